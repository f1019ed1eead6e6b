"""A fleet's folder: what is refused, what each machine gets, what stays when it is made again."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.flower_config import parse_superlink_connection
from flwr.cli.supernode.register import try_load_public_key
from flwr.common.args import try_obtain_server_certificates
from flwr.common.config import parse_config_args
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode, _try_setup_client_authentication
from helpers import command

from fedgen_app.errors import SettingsError
from fedgen_app.federation.protection import read_key
from fedgen_app.fleet import certificates, checks, spec

FLEET = """
name = "clinic"
[server]
hosts = ["fleet.example.org", "192.0.2.7", "2001:db8::7"]
operators = ["10.0.0.5"]
[[device]]
id = "ward-7"
data = "/data/the texts"
backbone = "/models/smollm2"
rank = 4
memory = "4GB"
backbone-bits = 4
threads = 3
prompts = "/data/wishes.txt"
cluster-key = "/etc/fedgen/ward-7/cluster.key"
cluster-noise = 0.05
cluster-encoder = "/models/encoder"
host = "pi-1.local"
[[device]]
id = 12
data = "/data/texts"
warm = false
"""
BIN = Path(sys.executable).parent


def write(tmp_path: Path, text: str = FLEET) -> Path:
    file = tmp_path / "fleet.toml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The fleet's folder."""
    ended = command("provision", write(tmp_path), "--output", tmp_path / "out")
    assert ended.status == 0, ended.err
    return tmp_path / "out"


def again(made: Path, text: str = FLEET, *options: str) -> str:
    ended = command("provision", write(made.parent, text), "--output", made, *options)
    assert ended.status == 0, ended.err
    return ended.out


MISTAKES = {
    'hosts = ["https://x"]': r"server\.hosts\[0\] = 'https://x': should be a host name",
    'hosts = ["0.0.0.0"]': r"server\.hosts\[0\] = '0\.0\.0\.0': should be an address that devices can reach",
    'hosts = ["10.0.0.300"]': r"server\.hosts\[0\] = '10\.0\.0\.300'",
    "hosts = []": r"server\.hosts = \[\]",
    "hosts = ['a']\nport = 70000": r"server\.port = 70000: should be less than or equal to 65535",
    "hosts = ['a']\nport = '8443'": r"server\.port = '8443': should be a valid integer",
    "hosts = ['a']\ninsecure = true": r"server\.insecure = True: no such key",
    "hosts = ['a']\nproxy = false": r"server\.proxy = False: .*would be open on a",
    "hosts = ['a']\noperators = ['10.0.0.5/8']": r"server\.operators\[0\] = '10\.0\.0\.5/8': should be an IP address",
    "hosts = ['a']\noperators = ['fe80::1%x; allow all; #']": r"server\.operators\[0\] = .*without a scope",
    "hosts = ['fe80::1%$(id)']": r"server\.hosts\[0\] = 'fe80::1%\$\(id\)': should be an address without a scope",
    "hosts = ['a']\n[paths]\nenvironment = '/etc/fedgen/env'": r"paths\.environment = '/etc/fedgen/env': lies in",
    "hosts = ['a']\nport = 9091": r"server\.port = 9091: the SuperLink itself listens there",
}
DEVICE = {
    "id = 'a b'": r"device\[1\]\.id = 'a b': should be up to 64 letters",
    "id = '../x'": r"device\[1\]\.id = '\.\./x'",
    "id = 'Server'": r"device\[1\]\.id = 'Server': should not be 'server'",
    "id = 'A'": r"device\[1\]\.id = 'A': so is another device called \('a'\)",
    "data = 'texts'": r"device\[1\]\.data = 'texts': should be an absolute path",
    "data = '/a\\nb'": r"device\[1\]\.data = ",
    "data = '/var/lib/fedgen/a/d'": r"device\[1\]\.data = '/var/lib/fedgen/a/d': lies in /var/lib/fedgen, of which",
    "cluster-key = '/etc/fedgen/a/k'": r"device\[1\]\.cluster-key = '/etc/fedgen/a/k': lies in /etc/fedgen, of which",
    "backbone = './model'": r"device\[1\]\.backbone = '\./model': should be an absolute path",
    "memory = '4 gigs'": r"device\[1\]\.memory = '4 gigs': should be bytes, or a text such as '4GB'",
    "backbone-bits = 5": r"device\[1\]\.backbone-bits = 5: should be 0, 4 or 8",
    "threads = -1": r"device\[1\]\.threads = -1: should be greater than or equal to 0",
    "prompts = 'wishes.txt'": r"device\[1\]\.prompts = 'wishes\.txt': should be an absolute path",
    "cluster-key = './key'": r"device\[1\]\.cluster-key = '\./key': should be an absolute path",
    "cluster-noise = -0.1": r"device\[1\]\.cluster-noise = -0\.1: should be greater than or equal to 0",
    "cluster-encoder = '~/e'": r"device\[1\]\.cluster-encoder = '~/e': should be an absolute path",
    "rank = -1": r"device\[1\]\.rank = -1: should be greater than or equal to 0",
    "rank = true": r"device\[1\]\.rank = True: should be a valid integer",
    "warm = 'yes'": r"device\[1\]\.warm = 'yes': should be a valid boolean",
    "color = 'red'": r"device\[1\]\.color = 'red': no such key",
}


