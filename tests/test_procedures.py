"""What clients do in methods with a procedure of their own, on a real PEFT model made small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from synthetic import a_round, assert_same, dense, random_adapter, settings
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedgen_app.errors import SettingsError
from fedgen_app.federation.local import Lesson, plain
from fedgen_app.federation.method import GlobalState, Lora, Method, Round, Update, load_method
from fedgen_app.learning import adapters, training
from fedgen_app.learning.adapters import Adapter, digest
from fedgen_app.learning.task import Examples
from fedgen_app.learning.training import Plan
from fedgen_app.methods.apfl import MIX
from fedgen_app.methods.fedrot_lora import aligned
from fedgen_app.methods.hetlora import tail
from fedgen_app.methods.scaffold import CONTROL, gradient

LORA = Lora(3, 6.0)
PLAN = Plan(
    epochs=2,
    max_steps=0,
    batch_size=4,
    accumulate=1,
    learning_rate=1e-2,
    weight_decay=0.0,
    clip_norm=1.0,
    seed=7,
)


@pytest.fixture(scope="module")
def model() -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_cache=False,
    )
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    return get_peft_model(LlamaForCausalLM(config), lora)


def loss(model: nn.Module, batch: Mapping[str, Tensor], noise: torch.Generator) -> Tensor:
    tokens = batch["tokens"]
    return nn.functional.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())


def examples(seed: int, count: int = 10) -> Examples:
    tokens = torch.randint(0, 4 + seed, (count, 12), generator=torch.Generator().manual_seed(seed))
    return Examples({"tokens": tokens})


def some_start(model: nn.Module, scale: float = 0.3) -> Adapter:
    """Both factors away from zero."""
    generator = torch.Generator().manual_seed(1)
    return {key: torch.randn(shape, generator=generator) * scale for key, shape in layout(model)}


def layout(model: nn.Module) -> Any:
    return adapters.at_rank(adapters.layout_of(adapters.read(model)), LORA.rank)


def lesson(model: PeftModel, start: Adapter | None = None, data: int = 2, **changes: Any) -> Lesson:
    """A lesson of round 1; settings go by their names, fields of the lesson by theirs."""
    names = {"plan", "own", "extra", "loss", "on_step", "train"}
    fields = {name: changes.pop(name) for name in list(changes) if name in names}
    start = some_start(model) if start is None else start
    adapters.write(model, start)
    round_ = Round(1, LORA, 5, settings(**changes), adapters.layout_of(start), 4)
    usual: dict[str, Any] = {"plan": PLAN, "own": {}, "extra": {}, "loss": loss, "train": training.train}
    return Lesson(
        model=model,
        data=examples(data),
        round=round_,
        start=start,
        trains=lambda key: True,
        **(usual | fields),
    )


def local_loss(model: PeftModel, adapter: Adapter, data: int = 2, residual: Adapter | None = None) -> float:
    adapters.write(model, adapter, residual)
    model.eval()
    with torch.no_grad():
        return float(loss(model, examples(data).rows, torch.Generator()))


def distance(one: Adapter, other: Adapter) -> float:
    return float(torch.stack([(one[key] - other[key]).double().square().sum() for key in other]).sum().sqrt())


# FedProx


def test_fedprox_stays_nearer_to_what_it_received(model: PeftModel) -> None:
    start, method = some_start(model), load_method("fedprox")
    free = plain(lesson(model)).adapter
    near = method.local(lesson(model, fedprox__mu=30.0)).adapter
    barely = method.local(lesson(model, fedprox__mu=1e-9)).adapter
    assert distance(near, start) < 0.7 * distance(free, start)
    assert distance(barely, free) < 1e-3 * distance(free, start)


# SCAFFOLD


def test_the_control_variate_is_the_gradient_over_all_local_data(model: PeftModel) -> None:
    whole = lesson(model)
    measured = gradient(whole)
    adapters.write(model, whole.start)
    model.zero_grad()
    parameters = adapters.parameters(model)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    loss(model, whole.data.rows, torch.Generator()).backward()
    for key, parameter in parameters.items():
        torch.testing.assert_close(measured[key], parameter.grad, rtol=1e-4, atol=1e-6)
        parameter.grad = None
    scaled = gradient(replace(whole, plan=replace(PLAN, half_precision=True)))
    for key in measured:
        torch.testing.assert_close(measured[key], scaled[key], rtol=1e-4, atol=1e-6)


def test_scaffold_corrects_with_the_old_variates_and_sends_the_change(model: PeftModel) -> None:
    method, start, drifts = load_method("scaffold"), some_start(model), []

    def spy(*arguments: Any, **named: Any) -> Any:
        drifts.append(named["drift"])
        return training.train(*arguments, **named)

    first = method.local(lesson(model, train=spy))
    assert all(not x.any() for x in drifts[0].values())
    assert digest(first.adapter) == digest(plain(lesson(model)).adapter)  # no correction yet: FedAvg
    measured = gradient(lesson(model))
    assert {key.removeprefix(CONTROL) for key in first.extra} == set(start)
    assert digest(first.own) == digest(first.extra) == digest({CONTROL + k: x for k, x in measured.items()})
    control = {key: torch.full_like(x, 0.01) for key, x in first.own.items()}
    other = some_start(model, 0.1)
    second = method.local(lesson(model, other, train=spy, own=first.own, extra=control))
    for key in start:
        torch.testing.assert_close(drifts[1][key], control[CONTROL + key] - first.own[CONTROL + key])
        torch.testing.assert_close(second.extra[CONTROL + key], second.own[CONTROL + key] - first.own[CONTROL + key])
    assert digest(second.adapter) != digest(plain(lesson(model, other)).adapter)
    shared = adapters.layout_of(start)
    assert method.shares_extra(shared, a_round(LORA)) == adapters.layout_of(second.extra)


def test_scaffolds_server_divides_by_all_clients(model: PeftModel) -> None:
    method, key = load_method("scaffold"), CONTROL + "x"
    updates = [Update(i, {"x": torch.tensor([1.0])}, 3, 10.0**i, {key: torch.tensor([i + 1.0])}) for i in range(2)]
    state = GlobalState({"x": torch.zeros(1)}, extra={key: torch.tensor([0.5])})
    after = method.rule(state, updates, a_round(LORA, clients=10))
    assert after.extra[key].item() == pytest.approx(0.5 + (1 + 2) / 10)
    assert method.sends_extra(after, a_round(LORA)) is after.extra
    first = method.rule(GlobalState({"x": torch.zeros(1)}), updates, a_round(LORA, clients=10))
    assert first.extra[key].item() == pytest.approx(0.3)


# Ditto


def test_dittos_shared_half_is_fedavgs_and_its_own_half_stays_near(model: PeftModel) -> None:
    method, start = load_method("ditto"), some_start(model)
    learned = method.local(lesson(model, ditto__mu=30.0))
    assert digest(adapters.read(model)) == digest(learned.adapter)  # nothing personal is left in the model
    assert digest(learned.adapter) == digest(plain(lesson(model)).adapter)
    loose = method.local(lesson(model, ditto__mu=0.0))
    assert distance(learned.own, start) < 0.7 * distance(loose.own, start)
    assert digest(loose.own) != digest(loose.adapter)  # other batches
    assert local_loss(model, loose.own) < local_loss(model, start)


def test_dittos_own_half_goes_on_where_it_was(model: PeftModel) -> None:
    method = load_method("ditto")
    own = some_start(model, 0.5)
    again = method.local(lesson(model, own=own, ditto__mu=0.0, plan=replace(PLAN, learning_rate=1e-7)))
    assert distance(again.own, own) < 1e-3
    assert distance(again.adapter, some_start(model)) < 1e-3  # and does not reach the shared half
    assert digest(method.personal(lesson(model, own=own))) == digest(own)
    newcomer = method.personal(lesson(model, ditto__mu=0.0))
    assert digest(newcomer) == digest(method.local(lesson(model, ditto__mu=0.0)).own)


# APFL


def mixed_loss(model: PeftModel, v: Adapter, w: Adapter, mix: float, data: int = 2) -> float:
    """The loss of a dW_v + (1 - a) dW_w, through the residual."""
    own = {key: x * mix if ".lora_B." in key else x for key, x in v.items()}
    rest = {key: x * (1 - mix) * LORA.scaling if ".lora_B." in key else x for key, x in w.items()}
    return local_loss(model, own, data, rest)


def test_the_mixture_is_one_of_products(model: PeftModel) -> None:
    method, v, w = load_method("apfl"), some_start(model, 0.6), some_start(model, 0.2)
    own = v | {MIX: torch.tensor(0.3)}
    personal = method.personal(lesson(model, w, own=own))
    assert adapters.rank_of(personal) == 2 * LORA.rank
    got = dense(personal, LORA.at(2 * LORA.rank).scaling)
    one, other = dense(v, LORA.scaling), dense(w, LORA.scaling)
    assert_same(got, {name: 0.3 * one[name] + 0.7 * other[name] for name in one})
    adapters.write(model, personal)
    assert local_loss(model, personal) == pytest.approx(mixed_loss(model, v, w, 0.3), rel=1e-5)


def test_the_mixture_folds_rslora(model: PeftModel) -> None:
    lora, v, w = Lora(3, 6.0, True), some_start(model, 0.6), some_start(model, 0.2)
    given = lesson(model, w, own=v | {MIX: torch.tensor(0.25)})
    personal = load_method("apfl").personal(replace(given, round=replace(given.round, lora=lora)))
    one, other = dense(v, lora.scaling), dense(w, lora.scaling)
    wanted = {name: 0.25 * one[name] + 0.75 * other[name] for name in one}
    assert_same(dense(personal, lora.at(6).scaling), wanted)


def test_apfl_trains_inside_the_mixture_and_leaves_the_model_as_fedavg_does(model: PeftModel) -> None:
    method, start = load_method("apfl"), some_start(model)
    learned = method.local(lesson(model, apfl__mix=0.5))
    assert digest(learned.adapter) == digest(plain(lesson(model)).adapter)
    learned = method.local(lesson(model, apfl__mix=0.5))
    assert digest(adapters.read(model)) == digest(learned.adapter)
    assert list(model.peft_config) == [adapters.ADAPTER]
    scalings = [layer.scaling for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert scalings and all(s == {adapters.ADAPTER: LORA.scaling} for s in scalings)
    v, mix = {key: learned.own[key] for key in start}, float(learned.own[MIX])
    assert mixed_loss(model, v, start, mix) < local_loss(model, start)
    # With a = 0 and no rate the own half does not act, so nothing in it is learnt.
    still = method.local(lesson(model, apfl__mix=0.0, apfl__mix_learning_rate=0.0))
    assert distance({key: still.own[key] for key in start}, start) < 1e-6


def test_the_mixs_step_is_its_gradient(model: PeftModel) -> None:
    method, v, w = load_method("apfl"), some_start(model, 0.6), some_start(model, 0.2)
    plan = replace(PLAN, learning_rate=1e-9, epochs=1, batch_size=10)  # v hardly moves; one step on all rows
    own = v | {MIX: torch.tensor(0.4)}
    mix = float(method.local(lesson(model, w, own=own, plan=plan, apfl__mix_learning_rate=0.5)).own[MIX])
    slope = (mixed_loss(model, v, w, 0.41) - mixed_loss(model, v, w, 0.39)) / 0.02
    assert abs(slope) > 1e-3
    assert mix == pytest.approx(0.4 - 0.5 * slope, rel=1e-3)
    batched = replace(plan, batch_size=2, accumulate=5)
    again = float(method.local(lesson(model, w, own=own, plan=batched, apfl__mix_learning_rate=0.5)).own[MIX])
    assert again == pytest.approx(mix, rel=1e-4)


def test_the_mix_knows_no_loss_scaling(model: PeftModel) -> None:
    method, own = load_method("apfl"), some_start(model, 0.6) | {MIX: torch.tensor(0.4)}

    def scaled(*arguments: Any, **named: Any) -> Any:
        model_, loss_, *rest = arguments
        # As a GradScaler does: what arrives at the loss is 1024 times as large.
        return training.train(model_, lambda *batch: 1024.0 * loss_(*batch), *rest, **named)

    plan = replace(PLAN, learning_rate=1e-9)
    plainly = method.local(lesson(model, own=own, plan=plan)).own[MIX]
    assert float(plainly) != pytest.approx(0.4, abs=1e-4)
    assert float(method.local(lesson(model, own=own, plan=plan, train=scaled)).own[MIX]) == pytest.approx(
        float(plainly), rel=1e-5
    )


def test_the_mix_stays_within_its_bounds(model: PeftModel) -> None:
    own = some_start(model, 0.6) | {MIX: torch.tensor(0.4)}
    mixes = [
        float(load_method("apfl").local(lesson(model, w, own=own, apfl__mix_learning_rate=1e4)).own[MIX])
        for w in (some_start(model, 0.2), some_start(model, 1.0))
    ]
    assert all(0 <= mix <= 1 for mix in mixes)


def test_apfl_restores_the_scalings_when_training_fails(model: PeftModel) -> None:
    calls = []

    def failing(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            arguments[1](arguments[0], examples(2).rows, torch.Generator())
            raise RuntimeError("out of memory")
        return training.train(*arguments, **named)

    with pytest.raises(RuntimeError, match="out of memory"):
        load_method("apfl").local(lesson(model, train=failing))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            assert all(isinstance(s, float | int) for s in layer.scaling.values())


def test_apfl_says_so_where_its_loss_is_not_used(model: PeftModel) -> None:
    def elsewhere(model_: nn.Module, loss_: Any, data: Examples, plan: Plan, **named: Any) -> Any:
        named["on_step"](1, 1)
        return training.Trained(0.0, 1, 1)

    with pytest.raises(SettingsError, match="apfl"):
        load_method("apfl").local(lesson(model, train=elsewhere))


# HetLoRA


def test_hetlora_prunes_what_training_used_less(model: PeftModel) -> None:
    method, start = load_method("hetlora"), some_start(model)
    learned = method.local(lesson(model, hetlora__gamma=0.7, hetlora__penalty=20.0))
    assert adapters.rank_of(learned.adapter) == 2
    unpruned = method.local(lesson(model, hetlora__gamma=1.0)).adapter
    assert digest(unpruned) == digest(plain(lesson(model)).adapter)
    # What is left has its product, at the smaller rank's scaling.
    adapters.write(model, start)
    raw = plain(replace(lesson(model), loss=with_penalty(20.0))).adapter
    kept = {key: x[:2] if ".lora_A." in key else x[:, :2] for key, x in raw.items()}
    assert_same(dense(learned.adapter, LORA.at(2).scaling), dense(kept, LORA.scaling))


def with_penalty(strength: float) -> Any:
    """The penalty in full, value and all."""

    def penalised(model: nn.Module, batch: Mapping[str, Tensor], noise: torch.Generator) -> Tensor:
        return loss(model, batch, noise) + strength * tail(adapters.parameters(model), 2)

    return penalised


def test_hetlora_keeps_what_training_used_more(model: PeftModel) -> None:
    start = some_start(model)
    faint = {key: x * (0.01 if ".lora_B." in key else 1.0) for key, x in start.items()}
    learned = load_method("hetlora").local(lesson(model, faint, hetlora__gamma=0.7))
    assert tail(learned.adapter, 2) > tail(faint, 2)
    assert adapters.rank_of(learned.adapter) == 3
    zero = {key: x * (".lora_A." in key) for key, x in start.items()}  # the first round: nothing is used less than not
    assert adapters.rank_of(load_method("hetlora").local(lesson(model, zero, hetlora__gamma=0.34)).adapter) == 3


def test_the_penalty_shrinks_the_tail_and_is_no_part_of_the_reported_loss(model: PeftModel) -> None:
    method = load_method("hetlora")
    free = method.local(lesson(model, hetlora__gamma=0.7))
    held = method.local(lesson(model, hetlora__gamma=0.7, hetlora__penalty=1e-6))
    strong = method.local(lesson(model, hetlora__gamma=0.7, hetlora__penalty=20.0))
    assert held.loss == pytest.approx(free.loss, rel=1e-4)
    assert strong.loss < 3 * free.loss  # with its value, 20 * tail would be in it
    assert 20.0 * float(tail(some_start(model), 2)) > 10 * free.loss


# FedRot-LoRA


@given(st.integers(0, 100), st.floats(0, 1))
@hypothesis_settings(deadline=None, max_examples=40)
def test_a_rotation_keeps_every_product(seed: int, strength: float) -> None:
    trained, received = random_adapter(seed, 4), random_adapter(seed + 1, 4)
    assert_same(dense(aligned(trained, received, strength), 2.5), dense(trained, 2.5))


def turned_copy(adapter: Adapter, seed: int) -> Adapter:
    """The same products in another basis; half of the bases are reflections."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    turned = {}
    for key, x in adapter.items():
        matrix = x.double().flatten(1)
        turned[key] = (q.T @ matrix if ".lora_A." in key else matrix @ q).float().reshape(x.shape)
    return turned


