"""Tokens, buckets of requests, and what the service counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedgen_app.errors import SettingsError
from fedgen_app.serving import guard
from fedgen_app.serving.guard import Buckets, holder, read_tokens
from fedgen_app.serving.metrics import Metrics

TOKENS = ("a" * 40, "b" * 40)


def test_a_token_is_known_by_every_character() -> None:
    assert holder(f"Bearer {TOKENS[1]}", TOKENS) == 1
    assert holder(f"bearer  {TOKENS[0]} ", TOKENS) == 0
    for wrong in (
        "",
        "Bearer",
        TOKENS[0],
        f"Basic {TOKENS[0]}",
        f"Bearer {TOKENS[0]}a",
        f"Bearer {'a' * 39}",
        "Bearer é",
    ):
        assert holder(wrong, TOKENS) is None
    assert holder("", ()) == 0


def test_tokens_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# the wards\n{TOKENS[0]}\n\n{TOKENS[1]}\n")
    assert read_tokens(file, "c" * 40) == TOKENS
    assert read_tokens(None, "c" * 40) == ("c" * 40,)
    assert read_tokens(None, "") == ()
    for content, message in (("", "holds no token"), ("short", "token 1 should be 32"), ("ä" * 40, "token 1")):
        file.write_text(content)
        with pytest.raises(SettingsError, match=message) as refused:
            read_tokens(file, "")
        assert not content or content not in str(refused.value)
    with pytest.raises(SettingsError, match="No such file"):
        read_tokens(tmp_path / "nowhere", "")


def test_a_bucket_empties_and_fills_again() -> None:
    clock = [100.0]
    buckets = Buckets(rate=0.5, burst=3, now=lambda: clock[0])
    assert [buckets.take("one") for _ in range(4)] == [0, 0, 0, 2.0]
    assert buckets.take("other") == 0
    clock[0] += 1
    assert buckets.take("one") == 1.0
    clock[0] += 1
    assert buckets.take("one") == 0
    clock[0] += 1000
    assert [buckets.take("one") for _ in range(4)] == [0, 0, 0, 2.0]


def test_buckets_are_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_CLIENTS", 10)
    clock = [0.0]
    buckets = Buckets(rate=1e-6, burst=2, now=lambda: clock[0])
    for number in range(100):
        clock[0] += 1
        buckets.take(number)
        assert len(buckets._left) <= 11
    assert [buckets.take(99), buckets.take(99) > 0] == [0, True]  # who asked last is not forgotten


def test_metrics_are_prometheus_text() -> None:
    metrics = Metrics({"waiting": lambda: 3})
    metrics.add("requests_total", labels={"path": "images", "status": 200})
    metrics.add("requests_total", 2, {"path": "images", "status": 200})
    metrics.add("busy_seconds_total", 0.25)
    lines = metrics.text().splitlines()
    assert 'fedgen_serve_requests_total{path="images",status="200"} 3' in lines
    assert "fedgen_serve_busy_seconds_total 0.25" in lines
    assert "fedgen_serve_waiting 3" in lines and "fedgen_serve_batches_total 0" in lines
    assert "# TYPE fedgen_serve_waiting gauge" in lines
    with pytest.raises(KeyError):
        metrics.add("nonsense")
