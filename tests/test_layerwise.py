"""Layer-wise aggregation: who disagrees in a layer does not count there, and counts elsewhere."""

from __future__ import annotations

import pytest
import torch
from synthetic import SHAPES, a_round, keys, random_adapter, state_of

from fedgen_app.federation.layerwise import agreement, layer_wise, layers
from fedgen_app.federation.method import GlobalState, Lora, Update, weighted_mean
from fedgen_app.learning.adapters import Adapter

LORA = Lora(2, 3.0)
FIRST, SECOND, THIRD = SHAPES


def nudged(state: GlobalState, seed: int, signs: dict[str, float] | None = None) -> Adapter:
    """B of every layer moved the same way, but for noise; against it where a layer's sign is -1."""
    common, noise = random_adapter(50, LORA.rank, scale=0.1), random_adapter(seed, LORA.rank, scale=0.01)
    adapter = dict(state.adapter)
    for name in SHAPES:
        key = keys(name)[1]
        adapter[key] = adapter[key] + (signs or {}).get(name, 1.0) * (common[key] + noise[key])
    return adapter


def test_both_factors_of_a_module_are_one_layer() -> None:
    found = list(layers(random_adapter(0, 2) | {"norm.weight": torch.zeros(1)}))
    assert sorted(map(tuple, found)) == sorted([*(tuple(sorted(keys(name))) for name in SHAPES), ("norm.weight",)])


def test_a_client_does_not_count_in_the_layer_where_it_points_away() -> None:
    state = state_of(LORA)
    honest = [Update(i, nudged(state, i), 2, 10.0 + i) for i in range(4)]
    against = Update(9, nudged(state, 9, {SECOND: -1.0}), 2, 10.0)
    got = layer_wise(weighted_mean)(state, [*honest, against], a_round(LORA)).adapter
    alone = layer_wise(weighted_mean)(state, honest, a_round(LORA)).adapter
    plain = weighted_mean(state, [*honest, against], a_round(LORA)).adapter
    second, first = keys(SECOND)[1], keys(FIRST)[1]
    torch.testing.assert_close(got[second], alone[second], rtol=0.02, atol=1e-3)
    assert (got[second] - plain[second]).abs().max() > 0.01
    torch.testing.assert_close(got[first], plain[first], rtol=0.02, atol=2e-3)


def test_the_weight_is_the_cosine_with_the_mean_change() -> None:
    state = state_of(LORA)
    parts = [
        Update(i, nudged(state, i, {THIRD: sign}), 2, n)
        for i, (n, sign) in enumerate([(3.0, 1), (5.0, 0.2), (2.0, -1)])
    ]
    key_a, key_b = keys(THIRD)
    own = [Update(u.client, {k: u.adapter[k] for k in (key_a, key_b)}, 2, u.num_examples) for u in parts]
    changes = [
        (
            (u.adapter[key_b] - state.adapter[key_b]).flatten(1).double() @ state.adapter[key_a].flatten(1).double()
        ).flatten()
        for u in own
    ]
    mean = sum((u.num_examples * c for u, c in zip(own, changes, strict=True)), torch.zeros(())) / 10
    cosines = [max(0.0, float(torch.cosine_similarity(c, mean, dim=0))) for c in changes]
    wanted = [u.num_examples * cosine for u, cosine in zip(own, cosines, strict=True)]
    assert agreement(own, state, a_round(LORA)) == pytest.approx(wanted, rel=1e-6)
    assert wanted[2] == 0


def test_where_nothing_changed_the_examples_count() -> None:
    state = state_of(LORA)
    same = [Update(i, dict(state.adapter), 2, 1.0 + i) for i in range(3)]
    after = layer_wise(weighted_mean)(state, same, a_round(LORA))
    torch.testing.assert_close(after.adapter, state.adapter)


def test_what_nobody_shared_stays() -> None:
    state = state_of(LORA)
    only = [Update(i, {keys(FIRST)[1]: nudged(state, i)[keys(FIRST)[1]]}, 2, 1.0) for i in range(3)]
    after = layer_wise(weighted_mean)(state, only, a_round(LORA)).adapter
    assert set(after) == set(state.adapter)
    assert all(torch.equal(after[k], state.adapter[k]) for k in after if k != keys(FIRST)[1])
