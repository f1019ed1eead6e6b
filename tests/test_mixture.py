"""Mixtures of adapters: the exact sum, per sample in one pass, and nothing of them left in the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_settings
from peft.tuners.lora import LoraLayer
from pipelines import image_settings, loud

from fedgen_app.errors import AdapterError, SettingsError
from fedgen_app.federation.hybrid import likened
from fedgen_app.learning import adapters
from fedgen_app.learning.adapters import Adapter, at_rank, merged, pairs
from fedgen_app.learning.backbone import Backbone, open_backbone
from fedgen_app.learning.mixture import Mixture, active, combined
from fedgen_app.tasks import _sampling, language
from fedgen_app.tasks._sampling import generate


def parts_of(backbone: Backbone, ranks: tuple[int, ...] = (4, 2, 3)) -> dict[int, Adapter]:
    """A loud adapter for each cluster, of a rank of its own."""
    draw = torch.Generator().manual_seed(1)
    return {
        cluster: {key: torch.randn(shape, generator=draw) / 3 for key, shape in at_rank(backbone.layout, rank)}
        for cluster, rank in enumerate(ranks)
    }


def test_weights_are_normalised_and_refused_where_they_make_no_sense() -> None:
    assert Mixture.of({2: 3.0, 0: 1.0, 1: 0.0}).weights == ((0, 0.25), (2, 0.75))
    assert Mixture.of({0: 2.0}) == Mixture.of({0: 7.0, 3: 0.0})
    assert Mixture.of({0: 1e308, 1: 1e308}).weights == ((0, 0.5), (1, 0.5))
    for wrong in ({}, {0: 0.0}, {0: -1.0, 1: 2.0}, {0: float("nan")}, {0: float("inf")}):
        with pytest.raises(SettingsError):
            Mixture.of(wrong)


def test_likeness_is_a_softmax_over_the_centroids() -> None:
    centres = {0: np.array([1.0, 0.0]), 4: np.array([0.0, 1.0])}
    weights = dict(likened(np.array([0.6, 0.8]), centres, 0.1).weights)
    assert weights[4] == pytest.approx(1 / (1 + np.exp(-2)))
    assert weights[0] == pytest.approx(1 - weights[4])


@pytest.mark.parametrize("rslora", [False, True])
def test_the_sum_is_exact_in_linear_and_convolution_layers_of_mixed_ranks(rslora: bool) -> None:
    changes: dict[str, Any] = {"lora__rslora": rslora, "lora__convolutions": True}
    backbone = open_backbone(image_settings("text", **changes))
    parts, weights = parts_of(backbone), {0: 0.2, 1: 0.5, 2: 0.3}

    def scaling(rank: int) -> float:
        return 8.0 / (rank**0.5 if rslora else rank)

    draw = torch.Generator().manual_seed(2)
    beside = {key: torch.randn(shape, generator=draw) / 3 for key, shape in at_rank(backbone.layout, 5)}
    whole = combined(Mixture.of(weights), {**parts, 1: merged(parts[1], beside, scaling)}, scaling)
    assert any(whole[a].ndim == 4 for a, _ in pairs(whole)) and any(whole[a].ndim == 2 for a, _ in pairs(whole))

    def dense(adapter: Adapter, a: str, b: str) -> torch.Tensor:
        return adapter[b].double().flatten(1) @ adapter[a].double().flatten(1)

    for a, b in pairs(whole):
        expected = sum(w * scaling(parts[c][a].shape[0]) * dense(parts[c], a, b) for c, w in weights.items())
        expected = expected + weights[1] * dense(beside, a, b)
        assert whole[a].shape[0] == 4 + 2 + 3 + 5
        assert torch.allclose(scaling(14) * dense(whole, a, b), expected, atol=1e-5)
    alone = combined(Mixture.of({2: 5.0}), parts, scaling)
    assert all(torch.equal(alone[key], parts[2][key]) for key in parts[2])


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What the sampler hands on, in float32, before it is rounded to pixels."""
    kept: list[torch.Tensor] = []
    to_pixels = _sampling.to_pixels

    def keep(pipeline: Any, current: torch.Tensor) -> Any:
        kept.append(current.clone())
        return to_pixels(pipeline, current)

    monkeypatch.setattr(_sampling, "to_pixels", keep)
    return kept


@pytest.mark.parametrize("kind", ["text", "latent", "text-encoder", "classes"])
def test_one_pass_with_a_mixture_per_sample_is_many_passes_with_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "latent" if kind == "text-encoder" else kind
    settings = image_settings(name, lora__text_encoder=kind == "text-encoder", samples__guidance=3.0)
    backbone = open_backbone(settings)
    parts, options = parts_of(backbone), settings.samples
    texts = ["0", "1"] * 2 if kind == "classes" else ["a photo of a disc", "a photo of a cross"] * 2
    mixtures = [Mixture.of({0: 1}), Mixture.of({0: 1, 1: 1}), Mixture.of({1: 1, 2: 3}), Mixture.of({0: 1})]
    passes, kept = [], drawn(monkeypatch)
    predict = _sampling.predict

    def counted(*arguments: Any) -> torch.Tensor:
        passes.append(len(arguments[2]))
        return predict(*arguments)

    monkeypatch.setattr(_sampling, "predict", counted)
    with active(backbone.model, parts, mixtures) as rows:
        generate(backbone, texts, 3, options, rows=rows)
    together = torch.cat(kept)
    assert passes == [4 if kind == "classes" else 8] * options.steps  # one pass a step, twice as long with guidance
    for number, mixture in enumerate(mixtures):
        kept.clear()
        adapters.write(backbone.model, combined(mixture, parts, lambda rank: settings.lora.alpha / rank))
        generate(backbone, texts, 3, options)
        apart = torch.cat(kept)
        assert torch.allclose(together[number], apart[number], atol=2e-4, rtol=1e-3)
        assert not torch.allclose(together[number], together[(number + 2) % 4], atol=0.01)