@pytest.mark.parametrize("seed", range(4))
def test_full_strength_finds_the_received_basis_again(seed: int) -> None:
    received = random_adapter(1, 4)
    turned = turned_copy(received, seed)
    assert distance(turned, received) > 1
    assert distance(aligned(turned, received, 1.0), received) < 1e-4
    assert distance(aligned(turned, received, 0.0), turned) < 1e-4
    near = [distance(aligned(turned, received, s), received) for s in (0.0, 0.3, 0.6, 1.0)]
    assert near == sorted(near, reverse=True)


def test_the_rotation_brings_the_mean_of_factors_to_that_of_products(model: PeftModel) -> None:
    received, average = random_adapter(1, 4), load_method("fedrot-lora").rule
    clients = [
        {key: x + 0.05 * random_adapter(10 + i, 4)[key] for key, x in turned_copy(received, i).items()}
        for i in range(3)
    ]
    lora = Lora(4, 8.0)
    errors = []
    for strength in (0.0, 1.0):
        updates = [Update(i, aligned(c, received, strength), 4, i + 1.0) for i, c in enumerate(clients)]
        after = average(GlobalState(received), updates, a_round(lora))
        mean = {n: sum((i + 1) / 6 * dense(c, 2.0)[n] for i, c in enumerate(clients)) for n in dense(received, 2.0)}
        got = dense(after.adapter, 2.0)
        errors.append(sum(((got[n] - mean[n]) ** 2).sum() for n in mean))
    assert errors[1] < 0.01 * errors[0]


def test_fedrot_sends_rotated_factors_of_what_it_trained(model: PeftModel) -> None:
    method = load_method("fedrot-lora")
    trained = plain(lesson(model)).adapter
    assert distance(method.local(lesson(model, fedrot__strength=0.0)).adapter, trained) < 1e-5
    turned = method.local(lesson(model, fedrot__strength=1.0)).adapter
    assert distance(turned, trained) > 1e-4
    assert_same(dense(turned, 1.0), dense(trained, 1.0))
    assert distance(turned, some_start(model)) < distance(trained, some_start(model))


# All of them


@pytest.mark.parametrize("name", ["fedprox", "scaffold", "ditto", "apfl", "hetlora", "fedrot-lora"])
def test_a_procedure_is_repeatable_and_lowers_the_loss_from_the_zero_start(model: PeftModel, name: str) -> None:
    method: Method = load_method(name)
    zero = {key: x * (".lora_A." in key) for key, x in some_start(model).items()}
    one, again = (method.local(lesson(model, zero)) for _ in range(2))
    assert digest(one.adapter) == digest(again.adapter) and digest(one.own) == digest(again.own)
    assert one.loss == again.loss
    assert local_loss(model, one.adapter) < local_loss(model, zero) - 1e-4
