"""What stands around the handlers of the inference service, without a model behind them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from serving import TOKEN, answering, image_body

from fedgen_app.serving import asks

AUTHORISED = {"Authorization": f"Bearer {TOKEN}"}


def test_an_error_that_nobody_foresaw_tells_its_type_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a photo of a cat")

    monkeypatch.setattr(asks, "parse", broken)
    with answering() as (host, port), httpx.Client(base_url=f"http://{host}:{port}", headers=AUTHORISED) as client:
        answer = client.post("/v1/images", content=image_body())
        assert answer.status_code == 500
        assert answer.json() == {"error": "the request could not be carried out: RuntimeError"}
        lines = client.get("/metrics").text.splitlines()
    assert 'fedgen_serve_requests_total{path="images",status="500"} 1' in lines and "fedgen_serve_open 0" in lines
    assert caplog.messages == ["a request failed: RuntimeError"] and not caplog.records[0].exc_info


def test_without_tokens_no_other_host_is_answered() -> None:
    with answering(b"drawn", tokens=()) as (host, port), httpx.Client(base_url=f"http://{host}:{port}") as client:

        def status(name: str, path: str = "/v1/images") -> int:
            return client.post(path, content=image_body(), headers={"Host": name}).status_code

        for name in ("localhost", f"localhost:{port}", "127.0.0.1", f"LOCALHOST:{port}", "[::1]", f"[::1]:{port}"):
            assert status(name) == 200, name
        for name in (
            f"evil.example:{port}",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "192.0.2.1",
            "",
            "[::1",
        ):
            assert status(name) == 421, name
        assert status("evil.example", "/v1/adapters") == 421
        assert client.get("/metrics", headers={"Host": "evil.example"}).status_code == 421
    with answering(b"drawn") as (host, port):
        headers = AUTHORISED | {"Host": "images.example.org"}
        assert httpx.post(f"http://{host}:{port}/v1/images", content=image_body(), headers=headers).status_code == 200


def test_a_token_has_one_rate_wherever_it_is_sent_from() -> None:
    with answering(burst=2, per_minute=1) as (_, port):
        found = []
        for source in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
            transport = httpx.HTTPTransport(local_address=source)
            with httpx.Client(transport=transport, headers=AUTHORISED) as client:
                found.append(client.post(f"http://127.0.0.1:{port}/v1/images", content=image_body()).status_code)
    assert found == [200, 200, 429]


def test_who_hangs_up_while_it_waits_costs_no_work() -> None:
    with (
        answering(b"drawn", work=3.0, batch=1) as (host, port),
        httpx.Client(base_url=f"http://{host}:{port}", headers=AUTHORISED) as client,
        ThreadPoolExecutor(3) as pool,
    ):

        def told(line: str) -> bool:
            return f"fedgen_serve_{line}" in client.get("/metrics").text.splitlines()

        working = pool.submit(client.post, "/v1/images", content=image_body())
        deadline = time.monotonic() + 20
        while not told("open 1"):
            assert time.monotonic() < deadline
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"http://{host}:{port}/v1/images", content=image_body(), headers=AUTHORISED, timeout=0.3)
        while not told("open 0"):
            assert time.monotonic() < deadline
        assert working.result().content == b"drawn"
        assert told("batches_total 1") and told('requests_total{path="images",status="499"} 1')


def test_what_is_not_begun_in_time_may_come_again_and_what_takes_too_long_may_not() -> None:
    with (
        answering(b"drawn", work=3.0, batch=1, patience=2.0) as (host, port),
        httpx.Client(base_url=f"http://{host}:{port}", headers=AUTHORISED) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        answers = [pool.submit(client.post, "/v1/images", content=image_body()) for _ in range(2)]
        by_status = {answer.result().status_code: answer.result() for answer in answers}
        assert set(by_status) == {429, 504}
        assert "not begun in 1 seconds" in by_status[429].text and by_status[429].headers["retry-after"]
        assert "not done in 2 seconds: ask for less" in by_status[504].text


def test_bodies_in_memory_are_bounded_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asks.Frame, "most_bytes", len(image_body()))
    with (
        answering(b"drawn", work=1.0, held=0) as (host, port),
        httpx.Client(base_url=f"http://{host}:{port}", headers=AUTHORISED) as client,
        ThreadPoolExecutor(3) as pool,
    ):
        answers = [pool.submit(client.post, "/v1/images", content=image_body()) for _ in range(2)]
        statuses = sorted(answer.result().status_code for answer in answers)
        assert statuses == [200, 429]
        assert client.post("/v1/images", content=image_body()).status_code == 200
        refused = client.post("/v1/images", content=image_body() + b"x")
        assert refused.status_code == 413 and "3 images need" in refused.text
