"""What tests of a fleet share: a fleet on this machine, its services without systemd, nginx as provisioned."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import FEDGEN, ROOT, command, events, results, tiny_data, tiny_model, tiny_overrides, write_records

from fedgen_app.engines.keeper import end_processes, free_port

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


def fleet_file(folder: Path, devices: tuple[str, ...], ports: tuple[int, int], more: str = "") -> Path:
    """Devices on this machine, behind nginx where there is one."""
    proxy = f"port = {ports[0]}\nsuperlink-port = {ports[1]}\nproxy = {str(bool(NGINX)).lower()}\n"
    paths = f"config = '{folder}/etc'\nstate = '{folder}/var'\nenvironment = '{Path(sys.executable).parents[1]}'\n"
    text = f"name = 'clinic'\n[server]\nhosts = ['localhost']\n{proxy}[paths]\n{paths}"
    for device in devices:
        data = folder / "data" / device
        data.mkdir(parents=True, exist_ok=True)
        write_records(data / "train.jsonl", {"sea": 12, "law": 8}, seed=len(device))
        text += (
            f"[[device]]\nid = '{device}'\ndata = '{data}'\nbackbone = '{tiny_model()}'\nport = {free_port()}\n{more}"
        )
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


def beside_a_folder_of_the_connection_s_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work where an operator often does: beside the provisioned folder, here one that `flwr` would take for an app."""
    (folder / "clinic").mkdir()
    (folder / "clinic" / "pyproject.toml").write_text("[project]\nname = 'no app'\n", encoding="utf-8")
    monkeypatch.chdir(folder)


def fedgen(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [FEDGEN, *map(str, arguments)], capture_output=True, text=True, env=environment(folder), timeout=600
    )


@dataclass
class Submitted:
    """A run that was submitted to a fleet."""

    process: subprocess.Popen[str]
    folder: Path

    def events(self, name: str) -> list[dict[str, Any]]:
        """What it has told of one kind so far."""
        return [e for e in events(self.folder) if e["event"] == name] if (self.folder / "events.jsonl").exists() else []

    def reaches(self, number: int, seconds: float = 300) -> None:
        """Wait until a round is over."""
        end = time.monotonic() + seconds
        while not any(event["round"] == number for event in self.events("round")):
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.1)

    def ends(self, seconds: float = 400) -> tuple[int, dict[str, Any]]:
        """Its exit status and results."""
        status = self.process.wait(seconds)
        return status, results(self.folder)

    def said(self) -> str:
        """What the command printed."""
        return self.folder.with_suffix(".log").read_text(errors="replace")[-3000:]


