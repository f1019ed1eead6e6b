"""A provisioned fleet with real Flower: TLS, node authentication, a run, a device that has no key, one that leaves."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from fleets import (
    NGINX,
    beside_a_folder_of_the_connection_s_name,
    fedgen,
    fleet_file,
    install,
    listening,
    nginx,
    service,
    until,
)
from helpers import ROOT, command, results, tiny_data, tiny_overrides

from fedgen_app.engines.keeper import end_processes, free_port


@pytest.mark.slow
def test_a_provisioned_fleet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside_a_folder_of_the_connection_s_name(tmp_path, monkeypatch)
    ports, devices = (free_port(), free_port()), ("ward-7", "ward-8")
    made = command("provision", fleet_file(tmp_path, devices, ports), "--output", tmp_path / "out")
    assert made.status == 0, made.err
    for machine in ("server", *devices):
        install(tmp_path, machine)
    (tmp_path / "etc" / "ward-8" / "policy.toml").write_text("max-epochs = 0\n")
    server = tmp_path / "etc" / "server"
    try:
        with ExitStack() as stack:
            stack.enter_context(service(tmp_path, "server/superlink.sh"))
            until(lambda: listening(ports[1]), 120, tmp_path)
            stack.enter_context(service(tmp_path, "server/superexec.sh"))
            if NGINX:
                (tmp_path / "nginx").mkdir()
                stack.enter_context(nginx(tmp_path / "nginx", tmp_path / "out" / "server" / "nginx.conf", ports[0]))
            ended = fedgen(tmp_path, "register", server, "--superlink", "clinic")
            assert ended.returncode == 0, ended.stderr
            assert ended.stdout.splitlines() == ["registered ward-7", "registered ward-8"]
            assert "nothing to do" in fedgen(tmp_path, "register", server, "--superlink", "clinic").stdout
            for device in devices:
                stack.enter_context(service(tmp_path, f"{device}/supernode.sh"))
                stack.enter_context(service(tmp_path, f"{device}/worker.sh"))
            check_run(tmp_path)
            check_leaving(tmp_path, ports)
    finally:
        end_processes(tmp_path)


def check_run(folder: Path) -> None:
    """The run completes with the device that agrees; what it keeps lies in its own state."""
    overrides = tiny_overrides(folder / "run") | {"dataset": str(tiny_data()), "num-server-rounds": 1}
    overrides |= {"expected-clients": 2, "partition.by": "auto", "label-column": "", "samples.count": 0}
    sets = [f"--set={key}={value}" for key, value in overrides.items() if key != "output-dir"]
    ended = fedgen(folder, "run", ROOT, "--superlink", "clinic", "--output", folder / "run", *sets)
    logs = {log.name: log.read_text(errors="replace")[-3000:] for log in folder.glob("*.log")}
    assert ended.returncode == 0, (ended.stderr, logs)
    found = results(folder / "run")
    assert found["status"] == "completed" and found["rounds"][0]["clients"] == ["ward-7"]
    assert [entry["reason"] for entry in found["left_out"]] == ["policy"]
    assert list((folder / "var" / "ward-7" / "adapters").glob("*/ward-7/adapter_model.safetensors"))
    assert not list((folder / "run").glob("clients/*/adapter_model.safetensors"))
    if NGINX:
        asked = (folder / "nginx" / "access.log").read_text()
        assert "POST /v1/fleet/" in asked and "/v1/control/" not in asked


def check_leaving(folder: Path, ports: tuple[int, int]) -> None:
    """A device that left is unknown to the SuperLink, and one that was never registered is refused."""
    known = json.loads((folder / "etc" / "server" / "registered.json").read_text())
    assert sorted(known) == ["ward-7", "ward-8"]
    made = command("provision", fleet_file(folder, ("ward-7", "rogue"), ports), "--output", folder / "out")
    assert made.status == 0, made.err
    install(folder, "rogue")
    with service(folder, "rogue/supernode.sh") as rogue:
        until(lambda: rogue.poll() is not None, 120, folder)
        assert rogue.returncode
    install(folder, "server")
    ended = fedgen(folder, "register", folder / "etc" / "server", "--superlink", "clinic")
    assert ended.stdout.splitlines() == ["unregistered ward-8", "registered rogue"], ended.stderr
