"""``fedgen device-worker``: carries out a SuperNode's tasks from a process that stays warm."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from fedgen_app.errors import SettingsError

LIBRARIES = ("torch", "transformers", "peft", "safetensors.torch")
LOOPBACK = ("127.0.0.1", "[::1]", "localhost")


def device_worker(
    runtime: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the SuperNode (--isolation process) listens.")
    ] = "127.0.0.1:9094",
    secret: Annotated[
        Path | None, typer.Option(help="The file of the SuperNode's --superexec-auth-secret-file.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(help="The file of its --ssl-ca-certfile; without: it speaks plain HTTP.")
    ] = None,
) -> None:
    """Import libraries and backbone once, and fork a child for every task; until SIGTERM."""
    host, _, port = runtime.rpartition(":")
    if host not in LOOPBACK or not port.isdecimal() or not 0 < int(port) < 65536:
        raise SettingsError(
            f"--runtime {runtime}: should be 127.0.0.1:PORT; a SuperNode's tasks are for its own machine"
        )
    if sys.platform != "linux":
        raise SettingsError("fedgen device-worker needs Linux; elsewhere use the SuperNode's --isolation subprocess")
    threads = _threads()
    _settle()
    began = time.monotonic()
    for name in LIBRARIES:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for every question
    logging.info("libraries imported in %.1f s", time.monotonic() - began)

    from fedgen_app.fleet.loopback import Runtime
    from fedgen_app.fleet.worker import Worker

    Worker(Runtime(runtime, ca), secret, threads).run()


def _threads() -> int:
    """That a task computes with: as OMP_NUM_THREADS says, else one for each processor that we may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted and not (wanted.isdecimal() and int(wanted)):
        raise SettingsError(f"OMP_NUM_THREADS = {wanted!r}: should be a number from 1 on")
    return int(wanted or len(os.sched_getaffinity(0)))


def _settle() -> None:
    """What has to be done before anything large is imported, which may start threads; why: fleet/zygote.py."""
    from fedgen_app.fleet import kernel

    try:
        kernel.drop_privileges()
    except OSError as error:
        raise SettingsError(f"the worker cannot give up its privileges: {error.strerror}") from None
    kernel.adopt_orphans()
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "FLWR_TELEMETRY_ENABLED": "0"}