@pytest.mark.parametrize("server", MISTAKES)
def test_every_mistake_of_the_server_is_named(server: str, tmp_path: Path) -> None:
    file = write(tmp_path, f"[server]\n{server}\n[[device]]\nid = 'a'\ndata = '/d'\n")
    with pytest.raises(SettingsError, match=MISTAKES[server]):
        spec.read(file)


@pytest.mark.parametrize("line", DEVICE)
def test_every_mistake_of_a_device_is_named(line: str, tmp_path: Path) -> None:
    given = {"id": "id = 'b'", "data": "data = '/d'", line.split(" ")[0]: line.replace("\\n", "\\n")}
    second = "\n".join(given.values()).replace("'/a\\nb'", '"/a\\nb"')
    file = write(tmp_path, f"[server]\nhosts = ['s']\n[[device]]\nid = 'a'\ndata = '/d'\n[[device]]\n{second}\n")
    with pytest.raises(SettingsError, match=DEVICE[line]):
        spec.read(file)


def test_all_mistakes_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    text = "[server]\nhosts = ['a b']\nport = 0\n[paths]\nconfig = 'etc'\n[[device]]\ndata = 'x'\n"
    ended = command("provision", write(tmp_path, text), "--output", tmp_path / "out")
    assert ended.status == 2 and not (tmp_path / "out").exists()
    named = [f"{key}" for key in ("server.hosts[0]", "server.port", "paths.config", "device[0].id", "device[0].data")]
    assert [name for name in named if name not in ended.err] == []
    assert "device[0].id is missing" in ended.err


def test_devices_on_one_host_need_ports_of_their_own(tmp_path: Path) -> None:
    text = "[server]\nhosts=['s']\n" + "".join(f"[[device]]\nid='{i}'\ndata='/d'\nhost='pi'\n" for i in "ab")
    with pytest.raises(SettingsError, match=r"device\[1\]\.port = 9094: 'a' on pi has it too"):
        spec.read(write(tmp_path, text))


