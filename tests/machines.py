"""A container of this machine's own file system with systemd as its first process.

Over the file system lies a layer of memory: whatever is installed there is gone afterwards. It has a network of its own
with nothing but loopback. Needs root and systemd-nspawn.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from helpers import tiny_data, tiny_model

# Where things lie inside: services have a /tmp of their own.
HERE, MODEL, DATA = "/srv/operator", "/srv/model", "/srv/data"
NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup")


class Machine:
    """A booted container."""

    def __init__(self, folder: Path, leader: psutil.Process) -> None:
        self.folder = folder
        self.leader = leader

    def run(self, *command: str | Path, seconds: float = 900, fails: bool = False) -> str:
        """What a command prints that runs inside, both streams, from the folder."""
        inside = ["nsenter", f"--target={self.leader.pid}", *NAMESPACES]
        clean = ["env", "-i", f"--chdir={HERE}", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"]
        ended = subprocess.run(
            [*inside, *clean, *map(str, command)], capture_output=True, text=True, timeout=seconds, errors="replace"
        )
        said = ended.stdout + ended.stderr
        assert bool(ended.returncode) == fails, (command, said, self.logs())
        return said

    def logs(self) -> str:
        """The last of what the services said."""
        inside = ["nsenter", f"--target={self.leader.pid}", "--mount", "--pid", "journalctl", "--no-pager", "-n", "60"]
        return subprocess.run(inside, capture_output=True, text=True, errors="replace").stdout

    def main_process(self, service: str) -> int:
        """The number of a service's main process inside."""
        number = int(self.run("systemctl", "show", "--property=MainPID", "--value", f"{service}.service"))
        assert number, f"{service} does not run\n{self.logs()}"
        return number

    def seen_by(self, service: str, *command: str | Path) -> str:
        """What a command says that sees the files that a service sees."""
        return self.run("nsenter", f"--target={self.main_process(service)}", "--mount", *command)


@contextlib.contextmanager
def booted(layer: Path, folder: Path) -> Iterator[Machine]:
    """This machine's file system under a layer in memory, with systemd as its first process."""
    layer.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "fedgen-test", layer], check=True)
    process = None
    try:
        for part in ("upper", "work", "root"):
            (layer / part).mkdir()
        options = f"lowerdir=/,upperdir={layer}/upper,workdir={layer}/work"
        subprocess.run(["mount", "-t", "overlay", "fedgen-test", "-o", options, layer / "root"], check=True)
        nspawn = ["systemd-nspawn", "--quiet", f"--directory={layer}/root", "--private-network", "--register=no"]
        nspawn += ["--keep-unit", "--link-journal=no", "--console=pipe", f"--bind={folder}:{HERE}"]
        nspawn += [f"--bind-ro={tiny_model()}:{MODEL}", f"--bind-ro={tiny_data()}:{DATA}"]
        nspawn += ["--boot", "systemd.unit=basic.target"]
        with (folder / "console.log").open("wb") as log:
            process = subprocess.Popen(nspawn, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        machine, end = None, time.monotonic() + 60
        while machine is None:
            assert process.poll() is None and time.monotonic() < end, (folder / "console.log").read_text()
            time.sleep(0.2)
            for child in psutil.Process(process.pid).children():
                status = Path(f"/proc/{child.pid}/status").read_text()
                if re.search(r"^NSpid:.*\t1$", status, re.MULTILINE):  # not what only sets the container up
                    machine = Machine(folder, child)
        while machine.run("sh", "-c", "systemctl is-system-running || true").strip() not in ("running", "degraded"):
            assert time.monotonic() < end, machine.logs()
            time.sleep(0.2)
        yield machine
    finally:
        try:
            if process is not None and process.poll() is None:
                for child in psutil.Process(process.pid).children():
                    child.kill()  # the first process of the container, and with it all others
                process.wait(60)
        finally:
            subprocess.run(["umount", "--recursive", "--lazy", layer], check=True)