def test_text_is_written_with_a_mixture_for_each_prompt_in_one_pass() -> None:
    settings = tiny_settings(samples__length=8)
    backbone = open_backbone(settings)
    parts, texts = parts_of(backbone), ["the sea", "the judge of the court", "a"]
    mixtures = [Mixture.of({0: 1, 2: 1}), Mixture.of({1: 1}), Mixture.of({0: 1, 2: 1})]
    passes: list[int] = []
    embedding = backbone.model.get_input_embeddings()  # type: ignore[operator]
    counting = embedding.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
    with active(backbone.model, parts, mixtures) as rows:
        said = language.TASK.sample(settings, backbone, texts, 1, rows)
    counting.remove()
    assert passes == [3] * 8  # one a token, of all three
    for number, mixture in enumerate(mixtures):
        adapters.write(backbone.model, combined(mixture, parts, lambda rank: 8.0 / rank))
        assert language.TASK.sample(settings, backbone, texts, 1)[number] == said[number]


def state_of(model: Any) -> Any:
    """All that PEFT notes of a model, and every parameter."""
    layers = {
        name: {key: dict(value) for key, value in vars(layer).items() if isinstance(value, dict) and key[:1] != "_"}
        | {"acts": layer._active_adapter, "hooks": len(layer._forward_pre_hooks)}
        | {"parts": {part: sorted(child) for part, child in layer.named_children() if part.startswith("lora_")}}
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    learns = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    return layers, learns, sorted(model.peft_config), model.active_adapter, model.base_model.active_adapter


@pytest.mark.parametrize("residual", [False, True])
def test_nothing_is_left_in_the_model(residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = image_settings("text")
    backbone = loud("text")
    parts, texts = parts_of(backbone), ["a photo of a disc"] * 2
    if residual:
        adapters.write(backbone.model, parts[0], parts[1])
    layers, learns, *rest = state_of(backbone.model)
    drawn_before, chance = generate(backbone, texts, 3, settings.samples), torch.get_rng_state()

    def same() -> None:
        found, learn, *others = state_of(backbone.model)
        assert found == layers and others == rest and learn.keys() == learns.keys()
        for name, (requires, value) in learn.items():
            assert requires is learns[name][0] and torch.equal(value, learns[name][1]), name
        assert torch.equal(torch.get_rng_state(), chance)

    mixtures = [Mixture.of({0: 1, 1: 2}), Mixture.of({2: 1})]
    with active(backbone.model, parts, mixtures) as rows:
        assert not np.array_equal(generate(backbone, texts, 3, settings.samples, rows=rows), drawn_before)
        assert np.array_equal(generate(backbone, texts, 3, settings.samples), drawn_before)  # outside of ``rows``
    same()
    assert np.array_equal(generate(backbone, texts, 3, settings.samples), drawn_before)
    with (
        pytest.raises(RuntimeError),
        active(backbone.model, parts, mixtures) as rows,
        torch.inference_mode(),
        rows([0, 1]),
    ):
        backbone.model(torch.zeros(2, 1, 16, 16), 0, encoder_hidden_states=torch.zeros(2, 4, 3))  # a width of 16 fits
    same()
    short = {key: value[:, :-1] for key, value in parts[1].items()}
    with pytest.raises(AdapterError), active(backbone.model, {0: short}, [Mixture.of({0: 1})]):
        pass
    same()
    with (
        pytest.raises(AdapterError, match="no adapter of cluster 7"),
        active(backbone.model, parts, [Mixture.of({7: 1})]),
    ):
        pass
    same()


def test_rows_that_a_layer_does_not_keep_cannot_have_mixtures_of_their_own() -> None:
    backbone = open_backbone(tiny_settings())
    parts, tokens = parts_of(backbone), torch.zeros((3, 4), dtype=torch.long)
    with active(backbone.model, parts, [Mixture.of({0: 1}), Mixture.of({1: 1})]) as rows:
        with rows([0, 0]):
            backbone.model(tokens)
        with rows([0, 1]), pytest.raises(AdapterError, match="2 samples with different mixtures .* has 3 rows"):
            backbone.model(tokens)


def test_what_cannot_be_mixed_is_refused() -> None:
    backbone = open_backbone(image_settings("text"))
    parts = parts_of(backbone)
    half = {key: value for key, value in parts[1].items() if "lora_A" in key}
    with pytest.raises(AdapterError, match="pairs of factors"):
        combined(Mixture.of({1: 1}), {1: half}, float)
    fewer = dict(list(parts[1].items())[:-2])
    with pytest.raises(AdapterError, match="same layers"):
        combined(Mixture.of({0: 1, 1: 1}), {0: parts[0], 1: fewer}, float)
    whole = open_backbone(image_settings("text"), weights="model")
    with pytest.raises(AdapterError, match="all weights learned"), active(whole.model, parts, [Mixture.of({0: 1})]):
        pass
    with (
        backbone.model.disable_adapter(),
        pytest.raises(AdapterError, match="switched off"),
        active(backbone.model, parts, [Mixture.of({0: 1})]),
    ):
        pass
