"""The units and installers under a real systemd, as docs/deploy.md says: a server and three devices on one machine.

A container of this machine's own file system, over which lies a layer of memory: whatever is installed there is gone
afterwards. It has a network of its own with nothing but loopback. Needs root, systemd-nspawn and nginx.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers import FEDGEN, ROOT, tiny_data, tiny_model, tiny_overrides, write_records

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.skipif(
        os.geteuid() != 0
        or not all(shutil.which(program) for program in ("systemd-nspawn", "nginx"))
        or any(place.is_relative_to("/tmp") for place in (ROOT, FEDGEN)),  # the container has a /tmp of its own
        reason="needs root, systemd-nspawn and nginx, and a checkout and an environment that do not lie in /tmp",
    ),
]
# Warm with a limit of its memory, warm without one, cold: each has other units.
DEVICES = {"ant": "memory = '4GB'\n", "bee": "", "cat": "warm = false\n"}
# Where things lie inside: services have a /tmp of their own.
HERE, MODEL, DATA = "/srv/operator", "/srv/model", "/srv/data"
NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup")
RUN = ("runuser", "-u", "fedgen", "--", "env", "FLWR_HOME=/var/lib/fedgen/server/flower", "PYTHONDONTWRITEBYTECODE=1")


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


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    folder = tmp_path / "operator"
    folder.mkdir()
    for place in (tiny_model(), tiny_data()):
        subprocess.run(["chmod", "-R", "a+rX", place], check=True)
    with booted(tmp_path / "layer", folder) as found:
        # A service's user has to get to Python and the app, which may lie below folders of root's own.
        for place in (Path(sys.executable).resolve(), FEDGEN, ROOT / "server_app.py"):
            found.run("chmod", "a+x", *place.parents)
        yield found


def fleet_of(folder: Path) -> Path:
    """A fleet file for one machine, with the standard folders."""
    text = f"name = 'clinic'\n[server]\nhosts = ['127.0.0.1']\n[paths]\nenvironment = '{FEDGEN.parents[1]}'\n"
    for number, (device, more) in enumerate(DEVICES.items()):
        data = folder / "data" / device
        data.mkdir(parents=True)
        write_records(data / "train.jsonl", {"sea": 12, "law": 8}, seed=number)
        text += f"[[device]]\nid = '{device}'\ndata = '{HERE}/data/{device}'\nbackbone = '{MODEL}'\n"
        text += f"port = {9094 + number}\n{more}"
    (folder / "fleet.toml").write_text(text)
    return Path(HERE, "fleet.toml")


def test_a_fleet_is_installed_and_works_under_systemd(machine: Machine) -> None:
    machine.run(FEDGEN, "provision", fleet_of(machine.folder), "--output", "clinic")
    machine.run("chmod", "-R", "a+rX", "data")
    machine.run("tar", "-xf", "clinic/server.tar")
    said = machine.run("./fedgen-server/install.sh")
    assert "ok: nginx passes the fleet API on port 8443" in said and "ok: service fedgen-superexec runs" in said

    machine.run("tar", "-xf", "clinic/devices/ant.tar")
    early = machine.run("sh", "-c", "./fedgen-ant/install.sh || true")  # a busy machine may not even have begun
    told = ("ended (if the SuperLink does not know this device yet: fedgen register", "has not reached the server")
    assert any(text in early for text in told) and "and has reached" not in early, early
    register = (*RUN, str(FEDGEN), "register", "/etc/fedgen/server", "--superlink", "clinic")
    assert machine.run(*register).splitlines() == [f"registered {device}" for device in DEVICES]
    for device in list(DEVICES)[1:]:
        machine.run("tar", "-xf", f"clinic/devices/{device}.tar")
        said = machine.run(f"./fedgen-{device}/install.sh")
        assert f"ok: service fedgen-supernode-{device} runs, and has reached the server" in said

    until_reached(machine, "ant", 0)  # by itself, now that it is registered; its worker has been there all the time
    assert machine.run("systemctl", "is-active", "fedgen-worker-ant") == "active\n"

    run(machine, "first", rounds=1)
    before = [machine.main_process(f"fedgen-{service}") for service in ("superlink", "superexec")]
    check_isolation(machine)

    # Another device comes: what runs goes on, and nobody else is installed anew.
    with (machine.folder / "fleet.toml").open("a") as file:
        file.write(f"[[device]]\nid = 'dog'\ndata = '{HERE}/data/ant'\nport = 9099\nwarm = false\n")
    assert machine.run(FEDGEN, "provision", "fleet.toml", "--output", "clinic").count("install again") == 2
    machine.run("tar", "-xf", "clinic/server.tar")
    said = machine.run("./fedgen-server/install.sh")
    assert "ok: service fedgen-superexec runs as before" in said
    assert [machine.main_process(f"fedgen-{service}") for service in ("superlink", "superexec")] == before
    assert machine.run(*register) == "registered dog\n"

    # A SuperNode that dies comes back by itself once the SuperLink takes it again, and its work goes on.
    reached = times_reached(machine, "cat")
    machine.run("systemctl", "kill", "--signal=KILL", "fedgen-supernode-cat.service")
    until_reached(machine, "cat", reached)
    run(machine, "second", rounds=1)

    # What nginx refuses takes the place of nothing that it serves.
    machine.run("sh", "-c", "echo nonsense > fedgen-server/nginx.conf")
    assert "nginx refuses" in machine.run("sh", "-c", "./fedgen-server/install.sh 2>&1 || true")
    machine.run("nginx", "-t")
    assert "nonsense" not in machine.run("cat", "/etc/nginx/conf.d/fedgen-clinic.conf")


def until_reached(machine: Machine, device: str, times: int) -> None:
    """Until a device's SuperNode has reached the SuperLink once more than so many times."""
    end = time.monotonic() + 300
    while times_reached(machine, device) == times:
        assert time.monotonic() < end, machine.logs()
        time.sleep(2)


