"""The warm process: it has one app bundle imported and the backbone open, and forks a child for each task.

Why a fork is safe here. A child of ``fork`` has one thread, the one that forked; pools of threads that existed before
are gone in it, while their locks and counters say that they are there, and whoever waits for them waits for ever. So
there must be none:

- torch computes with one thread here (``set_num_threads(1)``), so that neither OpenMP's nor MKL's pool is ever started;
  the child sets its own number first, and its pool is its own. No backward pass runs here, so that autograd has no
  threads; OpenBLAS gets ``OPENBLAS_NUM_THREADS=1`` before numpy is imported; tokenizers are told not to use any.
- nothing here speaks to a network: Flower's client, its heartbeat thread and TLS live in the child alone.
- CUDA is not touched: its context does not survive a fork. Where the backbone lies on a GPU, only imports are shared.

Before every fork the process counts its threads, and ends where there is one too many: its parent starts another one.
What the child reads it shares with us (copy on write); what it writes is its own and ends with it.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from fedgen_app.fleet import flower_task, kernel
from fedgen_app.fleet.loopback import Runtime

LARGEST = 128 * 1024  # bytes of one message between the processes
UNSAFE = 70  # exit status: there were threads
GIVEN_UP = 71  # of a child: the SuperNode does not want this any more
log = logging.getLogger(__name__)


def send(channel: socket.socket, what: str, **fields: Any) -> None:
    """One message; the other side gets it whole or not at all."""
    channel.send(json.dumps({"what": what, **fields}).encode())


def receive(channel: socket.socket) -> dict[str, Any] | None:
    """One message; None: the other side is gone.

    Raises:
        ValueError: it is none of ours.
    """
    raw = channel.recv(LARGEST)
    if not raw:
        return None
    found = json.loads(raw)
    if not isinstance(found, dict) or not isinstance(found.get("what"), str):
        raise ValueError("not one of our messages")
    return found


def live(channel: socket.socket, runtime: Runtime, threads: int, parent: int) -> NoReturn:
    """Do as we are told until the channel closes."""
    kernel.end_with_parent(parent)
    kernel.close_all_but([channel.fileno()])
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _forget_own_modules()
    while order := receive(channel):
        if order["what"] == "prepare":
            _prepare(channel, order["folder"], order["facts"])
        else:
            task = flower_task.Task(order["number"], order["bundle"], order["token"])
            _serve(channel, runtime, task, threads)
    os._exit(0)


def _forget_own_modules() -> None:
    """What is imported from here on is the bundle's code, not that of the installed package, which may be older."""
    for name in [n for n in sys.modules if n.partition(".")[0] in ("fedgen_app", "client_app", "server_app")]:
        del sys.modules[name]
    # The bundle's folder goes in front of these by itself; "" would be whatever folder we were started in.
    sys.path[:] = [place for place in sys.path if place]


def _prepare(channel: socket.socket, folder: str, facts: dict[str, Any]) -> None:
    """Import the bundle and let it make itself ready; foreign code, which may do anything but return."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        importlib.import_module("client_app")
        importlib.import_module("fedgen_app.federation.warmth").prepare(facts)
    except Exception:  # whatever a bundle raises: its tasks are carried out all the same, only colder
        log.exception("%s cannot be kept warm", Path(folder).name)
        send(channel, "prepared", ok=False)
        return
    gc.collect()
    gc.freeze()  # else the collector of every child would touch, and so copy, all that is shared
    if found := kernel.other_threads():
        log.error("%s started threads when it made itself ready: %s", Path(folder).name, ", ".join(found))
    send(channel, "prepared", ok=not found)


def _serve(channel: socket.socket, runtime: Runtime, task: flower_task.Task, threads: int) -> None:
    if found := kernel.other_threads():
        log.error("the warm process has threads and cannot be forked: %s", ", ".join(found))
        os._exit(UNSAFE)
    me = os.getpid()
    if (pid := os.fork()) == 0:
        _child(channel, runtime, task, threads, me)
    send(channel, "started", pid=pid)
    _, status = os.waitpid(pid, 0)
    send(channel, "ended", status=os.waitstatus_to_exitcode(status))


def _child(channel: socket.socket, runtime: Runtime, task: flower_task.Task, threads: int, parent: int) -> NoReturn:
    """Carry out one task and end, without what Python does at its end: that belongs to the process we came from."""
    status = 1
    try:
        kernel.end_with_parent(parent)
        import torch

        torch.set_num_threads(threads)
        done = flower_task.carry_out(
            runtime,
            task,
            on_message=lambda header: send(channel, "message", header=header.hex()),
            on_answered=lambda: send(channel, "answered"),
        )
        status = 0
        if (facts := _facts(done)) is not None:
            send(channel, "facts", folder=done.folder, facts=facts)
    except KeyboardInterrupt:  # how Flower's client and heartbeat say so
        status = GIVEN_UP
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:  # nothing may run on in what is a copy of the warm process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _facts(done: flower_task.Done) -> dict[str, Any] | None:
    """What the bundle wants to be kept warm; None: nothing, or it is no bundle of ours."""
    warmth = f"{done.folder}/fedgen_app/federation/warmth.py"
    if done.context is None or not Path(warmth).is_file():
        return None
    found: dict[str, Any] = importlib.import_module("fedgen_app.federation.warmth").remembered(done.context)
    return found if len(json.dumps(found)) < LARGEST // 2 else None
