"""What a task leaves behind for the next one."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import Context, RecordDict
from helpers import make_llama, tiny_config, tiny_data

from fedgen_app.federation import warmth
from fedgen_app.learning import backbone


def context(tmp_path: Path, **overrides: str | int | float | bool) -> Context:
    node: dict[str, str | int | float | bool] = {"client-id": "ward-7", "data": str(tiny_data())}
    return Context(1, 1, node, RecordDict(), tiny_config(tmp_path / "run", **overrides))


def test_what_is_prepared_is_what_the_next_task_opens(tmp_path: Path) -> None:
    facts = warmth.remembered(context(tmp_path))
    assert facts["fork"] is True
    backbone._open.cache_clear()
    warmth.prepare(facts)
    before = backbone._open.cache_info()
    assert before.misses == 1
    warmth.remembered(context(tmp_path, seed=9, num_server_rounds=7))  # another run, the same backbone
    assert backbone._open.cache_info().misses == 1


def test_preparing_starts_no_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        facts = warmth.remembered(context(tmp_path, threads=2))
        torch.set_num_threads(1)
        warmth.prepare(facts)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_key_differs_with_the_backbone_and_its_files(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model")
    first = warmth.remembered(context(tmp_path, backbone=str(model)))["key"]
    assert warmth.remembered(context(tmp_path, backbone=str(model), seed=3))["key"] == first
    assert warmth.remembered(context(tmp_path, backbone=str(model), lora__rank=2))["key"] != first
    (model / "notes.txt").write_text("replaced", encoding="utf-8")
    assert warmth.remembered(context(tmp_path, backbone=str(model)))["key"] != first
