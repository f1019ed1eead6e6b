"""The commands of docs/deploy.md under a real systemd: a server and three devices on one machine (``machines``)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import FEDGEN, ROOT, tiny_data, tiny_model, tiny_overrides, write_records
from machines import DATA, HERE, MODEL, Machine, booted

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
SERVICES = ("fedgen-superlink", "fedgen-superexec")
NEWER = "0.2.0"  # than what is installed
RUN = ("runuser", "-u", "fedgen", "--", "env", "FLWR_HOME=/var/lib/fedgen/server/flower", "PYTHONDONTWRITEBYTECODE=1")


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
    text = "name = 'clinic'\ncluster-key = true\n[server]\nhosts = ['127.0.0.1']\noperators = ['127.0.0.1']\n"
    text += f"[paths]\nenvironment = '{FEDGEN.parents[1]}'\n"
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
    said = install(machine, "server")
    assert "ok: nginx passes the fleet API on port 8443" in said and "ok: service fedgen-superexec runs" in said

    machine.run("tar", "-xf", "clinic/devices/ant.tar")
    early = machine.run("sh", "-c", "./fedgen-ant/install.sh || true")  # a busy machine may not even have begun
    told = ("ended (if the SuperLink does not know this device yet: fedgen register", "has not reached the server")
    assert any(text in early for text in told) and "and has reached" not in early, early
    assert register(machine) == [f"registered {device}" for device in DEVICES]
    for device in list(DEVICES)[1:]:
        assert f"ok: service fedgen-supernode-{device} runs, and has reached the server" in install(machine, device)

    until_reached(machine, "ant", 0)  # by itself, now that it is registered; its worker has been there all the time
    assert machine.run("systemctl", "is-active", "fedgen-worker-ant") == "active\n"

    run(machine, "first")
    check_isolation(machine)
    check_doctor(machine)
    check_another_device(machine)

    # A SuperNode that dies comes back by itself once the SuperLink takes it again, and its work goes on.
    reached = times_reached(machine, "cat")
    machine.run("systemctl", "kill", "--signal=KILL", "fedgen-supernode-cat.service")
    until_reached(machine, "cat", reached)
    run(machine, "second")

    # What nginx refuses takes the place of nothing that it serves.
    machine.run("sh", "-c", "echo nonsense > fedgen-server/nginx.conf")
    assert "nginx refuses" in machine.run("sh", "-c", "./fedgen-server/install.sh 2>&1 || true")
    machine.run("nginx", "-t")
    assert "nonsense" not in machine.run("cat", "/etc/nginx/conf.d/fedgen-clinic.conf")

    check_operator(machine)
    check_renewal(machine)
    check_new_keys(machine)
    check_lost_state(machine)
    check_upgrade(machine)
    check_leaving(machine)


def install(machine: Machine, name: str) -> str:
    """What an installer says that was copied to its machine."""
    machine.run("tar", "-xf", f"clinic/{'server' if name == 'server' else f'devices/{name}'}.tar")
    return machine.run(f"./fedgen-{name}/install.sh")


def register(machine: Machine, *options: str) -> list[str]:
    """What it says that it did."""
    command = (*RUN, FEDGEN, "register", "/etc/fedgen/server", "--superlink", "clinic", *options)
    return machine.run(*command).splitlines()


def provision(machine: Machine, *options: str) -> str:
    """What it says, of what has to be installed again too."""
    return machine.run(FEDGEN, "provision", "fleet.toml", "--output", "clinic", *options)


def processes(machine: Machine, *services: str) -> list[int]:
    """Their main processes."""
    return [machine.main_process(service) for service in services]


def check_doctor(machine: Machine) -> None:
    """Nothing is wrong with a device and the server, for the user of the services."""

    def doctor(part: str, home: str, *options: str) -> str:
        return machine.run(*RUN, f"HOME=/var/lib/fedgen/{home}", FEDGEN, "doctor", part, *options)

    where = ("--node", "/etc/fedgen/ant/node.toml", "--server", "127.0.0.1:8443", "--ca", "/etc/fedgen/ant/ca.crt")
    assert "396 days left" in doctor("device", "ant", *where)
    said = doctor("server", "server", "--state", "/var/lib/fedgen/server/runs", "--set", f"backbone={MODEL}")
    assert "at /var/lib/fedgen/server/runs" in said


def check_another_device(machine: Machine) -> None:
    """One that comes: what runs goes on, and nobody else is installed anew."""
    before = processes(machine, *SERVICES)
    with (machine.folder / "fleet.toml").open("a") as file:
        file.write(f"[[device]]\nid = 'dog'\ndata = '{HERE}/data/ant'\nport = 9099\nwarm = false\n")
    assert provision(machine).count("install again") == 2
    assert "ok: service fedgen-superexec runs as before" in install(machine, "server")
    assert processes(machine, *SERVICES) == before
    assert register(machine) == ["registered dog"]


def check_operator(machine: Machine) -> None:
    """Flower's own commands, from a machine whose address nginx lets to the control API."""

    def flwr(*arguments: str | Path) -> str:
        return machine.run("env", "FLWR_HOME=clinic/operator", FEDGEN.parent / "flwr", *arguments)

    def runs() -> list[dict[str, str]]:
        found: list[dict[str, str]] = json.loads(flwr("list", "clinic", "--format", "json"))["runs"]
        return found

    def config(name: str, rounds: int) -> str:
        values = overrides(name, DEVICES) | {"num-server-rounds": rounds}
        return " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())

    flwr("run", ROOT, "clinic", "--stream", "--run-config", config("operators", 1))
    assert results(machine, "operators")["status"] == "completed"
    known = {entry["run-id"] for entry in runs()}
    flwr("run", ROOT, "clinic", "--run-config", config("stopped", 500))
    (number,) = {entry["run-id"] for entry in runs()} - known
    end = time.monotonic() + 120
    while '"event": "round"' not in machine.run(
        "sh", "-c", "cat /var/lib/fedgen/server/runs/stopped/events.jsonl || true"
    ):
        assert time.monotonic() < end, machine.logs()
        time.sleep(1)
    flwr("stop", number, "clinic")
    assert next(entry["status"] for entry in runs() if entry["run-id"] == number) == "finished:stopped"
    assert "round" in flwr("log", number, "clinic", "--show")


