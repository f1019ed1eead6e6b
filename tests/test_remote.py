"""The device's side of the inference service, before a service that sends more than it should."""

from __future__ import annotations

import contextlib
import gzip
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from helpers import tiny_settings
from serving import FINGERPRINT, TOKEN, answering, until

from fedgen_app.errors import ServiceError
from fedgen_app.learning.backbone import open_backbone
from fedgen_app.learning.mixture import Mixture, combined
from fedgen_app.serving import asks, body, client
from fedgen_app.serving.client import ENDED_WAIT, MOST_ADAPTER_HEADER, MOST_ERROR, Remote, most_of_adapter

FACTS = {"seed": "1", "steps": "6", "guidance": "3.0", "sampler": "ddim"}


def post(device: httpx.Client, most: int, url: str = "http://127.0.0.1") -> bytes:
    return Remote(device, url, TOKEN, FINGERPRINT).post("images", {"prompt": torch.zeros(1, 4, 3)}, FACTS, most)


def lying(answer: Callable[[httpx.Request], httpx.Response]) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(answer))


def answered(device: httpx.Client, url: str) -> bool:
    try:
        return post(device, 1000, url) == b"drawn"
    except ServiceError:
        return False


def streamed(status: int, headers: dict[str, str]) -> httpx.Response:
    return httpx.Response(status, headers=headers, content=iter([b"x"]))


def test_an_answer_may_be_as_large_as_was_said_and_no_larger() -> None:
    with answering(bytes(1000)) as (host, port), httpx.Client() as device:
        assert post(device, 1000, f"http://{host}:{port}") == bytes(1000)
        with pytest.raises(ServiceError, match="an answer of more than 999 bytes"):
            post(device, 999, f"http://{host}:{port}")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how long was waited, without doing so."""
    found: list[float] = []
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=found.append))
    return found


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_service_is_asked_again_when_it_says(status: int, waits: list[float]) -> None:
    answers = iter([(status, {"Retry-After": "7"})] * 2 + [(200, {})])
    with lying(lambda _: streamed(*next(answers))) as device:
        assert post(device, 1) == b"x"
    assert waits == [7.0, 7.0]


def test_a_service_that_stays_busy_is_asked_five_times(waits: list[float]) -> None:
    with pytest.raises(ServiceError, match="HTTP 429"), lying(lambda _: streamed(429, {})) as device:
        post(device, 1)
    assert waits == [1.0] * 4


def test_a_connection_that_is_closed_at_once_is_tried_again_and_one_that_is_refused_is_not(waits: list[float]) -> None:
    with answering(b"drawn", alike=1) as place, httpx.Client() as device, contextlib.ExitStack() as held:
        url = f"http://{place[0]}:{place[1]}"
        too_many = [held.enter_context(socket.create_connection(place)) for _ in range(2)]
        with pytest.raises(ServiceError) as refused:
            post(device, 1000, url)
        assert refused.value.status == 0 and waits == [ENDED_WAIT] * 4
        for other in too_many:
            other.close()
        until(lambda: answered(device, url))  # once the service has seen that
    waits.clear()
    with pytest.raises(ServiceError, match="refused"), httpx.Client() as device:
        post(device, 1000, url)
    assert not waits


@pytest.mark.parametrize("status", [200, 500])
def test_what_has_no_end_is_not_read_on(status: int) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 10**8:
            sent += 1024
            yield b"x" * 1024

    with pytest.raises(ServiceError) as refused, lying(lambda _: httpx.Response(status, content=endless())) as device:
        post(device, 10_000)
    assert sent <= (10_000 if status == 200 else MOST_ERROR) + 1024 and refused.value.status in (0, status)


def test_a_small_answer_does_not_unfold_into_a_large_one() -> None:
    packed = gzip.compress(bytes(10**8))

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["accept-encoding"] == "identity"
        return httpx.Response(200, content=iter([packed]), headers={"Content-Encoding": "gzip"})

    with lying(answer) as device:
        assert post(device, len(packed)) == packed


def test_the_largest_mixed_adapter_still_fits() -> None:
    settings = tiny_settings(clusters__choose="count", clusters__count=3, aggregation__residual_rank=2)
    backbone = open_backbone(settings)
    part = backbone.fresh(0)
    mixed = combined(Mixture.of({0: 1, 1: 1, 2: 1}), {0: part, 1: part, 2: part}, lambda _: 1.0)
    size = len(body.write(mixed, {}))
    for rows in ({asks.VECTOR: torch.zeros(1, 8)}, {asks.CLUSTERS: torch.tensor([0, 1, 2])}):
        assert size < most_of_adapter(settings, backbone, rows) < MOST_ADAPTER_HEADER + 3 * size
    rows: dict[str, Any] = {}
    assert most_of_adapter(settings, backbone, rows) < MOST_ADAPTER_HEADER + size
