"""One thread that owns the model: it takes waiting requests that fit together and carries them out in one go."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from fedgen_app.errors import ServiceError
from fedgen_app.serving.asks import Ask
from fedgen_app.serving.metrics import Metrics

log = logging.getLogger(__name__)
CarryOut = Callable[[Sequence[Ask]], list[bytes]]


@dataclass
class _Job:
    ask: Ask
    answer: Future[bytes] = field(default_factory=Future)


class Worker:
    """A queue that is never longer than it may be, and the thread that empties it.

    Args:
        carry_out: Asks of equal ``together`` to the answers' bodies.
        most_waiting: Requests that may wait.
        most_rows: Images of one forward pass; a request with more of them has a pass of its own.
    """

    def __init__(self, carry_out: CarryOut, most_waiting: int, most_rows: int, metrics: Metrics) -> None:
        self._carry_out, self._most_waiting, self._most_rows = carry_out, most_waiting, most_rows
        self._metrics = metrics
        self._waiting: deque[_Job] = deque()
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
        return len(self._waiting)

    def put(self, ask: Ask) -> Future[bytes]:
        """The answer, when it will be there. Cancelled before its turn, a request is not carried out.

        Raises:
            ServiceError: 429: too many wait already; 503: the service is ending.
        """
        job = _Job(ask)
        with self._changed:
            if not self._open:
                raise ServiceError(503, "the service is ending")
            if len(self._waiting) >= self._most_waiting:
                raise ServiceError(429, "too many requests wait already")
            self._waiting.append(job)
            self._changed.notify()
        return job.answer

    def _work(self) -> None:
        while batch := self._next():
            began = time.perf_counter()
            try:
                answers = self._carry_out([job.ask for job in batch])
            except Exception as error:  # whatever one batch runs into, the next one must not wait for ever
                log.error("a batch of %d requests failed: %s", len(batch), type(error).__name__)
                for job in batch:
                    job.answer.set_exception(ServiceError(500, "the request could not be carried out"))
            else:
                if batch[0].ask.kind != "adapters":
                    self._metrics.add("images_total", sum(len(job.ask.mixtures) for job in batch))
                for job, answer in zip(batch, answers, strict=True):
                    job.answer.set_result(answer)
            self._metrics.add("busy_seconds_total", time.perf_counter() - began)
            self._metrics.add("batches_total")
            self._metrics.add("mixtures_total", len({mixture for job in batch for mixture in job.ask.mixtures}))

    def _next(self) -> list[_Job]:
        """The oldest request and those that fit to it; empty: it is over."""
        with self._changed:
            while True:
                while not self._waiting and self._open:
                    self._changed.wait()
                if not self._waiting:
                    return []
                chosen: list[_Job] = []
                left, rows = deque[_Job](), 0
                for job in self._waiting:
                    count = len(job.ask.mixtures)
                    like = not chosen or job.ask.together == chosen[0].ask.together
                    if like and (not chosen or rows + count <= self._most_rows):
                        if job.answer.set_running_or_notify_cancel():  # nobody waits for it any more
                            chosen.append(job)
                            rows += count
                    else:
                        left.append(job)
                self._waiting = left
                if chosen:
                    return chosen
