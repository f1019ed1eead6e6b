"""``fedgen estimate``: what a run will cost a device."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer

from fedgen_app.cli import presets
from fedgen_app.cli.run import assignment
from fedgen_app.settings import absolute, check, own_defaults


class DeviceName(StrEnum):
    """A class of devices, or this machine."""

    RASPBERRY_PI_5 = "raspberry-pi-5"
    JETSON_ORIN_NANO = "jetson-orin-nano"
    LAPTOP = "laptop"
    THIS = "this"


def estimate(
    preset: Annotated[str, typer.Option(help="A preset's name (see `fedgen presets`) or a TOML file.")] = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting; may be repeated.")
    ] = None,
    device: Annotated[DeviceName, typer.Option(help="On what; `this` is measured for a second.")] = DeviceName.THIS,
    rows: Annotated[int, typer.Option(min=1, help="Rows or images that the client trains on.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Peak memory, bytes up and down and seconds per round of one client, before anything runs."""
    config = own_defaults() | (presets.load(preset) if preset else {}) | dict(map(assignment, set_ or []))
    # Of the data only the number of rows counts, and a device's own lie elsewhere.
    settings = check(absolute(config | {"dataset": "bundled"}))

    from fedgen_app.fleet import estimate as counting

    found = counting.estimate(settings, device=device.value, rows=rows)
    print(json.dumps(found.as_json(), indent=1) if as_json else "\n".join(counting.shown(found)))
