"""``fedgen device-worker``: carries out a SuperNode's tasks (``--isolation process``) without a cold start for each.

Three kinds of process:

- this one asks the SuperNode for tasks, has the heavy libraries imported, and never runs an app's code;
- the warm one (``zygote``) is forked from it for one app bundle, imports that, and opens the backbone;
- a child of the warm one carries out one task and ends.

A new bundle gets a new warm process. A child that dies is answered for at once; a SuperNode that dies is waited for.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fedgen_app.engines.keeper import ended_with
from fedgen_app.fleet import kernel
from fedgen_app.fleet.loopback import Runtime

if TYPE_CHECKING:
    from fedgen_app.fleet.flower_task import Task

BUSY, IDLE, LATELY = 0.1, 1.0, 120.0  # seconds between two questions; the longer where nothing came lately
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0  # seconds between two tries to reach a SuperNode
REMINDER = 600.0  # seconds after which it is said again that there is none
PREPARING = 600.0  # seconds that a bundle may take to make itself ready
COLD = 3600.0  # seconds after which one that could not is asked again
LOOK = 5.0  # seconds between two looks whether the SuperNode of a running task is still there
log = logging.getLogger(__name__)


@dataclass
class Warm:
    """The warm process of one bundle.

    Attributes:
        key: What it is prepared for; "": nothing yet.
    """

    pid: int
    channel: socket.socket
    bundle: str
    key: str = ""


@dataclass
class Progress:
    """What is known of the running task.

    Attributes:
        until: When its message is too old to be answered, in seconds since 1970.
        answered: The SuperNode has the whole answer.
        gone: There is no SuperNode any more that could want one.
    """

    header: bytes | None = None
    until: float = math.inf
    folder: str = ""
    facts: dict[str, Any] | None = None
    answered: bool = False
    gone: bool = False


@dataclass
class Worker:
    """The first process.

    Attributes:
        secret: The file that the SuperNode's start script writes; None: it asks for none.
        threads: That a task computes with.
        pause: Seconds before the next try, where one fails; longer each time, until a SuperNode lets us ask for tasks.
        said: What was last said to be wrong, and when.
        cold: Bundles that could not make themselves ready, with the time before which they are not asked again.
    """

    runtime: Runtime
    secret: Path | None
    threads: int
    stopping: bool = False
    pause: float = FIRST_PAUSE
    said: tuple[str, float] = ("", 0.0)
    warm: Warm | None = None
    cold: dict[str, float] = field(default_factory=dict)
    _wake: socket.socket | None = None

    def run(self) -> None:
        """Carry out tasks until SIGTERM or SIGINT."""
        from fedgen_app.fleet import flower_task

        with self._signals():
            try:
                while not self.stopping:
                    self._serve(flower_task)
            finally:
                self._end_warm()

    def _serve(self, flower: Any) -> None:
        """Reach a SuperNode and carry out its tasks for as long as it answers."""
        if (client := self._reach(flower)) is None:
            return
        last = 0.0
        with contextlib.closing(client):
            try:
                while not self.stopping:
                    task = flower.acquire(client)
                    if not last:  # who listens may yet refuse: only now are we let in
                        log.info("connected to the SuperNode at %s", self.runtime.address)
                        self.pause, self.said, last = FIRST_PAUSE, ("", 0.0), time.monotonic()
                    if task:
                        self._carry_out(flower, task)
                        last = time.monotonic()
                    self._wait(BUSY if time.monotonic() - last < LATELY else IDLE)
            except (flower.httpx.HTTPError, ValueError) as error:
                self._fail("lost the SuperNode at %s: %s", _short(error))

    def _reach(self, flower: Any) -> Any:
        """A connection to a SuperNode that listens, however long that takes; None: we are to stop."""
        while not self.stopping:
            try:
                secret = self._read_secret()
                if _listens(self.runtime.address):
                    return flower.dispatcher(self.runtime, secret)
                found = "nothing listens there"
            except (OSError, ValueError) as error:
                found = _short(error)
            self._fail("no SuperNode at %s (%s); trying on", found)
        return None

    def _fail(self, text: str, reason: str) -> None:
        """Say what is wrong, the same no more often than every REMINDER seconds, and wait before the next try."""
        what, when = self.said
        if what != reason or time.monotonic() - when > REMINDER:
            log.warning(text, self.runtime.address, reason)
            self.said = reason, time.monotonic()
        self._wait(self.pause)
        self.pause = min(self.pause * 2, LONGEST_PAUSE)

    def _read_secret(self) -> bytes | None:
        """Anew for each connection: the file may be younger than we are."""
        if self.secret is None:
            return None
        if not (found := self.secret.read_bytes()):
            raise ValueError(f"{self.secret}: is empty")
        return found

    def _carry_out(self, flower: Any, task: Task) -> None:
        from fedgen_app.fleet.zygote import GIVEN_UP

        began, progress = time.monotonic(), Progress()
        status = self._attempt(task, progress)
        if status is None and progress.header is None and not (progress.gone or self.stopping):
            status = self._attempt(task, progress)  # the warm process had died before: the task is still whole
        if status == GIVEN_UP:
            log.warning("task %d is ended: the SuperNode has given it up", task.number)
        elif not progress.gone and (status != 0 or not progress.answered):
            told = "given up" if status is None else ended_with(status)
            log.error("task %d ended %s an answer, %s", task.number, "after" if progress.answered else "without", told)
            if progress.answered:
                flower.finish(self.runtime, task)
            else:
                flower.answer_for(self.runtime, task, progress.header)
        log.info("task %d: %.1f s", task.number, time.monotonic() - began)
        if progress.facts and time.monotonic() >= self.cold.get(task.bundle, 0.0) and not self.stopping:
            self._prepare(task.bundle, progress.folder, progress.facts)

    def _attempt(self, task: Task, progress: Progress) -> int | None:
        """Let the bundle's warm process carry it out, and end what it left running; returns as ``_follow``."""
        if self.warm is None or self.warm.bundle != task.bundle:
            self._end_warm()
            self.warm = self._start_warm(task.bundle)
        try:
            status = self._follow(self.warm, task, progress)
        except (OSError, ValueError, KeyError, TypeError) as error:  # an app may have written into the channel
            log.error("the warm process is lost: %s", _short(error))
            status = None
        if status is None:
            self._end_warm()
        else:
            kernel.end_descendants(spared=self.warm.pid)
        return status

    def _follow(self, warm: Warm, task: Task, progress: Progress) -> int | None:
        """Hand over a task and take note of what is told of it; end a child that hangs once nobody waits for it.

        Returns:
            The child's exit status; None: it was given up, or the warm process ended.
        """
        from fedgen_app.fleet.flower_task import expiry
        from fedgen_app.fleet.zygote import receive, send

        send(warm.channel, "task", number=task.number, bundle=task.bundle, token=task.token)
        unseen, ending = 0.0, False
        while not self.stopping:
            spoke = self._wait(min(LOOK, max(0.0, progress.until - time.time())), warm.channel)
            if time.time() >= progress.until and ending:
                return None
            if not ending and time.time() >= progress.until:
                log.error("task %d is ended: its message is valid no longer", task.number)
                kernel.end_descendants(spared=warm.pid)
                ending, progress.until = True, time.time() + LOOK  # so long has the warm process to tell of it
            if not spoke:
                unseen = 0.0 if _listens(self.runtime.address) else unseen + LOOK
                if unseen > 30.0:
                    log.warning("the SuperNode is gone: task %d is given up", task.number)
                    progress.gone = True
                    return None
                continue
            told = receive(warm.channel)
            if told is None:
                return None
            if told["what"] == "message" and progress.header is None:  # what comes later is the app's
                header = bytes.fromhex(told["header"])
                progress.until, progress.header = expiry(header), header
            elif told["what"] == "answered":
                progress.answered = True
            elif told["what"] == "facts":
                progress.folder, progress.facts = str(told["folder"]), told["facts"]
            elif told["what"] == "ended":
                return int(told["status"])
        return None

    def _prepare(self, bundle: str, folder: str, facts: dict[str, Any]) -> None:
        """Let the warm process open what the next task will want, while nobody waits for us."""
        from fedgen_app.fleet.zygote import receive, send

        if self.warm and self.warm.key == facts["key"]:
            return
        if self.warm is None or self.warm.key:  # what was open before would stay in memory beside the new
            self._end_warm()
            self.warm = self._start_warm(bundle)
        began = time.monotonic()
        send(self.warm.channel, "prepare", folder=folder, facts=facts)
        told: dict[str, Any] | None = None
        while not self.stopping and time.monotonic() - began < PREPARING:
            if self._wait(1.0, self.warm.channel):
                with contextlib.suppress(ValueError, OSError):
                    told = receive(self.warm.channel)
                break
        if self.stopping:
            return
        if told and told.get("ok") is True:
            self.warm.key = facts["key"]
            log.info("warm after %.1f s", time.monotonic() - began)
            return
        log.error("bundle %.8s does not get warm; its tasks start colder for an hour", bundle)
        self.cold[bundle] = time.monotonic() + COLD  # memory may be free again by then, or a backbone be back
        self._end_warm()

    def _start_warm(self, bundle: str) -> Warm:
        from fedgen_app.fleet import zygote

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        me = os.getpid()
        if (pid := os.fork()) == 0:
            try:
                zygote.live(theirs, self.runtime, self.threads, me)
            finally:  # it must never come back into a copy of our loop
                os._exit(1)
        theirs.close()
        return Warm(pid, ours, bundle)

    def _end_warm(self) -> None:
        if self.warm is None:
            return
        self.warm.channel.close()
        kernel.end_descendants()
        self.warm = None

    def _wait(self, seconds: float, channel: socket.socket | None = None) -> bool:
        """Until the channel has a message, a signal came, or the time is over; whether there is a message."""
        assert self._wake is not None
        sources = [self._wake, *([channel] if channel else [])]
        ready = select.select(sources, [], [], seconds)[0]
        if self._wake in ready:
            self._wake.recv(64)
        return channel in ready

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            self.stopping = True

        self._wake, other = socket.socketpair()
        other.setblocking(False)
        before = signal.set_wakeup_fd(other.fileno())
        old = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            for number, handler in old.items():
                signal.signal(number, handler)


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), 2):
        return True
    return False


def _short(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    refused = " (its secret is another one, or it wants one)" if status in (401, 403) else ""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}{refused}"
