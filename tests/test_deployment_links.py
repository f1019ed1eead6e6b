"""A real fleet among strangers and over bad links: who is let in, what gets through, what an eavesdropper sees."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fleets import NGINX, Fleet, environment, lost, record, rejected, whole
from helpers import make_llama, write_records
from links import Capture, Link, plain_echo

from fedgen_app.engines.keeper import free_port
from fedgen_app.fleet import certificates

pytestmark = pytest.mark.deployment
CANARY = "xylophone-7391"


def altered(script: Path, name: str, *changes: tuple[str, str]) -> Path:
    """A copy of a start script that differs in some places."""
    text = script.read_text(encoding="utf-8")
    for pattern, new in changes:
        text, count = re.subn(pattern, new, text)
        assert count, pattern
    copy = script.with_name(name)
    copy.write_text(text, encoding="utf-8")
    copy.chmod(0o755)
    return copy


def refused(fleet: Fleet, script: Path, reason: str, seconds: float = 150) -> float:
    """How soon a SuperNode gives up, in seconds; what it says of it is a pattern."""
    began, log = time.monotonic(), fleet.folder / f"{script.stem}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [script], env=environment(fleet.folder), stdout=output, stderr=output, start_new_session=True
        )
    try:
        assert process.wait(seconds)
        took, said = time.monotonic() - began, re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
        assert re.search(reason, said) and "Exit Code: 305" in said and "SuperNode ID" not in said, said
        return took
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def stranger(fleet: Fleet, name: str, *changes: tuple[str, str]) -> Path:
    """The start script of a SuperNode beside those of device ant, on a port of its own, without a worker."""
    script = fleet.folder / "etc" / "ant" / "supernode.sh"
    return altered(script, f"{name}.sh", (r"--port \d+", f"--port {free_port()}"), *changes)


def test_a_rogue_key_is_refused(fleet: Fleet) -> None:
    key = fleet.folder / "rogue.key"
    key.write_bytes(certificates.new_device_key())
    script = stranger(fleet, "rogue", (r'"[^"]*/device\.key"', f'"{key}"'))
    seconds = refused(fleet, script, r"\[code: 2004\] Failed to activate SuperNode")
    record("a rogue key", "refused by the SuperLink; the SuperNode ended", seconds)


def test_no_key_is_refused(fleet: Fleet) -> None:
    line = r'--auth-supernode-private-key "[^"]*" \\\n'
    reason = r"\[code: 2001\] SuperNode authentication is enabled"
    seconds = refused(fleet, stranger(fleet, "keyless", (line, "")), reason)
    record("no key", "refused by the SuperLink; the SuperNode ended", seconds)


@contextmanager
def expired_server(fleet: Fleet) -> Iterator[int]:
    """A server with a certificate of the fleet's own authority that ended yesterday."""
    ca, key = ((fleet.folder / "out" / "ca" / name).read_bytes() for name in ("ca.crt", "ca.key"))
    own, past = certificates.new_key(), datetime.now(UTC) - timedelta(days=5)
    made = certificates.server_certificate(ca, key, own, ["localhost"], 3, past)
    (fleet.folder / "expired.pem").write_bytes(made + own)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(fleet.folder / "expired.pem")
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)

        def serve() -> None:
            while not stop.is_set():
                try:
                    with listener.accept()[0] as plain, context.wrap_socket(plain, server_side=True):
                        pass
                except OSError:  # whoever refuses the certificate hangs up
                    continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            stop.set()
            thread.join()


def test_an_expired_certificate_is_refused(fleet: Fleet) -> None:
    with expired_server(fleet) as port:
        address = (r'--superlink "[^"]*"', f'--superlink "localhost:{port}"')
        seconds = refused(fleet, stranger(fleet, "expired", address), "certificate has expired")
    record("an expired certificate of the server", "refused by the device; the SuperNode ended", seconds)


def test_plain_text_to_the_tls_port(fleet: Fleet) -> None:
    port = fleet.ports[0] if NGINX else fleet.ports[1]
    began = time.monotonic()
    plain = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        plain.request("POST", "/v1/fleet/pull-messages", b"x")
        answer = str(plain.getresponse().status)
        assert answer == "400"
    except (http.client.HTTPException, OSError):  # the SuperLink itself hangs up
        answer = "a closed connection"
    finally:
        plain.close()
    record("plain text to the TLS port", f"answered with {answer}", time.monotonic() - began)


def test_another_backbone_and_a_policy_that_says_no(fleet: Fleet) -> None:
    other = make_llama(fleet.folder / "other-llama", seed=5)
    node = fleet.folder / "etc" / "cat" / "node.toml"
    policy = fleet.folder / "etc" / "bee" / "policy.toml"
    before = node.read_text(), policy.read_text()
    node.write_text(re.sub(r'"backbone" = ".*"', f'"backbone" = "{other}"', before[0]))
    policy.write_text("max-epochs = 0\n")
    fleet.stop("cat/supernode.sh")
    try:
        time.sleep(1)
        fleet.start("cat/supernode.sh")
        began = time.monotonic()
        run = fleet.submit(num_server_rounds=1)
        status, found = run.ends()
        seconds = time.monotonic() - began
    finally:
        node.write_text(before[0])
        policy.write_text(before[1])
        fleet.stop("cat/supernode.sh")
        fleet.start("cat/supernode.sh")
    assert status == 0, run.said()
    whole(found, 1)
    assert sorted(entry["reason"] for entry in found["left_out"]) == ["fingerprint", "policy"]
    assert found["rounds"][0]["clients"] == ["ant"]
    happened = "both left out at the roll call, with the reason; the run completed with the others"
    record("another backbone; a policy that says no", happened, seconds)


