"""``fedgen device-worker``: carries out a SuperNode's tasks from a process that stays warm."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedgen_app.errors import SettingsError

LOOPBACK = ("127.0.0.1", "[::1]", "localhost")


def device_worker(
    runtime: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the SuperNode (--isolation process) listens.")
    ] = "127.0.0.1:9094",
    secret: Annotated[
        Path | None, typer.Option(help="The file of the SuperNode's --superexec-auth-secret-file.")
    ] = None,
) -> None:
    """Import libraries and backbone once, and fork a child for every task; until SIGTERM."""
    host, _, port = runtime.rpartition(":")
    if host not in LOOPBACK or not port.isdecimal() or not 0 < int(port) < 65536:
        raise SettingsError(f"--runtime {runtime}: should be 127.0.0.1:PORT; what is sent there is not encrypted")
    if sys.platform != "linux":
        raise SettingsError("fedgen device-worker needs Linux; elsewhere use the SuperNode's --isolation subprocess")

    from fedgen_app.fleet.worker import start

    start(runtime, secret)
