"""One thread that owns the model: it takes waiting requests that fit together and carries them out in one go."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from fedgen_app.errors import ServiceError
from fedgen_app.serving.asks import Ask
from fedgen_app.serving.guard import LaterError
from fedgen_app.serving.metrics import Metrics

log = logging.getLogger(__name__)
CarryOut = Callable[[Sequence[Ask]], list[bytes]]
SHARE = 4  # so many clients at least it takes to fill the queue
LONGEST_WAIT = 60.0  # seconds that a client is told to stay away at most
REMEMBERED = 16  # batches from which the pace is known


@dataclass
class _Job:
    ask: Ask
    client: Hashable
    answer: Future[bytes] = field(default_factory=Future)


class Worker:
    """A queue that is never longer than it may be, and the thread that empties it.

    Clients share its time, not its places: next comes the oldest request of the client that was given the least work.
    Who comes anew begins where the client is that was served last: having been away saves nothing up (start-time fair
    queueing, Goyal, Vin and Cheng 1997).

    Args:
        carry_out: Asks of equal ``together`` to the answers' bodies.
        most_waiting: Requests that may wait; of one client a quarter of them.
        most_rows: Images of one forward pass; a request with more of them has a pass of its own.
    """

    def __init__(self, carry_out: CarryOut, most_waiting: int, most_rows: int, metrics: Metrics) -> None:
        self._carry_out, self._most_waiting, self._most_rows = carry_out, most_waiting, most_rows
        self._metrics = metrics
        self._waiting: deque[_Job] = deque()
        self._given: Counter[Hashable] = Counter()  # work by client, of those that were given more than ``_reached``
        self._reached = 0  # what the client that was served last had been given before
        self._recent: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)  # work and seconds of batches
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._work, name="worker")

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Take nothing more, carry out what waits, and end."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        with self._changed:
            self._drop_cancelled()
            return len(self._waiting)

    @property
    def wait(self) -> float:
        """Seconds that what waits will take, as far as the last batches tell; from 1 to ``LONGEST_WAIT``."""
        with self._changed:
            seconds, done = sum(seconds for _, seconds in self._recent), sum(work for work, _ in self._recent)
            expected = sum(job.ask.work for job in self._waiting) * seconds / done if done else 1.0
        return min(max(expected, 1.0), LONGEST_WAIT)

    def put(self, ask: Ask, client: Hashable) -> Future[bytes]:
        """The answer, when it will be there. Cancelled before its turn, a request is not carried out.

        Raises:
            ServiceError: 429: too many wait already, of all clients or of this one; 503: the service is ending.
        """
        job = _Job(ask, client)
        with self._changed:
            if not self._open:
                raise ServiceError(503, "the service is ending")
            self._drop_cancelled()
            if len(self._waiting) >= self._most_waiting:
                raise LaterError("too many requests wait already", self.wait)
            if sum(other.client == client for other in self._waiting) >= max(1, self._most_waiting // SHARE):
                raise LaterError("too many requests of this client wait already", self.wait)
            self._waiting.append(job)
            self._changed.notify()
        return job.answer

    def _drop_cancelled(self) -> None:
        """Their places are free at once."""
        self._waiting = deque(job for job in self._waiting if not job.answer.cancelled())

    def _work(self) -> None:
        while batch := self._next():
            alone = len(batch) == 1
            if not self._done(batch, last=alone) and not alone:
                for job in batch:  # what is too large for the device, or broken, costs none that share its pass
                    self._done([job], last=True)

    def _done(self, batch: Sequence[_Job], last: bool) -> bool:
        """Whether a batch was carried out; where it was not and it is the last try, its clients are told."""
        began = time.perf_counter()
        try:
            answers = self._carry_out([job.ask for job in batch])
        except Exception as error:  # whatever one batch runs into, the next one must not wait for ever
            log.error("a batch of %d requests failed: %s", len(batch), type(error).__name__)
            for job in batch if last else ():
                job.answer.set_exception(ServiceError(500, "the request could not be carried out"))
            return False
        finally:
            self._metrics.add("busy_seconds_total", time.perf_counter() - began)
        if batch[0].ask.kind != "adapters":
            self._metrics.add("images_total", sum(len(job.ask.mixtures) for job in batch))
        self._metrics.add("batches_total")
        self._metrics.add("mixtures_total", len({mixture for job in batch for mixture in job.ask.mixtures}))
        with self._changed:
            self._recent.append((sum(job.ask.work for job in batch), time.perf_counter() - began))
        for job, answer in zip(batch, answers, strict=True):
            job.answer.set_result(answer)
        return True

    def _next(self) -> list[_Job]:
        """The request whose turn it is and those that fit to it, oldest first; empty: it is over."""
        with self._changed:
            while True:
                while not self._waiting and self._open:
                    self._changed.wait()
                if not self._waiting:
                    return []
                first = min(self._waiting, key=lambda job: self._given[job.client])  # of equal ones the oldest
                chosen = self._taken(first)
                if chosen:
                    self._charge(first, chosen)
                    return chosen

    def _taken(self, first: _Job) -> list[_Job]:
        """It, and what fits into its pass, out of the queue; without those that nobody waits for any more."""
        chosen: list[_Job] = []
        rows = 0
        for job in [first, *(job for job in self._waiting if job is not first)]:
            count = len(job.ask.mixtures)
            fits = job.ask.together == first.ask.together and rows + count <= self._most_rows
            if (job is first or fits) and job.answer.set_running_or_notify_cancel():
                chosen.append(job)
                rows += count
        gone = set(map(id, chosen))
        self._waiting = deque(job for job in self._waiting if id(job) not in gone and not job.answer.cancelled())
        return chosen

    def _charge(self, first: _Job, chosen: Sequence[_Job]) -> None:
        self._reached = max(self._reached, self._given[first.client])
        for job in chosen:
            self._given[job.client] = max(self._given[job.client], self._reached) + job.ask.work
        # The others are where one begins that comes anew.
        self._given = Counter({client: work for client, work in self._given.items() if work > self._reached})
