"""A backbone over the net: packed, signed, pulled over bad lines and from bad servers, whole or not at all."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from filelock import FileLock
from helpers import command, tiny_model

from fedgen_app.errors import BackboneError, FedgenError, LockedError, SettingsError
from fedgen_app.fleet import certificates, manifest
from fedgen_app.fleet.manifest import Manifest
from fedgen_app.fleet.pack import fingerprint_of, pack
from fedgen_app.fleet.pull import Installed, pull
from fedgen_app.fleet.source import Source

CHUNK = 4096
QUICK = (0.0,) * 4
Spoil = Callable[[str, bytes], bytes]


@dataclass
class Site:
    """A web server that can misbehave.

    Attributes:
        ranges: Whether it can send a part of a file.
        cut_after: It hangs up after so many bytes of an answer, `cuts` times.
        spoil: What it does to a file's content, by path.
        asked: How often each path was asked for, and from which byte.
    """

    root: Path
    ranges: bool = True
    cut_after: int = 0
    cuts: int = 0
    status: int = 0
    pace: float = 0.0
    spoil: Spoil = field(default=lambda path, content: content)
    asked: list[tuple[str, int]] = field(default_factory=list)
    sent: int = 0

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.lstrip("/")
        start = int(handler.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        self.asked.append((path, start))
        file = self.root / path
        if self.status or not file.is_file():
            handler.send_error(self.status or 404)
            return
        content = self.spoil(path, file.read_bytes())
        part = start > 0 and self.ranges
        if part and start >= len(content):
            handler.send_error(416)
            return
        handler.send_response(206 if part else 200)
        if part:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        body = content[start:] if part else content
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        cutting = self.cut_after and self.cuts and path.startswith("chunks/") and len(body) > self.cut_after
        if cutting:
            body, self.cuts = body[: self.cut_after], self.cuts - 1
        time.sleep(self.pace)
        handler.wfile.write(body)
        self.sent += len(body)
        if cutting:
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True


@contextmanager
def running(site: Site, context: ssl.SSLContext | None = None) -> Iterator[str]:
    """The site on a free port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            try:
                site.answer(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def log_message(self, *arguments: Any) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(OSError, ValueError):  # the connection that was cut
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http{'s' if context else ''}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, packed; its key lies beside it."""
    folder = tmp_path_factory.mktemp("packed")
    pack(tiny_model(), folder / "site", folder / "key", "language", CHUNK)
    return folder


@pytest.fixture
def site(packed: Path, tmp_path: Path) -> Site:
    shutil.copytree(packed / "site", tmp_path / "site")
    return Site(tmp_path / "site")


def fetch(url: str, to: Path, key: Path, **options: Any) -> Installed:
    with Source.open(url, options.pop("ca", None), QUICK) as source:
        return pull(source, to, key, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_nothing(to: Path) -> None:
    """Neither a folder nor a part of one under its name."""
    assert not to.exists()


def test_what_is_pulled_is_what_was_packed(site: Site, packed: Path, tmp_path: Path) -> None:
    with running(site) as url:
        installed = fetch(url, tmp_path / "models" / "tiny", packed / "key.pub")
        assert files(tmp_path / "models" / "tiny") == files(tiny_model())
        assert installed.manifest.fingerprint == fingerprint_of(tiny_model(), "language")
        assert installed.fetched == installed.manifest.total == sum(map(len, files(tiny_model()).values()))
        assert [path.name for path in (tmp_path / "models").iterdir() if not path.name.endswith(".lock")] == ["tiny"]
        site.asked.clear()
        again = fetch(url, tmp_path / "models" / "tiny", packed / "key.pub")
        assert again.was_there and again.fetched == 0
        assert [path for path, _ in site.asked] == ["manifest.json", "manifest.sig"]


def test_what_is_pulled_can_be_read_by_every_user(site: Site, packed: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with running(site) as url:
            fetch(url, tmp_path / "new" / "models" / "tiny", packed / "key.pub")
    finally:
        os.umask(before)
    for path in (tmp_path / "new").rglob("*"):
        if not path.name.startswith("."):
            assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o755


@pytest.mark.parametrize(("ranges", "cuts"), [(True, 10), (False, 4)])
def test_a_line_that_is_cut_again_and_again(ranges: bool, cuts: int, site: Site, packed: Path, tmp_path: Path) -> None:
    site.ranges, site.cut_after, site.cuts = ranges, 1500, cuts
    with running(site) as url:
        installed = fetch(url, tmp_path / "tiny", packed / "key.pub")
    assert site.cuts == 0 and files(tmp_path / "tiny") == files(tiny_model())
    resumed = [start for path, start in site.asked if path.startswith("chunks/") and start]
    assert resumed and all(start % 1500 == 0 for start in resumed)  # asked for, even where the server cannot
    over = installed.fetched - installed.manifest.total
    assert over == (0 if ranges else cuts * 1500)


def test_a_server_that_comes_back(site: Site, packed: Path, tmp_path: Path) -> None:
    site.status = 503
    with running(site) as url:
        with pytest.raises(BackboneError, match=r"manifest\.json: HTTP 503"):
            fetch(url, tmp_path / "tiny", packed / "key.pub")
        assert Counter(path for path, _ in site.asked) == {"manifest.json": 5}
        site.status = 0
        fetch(url, tmp_path / "tiny", packed / "key.pub")
    assert files(tmp_path / "tiny") == files(tiny_model())


def test_a_later_call_goes_on_where_the_first_gave_up(site: Site, packed: Path, tmp_path: Path) -> None:
    site.cut_after, site.ranges, site.cuts = 1500, False, 10**6
    lost = site.spoil

    def give_up(path: str, content: bytes) -> bytes:
        if path.startswith("chunks/") and len(site.asked) > 20:
            site.cuts = 10**6
        return lost(path, content)

    site.cuts, site.spoil = 0, give_up
    with running(site) as url:
        with pytest.raises(BackboneError, match="chunks/"):
            fetch(url, tmp_path / "tiny", packed / "key.pub")
        assert_nothing(tmp_path / "tiny")
        site.cuts, site.spoil, site.sent = 0, lost, 0
        second = fetch(url, tmp_path / "tiny", packed / "key.pub")
    assert files(tmp_path / "tiny") == files(tiny_model())
    assert second.manifest.total - second.fetched >= 10 * CHUNK


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on(site: Site, packed: Path, tmp_path: Path) -> None:
    site.pace = 0.05
    with running(site) as url:
        arguments = ["backbone", "pull", url, "--to", str(tmp_path / "tiny"), "--key", str(packed / "key.pub")]
        code = "import sys; from fedgen_app.cli import main; main()"
        with subprocess.Popen([sys.executable, "-c", code, *arguments]) as child:
            deadline = time.monotonic() + 60
            while sum(path.startswith("chunks/") for path, _ in site.asked) < 10:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            child.kill()
        assert_nothing(tmp_path / "tiny")
        site.pace = 0.0
        second = fetch(url, tmp_path / "tiny", packed / "key.pub")
    assert files(tmp_path / "tiny") == files(tiny_model())
    assert 0 < second.fetched <= second.manifest.total - 5 * CHUNK


def test_a_partial_download_is_not_trusted(site: Site, packed: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".tiny.partial"
    partial.mkdir()
    model = bytearray((tiny_model() / "model.safetensors").read_bytes())
    model[3 * CHUNK + 7] ^= 1
    (partial / "model.safetensors").write_bytes(bytes(model) + b"more")
    (partial / "evil.py").write_text("raise SystemExit")
    (partial / "config.json").symlink_to(tmp_path / "elsewhere")
    with running(site) as url:
        installed = fetch(url, tmp_path / "tiny", packed / "key.pub")
    assert files(tmp_path / "tiny") == files(tiny_model()) and not (tmp_path / "elsewhere").exists()
    assert installed.manifest.total - installed.fetched >= 3 * CHUNK


def flip(path: str, content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:] if path.startswith("chunks/") else content


SPOILT: dict[str, tuple[Spoil, str]] = {
    "wrong bytes": (flip, "other bytes than the manifest says, 3 times"),
    "chunks too long": (lambda p, c: c + b"x" if p.startswith("chunks/") else c, "other bytes than the manifest says"),
    "chunks without end": (lambda p, c: c * 1000 if p.startswith("chunks/") else c, "other bytes"),
    "chunks too short": (lambda p, c: c[:-1] if p.startswith("chunks/") else c, "ended too early|other bytes"),
    "empty chunks": (lambda p, c: b"" if p.startswith("chunks/") else c, "ended too early"),
    "an altered manifest": (
        lambda p, c: c.replace(b"model.s", b"modem.s") if p == "manifest.json" else c,
        "not signed",
    ),
    "a truncated manifest": (lambda p, c: c[: len(c) // 2] if p == "manifest.json" else c, "not signed"),
    "an endless manifest": (lambda p, c: c * 10000 if p == "manifest.json" else c, "manifest.json: larger than"),
    "an empty signature": (lambda p, c: b"" if p == "manifest.sig" else c, "not signed"),
    "a signature that is none": (lambda p, c: b"\xff\x00!" if p == "manifest.sig" else c, "not signed"),
    "another signature": (lambda p, c: b"A" * 86 + b"==" if p == "manifest.sig" else c, "not signed"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_server_that_lies_installs_nothing(what: str, site: Site, packed: Path, tmp_path: Path) -> None:
    site.spoil, said = SPOILT[what]
    with running(site) as url, pytest.raises(BackboneError, match=said):
        fetch(url, tmp_path / "tiny", packed / "key.pub")
    assert_nothing(tmp_path / "tiny")
    site.spoil = lambda path, content: content
    with running(site) as url:
        fetch(url, tmp_path / "tiny", packed / "key.pub")
    assert files(tmp_path / "tiny") == files(tiny_model())


def test_the_signature_of_another_key_is_refused(site: Site, tmp_path: Path) -> None:
    manifest.private_key(tmp_path / "other")
    with running(site) as url, pytest.raises(BackboneError, match="not signed with this key"):
        fetch(url, tmp_path / "tiny", tmp_path / "other.pub")
    assert_nothing(tmp_path / "tiny")


def resigned(site: Site, packed: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The manifest changed and signed with the right key: what an operator's tool could get wrong."""
    tree = json.loads((site.root / "manifest.json").read_bytes())
    change(tree)
    content = json.dumps(tree).encode()
    (site.root / "manifest.json").write_bytes(content)
    (site.root / "manifest.sig").write_bytes(manifest.sign(content, manifest.private_key(packed / "key")))


def renamed(path: str) -> Callable[[dict[str, Any]], object]:
    return lambda tree: tree["files"][0].update(path=path)


SIGNED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "upwards": (renamed("../evil.json"), "plain relative path"),
    "absolute": (renamed("/etc/evil.json"), "plain relative path"),
    "with a backslash": (renamed("..\\evil.json"), "plain relative path"),
    "hidden": (renamed(".evil.json"), "plain relative path"),
    "with a line end": (renamed("evil\n.json"), "plain relative path"),
    "too deep": (renamed("a/b/c/d/evil.json"), "plain relative path"),
    "a pickle": (renamed("pytorch_model.bin"), "should end in"),
    "a program": (renamed("modeling.py"), "should end in"),
    "another pickle": (renamed("weights.pt"), "should end in"),
    "one path twice": (lambda t: t["files"].append(t["files"][0]), "two files of one path"),
    "one path in two cases": (lambda t: t["files"].append(t["files"][0] | {"path": "CONFIG.json"}), "two files"),
    "a file that is a folder": (
        lambda t: t["files"].append(t["files"][0] | {"path": "config.json/x.json"}),
        "two files",
    ),
    "a size that is not the chunks'": (lambda t: t["files"][0].update(bytes=10**9), "size is not that of its chunks"),
    "a negative size": (lambda t: t["files"][0].update(bytes=-1), "greater than or equal to 0"),
    "a digest that is a path": (lambda t: t["files"][0].update(chunks=["../../x"]), "match pattern"),
    "tiny chunks": (lambda t: t.update(chunk_bytes=1), "greater than or equal to 4096"),
    "no files": (lambda t: t.update(files=[]), "at least 1 item"),
    "another version": (lambda t: t.update(version=2), "version"),
    "an unknown key": (lambda t: t.update(run="evil"), "Extra inputs"),
    "another fingerprint": (lambda t: t.update(fingerprint="sha256:" + "0" * 64), "fingerprint is sha256:"),
}