@contextmanager
def serving(folder: Path, name: str = "server") -> Iterator[int]:
    """A TLS server with the fleet's certificate on a free port of loopback."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / name / "server.crt", folder / name / "server.key")
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)

        def serve() -> None:
            while not stop.is_set():
                try:
                    with listener.accept()[0] as plain, context.wrap_socket(plain, server_side=True) as tls:
                        tls.recv(1)
                except (TimeoutError, OSError):  # a client that refuses us hangs up
                    continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            stop.set()
            thread.join()


def handshake(port: int, ca: Path, name: str) -> None:
    context = ssl.create_default_context(cafile=str(ca))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with (
        socket.create_connection(("127.0.0.1", port), 10) as plain,
        context.wrap_socket(plain, server_hostname=name) as tls,
    ):
        tls.send(b"x")


def test_the_certificate_serves_all_its_names_and_no_other(made: Path) -> None:
    ca = made / "devices" / "ward-7" / "ca.crt"
    with serving(made) as port:
        for name in ("fleet.example.org", "192.0.2.7", "2001:db8::7", "localhost", "127.0.0.1"):
            handshake(port, ca, name)
        for name in ("example.org", "192.0.2.8"):
            with pytest.raises(ssl.SSLCertVerificationError, match="mismatch|doesn't match"):
                handshake(port, ca, name)
        with pytest.raises(ssl.SSLCertVerificationError):
            context = ssl.create_default_context()
            with socket.create_connection(("127.0.0.1", port), 10) as plain:
                context.wrap_socket(plain, server_hostname="localhost")
        assert checks.server_days_left(f"127.0.0.1:{port}", ca) in (396, 397)


def test_another_fleets_server_is_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = command("provision", write(tmp_path), "--output", tmp_path / "rogue")
    assert ended.status == 0
    with serving(tmp_path / "rogue") as port:
        assert checks.main(["server", f"127.0.0.1:{port}", str(made / "devices" / "12" / "ca.crt")]) == 1
    assert "its certificate is refused" in capsys.readouterr().err
    assert checks.main(["server", f"127.0.0.1:{port}", str(made / "devices" / "12" / "ca.crt")]) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_openssl_agrees(made: Path) -> None:
    if not (openssl := shutil.which("openssl")):
        pytest.skip("no openssl here")
    arguments = ["verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", made / "ca" / "ca.crt"]
    ended = subprocess.run(
        [openssl, *arguments, "-verify_hostname", "fleet.example.org", made / "server" / "server.crt"],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr


def members(archive: Path) -> dict[str, tuple[bytes, int]]:
    with tarfile.open(archive) as tar:
        found = {}
        for entry in tar.getmembers():
            assert entry.isfile() and (entry.uid, entry.gid) == (0, 0)
            content = tar.extractfile(entry)
            assert content is not None
            found[entry.name] = (content.read(), entry.mode)
    return found


def test_an_archive_has_its_own_secrets_and_nobody_elses(made: Path) -> None:
    secrets = {
        "ca.key": (made / "ca" / "ca.key").read_bytes(),
        "server.key": (made / "server" / "server.key").read_bytes(),
        "superexec.secret": (made / "server" / "superexec.secret").read_bytes(),
        "ward-7": (made / "devices" / "ward-7" / "device.key").read_bytes(),
        "12": (made / "devices" / "12" / "device.key").read_bytes(),
    }
    allowed = {"server": {"server.key", "superexec.secret"}, "ward-7": {"ward-7"}, "12": {"12"}}
    for machine, own in allowed.items():
        archive = made / "server.tar" if machine == "server" else made / "devices" / f"{machine}.tar"
        inside = members(archive)
        everything = b"".join(content for content, _ in inside.values())
        # A key's first lines are the same for all keys: its whole body is what nobody else may have.
        assert {name for name, secret in secrets.items() if secret.strip() in everything} == own
        private = [name for name, (content, _) in inside.items() if b"PRIVATE KEY" in content]
        assert len(private) == 1
        assert {inside[name][1] for name in private} == {0o600}
        if machine != "server":
            other = {"ward-7": "12", "12": "ward-7"}[machine]
            assert f"/{other}/".encode() not in everything


def test_the_devices_common_key_is_made_once_and_never_goes_to_the_server(made: Path) -> None:
    assert not (made / "clusters").exists()
    again(made, "cluster-key = true\n" + FLEET)
    key = content(made, "clusters/cluster.key")
    inside = members(made / "devices" / "12.tar")
    assert inside["fedgen-12/cluster.key"] == (key, 0o600) and len(read_key(made / "clusters" / "cluster.key")) >= 32
    node = tomllib.loads(inside["fedgen-12/node.toml"][0].decode())
    assert node["cluster-key"] == "/etc/fedgen/12/cluster.key"
    # This one names a file of its own, which someone copied there.
    assert "fedgen-ward-7/cluster.key" not in members(made / "devices" / "ward-7.tar")
    assert key.strip() not in b"".join(file for file, _ in members(made / "server.tar").values())
    assert "install again" not in again(made, "cluster-key = true\n" + FLEET)
    assert content(made, "clusters/cluster.key") == key


def test_the_devices_common_key_can_be_made_anew_and_a_damaged_one_is_named(made: Path) -> None:
    text = "cluster-key = true\n" + FLEET
    again(made, text)
    key = content(made, "clusters/cluster.key")
    assert f"install again: {made}/devices/12.tar" in again(made, text, "--new-cluster-key")
    new = content(made, "clusters/cluster.key")
    assert new != key and members(made / "devices" / "12.tar")["fedgen-12/cluster.key"][0] == new
    (made / "clusters" / "cluster.key").write_text("short")
    ended = command("provision", write(made.parent, text), "--output", made)
    assert ended.status == 2 and "clusters/cluster.key: 5 bytes, should be" in ended.err
    ended = command("provision", write(made.parent), "--output", made, "--new-cluster-key")
    assert ended.status == 2 and "--new-cluster-key: the fleet file does not say cluster-key = true" in ended.err


def test_a_common_key_is_placed_where_the_fleet_has_one_and_never_from_an_older_archive(tmp_path: Path) -> None:
    made, key = local_fleet(tmp_path), tmp_path / "etc" / "12" / "cluster.key"
    fleet = (tmp_path / "fleet.toml").read_text()
    again(made, "cluster-key = true\n" + fleet)
    options = (tmp_path / "unpacked", "--files-only", "--offline")
    assert install(made, "12", *options).returncode == 0
    assert key.read_bytes() == content(made, "clusters/cluster.key") and stat.S_IMODE(key.stat().st_mode) == 0o600
    again(made, fleet)  # from now on someone copies one there
    key.write_text("another one, of which provisioning knows nothing")
    assert install(made, "12", *options).returncode == 0
    assert (tmp_path / "unpacked" / "fedgen-12" / "cluster.key").exists() and key.read_text().startswith("another")


def test_secrets_are_readable_for_their_owner_alone(made: Path) -> None:
    open_to_all = {"ca.crt", "server.crt", "nginx.conf"}
    for path in [made, *made.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode & 0o077 == 0, path
        elif path.stat().st_size and path.name not in open_to_all and path.suffix not in (".pub", ".sh", ".service"):
            assert mode & 0o177 == 0, path


def test_flower_reads_the_keys(made: Path) -> None:
    for device in ("ward-7", "12"):
        parsed = _parse_args_run_supernode().parse_args(
            ["--auth-supernode-private-key", str(made / "devices" / device / "device.key")]
        )
        keys = _try_setup_client_authentication(parsed)
        assert keys is not None and isinstance(keys[0].curve, ec.SECP384R1)
        public = made / "server" / "devices" / f"{device}.pub"
        assert try_load_public_key(public) == public_key_to_bytes(keys[1])
        assert public.read_text().endswith(f" {device}\n")


def started(script: Path, tmp_path: Path) -> list[str]:
    """The arguments that a start script gives to Flower's program: the program here is one that tells them."""
    return json.loads(subprocess.run([script], capture_output=True, text=True, check=True).stdout)


