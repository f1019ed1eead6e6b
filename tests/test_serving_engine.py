"""How the service computes several requests at once."""

from __future__ import annotations

from typing import Any

import pytest
from pipelines import image_settings, loud
from serving import frame

from fedgen_app.learning.backbone import load_task
from fedgen_app.learning.mixture import Mixture
from fedgen_app.serving.asks import GLOBAL, Ask
from fedgen_app.serving.engine import Engine
from fedgen_app.tasks import _sampling


def test_a_pass_is_as_large_as_the_service_says_whatever_the_run_draws_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, backbone, passes = image_settings("text", samples__batch=2), loud("text"), []
    task, predict = load_task(settings.task), _sampling.predict
    engine = Engine(settings, task, backbone, {GLOBAL: backbone.fresh(0)}, frame(), batch=4)
    assert task.stages is not None

    def counted(*arguments: Any) -> Any:
        passes.append(len(arguments[2]))
        return predict(*arguments)

    def ask(count: int, seed: int) -> Ask:
        assert task.stages is not None
        encoded = task.stages.encode(backbone, ["a photo of a disc"] * count)
        return Ask("images", (Mixture.of({GLOBAL: 1.0}),) * count, encoded, seed, steps=2)

    monkeypatch.setattr(_sampling, "predict", counted)
    assert len(engine.carry_out([ask(3, 1), ask(1, 2)])) == 2
    assert passes == [4, 4]
    engine.carry_out([ask(5, 3)])
    assert passes[2:] == [4, 4, 1, 1]
