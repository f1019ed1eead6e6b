"""``fedgen provision`` and ``fedgen register``: everything that a fleet's machines need, and their keys made known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedgen_app.fleet import spec
from fedgen_app.fleet.provision import SOON, Outcome
from fedgen_app.fleet.provision import provision as make
from fedgen_app.fleet.registration import register as make_known


def provision(
    file: Annotated[Path, typer.Argument(help="The fleet file, TOML; see docs/deploy.md.")],
    output: Annotated[Path, typer.Option(help="The fleet's folder, new or of this fleet. It holds secrets.")],
    renew: Annotated[bool, typer.Option("--renew", help="Make the server's certificate anew.")] = False,
    new_key: Annotated[
        list[str] | None, typer.Option("--new-key", metavar="ID", help="Another key for this device; repeatable.")
    ] = None,
    new_cluster_key: Annotated[
        bool, typer.Option("--new-cluster-key", help="Another common key for all devices.")
    ] = False,
) -> None:
    """Make certificates, keys, services and an archive per machine; what is there already stays."""
    fleet = spec.read(file)
    outcome = make(fleet, output, renew, new_key or (), new_cluster_key)
    for line in _lines(fleet, output, outcome):
        print(line)


def register(
    folder: Annotated[Path, typer.Argument(help="The server's folder, with devices/*.pub.")],
    superlink: Annotated[str, typer.Option(help="The connection in Flower's config.toml.")],
    again: Annotated[bool, typer.Option("--again", help="The SuperLink's database is new.")] = False,
) -> None:
    """Register the fleet's devices with the SuperLink, and unregister those that left or have another key."""
    count = 0
    for change in make_known(folder, superlink, again):
        print(f"{change.what} {change.device}", flush=True)
        count += 1
    if not count:
        print("nothing to do: the SuperLink knows exactly these devices")


def _lines(fleet: spec.Fleet, output: Path, outcome: Outcome) -> list[str]:
    groups = (
        ("new", outcome.new),
        ("with a new key", outcome.rekeyed),
        ("kept", outcome.kept),
        ("removed", outcome.removed),
    )
    lines = [f"devices {what}: {', '.join(devices)}" for what, devices in groups if devices]
    for what, days, reason in (
        ("authority", outcome.ca_days, outcome.ca_renewed),
        ("server certificate", outcome.server_days, outcome.server_renewed),
    ):
        lines.append(f"{what}: {days} days left" + (f" (new: {reason})" if reason else ""))
        if days < SOON:
            lines.append("  ends soon or has ended: the same command with --renew, then install again")
    if "server" in outcome.changed:
        lines.append(f"install again: {output / 'server.tar'}, on the server")
    for device in fleet.device:
        if device.id in outcome.changed:
            lines.append(f"install again: {output / 'devices' / device.id}.tar, on {device.host or device.id}")
    if outcome.new or outcome.rekeyed or outcome.removed:
        lines.append("then, on the server: fedgen register (its install.sh prints the whole command)")
    return lines or ["nothing changed"]
