"""What tests of a fleet share: a fleet on this machine, its services without systemd, nginx as provisioned."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from helpers import FEDGEN, ROOT, tiny_model, write_records

from fedgen_app.engines.keeper import free_port

NGINX = os.environ.get("FEDGEN_NGINX") or shutil.which("nginx")


@contextlib.contextmanager
def nginx(folder: Path, configuration: Path, port: int) -> Iterator[None]:
    """nginx with a provisioned configuration, its own files in `folder`."""
    conf = configuration.read_text(encoding="utf-8")
    if not Path("/proc/net/if_inet6").exists():
        conf = "\n".join(line for line in conf.splitlines() if "listen [::]" not in line)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log;\nevents {{}}\n"
        f"http {{ access_log {folder}/access.log;\n{temporary}{conf}\n}}\n"
    )
    assert NGINX
    process = subprocess.Popen([NGINX, "-p", folder, "-c", folder / "nginx.conf"], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None and time.monotonic() < deadline, (folder / "error.log").read_text()
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()


MARKER = "FEDGEN_SIMULATION"


def fleet_file(folder: Path, devices: tuple[str, ...], ports: tuple[int, int]) -> Path:
    """Devices on this machine, behind nginx where there is one."""
    proxy = f"port = {ports[0]}\nsuperlink-port = {ports[1]}\nproxy = {str(bool(NGINX)).lower()}\n"
    paths = f"config = '{folder}/etc'\nstate = '{folder}/var'\nenvironment = '{Path(sys.executable).parents[1]}'\n"
    text = f"name = 'clinic'\n[server]\nhosts = ['localhost']\n{proxy}[paths]\n{paths}"
    for device in devices:
        data = folder / "data" / device
        data.mkdir(parents=True, exist_ok=True)
        write_records(data / "train.jsonl", {"sea": 12, "law": 8}, seed=len(device))
        text += f"[[device]]\nid = '{device}'\ndata = '{data}'\nbackbone = '{tiny_model()}'\nport = {free_port()}\n"
    (folder / "fleet.toml").write_text(text, encoding="utf-8")
    return folder / "fleet.toml"


def install(folder: Path, machine: str) -> None:
    archive = folder / "out" / ("server.tar" if machine == "server" else f"devices/{machine}.tar")
    (folder / "unpacked").mkdir(exist_ok=True)
    subprocess.run(["tar", "-xf", archive, "-C", folder / "unpacked"], check=True)
    script = folder / "unpacked" / f"fedgen-{machine}" / "install.sh"
    offline = [] if machine == "server" else ["--offline"]
    ended = subprocess.run([script, "--files-only", *offline], capture_output=True, text=True, env=environment(folder))
    assert ended.returncode == 0, ended.stderr


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "FLWR_HOME": str(folder / "var" / "server" / "flower"),
        "OMP_NUM_THREADS": "1",
        MARKER: str(folder),
    }


@contextlib.contextmanager
def service(folder: Path, script: str) -> Iterator[subprocess.Popen[bytes]]:
    """What a unit starts, without systemd; ended as systemd ends it."""
    path = folder / "etc" / script
    with (folder / f"{path.parent.name}-{path.stem}.log").open("wb") as log:
        process = subprocess.Popen([path], stdout=log, stderr=log, env=environment(folder), start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def until(condition: Callable[[], bool], seconds: float, folder: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        logs = {log.name: log.read_text(errors="replace")[-1500:] for log in folder.glob("*.log")}
        assert time.monotonic() < deadline, logs
        time.sleep(0.3)


def listening(port: int) -> bool:
    return any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in psutil.net_connections("tcp"))


def fedgen(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [FEDGEN, *map(str, arguments)], capture_output=True, text=True, env=environment(folder), timeout=600
    )