def test_a_slow_link_that_is_cut_ten_times(fleet: Fleet) -> None:
    assert NGINX, "needs nginx (FEDGEN_NGINX)"
    with Link(fleet.ports[0], rate=64_000, cut_after=40_000, cuts=10) as link:
        script = fleet.folder / "etc" / "cat" / "supernode.sh"
        whole_script = script.read_text(encoding="utf-8")
        address = rf'--superlink "localhost:{link.port}"'
        fleet.stop("cat/supernode.sh")
        altered(script, "supernode.sh", (r'--superlink "[^"]*"', address))
        try:
            fleet.start("cat/supernode.sh")
            began = time.monotonic()
            run = fleet.submit(num_server_rounds=4, lora__rank=32, lora__alpha=32.0, round__deadline=300)
            status, found = run.ends(600)
            seconds = time.monotonic() - began
        finally:
            fleet.stop("cat/supernode.sh")
            script.write_text(whole_script, encoding="utf-8")
            fleet.start("cat/supernode.sh")
        cuts, passed, last_cut = link.cuts, link.passed, link.last_cut
    assert status == 0, run.said()
    whole(found, 4)
    failed = rejected(found, "cat")
    assert cuts == 10 and {reason for _, reason in failed} <= {"error", "timeout"}
    ends = run.events("round")
    undisturbed = [r for before, r in zip(ends, ends[1:], strict=False) if before["time"] > last_cut]
    assert undisturbed and all("cat" in r["clients"] for r in undisturbed)
    happened = f"{cuts} cuts, {passed / 1e3:.0f} kB; the device was admitted in {4 - len(failed)} of 4 rounds"
    record("a link of 64 kB/s, cut ten times", f"{happened}; run completed", seconds, lost(len(failed)))


def test_a_full_disk_on_a_device(fleet: Fleet) -> None:
    adapters = fleet.folder / "var" / "bee" / "adapters"
    adapters.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", adapters], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        (adapters / "filler").write_bytes(b"x" * 60 * 1024)
        began = time.monotonic()
        run = fleet.submit(num_server_rounds=3)
        run.reaches(1)
        first = time.monotonic() - began
        (adapters / "filler").unlink()
        status, found = run.ends()
        log = (fleet.folder / "bee-worker.log").read_text(errors="replace")
        left = [p.name for p in adapters.rglob("state/*") if p.suffix != ".safetensors"]
    finally:
        subprocess.run(["umount", "-l", adapters], check=True)
    assert status == 0, run.said()
    whole(found, 3)
    assert "bee" not in found["rounds"][0]["clients"] and found["rounds"][2]["clients"] == ["ant", "bee", "cat"]
    assert "No space left" in log and "No space left" not in run.said() and not left
    happened = "error code while full, reason in the device's log alone; took part again once there was room"
    record("a full disk on a device", happened, first, lost(len(rejected(found, "bee"))))


def test_an_eavesdropper_sees_no_text_and_no_path(fleet: Fleet) -> None:
    if os.geteuid() != 0:
        pytest.skip("a capture needs root")
    servers = (fleet.ports[0], fleet.ports[1]) if NGINX else (fleet.ports[1],)
    ports = (*servers, *fleet.device_ports)
    data = fleet.folder / "data" / "ant"
    kept = (data / "train.jsonl").read_bytes()
    write_records(data / "train.jsonl", {"sea": 6}, seed=3)
    with (data / "train.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(f'{{"text": "the {CANARY} and the crew set sail {i}", "label": "sea"}}\n' for i in range(8))
    (data / "prompts.txt").write_text(f"tell me of the {CANARY}\n", encoding="utf-8")
    began = time.monotonic()
    with plain_echo() as plain, Capture(*ports, plain) as capture:
        with socket.create_connection(("127.0.0.1", plain)) as clear:
            clear.sendall(CANARY.encode())
        run = fleet.submit(num_server_rounds=2, samples__prompts=f"once the {CANARY}")
        status, _ = run.ends()
    seconds = time.monotonic() - began
    (data / "train.jsonl").write_bytes(kept)
    (data / "prompts.txt").unlink()
    assert status == 0, run.said()
    assert capture.shows(plain, CANARY.encode())  # it would have been seen
    texts = (CANARY, str(fleet.folder), str(data), "train.jsonl", "word_perplexity", "the crew")
    for port in ports:
        assert len(capture.seen[port]) > 50_000
        assert [text for text in texts if capture.shows(port, text.encode())] == []
    count = sum(len(capture.seen[port]) for port in ports)
    happened = (
        f"{capture.packets} packets, {count / 1e6:.1f} MB on the ports of nginx, of the SuperLink and of the three"
    )
    happened += " SuperNodes: no text, no path"
    record("a packet capture on loopback", happened, seconds)


def test_after_all_this_the_fleet_is_whole(fleet: Fleet) -> None:
    run = fleet.submit(num_server_rounds=1)
    status, found = run.ends()
    assert status == 0, run.said()
    assert found["rounds"][0]["clients"] == ["ant", "bee", "cat"]