class Fleet:
    """A provisioned fleet on this machine, with everything started as its units would."""

    def __init__(self, folder: Path, devices: tuple[str, ...] = ("ant", "bee", "cat"), warm: bool = True) -> None:
        self.folder, self.devices, self.warm = folder, devices, warm
        self.ports = free_port(), free_port()
        self.services: dict[str, tuple[contextlib.ExitStack, subprocess.Popen[bytes]]] = {}
        self.proxy = contextlib.ExitStack()
        self.runs = 0

    def __enter__(self) -> Fleet:
        try:
            self._bring_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _bring_up(self) -> None:
        file = fleet_file(self.folder, self.devices, self.ports, f"warm = {str(self.warm).lower()}\n")
        self.device_ports = [d["port"] for d in tomllib.loads(file.read_text(encoding="utf-8"))["device"]]
        made = command("provision", file, "--output", self.folder / "out")
        assert made.status == 0, made.err
        for machine in ("server", *self.devices):
            install(self.folder, machine)
        self.start("server/superlink.sh")
        until(lambda: listening(self.ports[1]), 120, self.folder)
        self.start("server/superexec.sh")
        if NGINX:
            (self.folder / "nginx").mkdir()
            configuration = self.folder / "out" / "server" / "nginx.conf"
            self.proxy.enter_context(nginx(self.folder / "nginx", configuration, self.ports[0]))
        self.register()
        for device in self.devices:
            self.start_device(device)

    def __exit__(self, *_: object) -> None:
        for script in list(self.services):
            self.stop(script)
        self.proxy.close()
        end_processes(self.folder)

    def register(self) -> None:
        """Let the SuperLink know the devices."""
        ended = fedgen(self.folder, "register", self.folder / "etc" / "server", "--superlink", "clinic")
        assert ended.returncode == 0, ended.stderr

    def start(self, script: str) -> subprocess.Popen[bytes]:
        """What a unit starts."""
        stack = contextlib.ExitStack()
        process = stack.enter_context(service(self.folder, script))
        self.services[script] = stack, process
        return process

    def stop(self, script: str) -> None:
        """As systemd stops it."""
        stack, _ = self.services.pop(script)
        stack.close()

    def kill(self, script: str) -> None:
        """kill -9 of this one process, whatever it has started."""
        _, process = self.services[script]
        process.kill()
        process.wait()

    def start_device(self, device: str) -> None:
        """Its SuperNode, and its worker where it has one."""
        self.start(f"{device}/supernode.sh")
        if self.warm:
            self.start(f"{device}/worker.sh")

    def stop_device(self, device: str) -> None:
        """Both of them."""
        for script in (f"{device}/worker.sh", f"{device}/supernode.sh"):
            if script in self.services:
                self.stop(script)

    def submit(self, **overrides: object) -> Submitted:
        """``fedgen run --superlink`` in the background, with the tiny model; a key has _ for - and __ for a dot."""
        self.runs += 1
        folder = self.folder / f"run-{self.runs}"
        config = tiny_overrides(folder) | {"dataset": str(tiny_data()), "partition.by": "auto", "label-column": ""}
        config |= {"samples.count": 0, "expected-clients": len(self.devices), "personal.max-steps": 2}
        config |= {key.replace("__", ".").replace("_", "-"): str(value) for key, value in overrides.items()}
        sets = [f"--set={key}={value}" for key, value in config.items() if key != "output-dir"]
        return self._begin(folder, "run", str(ROOT), "--superlink", "clinic", "--output", str(folder), *sets)

    def resume(self, run: Submitted) -> Submitted:
        """``fedgen resume`` of it."""
        return self._begin(run.folder, "resume", str(run.folder))

    def _begin(self, folder: Path, *arguments: str) -> Submitted:
        with folder.with_suffix(".log").open("ab") as log:
            process = subprocess.Popen([FEDGEN, *arguments], stdout=log, stderr=log, env=environment(self.folder))
        return Submitted(process, folder)  # type: ignore[arg-type]

    def child_of(self, device: str, seconds: float = 120) -> psutil.Process:
        """The process that trains on a device, once it has worked for a moment."""
        worker, end = psutil.Process(self.services[f"{device}/worker.sh"][1].pid), time.monotonic() + seconds
        while True:
            with contextlib.suppress(psutil.NoSuchProcess):
                found = [p for warm in worker.children() for p in warm.children()]
                if found and time.time() - found[0].create_time() > 0.7:
                    return found[0]
            assert time.monotonic() < end, f"{device} is not asked to train"
            time.sleep(0.05)


def record(case: str, happened: str, seconds: float, lost: str = "nothing") -> None:
    """A row of the report, where it is wanted."""
    if folder := os.environ.get("FEDGEN_DEPLOYMENT_RECORDS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        entry = {"case": case, "happened": happened, "seconds": round(seconds, 1), "lost": lost}
        name = "".join(c if c.isalnum() else "-" for c in case)
        (Path(folder) / f"{name}.json").write_text(json.dumps(entry) + "\n", encoding="utf-8")


def lost(count: int) -> str:
    """What a row of the report says of so many replies that were not admitted."""
    return {0: "nothing", 1: "one reply"}.get(count, f"{count} replies")


def rejected(found: dict[str, object], client: str) -> list[tuple[int, str]]:
    """Rounds that a client was chosen for and not admitted to, and why."""
    rounds = found["rounds"]
    assert isinstance(rounds, list)
    return [(r["round"], x["reason"]) for r in rounds for x in r["rejected"] if x["client"] == client]


def whole(found: dict[str, object], rounds: int) -> None:
    """Nothing of a completed run is missing."""
    assert found["status"] == "completed"
    assert [r["round"] for r in found["rounds"]] == list(range(1, rounds + 1))  # type: ignore[attr-defined]