def check_renewal(machine: Machine) -> None:
    """Another certificate and secret on the server; devices need nothing."""
    devices = [f"fedgen-supernode-{device}" for device in DEVICES]
    before, served = processes(machine, *devices), certificate(machine)
    said = provision(machine, "--renew")
    assert said.count("install again") == 1, said
    install(machine, "server")
    assert certificate(machine) != served
    run(machine, "renewed")
    assert processes(machine, *devices) == before


def certificate(machine: Machine) -> str:
    """What nginx shows."""
    return machine.run("python3", "-c", "import ssl; print(ssl.get_server_certificate(('127.0.0.1', 8443)))")


def check_new_keys(machine: Machine) -> None:
    """A device's own, and the one that all devices share."""

    def common() -> str:
        return machine.run("sh", "-c", "cat /etc/fedgen/*/cluster.key | od -An -tx1")

    keys = common()
    own = machine.run("cat", "/etc/fedgen/ant/device.key")
    provision(machine, "--new-key", "ant", "--new-cluster-key")
    install(machine, "server")
    assert register(machine) == ["unregistered ant", "registered ant"]
    for device in DEVICES:
        assert "and has reached the server" in install(machine, device)
    assert machine.run("cat", "/etc/fedgen/ant/device.key") != own
    changed = common()
    assert changed != keys and len(changed) == len(keys)
    run(machine, "keys")


def check_lost_state(machine: Machine) -> None:
    """Without its database the SuperLink knows nobody until they are registered again; they come back by themselves."""
    reached = {device: times_reached(machine, device) for device in DEVICES}
    machine.run("systemctl", "stop", *reversed(SERVICES))
    machine.run("rm", "/var/lib/fedgen/server/state.db")
    machine.run("systemctl", "start", *SERVICES)
    assert register(machine, "--again") == [f"registered {device}" for device in (*DEVICES, "dog")]
    for device, times in reached.items():
        until_reached(machine, device, times)
    run(machine, "again")