def local_fleet(tmp_path: Path) -> Path:
    """The same fleet installed below tmp_path, with programs that only say how they were called."""
    environment = tmp_path / "environment" / "bin"
    environment.mkdir(parents=True)
    (environment / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for name in ("flower-superlink", "flower-superexec", "fedgen-supernode", "fedgen"):
        (environment / name).write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    for name in ("flwr-serverapp", "flwr-clientapp", "flwr"):
        (environment / name).write_text("#!/bin/sh\n")
    for program in environment.iterdir():
        program.chmod(0o755)
    paths = f"[paths]\nconfig = '{tmp_path}/etc'\nstate = '{tmp_path}/var'\nenvironment = '{tmp_path}/environment'\n"
    ended = command("provision", write(tmp_path, FLEET + paths), "--output", tmp_path / "out")
    assert ended.status == 0, ended.err
    return tmp_path / "out"


def install(made: Path, machine: str, into: Path, *options: str) -> subprocess.CompletedProcess[str]:
    archive = made / "server.tar" if machine == "server" else made / "devices" / f"{machine}.tar"
    into.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "-xf", archive, "-C", into], check=True)
    script = into / f"fedgen-{machine}" / "install.sh"
    environment = os.environ | {"PYTHONPATH": str(Path(spec.__file__).parents[2])}
    return subprocess.run([script, *options], capture_output=True, text=True, env=environment)


def test_an_installed_device_starts_flower_as_flower_wants_it(tmp_path: Path) -> None:
    made = local_fleet(tmp_path)
    ended = install(made, "ward-7", tmp_path / "unpacked", "--files-only", "--offline")
    assert ended.returncode == 0, ended.stderr
    etc, var = tmp_path / "etc" / "ward-7", tmp_path / "var" / "ward-7"
    assert stat.S_IMODE(etc.stat().st_mode) == stat.S_IMODE(var.stat().st_mode) == 0o700
    assert stat.S_IMODE((etc / "device.key").stat().st_mode) == 0o600
    parsed = _parse_args_run_supernode().parse_args(started(etc / "supernode.sh", tmp_path))
    assert parsed.superlink == "fleet.example.org:8443" and not parsed.insecure and parsed.port == 9094
    assert parsed.root_certificates == str(etc / "ca.crt")
    assert _try_setup_client_authentication(parsed) is not None
    assert parse_config_args([parsed.node_config]) == {
        "client-id": "ward-7",
        "data": "/data/the texts",
        "backbone": "/models/smollm2",
        "rank": 4,
        "memory": 4_000_000_000,
        "backbone-bits": 4,
        "threads": 3,
        "prompts": "/data/wishes.txt",
        "cluster-key": "/etc/fedgen/ward-7/cluster.key",
        "cluster-noise": 0.05,
        "cluster-encoder": "/models/encoder",
        "state-dir": f"{var}/adapters",
        "policy": f"{etc}/policy.toml",
    }
    # The worker finds the SuperNode, and has the secret without which nobody gets its tasks.
    secret = var / "worker.secret"
    assert parsed.isolation == "process" and parsed.superexec_auth_secret_file == str(secret)
    assert len(secret.read_bytes()) == 48 and stat.S_IMODE(secret.stat().st_mode) == 0o600
    kept = secret.read_bytes()
    started(etc / "supernode.sh", tmp_path)
    assert secret.read_bytes() == kept
    asked = ["device-worker", "--runtime", "127.0.0.1:9094", "--secret", str(secret)]
    assert started(etc / "worker.sh", tmp_path) == [*asked, "--ca", parsed.ssl_ca_certfile]


