"""The worker of the inference service: what it takes together, what it refuses, and how it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import wait

import pytest
import torch

from fedgen_app.errors import ServiceError
from fedgen_app.learning.mixture import Mixture
from fedgen_app.serving.asks import Ask
from fedgen_app.serving.guard import LaterError
from fedgen_app.serving.metrics import Metrics
from fedgen_app.serving.worker import LONGEST_WAIT, Worker


def ask(seed: int, rows: int = 1, steps: int = 5) -> Ask:
    return Ask("images", (Mixture.of({seed % 3: 1}),) * rows, torch.zeros(rows, 1), seed, steps)


class Gated:
    """Carries out batches, each when it is let through, and notes them."""

    def __init__(self) -> None:
        self.gate, self.began = threading.Semaphore(0), threading.Semaphore(0)
        self.batches: list[list[int]] = []

    def __call__(self, batch: Sequence[Ask]) -> list[bytes]:
        self.batches.append([one.seed for one in batch])
        self.began.release()
        assert self.gate.acquire(timeout=20)
        if any(one.seed == 666 for one in batch):
            raise RuntimeError("a photo of a cat")
        return [str(one.seed).encode() for one in batch]


def test_what_fits_together_is_carried_out_together_oldest_first() -> None:
    work, metrics = Gated(), Metrics()
    worker = Worker(work, 20, 4, metrics)
    worker.start()
    first = worker.put(ask(0), 0)
    assert work.began.acquire(timeout=20)
    later = [worker.put(ask(n, rows, steps), n) for n, rows, steps in
             ((1, 1, 5), (2, 1, 9), (3, 2, 5), (4, 2, 5), (5, 1, 5), (6, 7, 9), (7, 1, 5))]  # fmt: skip
    assert worker.waiting == 7
    for _ in range(10):
        work.gate.release()
    wait([first, *later], timeout=20)
    assert [answer.result() for answer in (first, *later)] == [str(n).encode() for n in range(8)]
    assert work.batches == [[0], [1, 3, 5], [2], [4, 7], [6]]
    worker.stop()
    assert "fedgen_serve_batches_total 5" in metrics.text()


def test_a_full_queue_refuses_and_a_cancelled_request_is_left_out() -> None:
    work = Gated()
    worker = Worker(work, 2, 4, Metrics())
    worker.start()
    running = worker.put(ask(0), 0)
    assert work.began.acquire(timeout=20)
    given_up, kept = worker.put(ask(1), 1), worker.put(ask(2), 2)
    with pytest.raises(ServiceError, match="too many requests wait") as refused:
        worker.put(ask(3), 3)
    assert refused.value.status == 429
    assert given_up.cancel() and worker.waiting == 1  # its place is free at once
    for _ in range(3):
        work.gate.release()
    assert (running.result(20), kept.result(20)) == (b"0", b"2")
    assert work.batches == [[0], [2]]
    worker.stop()


def test_a_failed_batch_costs_its_requests_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    work = Gated()
    worker = Worker(work, 5, 1, Metrics())
    worker.start()
    broken, whole = worker.put(ask(666), 0), worker.put(ask(1), 1)
    for _ in range(2):
        work.gate.release()
    error = broken.exception(20)
    assert isinstance(error, ServiceError) and error.status == 500 and "cat" not in str(error)
    assert whole.result(20) == b"1"
    worker.stop()
    assert "RuntimeError" in caplog.text and "cat" not in caplog.text


def test_ending_carries_out_what_waits_and_takes_nothing_more() -> None:
    work = Gated()
    worker = Worker(work, 5, 1, Metrics())
    worker.start()
    answers = [worker.put(ask(n), n) for n in range(3)]
    ending = threading.Thread(target=worker.stop)
    assert work.began.acquire(timeout=20)
    ending.start()
    while worker._open:
        pass
    with pytest.raises(ServiceError) as refused:
        worker.put(ask(9), 9)
    assert refused.value.status == 503
    for _ in range(3):
        work.gate.release()
    ending.join(20)
    assert not ending.is_alive() and [answer.result(0) for answer in answers] == [b"0", b"1", b"2"]


def test_who_waits_with_much_leaves_room_and_turns_to_the_others() -> None:
    work = Gated()
    worker = Worker(work, 16, 1, Metrics())
    worker.start()
    answers = [worker.put(ask(0), "busy")]
    assert work.began.acquire(timeout=20)
    answers += [worker.put(ask(n), "busy") for n in (1, 2, 3, 4)]
    with pytest.raises(LaterError, match="of this client wait"):
        worker.put(ask(5), "busy")
    answers += [worker.put(ask(n), client) for n, client in ((6, "rare"), (7, "other"), (8, "rare"))]
    for _ in range(9):
        work.gate.release()
    wait(answers, timeout=20)
    assert work.batches == [[0], [6], [7], [1], [8], [2], [3], [4]]
    worker.stop()


def test_turns_are_weighed_by_work() -> None:
    work = Gated()
    worker = Worker(work, 24, 1, Metrics())
    worker.start()
    answers = [worker.put(ask(0), "first")]
    assert work.began.acquire(timeout=20)
    answers += [worker.put(ask(n, steps=15), "much") for n in (1, 2)]
    answers += [worker.put(ask(n, steps=5), "little") for n in range(3, 9)]
    for _ in range(9):
        work.gate.release()
    wait(answers, timeout=20)
    assert work.batches == [[0], [1], [3], [4], [5], [2], [6], [7], [8]]  # three of five steps for one of fifteen
    worker.stop()


def test_one_request_that_breaks_does_not_cost_those_in_its_pass() -> None:
    work, metrics = Gated(), Metrics()
    worker = Worker(work, 12, 4, metrics)
    worker.start()
    first = worker.put(ask(0), 0)
    assert work.began.acquire(timeout=20)
    whole, broken, other = worker.put(ask(1), 1), worker.put(ask(666), 2), worker.put(ask(2), 3)
    for _ in range(5):
        work.gate.release()
    assert [answer.result(20) for answer in (first, whole, other)] == [b"0", b"1", b"2"]
    assert isinstance(broken.exception(20), ServiceError)
    assert work.batches == [[0], [1, 666, 2], [1], [666], [2]]
    worker.stop()
    assert "fedgen_serve_batches_total 3" in metrics.text()


def test_a_full_queue_says_when_it_will_be_through() -> None:
    known, began, go = threading.Event(), threading.Event(), threading.Event()

    def draw(batch: Sequence[Ask]) -> list[bytes]:
        time.sleep(0.2)
        if known.is_set():
            began.set()
            go.wait(20)  # however long this test is kept from the processor, nothing leaves the queue
        return [b"" for _ in batch]

    worker = Worker(draw, 8, 1, Metrics())
    assert worker.wait == 1.0  # nothing is known yet
    worker.start()
    worker.put(ask(0), 0).result(20)
    known.set()
    answers = [worker.put(ask(0, rows=10), 0)]
    assert began.wait(20)
    answers += [worker.put(ask(n, rows=10), n) for n in range(1, 9)]
    try:
        with pytest.raises(LaterError) as refused:
            worker.put(ask(9), 9)
        assert 5 < refused.value.wait <= LONGEST_WAIT  # eight of ten images each, of which one took 0.2 s
    finally:
        go.set()
    wait(answers, timeout=20)
    worker.stop()
