"""One run of a sweep, or one preparation step, in a process of its own that ends with whoever started it.

Standard input is a pipe from the sweep. It closes when the sweep ends, however it ends, kill -9 included; a thread here
waits for that and then interrupts this process as Ctrl-C would, so that the run settles and can be resumed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PATIENCE = 30.0  # seconds that a run has to settle; Flower's simulation alone may take 8 to end its processes
BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from fedgen_app.sweeps.child import main; main()"
PREPARE = "prepare"


def start(arguments: Sequence[str], log_file: Path, threads: int) -> subprocess.Popen[bytes]:
    """``fedgen ARGUMENTS``, with the package that is running here; what it prints is appended to ``log_file``."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", BOOT, str(Path(__file__).resolve().parents[2]), *arguments],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment(os.environ, threads),
            start_new_session=True,  # Ctrl-C in the terminal reaches the sweep alone, which ends them in good order
        )


def environment(outer: Mapping[str, str], threads: int) -> dict[str, str]:
    """The outer environment with the threads of one run; who asked for fewer outside gets fewer."""
    limits = {}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        asked = outer.get(name, "")
        limits[name] = str(min(threads, int(asked)) if asked.isdecimal() and int(asked) else threads)
    return {**outer, **limits, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "COLUMNS": "120"}


def interrupt(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """End all of them: ask by closing their pipe, wait, kill who is still there."""
    for child in children:
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
    deadline = time.monotonic() + PATIENCE + 5
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.1, deadline - time.monotonic()))
        if child.returncode is None:
            child.kill()
            child.wait()


def main() -> None:
    """Be the child: ``prepare FOLDER STEP`` with the step as JSON, else a command line of ``fedgen``."""
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    sys.argv[0] = "fedgen"
    if sys.argv[1] == PREPARE:
        prepare(Path(sys.argv[2]), json.loads(sys.argv[3]))
        return
    from fedgen_app import cli

    cli.main()


def _end_with_the_sweep() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # `fedgen run` turns it into an interruption
    time.sleep(PATIENCE)
    os._exit(130)


def prepare(folder: Path, step: Mapping[str, Any]) -> None:
    """Carry out a preparation step, which makes ``folder``: whole, or not at all.

    A function is called as ``function(folder, **arguments)``; a script gets ``--output FOLDER --KEY VALUE ...``.
    """
    from fedgen_app.files import folder_atomic

    with folder_atomic(folder) as building:
        if step["call"]:
            module, _, function = step["call"].partition(":")
            getattr(importlib.import_module(module), function)(building, **step["arguments"])
        else:
            options = [text for key, value in step["arguments"].items() for text in (f"--{key}", str(value))]
            sys.argv = [step["script"], "--output", str(building), *options]
            runpy.run_path(step["script"], run_name="__main__")