def test_what_a_supernode_says_on_loopback_is_under_tls_whatever_the_clock_says(tmp_path: Path) -> None:
    made = local_fleet(tmp_path)
    assert install(made, "12", tmp_path / "unpacked", "--files-only", "--offline").returncode == 0
    seen = []
    for _ in range(2):
        script = tmp_path / "etc" / "12" / "supernode.sh"
        parsed = _parse_args_run_supernode().parse_args(started(script, tmp_path))
        authority, certificate, key = try_obtain_server_certificates(parsed) or (b"", b"", b"")
        assert certificates.belongs_to(certificate, key)
        assert stat.S_IMODE(Path(parsed.ssl_keyfile).stat().st_mode) == 0o600
        for year in (2001, 2090):
            assert certificates.days_left(certificate, datetime(year, 1, 1, tzinfo=UTC)) > 1000
        with serving(Path(parsed.ssl_keyfile).parent, "") as port:
            handshake(port, Path(parsed.ssl_ca_certfile), "127.0.0.1")
        seen.append((authority, certificate, key))
    assert not set(seen[0]) & set(seen[1])  # each start has its own


def test_a_device_may_have_no_worker_and_loses_the_one_that_it_had(tmp_path: Path) -> None:
    made = local_fleet(tmp_path)
    etc = tmp_path / "etc"
    for device in ("12", "ward-7"):
        assert install(made, device, tmp_path / "unpacked", "--files-only", "--offline").returncode == 0
    arguments = started(etc / "12" / "supernode.sh", tmp_path)
    assert "--isolation" not in arguments and not (tmp_path / "var" / "12" / "worker.secret").exists()
    assert not (etc / "12" / "worker.sh").exists() and (etc / "ward-7" / "worker.sh").exists()
    told = again(made, (tmp_path / "fleet.toml").read_text().replace("rank = 4", "rank = 4\nwarm = false"))
    assert f"install again: {made}/devices/ward-7.tar" in told
    assert not [p.name for p in (made / "devices" / "ward-7").iterdir() if "worker" in p.name]
    # Unpacked over the older archive, whose files are still there.
    assert install(made, "ward-7", tmp_path / "unpacked", "--files-only", "--offline").returncode == 0
    assert not (etc / "ward-7" / "worker.sh").exists()


def test_an_installed_server_starts_flower_as_flower_wants_it(tmp_path: Path) -> None:
    made = local_fleet(tmp_path)
    ended = install(made, "server", tmp_path / "unpacked", "--files-only")
    assert ended.returncode == 0, ended.stderr
    etc = tmp_path / "etc" / "server"
    parsed = _parse_args_run_superlink().parse_args(started(etc / "superlink.sh", tmp_path))
    assert (parsed.host, parsed.port) == ("127.0.0.1", 9091)
    assert not parsed.insecure and parsed.enable_supernode_auth and not parsed.runtime_dependency_install
    assert parsed.isolation == "process" and parsed.database == f"{tmp_path}/var/server/state.db"
    secret = Path(parsed.superexec_auth_secret_file).read_bytes()
    arguments = started(etc / "superexec.sh", tmp_path)
    assert arguments[:2] == ["--runtime-api-address", "127.0.0.1:9091"] and "--insecure" not in arguments
    assert Path(arguments[arguments.index("--superexec-auth-secret-file") + 1]).read_bytes() == secret
    assert len(secret) == 48
    home = tmp_path / "var" / "server" / "flower" / "config.toml"
    entry = tomllib.loads(home.read_text())["superlink"]["clinic"]
    assert parse_superlink_connection(entry, "clinic").address == "127.0.0.1:9091"
    assert entry["root-certificates"] == str(etc / "ca.crt")
    assert sorted(path.name for path in (etc / "devices").iterdir()) == ["12.pub", "ward-7.pub"]


def test_install_scripts_check_their_steps(tmp_path: Path) -> None:
    made = local_fleet(tmp_path)
    unpacked, etc = tmp_path / "unpacked", tmp_path / "etc" / "12"

    def failing(*options: str) -> str:
        ended = install(made, "12", unpacked, "--files-only", *options)
        assert ended.returncode == 1
        return ended.stderr

    assert "--fast: no such option" in failing("--fast")
    assert "fleet.example.org:8443: cannot be reached" in failing()
    (etc / "policy.toml").write_text("max-epochs = -1\n")
    assert "max-epochs = -1" in failing("--offline")
    (etc / "policy.toml").write_text("max-epochs = 1\n")
    assert install(made, "12", unpacked, "--files-only", "--offline").returncode == 0
    assert (etc / "policy.toml").read_text() == "max-epochs = 1\n"
    (tmp_path / "environment" / "bin" / "flwr-clientapp").unlink()
    assert "flwr-clientapp is missing" in failing("--offline")
    (tmp_path / "environment" / "bin" / "python").write_text("#!/bin/sh\necho 0.0.1\n")
    assert "has fedgen-edge 0.0.1, the fleet has" in failing("--offline")
    (tmp_path / "environment" / "bin" / "python").unlink()
    assert "python3 -m venv" in failing("--offline")


