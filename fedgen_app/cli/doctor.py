"""``fedgen doctor``: is this machine fit for its part?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedgen_app.cli import presets
from fedgen_app.cli.run import assignment
from fedgen_app.errors import SettingsError
from fedgen_app.settings import Settings, own_defaults, read_toml


class Part(StrEnum):
    """What a machine is to be."""

    SERVER = "server"
    DEVICE = "device"
    SIM = "sim"


def doctor(
    part: Annotated[Part, typer.Argument(help="What this machine is to be.")] = Part.SIM,
    node: Annotated[Path | None, typer.Option(help="device: its node.toml.")] = None,
    address: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="Look whether it answers.")] = "",
    ca: Annotated[Path | None, typer.Option(help="The fleet's ca.crt, for --server.")] = None,
    state: Annotated[Path | None, typer.Option(help="server, sim: where runs will lie.", show_default="runs")] = None,
    task: Annotated[str, typer.Option(help="What the backbone generates; default: as the settings say.")] = "",
    preset: Annotated[str, typer.Option(help="Settings of the run, for memory and backbone; as of `fedgen run`.")] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One of them.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Look at this machine; exit status 1 where something is wrong, with how to mend it."""
    if bool(address) != bool(ca):
        raise SettingsError("--server and --ca belong together")
    if node and part is not Part.DEVICE:
        raise SettingsError(f"--node {node}: is for `fedgen doctor device`")
    if state and part is Part.DEVICE:
        raise SettingsError(f"--state {state}: a device's is the state-dir of its --node")
    config = read_toml(node) if node else {}
    wanted = (presets.load(preset) if preset else {}) | ({"task": task} if task else {})
    settings = Settings.from_run_config(own_defaults() | wanted | dict(map(assignment, set_ or [])))

    from fedgen_app.fleet import doctor as looking

    def findings() -> Iterator[looking.Finding]:
        if part is Part.DEVICE:
            yield from looking.device(config, settings)
        else:
            yield from looking.elsewhere(settings, (state or Path("runs")).resolve(), part is Part.SERVER)
        if address and ca:
            yield from looking.server(address, ca)

    found = []
    for finding in findings():
        found.append(finding)
        if not as_json:
            print(f"{'ok  ' if finding.ok else 'BAD '} {finding.what}: {finding.detail}", flush=True)
            if not finding.ok:
                print(f"     -> {finding.fix}")
            elif finding.hint:
                print(f"     hint: {finding.hint}")
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    if not all(finding.ok for finding in found):
        raise typer.Exit(1)
