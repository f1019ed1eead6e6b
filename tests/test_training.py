"""The training loop on a model small enough to see through."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedgen_app.errors import DataError
from fedgen_app.learning import adapters
from fedgen_app.learning.adapters import Adapter
from fedgen_app.learning.task import Examples
from fedgen_app.learning.training import Plan, planned_steps, round_factor, train

PLAN = Plan(
    epochs=3,
    max_steps=0,
    batch_size=4,
    accumulate=1,
    learning_rate=1e-2,
    weight_decay=0.0,
    clip_norm=1.0,
    seed=7,
)
ROWS = 10


def tiny(dropout: float = 0.0) -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_cache=False,
    )
    lora = LoraConfig(r=2, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj", "o_proj"])
    return get_peft_model(LlamaForCausalLM(config), lora)


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return tiny()


def start(model: nn.Module) -> Adapter:
    """Both factors away from zero, so that both have gradients."""
    generator = torch.Generator().manual_seed(1)
    layout = adapters.layout_of(adapters.read(model))
    return {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in layout}


def examples(count: int = ROWS) -> Examples:
    tokens = torch.randint(0, 4, (count, 12), generator=torch.Generator().manual_seed(2))
    return Examples({"tokens": tokens}, {})


def loss(model: nn.Module, batch: Mapping[str, Tensor], noise: torch.Generator) -> Tensor:
    tokens = batch["tokens"]
    return nn.functional.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())


def trained(model: PeftModel, plan: Plan = PLAN, **arguments: Any) -> Adapter:
    adapters.write(model, start(model))
    train(model, loss, examples(), plan, **arguments)
    return adapters.read(model)


def distance(one: Adapter, other: Adapter) -> float:
    return math.sqrt(sum(((one[key] - other[key]).double() ** 2).sum().item() for key in one))


@pytest.mark.parametrize(
    ("count", "changes", "steps"),
    [
        (10, {}, 9),
        (8, {}, 6),
        (1, {}, 3),
        (10, {"accumulate": 2}, 6),
        (10, {"accumulate": 100}, 3),
        (10, {"max_steps": 4}, 4),
        (10, {"max_steps": 100}, 9),
    ],
)
def test_planned_steps_are_the_steps_that_are_taken(
    model: PeftModel, count: int, changes: dict[str, int], steps: int
) -> None:
    plan = replace(PLAN, **changes)
    assert planned_steps(count, plan) == steps
    seen: list[tuple[int, int]] = []
    adapters.write(model, start(model))
    done = train(model, loss, examples(count), plan, on_step=lambda step, of: seen.append((step, of)))
    assert done.steps == steps and seen == [(i + 1, steps) for i in range(steps)]
    if steps < 9 and "max_steps" in changes:
        assert done.examples == 4 + 4 + 2 + 4
    else:
        assert done.examples == 3 * count


@given(st.integers(1, 200), st.integers(0, 250))
def test_the_rounds_factor_warms_up_peaks_at_one_and_falls(rounds: int, warmup: int) -> None:
    factors = [round_factor(number, rounds, warmup) for number in range(1, rounds + 1)]
    peak = min(warmup, rounds - 1)
    assert all(f > 0 for f in factors)
    assert factors[peak] == max(factors) == 1
    assert all(a < b for a, b in zip(factors[: peak + 1], factors[1 : peak + 1], strict=False))
    assert all(a > b for a, b in zip(factors[peak:], factors[peak + 1 :], strict=False))


def test_the_rounds_factor_by_hand() -> None:
    assert [round_factor(n, 4, 1) for n in (1, 2, 3, 4)] == pytest.approx([0.5, 1.0, 0.75, 0.25])
    assert [round_factor(n, 3, 2) for n in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert round_factor(1, 1, 5) == 1


def test_training_lowers_the_loss_it_reports(model: PeftModel) -> None:
    adapters.write(model, start(model))
    results = [train(model, loss, examples(), replace(PLAN, epochs=1, seed=i)).loss for i in range(15)]
    assert results[-1] < results[0] - 0.1


def test_the_reported_loss_is_the_mean_over_examples(model: PeftModel) -> None:
    adapters.write(model, start(model))
    # Without learning, the mean over unequal batches (4, 4, 2) is the mean over all rows.
    result = train(model, loss, examples(), replace(PLAN, epochs=1, learning_rate=0.0))
    assert result.loss == pytest.approx(loss(model, examples().rows, torch.Generator()).item(), rel=1e-5)


def test_one_seed_gives_one_adapter_bit_for_bit() -> None:
    def result(seed: int) -> str:
        return adapters.digest(trained(model, replace(PLAN, seed=seed)))

    model = tiny(dropout=0.2)
    first = result(7)
    torch.rand(5)  # somebody else draws from the global generator
    assert result(7) == first
    assert result(8) != first


def test_the_seed_reaches_the_tasks_noise(model: PeftModel) -> None:
    drawn: list[float] = []

    def noisy(model: nn.Module, batch: Mapping[str, Tensor], noise: torch.Generator) -> Tensor:
        drawn.append(torch.rand((), generator=noise).item())
        return loss(model, batch, noise)

    for seed in (1, 1, 2):
        train(model, noisy, examples(4), replace(PLAN, seed=seed))
    assert drawn[0:3] == drawn[3:6] != drawn[6:9] and len(set(drawn[:3])) == 3


def test_only_the_keys_that_train_change(model: PeftModel) -> None:
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" not in name}
    after = trained(model, trains=lambda key: ".lora_B." in key)
    for key, tensor in start(model).items():
        assert torch.equal(after[key], tensor) == (".lora_A." in key)
    # The next client trains everything again: nothing of the choice stays on the shared model.
    after = trained(model)
    assert not any(torch.equal(after[key], tensor) for key, tensor in start(model).items())
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(p, frozen[name]) and p.grad is None


def test_weight_decay_leaves_keys_that_do_not_train_alone(model: PeftModel) -> None:
    after = trained(model, replace(PLAN, weight_decay=0.5), trains=lambda key: ".lora_B." in key)
    assert all(torch.equal(after[key], t) for key, t in start(model).items() if ".lora_A." in key)


def test_accumulated_batches_are_one_larger_batch(model: PeftModel) -> None:
    # 10 rows: 4 + 4 + 2 accumulated against 10 at once; a mean of means would weigh the last two rows double.
    plan = replace(PLAN, epochs=4, weight_decay=0.01)
    parts = trained(model, replace(plan, batch_size=4, accumulate=3))
    whole = trained(model, replace(plan, batch_size=12, accumulate=1))
    assert distance(parts, start(model)) > 0.1
    assert distance(parts, whole) < 2e-3 * distance(parts, start(model))


def test_training_stops_after_max_steps(model: PeftModel) -> None:
    one_epoch = trained(model, replace(PLAN, epochs=1))
    assert adapters.digest(trained(model, replace(PLAN, max_steps=3))) == adapters.digest(one_epoch)


def test_the_learning_rate_decays_only_where_it_is_asked_to(model: PeftModel) -> None:
    first = trained(model, replace(PLAN, max_steps=1))
    assert adapters.digest(trained(model, replace(PLAN, max_steps=1, decay=True))) == adapters.digest(first)
    constant, falling = trained(model), trained(model, replace(PLAN, decay=True))
    assert 0 < distance(falling, start(model)) < distance(constant, start(model))


def test_the_proximal_term_pulls_towards_the_anchor(model: PeftModel) -> None:
    anchor = {key: torch.full_like(tensor, 0.2) for key, tensor in start(model).items()}
    plan = replace(PLAN, epochs=20, clip_norm=0.0)
    distances = [distance(trained(model, replace(plan, proximal=mu), anchor=anchor), anchor) for mu in (0, 0.1, 100.0)]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.1 * distance(start(model), anchor)
    free = adapters.digest(trained(model, plan))
    assert adapters.digest(trained(model, replace(plan, proximal=0.0), anchor=anchor)) == free


def test_the_proximal_gradient_is_mu_times_the_distance(model: PeftModel) -> None:
    def flat(model: nn.Module, batch: Mapping[str, Tensor], noise: torch.Generator) -> Tensor:
        return loss(model, batch, noise) * 0

    gradients: dict[str, Tensor] = {}
    anchor = {key: torch.zeros_like(tensor) for key, tensor in start(model).items()}
    adapters.write(model, start(model))
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p, key=key: gradients.update({key: p.grad.clone()}))
        for key, p in adapters.parameters(model).items()
    ]
    plan = replace(PLAN, max_steps=1, proximal=3.0, accumulate=2, clip_norm=0.0)
    train(model, flat, examples(), plan, anchor=anchor)
    for hook in hooks:
        hook.remove()
    for key, tensor in start(model).items():
        torch.testing.assert_close(gradients[key], 3 * tensor)


def test_clipping_bounds_the_gradient(model: PeftModel) -> None:
    def steep(model: nn.Module, batch: Mapping[str, Tensor], noise: torch.Generator) -> Tensor:
        return 1e4 * loss(model, batch, noise)

    norms: list[float] = []

    def note(step: int, of: int) -> None:
        norms.append(math.sqrt(sum((g.double() ** 2).sum().item() for g in seen.values())))

    seen: dict[str, Tensor] = {}
    original = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *arguments: Any, **keywords: Any) -> Any:
        for index, p in enumerate(self.param_groups[0]["params"]):
            seen[str(index)] = p.grad.clone()
        return original(self, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        train(model, steep, examples(), replace(PLAN, clip_norm=0.5, max_steps=2), on_step=note)
        train(model, steep, examples(), replace(PLAN, clip_norm=0.0, max_steps=1), on_step=note)
    assert norms[0] == pytest.approx(0.5, rel=1e-3) and norms[1] == pytest.approx(0.5, rel=1e-3)
    assert norms[2] > 10


def test_nothing_to_train_on_is_a_data_error(model: PeftModel) -> None:
    before = adapters.digest(adapters.read(model))
    with pytest.raises(DataError, match="no example"):
        train(model, loss, examples(0), PLAN)
    assert adapters.digest(adapters.read(model)) == before


def test_a_client_that_failed_half_way_leaves_no_gradient_to_the_next(model: PeftModel) -> None:
    calls = []

    def failing(model: nn.Module, batch: Mapping[str, Tensor], noise: torch.Generator) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return loss(model, batch, noise)

    results = []
    for fails in (False, True):
        if fails:
            adapters.write(model, start(model))
            with pytest.raises(RuntimeError, match="out of memory"):
                train(model, failing, examples(), replace(PLAN, accumulate=3))
            assert any(p.grad is not None for p in adapters.parameters(model).values())
        adapters.write(model, start(model))
        train(model, loss, examples(), PLAN)
        results.append(adapters.digest(adapters.read(model)))
    assert results[0] == results[1]