@pytest.mark.parametrize("beside", ["fedgen-12", "."])
def test_a_wheel_beside_the_installer_is_installed_where_the_version_is_missing(beside: str, tmp_path: Path) -> None:
    made, unpacked, programs = local_fleet(tmp_path), tmp_path / "unpacked", tmp_path / "environment" / "bin"
    python = programs / "python"
    python.rename(programs / "real")
    python.write_text("#!/bin/sh\nexit 1\n")
    (programs / "pip").write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/pip.log\nmv {programs}/real {python}\n')
    for program in (python, programs / "pip"):
        program.chmod(0o755)
    without = install(made, "12", unpacked, "--files-only", "--offline")
    wheel = f"fedgen_edge-{version('fedgen-edge')}-py3-none-any.whl"
    assert without.returncode == 1 and f"is not installed in {tmp_path}/environment: lay {wheel}" in without.stderr
    (unpacked / beside / wheel).write_bytes(b"")
    assert install(made, "12", unpacked, "--files-only", "--offline").returncode == 0
    assert (tmp_path / "pip.log").read_text().split()[0] == "install"
    assert Path((tmp_path / "pip.log").read_text().split()[1]).resolve() == unpacked / beside / wheel


def test_a_device_is_told_which_file_its_user_cannot_read(capsys: pytest.CaptureFixture[str]) -> None:
    nobody = 65534
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        folder.chmod(0o755)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text("x")
        (folder / "config.json").chmod(0o644)
        (folder / "model.safetensors").chmod(0o600 if os.geteuid() == 0 else 0o200)
        before = os.geteuid()
        if before == 0:
            os.seteuid(nobody)
        try:
            assert checks.main(["readable", place]) == 1
        finally:
            os.seteuid(before)
        assert f"{folder}/model.safetensors: Permission denied" in capsys.readouterr().err
        (folder / "model.safetensors").chmod(0o644)
        assert checks.main(["readable", place]) == 0


def test_the_installer_lets_the_services_user_try_what_is_read(made: Path) -> None:
    tried = 'runuser -u "$user" -- "$python" -P -m fedgen_app.fleet.checks readable "$path"'
    read = {"ward-7": "'/data/the texts' /models/smollm2 /data/wishes.txt /models/encoder", "12": "/data/texts"}
    for device, paths in read.items():
        script = (made / "devices" / device / "install.sh").read_text()
        assert f"    for path in {paths}; do\n" in script and tried in script


def test_systemd_takes_the_units(made: Path, tmp_path: Path) -> None:
    units = sorted(made.rglob("*.service"))
    assert len(units) == 5
    worker = (made / "devices" / "ward-7" / "fedgen-worker-ward-7.service").read_text()
    assert "BindReadOnlyPaths=/dev/null:/etc/fedgen/ward-7/device.key\n" in worker and "IPAddressDeny=any\n" in worker
    assert "PrivateUsers=yes\n" in worker
    for key, place in (("backbone", "/models/smollm2"), ("cluster-encoder", "/models/encoder")):
        hub = again(made, FLEET.replace(f'{key} = "{place}"', f'{key} = "org/model"'))
        assert "ward-7.tar" in hub
        assert "IPAddressDeny" not in (made / "devices" / "ward-7" / "fedgen-worker-ward-7.service").read_text()
    node = (made / "devices" / "ward-7" / "fedgen-supernode-ward-7.service").read_text()
    assert (
        "RestartSec=70\n" in node and "Restart=always\n" in node and f"MemoryMax={4_000_000_000 + 2 * 1024**3}" in node
    )
    for unit in units:
        assert "NoNewPrivileges=yes" in unit.read_text() and "ProtectSystem=strict" in unit.read_text()
    if not (analyze := shutil.which("systemd-analyze")):
        pytest.skip("no systemd-analyze here")
    for unit in units:
        # The program and the user are not on this machine; everything else is checked.
        copy = tmp_path / unit.name
        lines = unit.read_text().splitlines()
        copy.write_text("\n".join("ExecStart=/bin/true" if x.startswith("ExecStart") else x for x in lines) + "\n")
        ended = subprocess.run([analyze, "verify", "--man=no", copy], capture_output=True, text=True)
        mine = [
            line for line in ended.stderr.splitlines() if unit.name in line and "fedgen-superlink.service" not in line
        ]
        assert mine == [], ended.stderr


