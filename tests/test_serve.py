"""The inference service over HTTP: what it gives, whom it refuses, and that nothing makes it fall over."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from helpers import federate, tiny_config
from pipelines import image_config
from serving import OTHER_TOKEN, TOKEN, Listening, asked_of, engine_of, image_body, image_run, listening, text_run

from fedgen_app.errors import SettingsError
from fedgen_app.learning import adapters
from fedgen_app.learning.mixture import Mixture, combined
from fedgen_app.serving import asks, body
from fedgen_app.serving.engine import scaling
from fedgen_app.serving.guard import Limits

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service() -> Iterator[Listening]:
    with listening(image_run()) as found:
        yield found


def pixels(service: Listening, content: bytes, count: int = 1) -> np.ndarray:
    engine, stages = service.engine, service.engine.task.stages
    assert stages is not None
    return np.stack(stages.unpack(engine.settings, engine.backbone, content, count)).astype(int)


def test_an_image_is_what_the_run_itself_draws(service: Listening) -> None:
    engine = service.engine
    answer = service.post("images", asked_of(engine, seed="5"))
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png", answer.text
    adapters.write(engine.backbone.model, engine.parts[asks.GLOBAL])
    (drawn,) = engine.task.sample(engine.settings, engine.backbone, ["a photo of a disc"], 5)
    assert np.abs(pixels(service, answer.content)[0] - drawn.content).max() <= 1
    assert service.post("images", asked_of(engine, seed="5")).content == answer.content
    assert service.post("images", asked_of(engine, seed="6")).content != answer.content


def test_a_batch_of_users_and_clusters_gives_each_what_it_gets_alone(service: Listening) -> None:
    engine = service.engine
    assert engine.task.stages is not None and len(engine.frame.clusters) == 3
    bodies = []
    for number in range(9):
        named = torch.tensor([number % 3, (number + 1) % 3])
        rows = torch.tensor([[1.0, number]], dtype=torch.float64)
        encoded = engine.task.stages.encode(engine.backbone, [f"a photo of a {'disc' if number % 2 else 'cross'}"])
        tensors = {asks.PROMPT: encoded, "clusters": named, "weights": rows}
        bodies.append(image_body(tensors, fingerprint=engine.frame.fingerprint, seed=str(number)))
    alone = [service.post("images", one) for one in bodies]
    before = service.metric("batches_total")
    with ThreadPoolExecutor(9) as pool:
        together = list(pool.map(lambda one: service.post("images", one), bodies))
    assert service.metric("batches_total") - before < 9
    for one, other in zip(alone, together, strict=True):
        assert one.status_code == other.status_code == 200
        assert np.abs(pixels(service, one.content) - pixels(service, other.content)).max() <= 1
    assert len({answer.content for answer in alone}) > 5


def test_wrong_requests_get_a_clear_4xx(service: Listening) -> None:
    right, most = asked_of(service.engine), service.engine.frame.most_bytes
    for kind, content, token, status in (
        ("images", right, "x", 401),
        ("images", right, TOKEN[:-1], 401),
        ("images", right, OTHER_TOKEN, 200),
        ("images", b"", TOKEN, 400),
        ("images", b"a photo of a cat", TOKEN, 400),
        ("images", right[:-4], TOKEN, 400),
        ("images", right + bytes(4), TOKEN, 400),
        ("images", bytes(most + 1), TOKEN, 413),
        ("images", bytes(30 * 1024**2), TOKEN, 413),
        ("images", bytes(1024**2), "wrong", 401),
        ("images", image_body(), TOKEN, 409),
        ("latents", right, TOKEN, 422),
        ("adapters", right, TOKEN, 422),
        ("texts", right, TOKEN, 404),
    ):
        answer = service.post(kind, content, token)
        assert answer.status_code == status, (kind, len(content), answer.text)
        if status != 200:
            assert answer.json()["error"] and "cat" not in answer.text
    assert service.post("images", right, "x").headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{service.url}/v1/images").status_code == 405
    for path in ("/docs", "/openapi.json", "/redoc", "/", "/v1"):
        assert service.get(path).status_code == 404
    chunks = (bytes(60_000) for _ in range(most // 60_000 + 2))  # without a length that could be looked at
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert httpx.post(f"{service.url}/v1/images", content=chunks, headers=headers).status_code == 413


def test_health_is_for_all_and_metrics_for_those_with_a_token(service: Listening) -> None:
    assert httpx.get(f"{service.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{service.url}/metrics").status_code == 401
    before = service.metric('requests_total{path="images",status="401"}')
    service.post("images", b"", "wrong")
    assert service.metric('requests_total{path="images",status="401"}') == before + 1
    images = service.metric("images_total")
    service.post("images", asked_of(service.engine))
    assert service.metric("images_total") == images + 1


def test_two_hundred_at_once_are_answered_or_told_to_wait() -> None:
    with listening(image_run(), waiting=10) as service:
        right = asked_of(service.engine)
        most = service.engine.frame.most_bytes
        kinds = [(right, TOKEN), (right, OTHER_TOKEN), (right, "wrong"), (b"no body", TOKEN), (bytes(most + 9), TOKEN)]
        kinds += [(image_body(), TOKEN), (right[:-4], TOKEN), (right, TOKEN)]
        wanted = [{200, 429}, {200, 429}, {401}, {400}, {413}, {409}, {400}, {200, 429}]
        ready = threading.Barrier(200)

        def ask(number: int) -> tuple[int, int]:
            ready.wait(60)
            answer = service.post("images", *kinds[number % 8])
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
            return number % 8, answer.status_code

        with ThreadPoolExecutor(200) as pool:
            found = Counter(pool.map(ask, range(200)))
        assert sum(found.values()) == 200
        assert {(kind, status) for kind, status in found if status not in wanted[kind]} == set()
        statuses = {status for _, status in found}
        assert {200, 401, 400, 413, 409, 429} <= statuses, found
        assert service.get("/health").status_code == 200
        assert service.post("images", right).status_code == 200
        assert (service.metric("waiting"), service.metric("open")) == (0, 0)


def test_two_hundred_at_once_of_one_address_are_all_answered_with_the_limits_that_are_shipped() -> None:
    shipped = Limits()
    with listening(image_run(), per_minute=shipped.per_minute, burst=shipped.burst) as service:
        right, ready = asked_of(service.engine), threading.Barrier(200)

        def ask(number: int) -> tuple[int, int]:
            ready.wait(60)
            answer = service.post("images", right, (TOKEN, OTHER_TOKEN, "wrong")[number % 3])
            return number % 3, answer.status_code

        with ThreadPoolExecutor(200) as pool:
            found = Counter(pool.map(ask, range(200)))
        assert found[2, 401] == 66 and all(found[token, 200] and found[token, 429] for token in (0, 1))
        assert sum(found.values()) == 200 and len(found) == 5, found


def test_each_client_has_a_rate_of_its_own() -> None:
    with listening(image_run(), per_minute=6, burst=3) as service:
        wrong = [service.post("images", b"").status_code for _ in range(5)]
        assert wrong == [400, 400, 400, 429, 429]
        answer = service.post("images", b"")
        assert 1 <= int(answer.headers["retry-after"]) <= 10
        assert service.post("images", b"", OTHER_TOKEN).status_code == 400
        assert service.get("/health").status_code == 200


def begun(service: Listening) -> socket.socket:
    """A connection on which half a body has come."""
    connection = socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), timeout=60)
    head = f"POST /v1/images HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    connection.sendall(head.encode() + b"Content-Length: 900\r\n\r\nhalf")
    while not service.metric("open"):
        time.sleep(0.05)
    return connection


def test_slow_bodies_end() -> None:
    with listening(image_run(), seconds=5.0, arriving=1) as service, begun(service) as slow:
        assert service.post("images", b"").status_code == 429  # the only place is taken
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_who_leaves_in_the_middle_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    with listening(image_run(), arriving=1) as service:
        begun(service).close()
        deadline = time.monotonic() + 60
        while service.metric("open"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert service.post("images", asked_of(service.engine)).status_code == 200
    assert caplog.text == ""


def test_a_mixed_adapter_is_the_exact_sum() -> None:
    with listening(text_run()) as service:
        engine = service.engine
        assert engine.frame.shapes is None
        tensors = {"clusters": torch.tensor([1, 2]), "weights": torch.tensor([[1.0, 3.0]], dtype=torch.float64)}
        answer = service.post("adapters", body.write(tensors, {"backbone": engine.frame.fingerprint}))
        assert answer.status_code == 200, answer.text
        found, facts = body.read(answer.content, 10**6)
        expected = combined(Mixture.of({1: 1, 2: 3}), engine.parts, lambda rank: scaling(engine.settings, rank))
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
        assert facts == {"alpha": "8.0", "rslora": "false"}
        answer = service.post("images", image_body(fingerprint=engine.frame.fingerprint))
        assert answer.status_code == 404 and "adapters, no images" in answer.text


def test_class_numbers_would_be_plain_and_whole_models_have_no_adapters(tmp_path: Path) -> None:
    short = {"metrics__samples": 0, "test_sequences": 8, "max_steps": 1, "personal__max_steps": 1, "samples__count": 0}
    federate(image_config(tmp_path / "classes", "classes", num_server_rounds=1, label_column="label", **short), 2)
    assert engine_of(tmp_path / "classes", Limits()).frame.shapes is None
    federate(tiny_config(tmp_path / "whole", method="fedavg-full", num_server_rounds=1, samples__count=0), 2)
    with pytest.raises(SettingsError, match="all weights learned"):
        engine_of(tmp_path / "whole", Limits())
