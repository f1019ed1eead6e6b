"""The device's side of the inference service, before a service that sends more than it should."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch
from helpers import tiny_settings
from serving import FINGERPRINT, TOKEN, answering

from fedgen_app.errors import ServiceError
from fedgen_app.learning.backbone import open_backbone
from fedgen_app.learning.mixture import Mixture, combined
from fedgen_app.serving import asks, body
from fedgen_app.serving.client import MOST_ADAPTER_HEADER, MOST_ERROR, Remote, most_of_adapter

FACTS = {"seed": "1", "steps": "6", "guidance": "3.0", "sampler": "ddim"}


def post(client: httpx.Client, most: int, url: str = "http://127.0.0.1") -> bytes:
    return Remote(client, url, TOKEN, FINGERPRINT).post("images", {"prompt": torch.zeros(1, 4, 3)}, FACTS, most)


def lying(answer: Callable[[httpx.Request], httpx.Response]) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(answer))


def test_an_answer_may_be_as_large_as_was_said_and_no_larger() -> None:
    with answering(bytes(1000)) as (host, port), httpx.Client() as client:
        assert post(client, 1000, f"http://{host}:{port}") == bytes(1000)
        with pytest.raises(ServiceError, match="an answer of more than 999 bytes"):
            post(client, 999, f"http://{host}:{port}")


@pytest.mark.parametrize("status", [200, 500])
def test_what_has_no_end_is_not_read_on(status: int) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 10**8:
            sent += 1024
            yield b"x" * 1024

    with pytest.raises(ServiceError) as refused, lying(lambda _: httpx.Response(status, content=endless())) as client:
        post(client, 10_000)
    assert sent <= (10_000 if status == 200 else MOST_ERROR) + 1024 and refused.value.status in (0, status)


def test_a_small_answer_does_not_unfold_into_a_large_one() -> None:
    packed = gzip.compress(bytes(10**8))

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["accept-encoding"] == "identity"
        return httpx.Response(200, content=iter([packed]), headers={"Content-Encoding": "gzip"})

    with lying(answer) as client:
        assert post(client, len(packed)) == packed


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