def test_another_user_namespace_keeps_the_worker_out_of_the_supernode() -> None:
    """What PrivateUsers=yes of the worker's service rests on: the same user, and no look through /proc."""
    if not (unshare := shutil.which("unshare")) or subprocess.run([unshare, "--user", "true"]).returncode:
        pytest.skip("no user namespaces here")
    with subprocess.Popen(["sleep", "60"]) as other:
        look = ["ls", f"/proc/{other.pid}/root/etc"]
        allowed = subprocess.run(look, capture_output=True).returncode
        refused = subprocess.run([unshare, "--user", *look], capture_output=True).returncode
        other.kill()
    assert allowed == 0 and refused != 0


def test_a_device_that_left_is_not_installed_again_from_an_older_archive(tmp_path: Path) -> None:
    made = local_fleet(tmp_path)
    assert install(made, "server", tmp_path / "unpacked", "--files-only").returncode == 0
    again(made, (tmp_path / "fleet.toml").read_text().replace('id = "ward-7"', 'id = "ward-8"'))
    devices = tmp_path / "etc" / "server" / "devices"

    def installed() -> list[str]:
        return sorted(path.name for path in devices.iterdir())

    # An installation that stops before it is done takes no key away: `fedgen register` would unregister its device.
    (devices / "ward-8.pub.new").mkdir()
    assert install(made, "server", tmp_path / "unpacked", "--files-only").returncode != 0
    assert installed() == ["12.pub", "ward-7.pub", "ward-8.pub.new"]
    shutil.rmtree(devices / "ward-8.pub.new")
    assert install(made, "server", tmp_path / "unpacked", "--files-only").returncode == 0
    assert (tmp_path / "unpacked" / "fedgen-server" / "devices" / "ward-7.pub").exists()
    assert installed() == ["12.pub", "ward-8.pub"]


def content(made: Path, relative: str) -> bytes:
    return (made / relative).read_bytes()


def test_the_same_again_changes_nothing(made: Path) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    assert "install again" not in again(made)
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before


def test_devices_come_and_go_and_the_others_keep_their_keys(made: Path) -> None:
    kept = content(made, "devices/12/device.key")
    text = FLEET.replace("ward-7", "ward-8")
    told = again(made, text)
    assert "devices new: ward-8" in told and "devices kept: 12" in told and "devices removed: ward-7" in told
    assert content(made, "devices/12/device.key") == kept
    assert sorted(path.name for path in (made / "devices").iterdir()) == ["12", "12.tar", "ward-8", "ward-8.tar"]
    assert {name for name in members(made / "server.tar") if name.endswith(".pub")} == {
        "fedgen-server/devices/12.pub",
        "fedgen-server/devices/ward-8.pub",
    }
    assert "install again: " + str(made / "devices" / "12") not in told


def test_an_authority_without_its_key_signs_nothing_and_no_other_takes_its_place(made: Path) -> None:
    (made / "ca" / "ca.key").unlink()
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    assert "install again" not in again(made)  # nothing has to be signed
    for text, options in ((FLEET, ["--renew"]), (FLEET.replace("192.0.2.7", "192.0.2.8"), [])):
        ended = command("provision", write(made.parent, text), "--output", made, *options)
        assert ended.status == 2 and f"{made}/ca/ca.key: is missing beside ca.crt" in ended.err
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before


def test_what_register_noted_in_the_servers_folder_stays(made: Path) -> None:
    noted = {"server/registered.json": b'{"ward-7": {"node": "1", "key": "k"}}', "server/.lock": b""}
    for name, there in (noted | {"server/old.txt": b"of an older version"}).items():
        (made / name).write_bytes(there)
    again(made, FLEET.replace("ward-7", "ward-8"))
    assert {name: content(made, name) for name in noted} == noted
    assert not (made / "server" / "old.txt").exists()
    assert not [name for name in members(made / "server.tar") if name.endswith(("registered.json", ".lock"))]


def test_renewing_gives_the_server_another_certificate_that_devices_still_trust(made: Path) -> None:
    before = {name: content(made, name) for name in ("server/server.crt", "server/server.key", "ca/ca.crt")}
    device, secret = content(made, "devices/12.tar"), content(made, "server/superexec.secret")
    told = again(made, FLEET, "--renew")
    assert "server certificate: 396 days left (new: --renew)" in told or "397 days left (new: --renew)" in told
    assert content(made, "server/server.crt") != before["server/server.crt"]
    assert content(made, "server/server.key") != before["server/server.key"]
    assert content(made, "server/superexec.secret") != secret
    assert content(made, "ca/ca.crt") == before["ca/ca.crt"] and content(made, "devices/12.tar") == device
    with serving(made) as port:
        handshake(port, made / "devices" / "12" / "ca.crt", "fleet.example.org")