@pytest.mark.parametrize("what", SIGNED)
def test_a_signed_manifest_is_checked_all_the_same(what: str, site: Site, packed: Path, tmp_path: Path) -> None:
    change, said = SIGNED[what]
    resigned(site, packed, change)
    (tmp_path / "device").mkdir()
    with running(site) as url, pytest.raises(BackboneError, match=said):
        fetch(url, tmp_path / "device" / "tiny", packed / "key.pub")
    left = [path.name for path in tmp_path.rglob("*") if "evil" in path.name or path.name == "tiny"]
    assert left == []


def test_too_much_is_refused_before_anything_is_fetched(site: Site, packed: Path, tmp_path: Path) -> None:
    with running(site) as url:
        with pytest.raises(BackboneError, match=r"at most 1000 are taken"):
            fetch(url, tmp_path / "tiny", packed / "key.pub", most_bytes=1000)

        def enormous(tree: dict[str, Any]) -> None:
            size = 10**15
            chunks = ["0" * 64] * (size // (64 * 1024**2) + 1)
            tree.update(
                chunk_bytes=64 * 1024**2, files=[{"path": "a.safetensors", "bytes": size, "chunks": chunks[:9]}]
            )
            tree["files"][0]["bytes"] = 9 * 64 * 1024**2

        resigned(site, packed, enormous)
        usage = shutil.disk_usage(tmp_path)
        shutil_usage = type(usage)(usage.total, usage.used, 500_000_000)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fedgen_app.fleet.pull.shutil.disk_usage", lambda path: shutil_usage)
            with pytest.raises(BackboneError, match="500000000 bytes are free, 667979776 are needed"):
                fetch(url, tmp_path / "tiny", packed / "key.pub")
    assert not any(path.startswith("chunks/") for path, _ in site.asked)


def test_what_lies_there_is_not_lost(site: Site, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "mine.txt").write_text("mine")
    with running(site) as url:
        with pytest.raises(SettingsError, match="--replace"):
            fetch(url, tmp_path / "tiny", packed / "key.pub")
        site.spoil = flip
        with pytest.raises(BackboneError):
            fetch(url, tmp_path / "tiny", packed / "key.pub", replace=True)
        assert files(tmp_path / "tiny") == {"mine.txt": b"mine"}
        site.spoil = lambda path, content: content
        fetch(url, tmp_path / "tiny", packed / "key.pub", replace=True)
    assert files(tmp_path / "tiny") == files(tiny_model())


def test_two_at_once(site: Site, packed: Path, tmp_path: Path) -> None:
    with running(site) as url, FileLock(tmp_path / ".tiny.lock"), pytest.raises(LockedError):
        fetch(url, tmp_path / "tiny", packed / "key.pub")


def test_over_tls_with_an_authority_of_ones_own(site: Site, packed: Path, tmp_path: Path) -> None:
    ca_key, key = certificates.new_key(), certificates.new_key()
    ca = certificates.authority(ca_key, "test", 2)
    pem = tmp_path / "server.pem"
    pem.write_bytes(key + certificates.server_certificate(ca, ca_key, key, ["files.example.org"], 2))
    (tmp_path / "ca.crt").write_bytes(ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with running(site, context) as url:
        with pytest.raises(BackboneError, match="(?i)certificate verify failed"):
            fetch(url, tmp_path / "tiny", packed / "key.pub")
        fetch(url, tmp_path / "tiny", packed / "key.pub", ca=tmp_path / "ca.crt")
    assert files(tmp_path / "tiny") == files(tiny_model())


@pytest.mark.parametrize(
    "url", ["http://files.example.org/x", "ftp://127.0.0.1/x", "https:///x", "https://a:b@c/x", "https://c/x?y", "x"]
)
def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(SettingsError), Source.open(url, None):
        pass


def test_a_redirect_is_not_followed(site: Site, packed: Path, tmp_path: Path) -> None:
    site.status = 302
    with running(site) as url, pytest.raises(BackboneError, match="HTTP 302"):
        fetch(url, tmp_path / "tiny", packed / "key.pub")


def test_pack_takes_what_a_backbone_is_and_says_what_it_leaves(tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model(), tmp_path / "model")
    (model / "training_args.bin").write_bytes(b"x")
    (model / "modeling.py").write_text("x")
    (model / ".git").mkdir()
    (model / ".git" / "config.json").write_text("{}")
    ended = command(*("backbone", "pack", model), "--output", tmp_path / "site", "--key", tmp_path / "key")
    assert ended.status == 0, ended.err
    for name in ("training_args.bin", "modeling.py", ".git/config.json"):
        assert f"left out: {name}" in ended.out
    assert fingerprint_of(model, "language") in ended.out
    made = Manifest.model_validate_json((tmp_path / "site" / "manifest.json").read_bytes())
    assert {file.path for file in made.files} == set(files(tiny_model()))
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert not {path.read_bytes() for path in (tmp_path / "site").rglob("*") if path.is_file()} & {
        (tmp_path / "key").read_bytes()
    }
    key = (tmp_path / "key").read_bytes()
    again = command(*("backbone", "pack", model), "--output", tmp_path / "site", "--key", tmp_path / "key")
    assert again.status == 0 and (tmp_path / "key").read_bytes() == key


def test_pack_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    model = tiny_model()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "rsa").write_bytes(certificates.new_key())

    def refused(kind: type[FedgenError], said: str, *arguments: Any) -> None:
        with pytest.raises(kind, match=said):
            pack(*arguments)

    refused(SettingsError, "no such folder", tmp_path / "none", tmp_path / "o", tmp_path / "k", "language")
    refused(SettingsError, "is there and no packed", model, tmp_path / "full", tmp_path / "k", "language")
    refused(SettingsError, "beside the backbone", model, model / "site", tmp_path / "k", "language")
    refused(SettingsError, "should be Ed25519", model, tmp_path / "o", tmp_path / "rsa", "language")
    refused(SettingsError, "should be one of", model, tmp_path / "o", tmp_path / "k", "music")
    refused(BackboneError, "no .*weights|not|damaged", tmp_path / "full", tmp_path / "o", tmp_path / "k", "language")
    assert not (tmp_path / "o").exists()


def test_pack_looks_first_whether_devices_will_take_it(tmp_path: Path) -> None:
    spaced = shutil.copytree(tiny_model(), tmp_path / "My Model")
    ended = command("backbone", "pack", spaced, "--output", tmp_path / "o", "--key", tmp_path / "k")
    assert ended.status == 2 and "its name 'My Model' should be letters" in ended.err
    twice = shutil.copytree(tiny_model(), tmp_path / "twice")
    for name in ("a.md", "A.md"):
        (twice / name).write_text("a card")
    ended = command("backbone", "pack", twice, "--output", tmp_path / "o", "--key", tmp_path / "k")
    assert ended.status == 2 and "has two files of one path" in ended.err
    assert not (tmp_path / "o").exists() and not (tmp_path / "k").exists()


@pytest.mark.parametrize("chunks", [235_000, 300_000])
def test_pack_makes_no_manifest_that_pull_refuses(chunks: int, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model(), tmp_path / "model")
    with (model / "more.txt").open("wb") as stream:
        stream.truncate(chunks * 4096)  # a hole: it takes no disk
    with pytest.raises(SettingsError, match="more than 16 MiB"):
        pack(model, tmp_path / "o", tmp_path / "k", "language", 4096)
    assert not (tmp_path / "o").exists() and not (tmp_path / "k").exists()


def test_a_key_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for key in (tmp_path / "file" / "key", Path("/proc/none/key")):
        ended = command("backbone", "pack", tiny_model(), "--output", tmp_path / "o", "--key", key)
        assert ended.status == 2 and f"--key {key}: no key can be written there" in ended.err
    assert not (tmp_path / "o").exists()


def test_a_signature_is_for_manifests_alone() -> None:
    key = Ed25519PrivateKey.generate()
    with pytest.raises(BackboneError):
        manifest.verified(b"{}", base64.b64encode(key.sign(b"{}")), key.public_key())


def test_the_commands_tell_the_fingerprint(site: Site, packed: Path, tmp_path: Path) -> None:
    with running(site) as url:
        ended = command("backbone", "pull", url, "--to", tmp_path / "tiny", "--key", packed / "key.pub")
    shown = command("backbone", "fingerprint", tmp_path / "tiny").out.strip()
    assert ended.status == 0 and shown.startswith("sha256:") and f"fingerprint {shown}" in ended.out
    assert command("backbone", "pull", "https://x/y", "--to", "x", "--key", tmp_path / "none").status == 2
