"""A fleet's devices and a real SuperLink that knows more or less of them than the record says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fleets import beside_a_folder_of_the_connection_s_name, environment, fedgen, fleet_file, install, service
from helpers import command

from fedgen_app.engines.keeper import end_processes, free_port
from fedgen_app.errors import RunError
from fedgen_app.fleet import registration


@pytest.mark.slow
def test_where_record_and_superlink_differ_the_superlink_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports, devices = (free_port(), free_port()), ("ward-7", "ward-8")
    made = command("provision", fleet_file(tmp_path, devices, ports), "--output", tmp_path / "out")
    assert made.status == 0, made.err
    install(tmp_path, "server")
    beside_a_folder_of_the_connection_s_name(tmp_path, monkeypatch)
    server = tmp_path / "etc" / "server"
    record = server / "registered.json"

    def register() -> list[str]:
        ended = fedgen(tmp_path, "register", server, "--superlink", "clinic")
        return (ended.stdout or ended.stderr).splitlines()

    try:
        with service(tmp_path, "server/superlink.sh"):
            # At once: it waits for a SuperLink that starts.
            assert register() == ["registered ward-7", "registered ward-8"]
            kept = json.loads(record.read_text())
            found = ["already registered ward-7", "already registered ward-8"]
            record.unlink()
            assert register() == found and json.loads(record.read_text()) == kept
            record.write_text(json.dumps(kept | {"ward-7": kept["ward-7"] | {"node": "17"}}))
            assert register() == found[:1] and json.loads(record.read_text()) == kept
            assert register() == ["nothing to do: the SuperLink knows exactly these devices"]
            # A device left while the record was lost: nobody knows any more whose node that is.
            (server / "devices" / "ward-8.pub").rename(tmp_path / "ward-8.pub")
            record.unlink()
            assert register()[1].startswith(
                f"left: node {kept['ward-8']['node']} (ward-8), which is not of this folder"
            )
            record.write_text(json.dumps(kept))
            assert register() == ["unregistered ward-8"]
            (tmp_path / "ward-8.pub").rename(server / "devices" / "ward-8.pub")
            assert "--new-key ward-8" in register()[0]
        monkeypatch.setattr(registration, "STARTING", 1.0)
        monkeypatch.setenv("FLWR_HOME", environment(tmp_path)["FLWR_HOME"])
        with pytest.raises(RunError, match="SuperLink is unavailable"):
            list(registration.register(server, "clinic"))
    finally:
        end_processes(tmp_path)