def test_an_authority_that_ends_first_is_renewed_and_old_devices_still_trust_it(tmp_path: Path) -> None:
    short = FLEET + "[certificates]\nca-days = 20\nserver-days = 397\n"
    out = tmp_path / "out"
    told = command("provision", write(tmp_path, short), "--output", out).out
    assert "authority: 19 days left" in told and "--renew" in told
    assert certificates.days_left(content(out, "server/server.crt")) <= 20
    old = tmp_path / "old-ca.crt"
    old.write_bytes(content(out, "devices/12/ca.crt"))
    told = again(out, short.replace("ca-days = 20", "ca-days = 3650"), "--renew")
    assert "authority: 3649 days left (new: --renew)" in told and f"install again: {out}/devices/12.tar" in told
    assert content(out, "devices/12/ca.crt") != old.read_bytes()
    with serving(out) as port:
        handshake(port, old, "fleet.example.org")
        handshake(port, out / "devices" / "12" / "ca.crt", "fleet.example.org")


def test_an_expired_certificate_is_refused_and_told(tmp_path: Path, made: Path) -> None:
    ca, key = content(made, "ca/ca.crt"), content(made, "server/server.key")
    past = datetime.now(UTC) - timedelta(days=5)
    expired = certificates.server_certificate(ca, content(made, "ca/ca.key"), key, ["fleet.example.org"], 3, past)
    assert certificates.days_left(expired) == -3
    (made / "server" / "server.crt").write_bytes(expired)
    with serving(made) as port, pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(port, made / "ca" / "ca.crt", "fleet.example.org")


@pytest.mark.parametrize("part", ["server.key", "server.crt"])
def test_a_certificate_that_is_not_for_its_key_is_made_anew(part: str, made: Path) -> None:
    """As a renewal leaves it that is ended between the two files."""
    before = {name: content(made, f"server/{name}") for name in ("server.key", "server.crt", "superexec.secret")}
    again(made, FLEET, "--renew")
    renewed = content(made, f"server/{part}")
    for name, old in before.items():
        if name != part:
            (made / "server" / name).write_bytes(old)
    for damaged in (renewed, b"none"):
        (made / "server" / part).write_bytes(damaged)
        assert "(new: it was damaged, or not for its key)" in again(made)
        assert content(made, "server/superexec.secret") == before["superexec.secret"]
        with serving(made) as port:
            handshake(port, made / "ca" / "ca.crt", "fleet.example.org")
    (made / "ca" / "ca.key").write_text("none")
    ended = command("provision", write(made.parent), "--output", made, "--renew")
    assert ended.status == 2 and "ca/ca.key: damaged" in ended.err


def test_another_name_means_another_certificate(made: Path) -> None:
    told = again(made, FLEET.replace('"192.0.2.7"', '"192.0.2.9"'))
    assert "new: server.hosts changed" in told
    assert "192.0.2.9" in certificates.hosts_of(content(made, "server/server.crt"))


def test_one_device_can_have_another_key(made: Path) -> None:
    keys = {device: content(made, f"devices/{device}/device.key") for device in ("ward-7", "12")}
    assert "devices with a new key: ward-7" in again(made, FLEET, "--new-key", "ward-7")
    assert content(made, "devices/ward-7/device.key") != keys["ward-7"]
    assert content(made, "devices/12/device.key") == keys["12"]
    ended = command("provision", write(made.parent), "--output", made, "--new-key", "nobody")
    assert ended.status == 2 and "--new-key nobody: no such device" in ended.err


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda out: (out / "fleet.json").unlink(), "is not empty and holds no fleet"),
        (lambda out: (out / "fleet.json").write_text("{"), "damaged"),
        (lambda out: (out / "devices" / "12" / "device.key").write_text("x"), "key of device 12 is damaged"),
        (lambda out: (out / "ca" / "ca.crt").write_text("x"), "ca/ca.crt: damaged"),
    ],
)
def test_a_folder_that_is_not_as_it_was_is_refused(made: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(made)
    ended = command("provision", write(made.parent), "--output", made)
    assert ended.status == 2 and said in ended.err


def test_the_fleet_of_another_name_is_left_alone(made: Path) -> None:
    ended = command("provision", write(made.parent, FLEET.replace("clinic", "other")), "--output", made)
    assert ended.status == 2 and "holds the fleet 'clinic'" in ended.err


def test_an_operator_elsewhere_gets_a_connection(made: Path) -> None:
    entry = tomllib.loads((made / "operator" / "config.toml").read_text())["superlink"]["clinic"]
    assert entry["address"] == "fleet.example.org:8443" and Path(entry["root-certificates"]).is_file()
    again(made, FLEET.replace('operators = ["10.0.0.5"]', ""))
    assert not (made / "operator").exists()


def test_nothing_is_ever_insecure(made: Path) -> None:
    written = [path.read_bytes() for path in made.rglob("*") if path.is_file()]
    assert len(written) > 25
    assert [text for text in written if b"--insecure" in text or b"insecure =" in text or b"@{" in text] == []
