"""What stands around the handlers of the inference service, without a model behind them."""

from __future__ import annotations

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
