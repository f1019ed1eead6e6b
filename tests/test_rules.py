"""Every method's rule against the dense oracle: unequal weights, alpha / r != 1, rsLoRA, mixed ranks, any shape."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from synthetic import (
    Shapes,
    a_round,
    assert_alive,
    assert_same,
    best,
    dense,
    dense_mean,
    federations,
    keys,
    matrices,
    norm,
    plus,
    random_adapter,
    settings,
    start,
    state_of,
    updates_of,
)

from fedgen_app.errors import SettingsError
from fedgen_app.federation.aggregation import absorb, mean_of_products
from fedgen_app.federation.lowrank import Pair
from fedgen_app.federation.method import GlobalState, Lora, Update, load_method
from fedgen_app.learning.adapters import Layout, digest, pairs
from fedgen_app.settings import plugins

QUICK = hypothesis_settings(deadline=None, max_examples=40)
LORA = Lora(4, 10.0)
MIXED = ([4, 2, 3, 1], [3.0, 500.0, 1.0, 41.0])
EQUAL = ([4, 4, 4], [3.0, 50.0, 7.0])
ANY_RANK = ("flora", "flexlora", "hetlora")
ADAPTERS = [m for m in plugins("methods") if m not in ("fedavg-full", "local-only", "centralized")]
Federation = tuple[Lora, list[Update], Shapes]


def served(state: GlobalState, lora: Lora) -> dict[str, np.ndarray]:
    """What a model with this state adds to its weights."""
    added = dense(state.adapter, lora.scaling)
    return plus(added, dense(state.residual, 1.0)) if state.residual else added


def shared_of(name: str, updates: list[Update], number: int) -> list[Update]:
    """The updates as they arrive: the shared keys only, with what the method sends beside them."""
    method, round_ = load_method(name), a_round(LORA, number)
    cut = []
    for u in updates:
        shared = {key: x for key, x in u.adapter.items() if method.shares(key, round_)}
        extra = {f"control.{key}": 0.1 * x for key, x in shared.items()} if name == "scaffold" else {}
        cut.append(Update(u.client, shared, u.rank, u.num_examples, extra))
    return cut


# FlexLoRA


@given(federations(mixed=True))
@QUICK
def test_flexlora_is_the_best_approximation_of_the_mean_product(federation: Federation) -> None:
    lora, updates, shapes = federation
    after = load_method("flexlora").rule(state_of(lora, shapes), updates, a_round(lora, shapes=shapes))
    mean = dense_mean(updates, lora)
    wanted = best(mean, lora.rank)
    assert_same(dense(after.adapter, lora.scaling), wanted)
    lost = (norm(plus(mean, wanted, -1)) / norm(mean)) ** 2
    assert after.facts["discarded_energy"] == pytest.approx(lost, abs=1e-10)
    assert {key: x.shape for key, x in after.adapter.items()} == {
        key: x.shape for key, x in random_adapter(0, lora.rank, shapes).items()
    }
    assert_alive(after.adapter, {}, lora.scaling)


@given(federations(mixed=True))
@QUICK
def test_a_flexlora_client_gets_the_best_of_its_own_rank_at_its_own_scaling(federation: Federation) -> None:
    lora, updates, shapes = federation
    method = load_method("flexlora")
    after = method.rule(state_of(lora, shapes), updates, a_round(lora, shapes=shapes))
    assert method.fit is not None
    for rank in range(1, lora.rank + 1):
        own = lora.at(rank)
        cut = method.fit(after.adapter, lora, own)
        assert all(len(cut[key]) == rank for key in cut if ".lora_A." in key)
        got, wanted = dense(cut, own.scaling), best(dense_mean(updates, lora), rank)
        assert_same(got, wanted)
        assert_alive(cut, {}, own.scaling)


def test_flexlora_again_on_its_own_result_changes_nothing() -> None:
    rule, round_ = load_method("flexlora").rule, a_round(LORA)
    once = rule(state_of(LORA), updates_of(*MIXED), round_)
    again = rule(once, [Update(0, once.adapter, 4, 5.0)], round_)
    assert_same(dense(again.adapter, LORA.scaling), dense(once.adapter, LORA.scaling))
    assert again.facts["discarded_energy"] < 1e-12


# FLoRA


@pytest.mark.parametrize("rslora", [False, True])
def test_flora_adds_the_mean_product_round_after_round(rslora: bool) -> None:
    lora, rule = Lora(4, 10.0, rslora), load_method("flora").rule
    state, wanted = state_of(lora), None
    for number in (1, 2, 3):
        updates = updates_of(*MIXED, seed=number)[: 4 - number % 2]  # partial participation
        before = state.adapter
        state = rule(state, updates, a_round(lora, number, aggregation__residual_rank=1000))
        mean = dense_mean(updates, lora)
        wanted = plus(wanted, mean) if wanted else mean
        assert_same(served(state, lora), wanted)
        assert state.facts["discarded_energy"] < 1e-12
        assert digest(state.adapter) != digest(before)
        assert all(not state.adapter[b].any() and state.adapter[a].any() for a, b in pairs(state.adapter))
        assert_alive(state.adapter, state.residual, lora.scaling)


@given(federations(mixed=True))
@QUICK
def test_flora_is_exact_at_any_shape(federation: Federation) -> None:
    lora, updates, shapes = federation
    round_ = a_round(lora, shapes=shapes, aggregation__residual_rank=1000)
    after = load_method("flora").rule(state_of(lora, shapes), updates, round_)
    assert_same(served(after, lora), dense_mean(updates, lora))


def test_the_residual_keeps_the_best_of_its_rank_and_says_what_it_lost() -> None:
    rule, first, second = load_method("flora").rule, updates_of(*MIXED), updates_of(*MIXED, seed=2)
    state = rule(state_of(LORA), first, a_round(LORA, aggregation__residual_rank=3))
    kept = best(dense_mean(first, LORA), 3)
    assert_same(dense(state.residual, 1.0), kept)
    state = rule(state, second, a_round(LORA, 2, aggregation__residual_rank=3))
    whole = plus(kept, dense_mean(second, LORA))
    assert_same(dense(state.residual, 1.0), best(whole, 3))
    lost = (norm(plus(whole, best(whole, 3), -1)) / norm(whole)) ** 2
    assert lost > 0.01 and state.facts["discarded_energy"] == pytest.approx(lost, rel=1e-4)
    assert {len(x) for key, x in state.residual.items() if ".lora_A." in key} == {3}


def test_the_residual_of_nothing_is_zero() -> None:
    zero = [Update(0, start(4), 4, 1.0)]
    residual, lost = absorb({}, mean_of_products(zero, LORA), start(4), 8)
    assert lost == 0 and all(not x.any() for x in residual.values())
    assert {key: x.shape[key.count("lora_B")] for key, x in residual.items()} == dict.fromkeys(residual, 1)


def test_a_fresh_start_depends_on_the_round_and_on_nothing_else() -> None:
    rule = load_method("flora").rule
    one = rule(state_of(LORA), updates_of(*MIXED), a_round(LORA, 1)).adapter
    same = rule(state_of(LORA), updates_of(*MIXED, seed=4), a_round(LORA, 1)).adapter
    other = rule(state_of(LORA), updates_of(*MIXED), a_round(LORA, 2)).adapter
    assert digest(one) == digest(same) != digest(other)


# FedEx-LoRA


@given(federations(mixed=False))
@QUICK
def test_fedex_is_exact(federation: Federation) -> None:
    lora, updates, shapes = federation
    round_ = a_round(lora, shapes=shapes, aggregation__residual_rank=1000)
    after = load_method("fedex-lora").rule(state_of(lora, shapes), updates, round_)
    assert_same(served(after, lora), dense_mean(updates, lora))
    total = sum(u.num_examples for u in updates)
    for key, mean in after.adapter.items():  # the adapter itself is FedAvg's
        wanted = sum(u.num_examples / total * u.adapter[key].double() for u in updates)
        torch.testing.assert_close(mean, wanted.float())


def test_fedex_errors_add_up_over_rounds() -> None:
    rule, state, errors = load_method("fedex-lora").rule, state_of(LORA), None
    for number in (1, 2, 3):
        updates = updates_of(*EQUAL, seed=number)
        state = rule(state, updates, a_round(LORA, number, aggregation__residual_rank=1000))
        error = plus(dense_mean(updates, LORA), dense(state.adapter, LORA.scaling), -1)
        errors = plus(errors, error) if errors else error
        assert_same(dense(state.residual, 1.0), errors)
        assert_alive(state.adapter, state.residual, LORA.scaling)


# HetLoRA


@given(federations(mixed=True))
@QUICK
def test_hetlora_is_the_mean_of_padded_factors_weighted_by_norms(federation: Federation) -> None:
    lora, updates, shapes = federation
    before = state_of(lora, shapes)
    after = load_method("hetlora").rule(before, updates, a_round(lora, shapes=shapes))
    scalings = [lora.at(u.rank).scaling for u in updates]
    sizes = [norm(dense(u.adapter, s)) for u, s in zip(updates, scalings, strict=True)]
    widest = max(u.rank for u in updates)
    for name in shapes:
        old_b, old_a = matrices(before.adapter, name)
        mean_b, mean_a = np.zeros_like(old_b), np.zeros_like(old_a)
        for update, scaling, size in zip(updates, scalings, sizes, strict=True):
            b, a = matrices(update.adapter, name)
            fold = math.sqrt(scaling / lora.scaling) * size / sum(sizes)
            mean_b[:, : update.rank] += fold * b
            mean_a[: update.rank] += fold * a
        mean_b[:, widest:], mean_a[widest:] = old_b[:, widest:], old_a[widest:]
        got_b, got_a = matrices(after.adapter, name)
        np.testing.assert_allclose(got_b, mean_b, atol=1e-5)
        np.testing.assert_allclose(got_a, mean_a, atol=1e-5)
    assert_alive(after.adapter, {}, lora.scaling)


def test_one_hetlora_client_of_a_small_rank_gives_its_own_product() -> None:
    method, (update,) = load_method("hetlora"), updates_of([2], [5.0])
    zero = {key: x * (".lora_A." in key) for key, x in random_adapter(9, 4).items()}
    after = method.rule(GlobalState(zero), [update], a_round(LORA))
    assert_same(dense(after.adapter, LORA.scaling), dense(update.adapter, LORA.at(2).scaling))
    assert method.fit is not None
    back = method.fit(after.adapter, LORA, LORA.at(2))
    assert all(torch.allclose(back[key], update.adapter[key], rtol=1e-5) for key in back)


def test_hetlora_weighs_zero_products_by_examples() -> None:
    zero = [
        Update(i, {k: x * (".lora_A." in k) for k, x in u.adapter.items()}, u.rank, u.num_examples)
        for i, u in enumerate(updates_of([4, 4], [3.0, 1.0]))
    ]
    after = load_method("hetlora").rule(state_of(LORA), zero, a_round(LORA))
    key = keys("layers.0.q_proj")[0]
    torch.testing.assert_close(after.adapter[key], 0.75 * zero[0].adapter[key] + 0.25 * zero[1].adapter[key])


def test_hetlora_directions_that_only_a_weightless_client_has_stay_alive() -> None:
    silent, loud = updates_of([4, 2], [3.0, 1.0])
    silent = Update(0, {k: x * (".lora_A." in k) for k, x in silent.adapter.items()}, 4, 3.0)
    before = state_of(LORA)
    after = load_method("hetlora").rule(before, [silent, loud], a_round(LORA))
    key_a, key_b = keys("layers.0.q_proj")
    assert torch.equal(after.adapter[key_a][2:], before.adapter[key_a][2:])
    assert torch.equal(after.adapter[key_b][:, 2:], before.adapter[key_b][:, 2:])
    assert_alive(after.adapter, {}, LORA.scaling)


# One factor at a time


@pytest.mark.parametrize(
    ("name", "number", "shared"),
    [("ffa-lora", 2, ".lora_B."), ("rolora", 1, ".lora_B."), ("rolora", 2, ".lora_A."), ("fedsvd", 1, ".lora_B.")],
)
def test_what_averages_one_factor_is_exact(name: str, number: int, shared: str) -> None:
    method, state = load_method(name), state_of(LORA)
    trained = [
        Update(u.client, state.adapter | {k: x for k, x in u.adapter.items() if shared in k}, 4, u.num_examples)
        for u in updates_of(*EQUAL)
    ]
    arrived = shared_of(name, trained, number)
    assert all(shared in key for u in arrived for key in u.adapter)
    after = method.rule(state, arrived, a_round(LORA, number))
    assert_same(dense(after.adapter, LORA.scaling), dense_mean(trained, LORA))
    round_ = a_round(LORA, number, num_server_rounds=5)
    assert {key for key in state.adapter if method.trains(key, round_)} == set(arrived[0].adapter)


def test_rolora_trains_both_factors_once_nothing_is_averaged_any_more() -> None:
    method, last = load_method("rolora"), a_round(LORA, 6, num_server_rounds=5)
    assert all(method.trains(key, last) for key in state_of(LORA).adapter)
    assert method.sends(state_of(LORA), last).keys() == state_of(LORA).adapter.keys()


def test_ffa_and_fedsa_send_their_factor_alone() -> None:
    state, round_ = state_of(LORA), a_round(LORA)
    assert all(".lora_B." in key for key in load_method("ffa-lora").sends(state, round_))
    assert all(".lora_A." in key for key in load_method("fedsa-lora").sends(state, round_))
    assert len(load_method("ffa-lora").sends(state, round_)) == len(state.adapter) // 2
    fedsa = load_method("fedsa-lora")
    assert not fedsa.has_global and all(fedsa.trains(key, round_) for key in state.adapter)
    after = fedsa.rule(state, shared_of("fedsa-lora", updates_of(*EQUAL), 1), round_)
    key_a, key_b = keys("layers.1.conv")
    assert torch.equal(after.adapter[key_b], state.adapter[key_b])
    wanted = sum(u.num_examples * u.adapter[key_a].double() for u in updates_of(*EQUAL)) / 60
    torch.testing.assert_close(after.adapter[key_a], wanted.float())


@given(federations(mixed=False))
@QUICK
def test_fedsvd_turns_a_and_keeps_the_product(federation: Federation) -> None:
    lora, updates, shapes = federation
    state = state_of(lora, shapes)
    only_b = [
        Update(u.client, {k: x for k, x in u.adapter.items() if ".lora_B." in k}, u.rank, u.num_examples)
        for u in updates
    ]
    after = load_method("fedsvd").rule(state, only_b, a_round(lora, shapes=shapes))
    whole = [Update(u.client, state.adapter | u.adapter, u.rank, u.num_examples) for u in only_b]
    assert_same(dense(after.adapter, lora.scaling), dense_mean(whole, lora))
    for name in shapes:
        a = matrices(after.adapter, name)[1]
        room = min(a.shape)
        np.testing.assert_allclose(a[:room] @ a[:room].T, np.eye(room), atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, atol=1e-5)
    assert_alive(after.adapter, {}, lora.scaling)


# The server's optimisers, number by number


def optimised(name: str, means: list[float], x: float) -> float:
    """The same in plain floats."""
    s = settings()
    momentum, m, v = 0.0, 0.0, s.fedopt.tau**2
    for mean in means:
        change = mean - x
        if name == "fedavgm":
            momentum = s.fedavgm.momentum * momentum + change
            x += s.fedavgm.learning_rate * momentum
            continue
        m = s.fedopt.beta1 * m + (1 - s.fedopt.beta1) * change
        if name == "fedadam":
            v = s.fedopt.beta2 * v + (1 - s.fedopt.beta2) * change**2
        else:
            v = v - (1 - s.fedopt.beta2) * change**2 * math.copysign(1.0, v - change**2)
        x += s.fedopt.learning_rate * m / (math.sqrt(v) + s.fedopt.tau)
    return x


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi"])
def test_a_server_optimiser_follows_its_formula(name: str) -> None:
    rule, state = load_method(name).rule, state_of(LORA)
    key, place = keys("layers.1.v_proj")[1], (2, 3)
    x, means = float(state.adapter[key][place]), []
    for number in (1, 2, 3):
        updates = updates_of(*EQUAL, seed=number, scale=1e-3 if number == 2 else 1.0)
        means.append(sum(u.num_examples * float(u.adapter[key][place]) for u in updates) / 60)
        state = rule(state, updates, a_round(LORA, number))
    assert float(state.adapter[key][place]) == pytest.approx(optimised(name, means, x), rel=1e-5)
    assert all(tensor.dtype == torch.float32 for tensor in state.extra.values())


def test_fedyogi_and_fedadam_differ() -> None:
    updates = updates_of(*EQUAL)
    one, other = (load_method(n).rule(state_of(LORA), updates, a_round(LORA)).adapter for n in ("fedadam", "fedyogi"))
    assert digest(one) != digest(other)


# FedPer

LLAMA = "base_model.model.model.layers.{}.self_attn.q_proj"
UNET = (
    "base_model.model.conv_in",
    "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "base_model.model.up_blocks.0.attentions.0.transformer_blocks.1.attn1.to_q",
    "base_model.model.up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0",
    "base_model.model.conv_out",
)


def layout_of_names(names: list[str] | tuple[str, ...]) -> Layout:
    return tuple(sorted((key, (1, 1)) for name in names for key in keys(name)))


def personal(names: list[str] | tuple[str, ...], count: int) -> list[str]:
    """The layers that FedPer does not share."""
    method = load_method("fedper")
    round_ = a_round(LORA, fedper__personal_blocks=count)
    round_ = type(round_)(1, LORA, 0, round_.settings, layout_of_names(names), 3)
    return [n for n in names if not any(method.shares(key, round_) for key in keys(n))]


def test_fedper_keeps_the_last_blocks() -> None:
    llama = [LLAMA.format(i) for i in (0, 1, 9, 10)]
    assert personal(llama, 1) == llama[3:]  # 10 comes after 9, not after 1
    assert personal(llama, 3) == llama[1:]
    assert personal([*llama, "base_model.model.lm_head"], 1) == [llama[3], "base_model.model.lm_head"]
    assert personal(UNET, 1) == [*UNET[5:]]
    assert personal(UNET, 3) == [*UNET[3:]]
    dit = [f"base_model.model.transformer_blocks.{i}.attn1.to_q" for i in range(3)]
    assert personal(dit, 1) == dit[2:]
    text = [f"base_model.model.text_encoder.text_model.encoder.layers.{i}.self_attn.q_proj" for i in range(2)]
    both = [*text, *(name.replace("base_model.model", "base_model.model.unet") for name in UNET)]
    assert personal(both, 1) == both[-2:]
    halves = {"generator": ("stem", "blocks.0.conv", "blocks.1.conv", "output")}
    halves["discriminator"] = ("blocks.0.conv", "blocks.1.conv", "features", "output")
    gan = [f"base_model.model.{half}.{name}" for half, names in halves.items() for name in names]
    assert personal(gan, 1) == [*gan[2:4], *gan[5:]]


def test_fedper_sends_what_it_shares() -> None:
    method, round_ = load_method("fedper"), a_round(LORA, fedper__personal_blocks=1)
    state = state_of(LORA)
    assert {key.split(".lora_")[0] for key in method.sends(state, round_)} == {"layers.0.q_proj"}


@pytest.mark.parametrize("names", [[LLAMA.format(0)], [LLAMA.format(0), LLAMA.format(1)], ["base_model.model.net"]])
def test_fedper_refuses_to_share_nothing(names: list[str]) -> None:
    with pytest.raises(SettingsError, match=r"fedper\.personal-blocks = 2.*blocks"):
        personal(names, 2)


# What holds for all of them


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("number", [1, 2])
def test_replies_in_any_order_give_the_same_bits_once_they_stand_in_client_order(name: str, number: int) -> None:
    rule, updates = load_method(name).rule, shared_of(name, updates_of(*(MIXED if name in ANY_RANK else EQUAL)), number)
    digests, far = set(), 0.0
    reference = rule(state_of(LORA), updates, a_round(LORA, number))
    for order in itertools.permutations(updates):
        after = rule(state_of(LORA), sorted(order, key=lambda u: int(u.client)), a_round(LORA, number))
        digests.add(tuple(digest(part) for part in after.tensors.values()))
        unsorted = rule(state_of(LORA), order, a_round(LORA, number))
        far = max(far, norm(plus(served(unsorted, LORA), served(reference, LORA), -1)))
    assert len(digests) == 1
    assert far <= 1e-5 * norm(served(reference, LORA))


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("from_zero", [False, True])
def test_every_direction_can_learn_after_every_rule(name: str, number: int, from_zero: bool) -> None:
    ranks, weights = MIXED if name in ANY_RANK else EQUAL
    state = GlobalState(start(4)) if from_zero else state_of(LORA)
    updates = updates_of(ranks, weights)
    if from_zero:  # nobody learnt anything: everyone answers with what it received
        fit = load_method(name).fit
        updates = [
            Update(i, fit(state.adapter, LORA, LORA.at(r)) if fit else state.adapter, r, w)
            for i, (r, w) in enumerate(zip(ranks, weights, strict=True))
        ]
    after = load_method(name).rule(state, shared_of(name, updates, number), a_round(LORA, number))
    assert_alive(after.adapter, after.residual, LORA.scaling)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_rule_changes_none_of_its_arguments(name: str) -> None:
    rule, state = load_method(name).rule, state_of(LORA)
    updates = shared_of(name, updates_of(*(MIXED if name in ANY_RANK else EQUAL)), 1)
    before = [digest(state.adapter), *(digest(u.adapter) for u in updates)]
    middle = rule(state, updates, a_round(LORA))
    inside = [digest(part) for part in middle.tensors.values()]
    rule(middle, updates, a_round(LORA, 3))
    assert before == [digest(state.adapter), *(digest(u.adapter) for u in updates)]
    assert inside == [digest(part) for part in middle.tensors.values()]


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_rule_keeps_keys_shapes_and_kind(name: str) -> None:
    updates = shared_of(name, updates_of(*(MIXED if name in ANY_RANK else EQUAL)), 1)
    state = state_of(LORA)
    after = load_method(name).rule(state, updates, a_round(LORA))
    for part in after.tensors.values():
        assert all(x.dtype == torch.float32 and x.is_contiguous() and x.isfinite().all() for x in part.values())
    assert {k: x.shape for k, x in after.adapter.items()} == {k: x.shape for k, x in state.adapter.items()}
    assert set(after.residual) in (set(), set(state.adapter))


@pytest.mark.parametrize("name", plugins("methods"))
def test_every_method_cites_its_paper_on_its_first_line(name: str) -> None:
    module = __import__(f"fedgen_app.methods.{name.replace('-', '_')}", fromlist=["METHOD"])
    assert module.__doc__ is not None
    first = module.__doc__.splitlines()[0]
    assert "arXiv" in first or name in ("local-only", "centralized")


def refusals(name: str, **overrides: str) -> list[str]:
    return list(load_method(name).refuses(settings(method=name, **overrides)))


@pytest.mark.parametrize(
    ("name", "guard", "fits"),
    [
        ("flora", "krum", True),
        ("flora", "factor-median", False),
        ("fedex-lora", "factor-trimmed-mean", False),
        ("flexlora", "geometric-median", True),
        ("hetlora", "geometric-median", False),
        ("hetlora", "norm-bound", True),
        ("fedsa-lora", "krum", False),
        ("fedsa-lora", "factor-median", True),
        ("scaffold", "norm-bound", False),
        ("local-only", "norm-bound", False),
        ("centralized", "krum", False),
        ("fedgen-edge", "factor-median", True),
    ],
)
def test_a_method_refuses_the_robust_rules_that_do_not_fit_it(name: str, guard: str, fits: bool) -> None:
    reasons = refusals(name, aggregation__robust=guard)
    assert bool(reasons) is not fits
    assert fits or (f"aggregation.robust = '{guard}'" in reasons[0] and name in reasons[0])
    assert not refusals(name)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda pair, lora: (pair[0] / lora.scaling, torch.nn.functional.normalize(pair[1], dim=1)),
        lambda pair, lora: (pair[0], pair[1]),
    ],
)
def test_the_oracle_tells_a_lost_root_and_a_lost_scaling(wrong: Callable[[Pair, Lora], Pair]) -> None:
    # The two commonest errors, made on purpose: the comparison that the tests above rest on has to see them.
    from fedgen_app.federation.lowrank import as_factors, compress

    updates, adapter = updates_of(*EQUAL), {}
    for key_a, key_b, product in mean_of_products(updates, LORA):
        adapter |= as_factors(wrong(compress(product, 4).balanced, LORA), updates[0].adapter, key_a, key_b)
    with pytest.raises(AssertionError):
        assert_same(dense(adapter, LORA.scaling), best(dense_mean(updates, LORA), 4))
