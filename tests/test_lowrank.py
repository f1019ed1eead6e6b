"""Algebra of pairs against dense numpy, over shapes that hypothesis makes up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from synthetic import assert_alive, assert_same, dense, keys, random_adapter

from fedgen_app.federation import lowrank
from fedgen_app.federation.lowrank import Pair

SIZE = st.integers(1, 9)
QUICK = hypothesis_settings(deadline=None, max_examples=60)


@st.composite
def some_pairs(draw: st.DrawFn) -> list[Pair]:
    d_out, d_in, seed = draw(SIZE), draw(SIZE), draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ranks = draw(st.lists(SIZE, min_size=1, max_size=4))
    return [(normal(d_out, rank), normal(rank, d_in)) for rank in ranks]


def product(pair: Pair) -> np.ndarray:
    return (pair[0] @ pair[1]).numpy()


@given(some_pairs())
@QUICK
def test_a_stack_is_the_weighted_sum(pairs: list[Pair]) -> None:
    weights = [0.5 - i for i in range(len(pairs))]
    wanted = sum(w * product(p) for p, w in zip(pairs, weights, strict=True))
    np.testing.assert_allclose(product(lowrank.stack(pairs, weights)), wanted, atol=1e-12)


@given(some_pairs(), SIZE)
@QUICK
def test_compression_is_the_dense_best_approximation(pairs: list[Pair], rank: int) -> None:
    stacked = lowrank.stack(pairs, [1.0] * len(pairs))
    got = lowrank.compress(stacked, rank)
    whole = product(stacked)
    u, s, v = np.linalg.svd(whole, full_matrices=False)
    assert len(got.values) == min(rank, int((s > 1e-7 * s[0]).sum()))
    kept = len(got.values)
    np.testing.assert_allclose(got.values.numpy(), s[:kept], rtol=1e-9)
    np.testing.assert_allclose(product(got.balanced), (u[:, :kept] * s[:kept]) @ v[:kept], atol=1e-7 * s[0])
    np.testing.assert_allclose((got.left.T @ got.left).numpy(), np.eye(kept), atol=1e-10)
    np.testing.assert_allclose((got.right @ got.right.T).numpy(), np.eye(kept), atol=1e-10)
    assert got.energy == pytest.approx((whole**2).sum())
    lost = ((whole - product(got.balanced)) ** 2).sum()
    assert got.lost == pytest.approx(lost, abs=1e-9 * got.energy)


@given(some_pairs())
@QUICK
def test_signs_are_no_accident(pairs: list[Pair]) -> None:
    b, a = pairs[0]
    one, other = lowrank.compress((b, a), 9), lowrank.compress((-b, -a), 9)
    for left in (one.left, other.left):
        largest = left.abs().argmax(0)
        assert (left[largest, torch.arange(left.shape[1])] > 0).all()
    torch.testing.assert_close(one.left, other.left)


def test_what_cancels_leaves_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(50, 8, generator=generator), torch.randn(8, 40, generator=generator)
    pair = (b.double(), a.double())
    nothing = lowrank.compress(lowrank.stack([pair, pair], [1e6, -1e6]), 8)
    assert len(nothing.values) == 0 and nothing.lost <= 1e-6
    assert len(lowrank.compress((pair[0] * 0, pair[1]), 8).values) == 0


def test_a_large_factor_that_adds_nothing_hides_nobody() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(9, 2, generator=generator).double(), torch.randn(2, 7, generator=generator).double()
    idle = (torch.zeros(9, 2).double(), torch.full((2, 7), 1e30).double())
    got = lowrank.compress(lowrank.stack([(b, a), idle], [1.0, 1.0]), 4)
    assert len(got.values) == 2
    np.testing.assert_allclose(product(got.balanced), product((b, a)), rtol=1e-9)


def test_a_weak_direction_is_kept_until_it_is_below_rounding() -> None:
    basis = torch.eye(4, dtype=torch.float64)
    for strength, kept in ((1e-5, 2), (1e-9, 1)):
        pair = (basis[:, :2] * torch.tensor([1.0, strength], dtype=torch.float64), basis[:2])
        assert len(lowrank.compress(pair, 4).values) == kept


@given(some_pairs(), st.integers(1, 12))
@QUICK
def test_a_refill_keeps_the_product_and_adds_orthogonal_rows(pairs: list[Pair], rank: int) -> None:
    b, a = lowrank.compress(pairs[0], rank).balanced
    full_b, full_a = lowrank.refill((b, a), rank, seed=5, length=2.0)
    assert full_b.shape == (len(b), rank) and full_a.shape == (rank, a.shape[1])
    # The same sums, less what is zero; the order in which a matrix product adds may differ with its size.
    np.testing.assert_allclose((full_b @ full_a).numpy(), (b @ a).numpy(), rtol=1e-12, atol=1e-14)
    new, room = full_a[len(a) :], max(0, a.shape[1] - len(a))
    torch.testing.assert_close(new.norm(dim=1), torch.full((len(new),), 2.0, dtype=torch.float64))
    orthogonal = new[:room]
    if len(orthogonal):
        torch.testing.assert_close(orthogonal @ orthogonal.T, 4.0 * torch.eye(len(orthogonal), dtype=torch.float64))
        if len(a):
            assert (orthogonal @ a.T).abs().max() < 1e-9 * (1 + a.abs().max())
    assert torch.equal(full_b[:, len(a) :], torch.zeros(len(b), len(new), dtype=torch.float64))


def test_a_refill_is_seeded() -> None:
    pair = (torch.ones(4, 1, dtype=torch.float64), torch.ones(1, 6, dtype=torch.float64))
    one, same, other = (lowrank.refill(pair, 3, seed)[1] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.allclose(one, other)


def test_padding_adds_nothing_and_takes_nothing() -> None:
    pair = (torch.randn(4, 2).double(), torch.randn(2, 6).double())
    b, a = lowrank.pad(pair, 5)
    assert b.shape == (4, 5) and a.shape == (5, 6)
    assert torch.equal(b @ a, pair[0] @ pair[1])


@given(some_pairs())
@QUICK
def test_gram_and_norm_are_those_of_the_dense_products(pairs: list[Pair]) -> None:
    flat = np.stack([product(p).ravel() for p in pairs])
    got = lowrank.gram(pairs)
    np.testing.assert_allclose(got.numpy(), flat @ flat.T, atol=1e-10)
    assert torch.equal(got, got.T)
    for pair, vector in zip(pairs, flat, strict=True):
        assert lowrank.product_norm(pair) == pytest.approx(np.linalg.norm(vector), abs=1e-12)


def test_factors_come_back_in_the_layers_form_at_any_rank() -> None:
    adapter = random_adapter(1, 3)
    for name in ("layers.0.q_proj", "layers.1.conv"):
        key_a, key_b = keys(name)
        pair = lowrank.as_pair(adapter, key_a, key_b)
        assert pair[0].dtype == torch.float64 and pair[0].shape[1] == pair[1].shape[0] == 3
        back = lowrank.as_factors(pair, adapter, key_a, key_b)
        assert all(torch.equal(back[key], adapter[key]) for key in (key_a, key_b))
        wider = lowrank.as_factors(lowrank.pad(pair, 5), adapter, key_a, key_b)
        assert wider[key_a].shape == (5, *adapter[key_a].shape[1:])
        assert wider[key_b].shape == (adapter[key_b].shape[0], 5, *adapter[key_b].shape[2:])


def test_truncation_keeps_the_first_directions() -> None:
    adapter = random_adapter(1, 4)
    cut = lowrank.truncate(adapter, 2, times_b=3.0, times_a=0.5)
    for name in ("layers.0.q_proj", "layers.1.conv"):
        key_a, key_b = keys(name)
        torch.testing.assert_close(cut[key_a], 0.5 * adapter[key_a][:2])
        torch.testing.assert_close(cut[key_b], 3.0 * adapter[key_b][:, :2])
    assert_same(dense(lowrank.truncate(adapter, 4), 1.0), dense(adapter, 1.0))


def test_the_check_for_life_finds_a_dead_direction() -> None:
    adapter = random_adapter(1, 3)
    assert_alive(adapter, {}, 2.0)
    padded: dict[str, torch.Tensor] = {}
    for name in ("layers.0.q_proj", "layers.1.v_proj", "layers.1.conv"):
        padded |= lowrank.as_factors(lowrank.pad(lowrank.as_pair(adapter, *keys(name)), 4), adapter, *keys(name))
    with pytest.raises(AssertionError, match="never learn"):
        assert_alive(padded, {}, 2.0)
