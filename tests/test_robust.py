"""Robust rules: distances against the dense oracle, and 10-30 % attackers against clients with a common signal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from synthetic import (
    Dense,
    Shapes,
    a_round,
    assert_same,
    dense,
    dense_mean,
    federations,
    matrices,
    norm,
    plus,
    random_adapter,
    settings,
    state_of,
    updates_of,
)

from fedgen_app.errors import RunError
from fedgen_app.federation.method import GlobalState, Lora, Method, Update, load_method, weighted_mean
from fedgen_app.federation.robust import (
    NEEDED,
    attackers,
    gram_beside_the_others,
    gram_of_changes,
    objection,
    reweigh,
    robust,
    weiszfeld,
)
from fedgen_app.learning.adapters import Adapter, digest

LORA = Lora(4, 10.0)
QUICK = hypothesis_settings(deadline=None, max_examples=40)
RULES = list(NEEDED)


def flat(products: Dense) -> np.ndarray:
    return np.concatenate([products[name].ravel() for name in sorted(products)])


# Distances


@given(federations(mixed=True))
@QUICK
def test_the_gram_matrix_is_that_of_the_dense_changes(federation: tuple[Lora, list[Update], Shapes]) -> None:
    lora, updates, shapes = federation
    received = [random_adapter(77, u.rank, shapes) for u in updates]
    scalings = [lora.at(u.rank).scaling for u in updates]
    changes = np.stack(
        [
            flat(plus(dense(u.adapter, s), dense(old, s), -1))
            for u, old, s in zip(updates, received, scalings, strict=True)
        ]
    )
    got = gram_of_changes(updates, received, lora).numpy()
    np.testing.assert_allclose(got, changes @ changes.T, atol=1e-10 * (1 + np.abs(got).max()))


@given(federations(mixed=False))
@QUICK
def test_beside_the_others_is_the_first_order_of_the_product_of_means(
    federation: tuple[Lora, list[Update], Shapes],
) -> None:
    lora, updates, shapes = federation
    received, changes = random_adapter(77, lora.rank, shapes), []
    for update in updates:
        parts = []
        for name in sorted(shapes):
            each = [matrices(u.adapter, name) for u in updates]
            b_mid, a_mid = (np.median(np.stack(factors), axis=0) for factors in zip(*each, strict=True))
            (b, a), (b_old, a_old) = matrices(update.adapter, name), matrices(received, name)
            parts.append((lora.scaling * ((b - b_old) @ a_mid + b_mid @ (a - a_old))).ravel())
        changes.append(np.concatenate(parts))
    wanted = np.stack(changes) @ np.stack(changes).T
    got = gram_beside_the_others(updates, received, lora).numpy()
    np.testing.assert_allclose(got, wanted, atol=1e-10 * (1 + np.abs(wanted).max()))


def test_a_factor_that_was_not_shared_is_the_received_one() -> None:
    state, updates = state_of(LORA), updates_of([4, 4, 4], [1.0, 2.0, 3.0])
    only_b = [replace(u, adapter={k: x for k, x in u.adapter.items() if ".lora_B." in k}) for u in updates]
    whole = [replace(u, adapter=state.adapter | u.adapter) for u in only_b]
    one, other = (gram_of_changes(us, [state.adapter] * 3, LORA) for us in (only_b, whole))
    torch.testing.assert_close(one, other)
    changes = np.stack([flat(plus(dense(u.adapter, 2.5), dense(state.adapter, 2.5), -1)) for u in whole])
    np.testing.assert_allclose(one.numpy(), changes @ changes.T, rtol=1e-9)


def test_small_changes_of_a_large_adapter_are_measured_exactly() -> None:
    old = {key: 1e4 * x for key, x in random_adapter(5, 4).items()}
    new = {key: x * (1 + 2.0**-18) for key, x in old.items()}
    got = gram_of_changes([Update(0, new, 4, 1.0)], [old], LORA)[0, 0]
    change = flat(plus(dense(new, 2.5), dense(old, 2.5), -1))
    assert float(got) == pytest.approx(float(change @ change), rel=1e-9)


def test_tensors_of_a_whole_model_are_measured_as_they_are() -> None:
    old = {"weight": torch.zeros(2, 3), "bias": torch.ones(3)}
    new = [{"weight": torch.full((2, 3), float(i)), "bias": torch.ones(3) * (1 - i)} for i in range(3)]
    got = gram_of_changes([Update(i, n, 1, 1.0) for i, n in enumerate(new)], [old] * 3, Lora(1, 1.0))
    assert got.tolist() == [[9.0 * i * j for j in range(3)] for i in range(3)]


# Of two, any point between them is nearly as good where their weights are alike, and the steps get no further.
@given(st.integers(0, 1000), st.integers(3, 9))
@QUICK
def test_weiszfeld_finds_the_point_of_least_total_distance(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    points, weights = rng.normal(size=(count, 4)), rng.uniform(0.5, 2, count)
    shares = np.array(weiszfeld(torch.tensor(points @ points.T), list(weights)))
    assert shares.sum() == pytest.approx(1) and (shares > 0).all()

    def total(place: np.ndarray) -> float:
        return float((weights * np.linalg.norm(points - place, axis=1)).sum())

    found = shares @ points
    slack = 1e-3 * total(found)  # between near-equals at the two ends of a line the last steps are very short
    for _ in range(200):
        assert total(found) <= total(found + rng.normal(size=4) * rng.choice([1e-2, 0.1, 1.0])) + slack
    assert all(total(found) <= total(point) + slack for point in points)


def test_the_geometric_median_of_equals_is_their_mean() -> None:
    same = torch.ones(3, 3, dtype=torch.float64)
    assert weiszfeld(same, [1.0, 2.0, 3.0]) == pytest.approx([1 / 6, 2 / 6, 3 / 6])


# Each rule by its definition


def reference_krum(changes: np.ndarray, f: int) -> list[int]:
    scores = []
    for i, one in enumerate(changes):
        squares = sorted(((one - other) ** 2).sum() for j, other in enumerate(changes) if j != i)
        scores.append(sum(squares[: len(changes) - f - 2]))
    return sorted(range(len(changes)), key=lambda i: scores[i])


def test_krum_and_multi_krum_choose_by_dense_distances() -> None:
    state, updates = state_of(LORA), updates_of([4] * 9, [1.0 + i for i in range(9)])
    changes = np.stack([flat(plus(dense(u.adapter, 2.5), dense(state.adapter, 2.5), -1)) for u in updates])
    round_ = a_round(LORA, aggregation__attackers=0.3)
    order = reference_krum(changes, 2)
    assert reweigh("krum", updates, state, round_) == [updates[order[0]]]
    assert reweigh("multi-krum", updates, state, round_) == [updates[i] for i in sorted(order[:7])]


def test_krum_asks_the_nearest_neighbours_only() -> None:
    # Of all distances the point at 5, in the middle of the whole line, would have the least.
    places = [5.0, 0.0, 6.0, 0.1, 0.22, 10.0, 0.3]
    updates = [Update(i, {"weight": torch.tensor([x])}, 1, 1.0) for i, x in enumerate(places)]
    round_ = a_round(Lora(1, 1.0), aggregation__attackers=0.3)
    state = GlobalState({"weight": torch.tensor([1.0])})
    assert [u.client for u in reweigh("krum", updates, state, round_)] == [3]
    assert [u.client for u in reweigh("multi-krum", updates, state, round_)] == [0, 1, 3, 4, 6]


def test_a_norm_bound_clips_the_product_and_nothing_else() -> None:
    state = state_of(LORA)
    updates = [
        replace(u, adapter={k: x + size * (u.adapter[k] - x) for k, x in state.adapter.items()})
        for u, size in zip(updates_of([4] * 5, [3.0] * 5), (0.1, 0.1, 0.11, 0.1, 5.0), strict=True)
    ]
    got = reweigh("norm-bound", updates, state, a_round(LORA, aggregation__norm_bound=1.5))
    sizes = [norm(plus(dense(u.adapter, 2.5), dense(state.adapter, 2.5), -1)) for u in updates]
    clipped = norm(plus(dense(got[4].adapter, 2.5), dense(state.adapter, 2.5), -1))
    limit = 1.5 * np.median(sizes)  # and its factors', beside the others', are within theirs
    assert sizes[4] > 10 * np.median(sizes) and 0.9 * limit < clipped <= limit * (1 + 1e-6)
    assert got[:4] == updates[:4] and got[4].num_examples == 3.0


def test_a_norm_bound_clips_a_shared_factor_alone() -> None:
    state, updates = state_of(LORA), updates_of([4] * 3, [1.0] * 3)
    only_b = [
        replace(u, adapter={k: x * (100.0 if i == 2 else 1.0) for k, x in u.adapter.items() if ".lora_B." in k})
        for i, u in enumerate(updates)
    ]
    got = reweigh("norm-bound", only_b, state, a_round(LORA))
    assert set(got[2].adapter) == set(only_b[2].adapter)
    sizes = [
        norm(plus(dense(state.adapter | u.adapter, 2.5), dense(state.adapter, 2.5), -1)) for u in (*only_b[:2], got[2])
    ]
    assert sizes[2] == pytest.approx(max(sizes[:2]), rel=1e-3)


def test_the_geometric_median_only_changes_weights() -> None:
    state, updates = state_of(LORA), updates_of([4] * 5, [1.0, 2.0, 3.0, 4.0, 5.0])
    got = reweigh("geometric-median", updates, state, a_round(LORA))
    assert [replace(g, num_examples=0) for g in got] == [replace(u, num_examples=0) for u in updates]
    assert sum(u.num_examples for u in got) == pytest.approx(15.0)


@pytest.mark.parametrize("count", [4, 5])
def test_rules_on_factors_are_numpys(count: int) -> None:
    updates = updates_of([4] * count, [10.0**i for i in range(count)])
    round_ = a_round(LORA, aggregation__attackers=0.25)
    median, trimmed = (reweigh(f"factor-{r}", updates, state_of(LORA), round_) for r in ("median", "trimmed-mean"))
    assert len(median) == len(trimmed) == 1
    for key in updates[0].adapter:
        each = np.stack([u.adapter[key].double().numpy() for u in updates])
        np.testing.assert_allclose(median[0].adapter[key], np.median(each, axis=0), rtol=1e-6)
        np.testing.assert_allclose(trimmed[0].adapter[key], np.sort(each, axis=0)[1:-1].mean(0), rtol=1e-6, atol=1e-7)
    assert median[0].num_examples == sum(u.num_examples for u in updates)


def test_none_changes_nothing() -> None:
    updates = updates_of([4] * 2, [1.0, 2.0])
    assert reweigh("none", updates, state_of(LORA), a_round(LORA)) == updates
    guarded = robust(weighted_mean)(state_of(LORA), updates, a_round(LORA))
    assert digest(guarded.adapter) == digest(weighted_mean(state_of(LORA), updates, a_round(LORA)).adapter)


# How many clients a rule needs


@pytest.mark.parametrize(("share", "clients", "f"), [(0.2, 2, 1), (0.2, 9, 1), (0.2, 10, 2), (0.29, 100, 29)])
def test_attackers_are_a_share_of_the_clients_and_at_least_one(share: float, clients: int, f: int) -> None:
    assert attackers(settings(aggregation__attackers=share).aggregation, clients) == f


@pytest.mark.parametrize(
    ("name", "share", "few", "needs"),
    [
        ("krum", 0.4, 5, "2f + 3 = 7 replies against f = 2 attackers"),
        ("multi-krum", 0.2, 4, "2f + 3 = 5 replies against f = 1 attackers"),
        ("factor-trimmed-mean", 0.1, 2, "2f + 1 = 3 replies against f = 1 attackers"),
    ],
)
def test_too_few_clients_are_refused_by_name_and_number(name: str, share: float, few: int, needs: str) -> None:
    round_ = a_round(LORA, aggregation__robust=name, aggregation__attackers=share)
    updates = updates_of([4] * few, [1.0] * few)
    with pytest.raises(RunError) as caught:
        robust(weighted_mean)(state_of(LORA), updates, round_)
    for words in (f"aggregation.robust = {name!r}", needs, f"there are {few}", f"aggregation.attackers = {share}"):
        assert words in str(caught.value)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("clients", range(1, 12))
@pytest.mark.parametrize("share", [0.1, 0.3, 0.49])
def test_a_rule_works_wherever_it_has_no_objection(name: str, clients: int, share: float) -> None:
    round_ = a_round(LORA, aggregation__robust=name, aggregation__attackers=share)
    updates = updates_of([4] * clients, [1.0 + i for i in range(clients)])
    if objection(round_.settings.aggregation, clients):
        with pytest.raises(RunError, match="aggregation.robust"):
            robust(weighted_mean)(state_of(LORA), updates, round_)
    else:
        after = robust(weighted_mean)(state_of(LORA), updates, round_)
        assert all(x.isfinite().all() for x in after.adapter.values())


def test_a_rank_of_its_own_needs_a_method_for_it() -> None:
    updates = updates_of([4, 4, 4, 4, 2], [1.0] * 5)
    with pytest.raises(RunError, match="rank 2"):
        reweigh("krum", updates, state_of(LORA), a_round(LORA))


# Attacks

SMALL: Shapes = {"layers.0.q_proj": (12, (10,)), "layers.1.conv": (8, (2, 3, 3))}
Attack = Callable[[Adapter, Sequence[Adapter], int], Adapter]


def moved(start: Adapter, by: Adapter, times: float) -> Adapter:
    return {key: x + times * by[key] for key, x in start.items()}


def minus(one: Adapter, other: Adapter) -> Adapter:
    return {key: x - other[key] for key, x in one.items()}


def mean_of(adapters: Sequence[Adapter]) -> Adapter:
    return {key: torch.stack([a[key] for a in adapters]).mean(0) for key in adapters[0]}


ATTACKS: dict[str, Attack] = {
    "noise": lambda start, honest, i: moved(start, random_adapter(5000 + i, 4, SMALL), 3.0),
    "sign flip": lambda start, honest, i: moved(start, minus(honest[i], start), -9.0),
    "scaled": lambda start, honest, i: moved(start, minus(honest[i], start), 30.0),
    # The product of an honest client, in factors that spoil a mean of factors.
    "turned": lambda start, honest, i: {k: x * (100 if ".lora_A." in k else 0.01) for k, x in honest[i].items()},
    # All attackers say the same, so that they are each other's nearest neighbours.
    "colluding": lambda start, honest, i: moved(start, minus(mean_of(honest), start), -8.0),
}
CLIENTS = 20


def population(attack: str, hostile: int) -> tuple[GlobalState, list[Update], Dense]:
    """Clients that moved alike from one start, up to noise; the mean product of those who are honest."""
    begin, signal = random_adapter(1, 4, SMALL, 0.3), random_adapter(2, 4, SMALL, 0.1)
    honest = [moved(moved(begin, signal, 1.0), random_adapter(100 + i, 4, SMALL), 0.03) for i in range(CLIENTS)]
    weights = [1.0 + i % 4 for i in range(CLIENTS)]
    places = {3 * i % CLIENTS for i in range(hostile)}
    adapters = [ATTACKS[attack](begin, honest, i) if i in places else h for i, h in enumerate(honest)]
    updates = [Update(i, a, 4, w) for i, (a, w) in enumerate(zip(adapters, weights, strict=True))]
    good = [Update(i, honest[i], 4, w) for i, w in enumerate(weights) if i not in places]
    return GlobalState(begin), updates, dense_mean(good, LORA)


# How far the result may lie from the honest mean, as a share of the way that the honest went. Krum takes one client,
# with that one's noise; a norm bound lets every attacker pull by one median change, so of 30 % it keeps the direction.
ALLOWED = {
    "norm-bound": 0.75,
    "krum": 0.45,
    "multi-krum": 0.2,
    "geometric-median": 0.3,
    "factor-median": 0.3,
    "factor-trimmed-mean": 0.3,
}


def error(after: GlobalState, wanted: Dense, begin: Dense) -> float:
    got = plus(dense(after.adapter, LORA.scaling), dense(after.residual, 1.0)) if after.residual else None
    got = got or dense(after.adapter, LORA.scaling)
    return norm(plus(got, wanted, -1)) / norm(plus(wanted, begin, -1))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("hostile", [2, 4, 6])
def test_attackers_do_not_move_a_robust_rule_far(name: str, attack: str, hostile: int) -> None:
    state, updates, wanted = population(attack, hostile)
    round_ = a_round(LORA, shapes=SMALL, aggregation__robust=name, aggregation__attackers=0.3)
    guarded = error(robust(weighted_mean)(state, updates, round_), wanted, dense(state.adapter, LORA.scaling))
    assert guarded < ALLOWED[name]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("hostile", [2, 4, 6])
def test_the_same_attackers_do_move_the_plain_mean(attack: str, hostile: int) -> None:
    state, updates, wanted = population(attack, hostile)
    plain = weighted_mean(state, updates, a_round(LORA, shapes=SMALL))
    assert error(plain, wanted, dense(state.adapter, LORA.scaling)) > max(ALLOWED.values())


@pytest.mark.parametrize("method", ["flora", "fedex-lora", "flexlora", "hetlora", "fedavgm"])
@pytest.mark.parametrize("name", ["multi-krum", "norm-bound"])
def test_the_guard_stands_before_other_rules_too(method: str, name: str) -> None:
    state, updates, wanted = population("scaled", 4)
    round_ = a_round(LORA, shapes=SMALL, aggregation__robust=name, aggregation__residual_rank=100)
    chosen: Method = load_method(method)
    begin = dense(state.adapter, LORA.scaling)
    far = error(chosen.rule(state, updates, round_), wanted, begin)
    near = error(robust(chosen.rule, chosen.fit, chosen.widen)(state, updates, round_), wanted, begin)
    assert near < 0.75 < far


def test_a_client_of_small_rank_is_no_outlier() -> None:
    # What a client changed is measured from what it received at its own rank, not from the server's larger adapter.
    flex = load_method("flexlora")
    assert flex.fit is not None
    state, signal = state_of(LORA), random_adapter(2, 4, scale=0.05)
    updates = []
    for i, rank in enumerate([4, 4, 4, 4, 1, 1]):
        received = flex.fit(state.adapter, LORA, LORA.at(rank))
        cut = flex.fit(signal, LORA, LORA.at(rank))
        updates.append(Update(i, {k: x + cut[k] for k, x in received.items()}, rank, 1.0))
    hostile = Update(6, {k: 20 * x for k, x in updates[0].adapter.items()}, 4, 1.0)
    round_ = a_round(LORA, aggregation__attackers=0.2)
    kept = reweigh("multi-krum", [*updates, hostile], state, round_, flex.fit)
    assert [u.client for u in kept] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["multi-krum", "norm-bound"])
def test_factors_of_several_ranks_are_compared_as_hetlora_averages_them(name: str) -> None:
    het = load_method("hetlora")
    assert het.fit is not None
    state, honest, _ = population("turned", 0)
    at_rank = [replace(u, adapter=het.fit(u.adapter, LORA, LORA.at(2)), rank=2) for u in honest[::3]]
    updates = [*at_rank, *(u for i, u in enumerate(honest) if i % 3)]
    turned = [replace(u, adapter=ATTACKS["turned"](u.adapter, [u.adapter], 0)) for u in updates[3:9]]
    attacked = [*updates[:3], *turned, *updates[9:]]
    assert {u.rank for u in turned} == {2, 4}
    for each, same in zip(turned, updates[3:9], strict=True):  # nothing that a product could show
        assert_same(dense(each.adapter, 1.0), dense(same.adapter, 1.0))
    round_ = a_round(LORA, shapes=SMALL, aggregation__robust=name, aggregation__attackers=0.3)
    kept = reweigh(name, attacked, state, round_, het.fit, het.widen)
    hostile = {u.client for u in turned}
    if name != "norm-bound":
        assert not hostile & {u.client for u in kept}
        assert hostile & {u.client for u in reweigh(name, attacked, state, round_, het.fit)}
    wanted, begin = dense(het.rule(state, updates, round_).adapter, LORA.scaling), dense(state.adapter, LORA.scaling)
    assert error(het.rule(state, attacked, round_), wanted, begin) > 1
    if name == "norm-bound":
        assert error(het.rule(state, kept, round_), wanted, begin) < ALLOWED[name]


@pytest.mark.parametrize("name", ["multi-krum", "norm-bound"])
def test_a_turned_direction_is_seen_where_most_do_not_have_it(name: str) -> None:
    # The first round: B is zero, and so is the product with it of whatever A a client sends.
    het = load_method("hetlora")
    assert het.fit is not None
    begin = {k: x if ".lora_A." in k else torch.zeros_like(x) for k, x in random_adapter(1, 4, SMALL, 0.3).items()}
    signal, state = random_adapter(2, 4, SMALL, 0.1), GlobalState(begin)
    honest = [moved(moved(begin, signal, 1.0), random_adapter(100 + i, 4, SMALL), 0.03) for i in range(CLIENTS)]
    small, hostile = range(11), range(17, CLIENTS)  # eleven of two directions, six honest ones and three others of four
    updates = [Update(i, het.fit(a, LORA, LORA.at(2)), 2, 1.0) for i, a in enumerate(honest) if i in small]
    for i in range(len(small), CLIENTS):
        last = {k: x.narrow(0 if ".lora_A." in k else 1, 2, 2) for k, x in honest[i].items()}
        for key, part in last.items() if i in hostile else ():
            part.mul_(300 if ".lora_A." in key else 1 / 300)
        updates.append(Update(i, honest[i], 4, 1.0))
    good = [u for u in updates if u.client not in hostile]
    round_ = a_round(LORA, shapes=SMALL, aggregation__robust=name, aggregation__attackers=0.15)
    wanted, start = dense(het.rule(state, good, round_).adapter, LORA.scaling), dense(begin, LORA.scaling)
    kept = reweigh(name, updates, state, round_, het.fit, het.widen)
    assert error(het.rule(state, updates, round_), wanted, start) > 1
    if name == "multi-krum":
        assert [u.client for u in kept] == [u.client for u in good]
    assert error(het.rule(state, kept, round_), wanted, start) < ALLOWED[name]


def test_every_direction_can_learn_after_a_guarded_rule() -> None:
    from synthetic import assert_alive

    state, updates, _ = population("colluding", 6)
    for name in RULES:
        round_ = a_round(LORA, shapes=SMALL, aggregation__robust=name, aggregation__attackers=0.3)
        assert_alive(robust(weighted_mean)(state, updates, round_).adapter, {}, LORA.scaling)


def test_a_median_that_nobody_left_is_the_received_adapter() -> None:
    state = state_of(LORA)
    still = [Update(i, dict(state.adapter), 4, 1.0) for i in range(3)]
    far = Update(3, random_adapter(7, 4), 4, 1.0)
    got = reweigh("norm-bound", [*still, far], state, a_round(LORA))
    assert_same(dense(got[3].adapter, 2.5), dense(state.adapter, 2.5))
    shares = [u.num_examples for u in reweigh("geometric-median", [*still, far], state, a_round(LORA))]
    assert shares[3] < 1e-3 * math.fsum(shares)