def times_reached(machine: Machine, device: str) -> int:
    """How often a device's SuperNode has reached the SuperLink."""
    return machine.run("journalctl", "--output=cat", f"--unit=fedgen-supernode-{device}.service").count("SuperNode ID:")


def run(machine: Machine, name: str, rounds: int) -> None:
    """A run over all devices, typed on the server as its guide says."""
    overrides = tiny_overrides(Path(f"/var/lib/fedgen/server/runs/{name}")) | {"num-server-rounds": rounds}
    overrides |= {"backbone": MODEL, "dataset": DATA, "partition.by": "auto", "label-column": "", "samples.count": 0}
    overrides |= {"expected-clients": len(DEVICES), "personal.max-steps": 2, "round.roll-call": 200}
    output = overrides.pop("output-dir")
    sets = [f"--set={key}={value}" for key, value in overrides.items()]
    machine.run(
        *RUN, f"PYTHONPATH={ROOT}", FEDGEN, "run", ROOT, "--superlink", "clinic", "--output", str(output), *sets
    )
    found = json.loads(machine.run("cat", f"{output}/results.json"))
    told = found["rounds"], found["left_out"], machine.logs()
    assert found["status"] == "completed" and found["rounds"][0]["clients"] == list(DEVICES), told


def check_isolation(machine: Machine) -> None:
    """Each service sees its own device alone, and what was sent to a machine does not see that machine's key."""
    for device, service in (("ant", "worker"), ("ant", "supernode"), ("cat", "supernode")):
        for folder in ("/etc/fedgen", "/var/lib/fedgen"):
            assert machine.seen_by(f"fedgen-{service}-{device}", "ls", folder) == f"{device}\n"
    for service in ("fedgen-superlink", "fedgen-superexec"):
        assert machine.seen_by(service, "ls", "/etc/fedgen") == "server\n"
    check_key(machine, "/etc/fedgen/ant/device.key", "fedgen-supernode-ant", "fedgen-worker-ant")
    check_key(machine, "/etc/fedgen/server/server.key", "fedgen-superlink", "fedgen-superexec")


def check_key(machine: Machine, key: str, owner: str, other: str) -> None:
    """The one service reads the key, the other neither finds it nor gets to the first, though both have one user."""
    assert "PRIVATE KEY" in machine.seen_by(owner, "cat", key)
    assert machine.seen_by(other, "cat", key) == ""
    inside = ("nsenter", f"--target={machine.main_process(other)}", "--mount", "--user", "--setuid=0")
    machine.run(*inside, "ls", f"/proc/{machine.main_process(owner)}/root/etc", fails=True)  # PrivateUsers