def check_upgrade(machine: Machine) -> None:
    """To a newer version, of the same code: every service starts anew with it."""
    checkout = machine.folder / "checkout"
    checkout.mkdir()
    kept = ("README.md", "LICENSE", "pyproject.toml", "client_app.py", "server_app.py", "fedgen_app", "fedgen_assets")
    for name in kept:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, checkout / name)
    project = checkout / "pyproject.toml"
    project.write_text(project.read_text().replace('version = "0.1.0"', f'version = "{NEWER}"'))
    wheel = [FEDGEN.parent / "pip", "wheel", "--no-deps", "--wheel-dir", checkout / "dist", checkout]
    subprocess.run(wheel, check=True, capture_output=True)
    before = processes(machine, *SERVICES, "fedgen-worker-ant", "fedgen-supernode-ant")
    machine.run(FEDGEN.parent / "pip", "install", f"checkout/dist/fedgen_edge-{NEWER}-py3-none-any.whl")
    provision(machine)
    for name in ("server", *DEVICES):
        said = install(machine, name)
        assert f"ok: fedgen-edge {NEWER}" in said and "as before" not in said
    after = processes(machine, *SERVICES, "fedgen-worker-ant", "fedgen-supernode-ant")
    assert not set(before) & set(after)
    assert "ok: service fedgen-superexec runs as before" in install(machine, "server")
    run(machine, "upgraded", checkout=Path(HERE, "checkout"))


def check_leaving(machine: Machine) -> None:
    """A device that leaves, and what is deleted of one that stays."""
    text = (machine.folder / "fleet.toml").read_text()
    first, after = text.index("[[device]]\nid = 'bee'"), text.index("[[device]]\nid = 'cat'")
    (machine.folder / "fleet.toml").write_text(text[:first] + text[after:])
    provision(machine)
    install(machine, "server")
    assert register(machine) == ["unregistered bee"]
    services = "fedgen-supernode-bee", "fedgen-worker-bee"
    machine.run("systemctl", "disable", "--now", *services)
    units = [f"/etc/systemd/system/{service}.service" for service in services]
    machine.run("rm", "-r", *units, "/etc/fedgen/bee", "/var/lib/fedgen/bee")
    machine.run("systemctl", "daemon-reload")
    assert machine.run("sh", "-c", f"systemctl is-active {' '.join(services)} || true") == "inactive\n" * 2
    machine.run("systemctl", "cat", services[0], fails=True)
    number = results(machine, "first")["run"]
    assert number in machine.run("ls", "/var/lib/fedgen/ant/adapters")
    machine.run("rm", "-r", f"/var/lib/fedgen/ant/adapters/{number}")
    run(machine, "left", devices=("ant", "cat"), checkout=Path(HERE, "checkout"))


def until_reached(machine: Machine, device: str, times: int) -> None:
    """Until a device's SuperNode has reached the SuperLink once more than so many times."""
    end = time.monotonic() + 300
    while times_reached(machine, device) == times:
        assert time.monotonic() < end, machine.logs()
        time.sleep(2)


def times_reached(machine: Machine, device: str) -> int:
    """How often a device's SuperNode has reached the SuperLink."""
    return machine.run("journalctl", "--output=cat", f"--unit=fedgen-supernode-{device}.service").count("SuperNode ID:")


def overrides(name: str, devices: Sequence[str]) -> dict[str, object]:
    """Settings of a run over devices, with its folder on the server."""
    found = tiny_overrides(Path(f"/var/lib/fedgen/server/runs/{name}")) | {"num-server-rounds": 1}
    found |= {"backbone": MODEL, "dataset": DATA, "partition.by": "auto", "label-column": "", "samples.count": 0}
    return found | {"expected-clients": len(devices), "personal.max-steps": 2, "round.roll-call": 200}


def run(machine: Machine, name: str, devices: Sequence[str] = tuple(DEVICES), checkout: Path = ROOT) -> None:
    """A run over devices, typed on the server as its guide says."""
    values = overrides(name, devices)
    output = values.pop("output-dir")
    sets = [f"--set={key}={value}" for key, value in values.items()]
    machine.run(
        *RUN, f"PYTHONPATH={checkout}", FEDGEN, "run", checkout, "--superlink", "clinic", "--output", str(output), *sets
    )
    found = results(machine, name)
    told = found["rounds"], found["left_out"], machine.logs()
    assert found["status"] == "completed" and found["rounds"][0]["clients"] == list(devices), told


def results(machine: Machine, name: str) -> dict[str, Any]:
    """What a run has come to."""
    found: dict[str, Any] = json.loads(machine.run("cat", f"/var/lib/fedgen/server/runs/{name}/results.json"))
    return found


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
