"""Arithmetic on adapters. Knows tensors and nothing of Flower, so that its tests are arithmetic.

All sums run in float64 and in the order of the arguments: the same replies give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from fedgen_app.federation.lowrank import Pair, as_factors, as_pair, compress, gram, pad, product_norm, stack
from fedgen_app.learning.adapters import Adapter, pairs

if TYPE_CHECKING:
    from fedgen_app.federation.method import Lora, Update


def mean_of_factors(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Weighted mean of each tensor: sum over k of w_k x_k, divided by the sum of the weights.

    Raises:
        ValueError: no adapters, weights that do not sum to something positive, or keys that differ.
    """
    total = sum(weights)
    if not adapters or len(adapters) != len(weights) or not total > 0:
        raise ValueError(f"{len(adapters)} adapters with weights {list(weights)} have no mean")
    if any(set(adapter) != set(adapters[0]) for adapter in adapters):
        raise ValueError("the adapters' keys differ")
    mean = {}
    for key in sorted(adapters[0]):
        accumulated = torch.zeros(adapters[0][key].shape, dtype=torch.float64)
        for adapter, weight in zip(adapters, weights, strict=True):
            accumulated += weight * adapter[key].double()
        mean[key] = (accumulated / total).float()
    return mean


def mean_of_products(updates: Sequence[Update], lora: Lora) -> Iterator[tuple[str, str, Pair]]:
    """dW* = sum over k of p_k s_k B_k A_k, layer by layer, as one stacked pair; p_k: the share of the examples.

    Ranks may differ, and with them the scalings s_k.

    Yields:
        Key of A, key of B, and B = [B_1 .. B_n], A = [p_1 s_1 A_1; ..; p_n s_n A_n].
    """
    total = sum(u.num_examples for u in updates)
    weights = [u.num_examples / total * lora.at(u.rank).scaling for u in updates]
    for key_a, key_b in pairs(updates[0].adapter):
        yield key_a, key_b, stack([as_pair(u.adapter, key_a, key_b) for u in updates], weights)


def absorb(
    residual: Adapter, changes: Iterable[tuple[str, str, Pair]], like: Adapter, rank: int
) -> tuple[Adapter, float]:
    """Add changes to the residual, which acts with scaling 1, and keep its best approximation of at most this rank.

    All layers get one rank, the largest that one of them needs.

    Args:
        like: An adapter whose layers have the form that the residual's are to have.

    Returns:
        The residual, and the share of its squared Frobenius norm that the rank could not hold.
    """
    kept = []
    for key_a, key_b, change in changes:
        whole = stack([as_pair(residual, key_a, key_b), change], [1, 1]) if residual else change
        kept.append((key_a, key_b, compress(whole, rank)))
    width = max([1, *(len(small.values) for *_, small in kept)])
    factors: Adapter = {}
    for key_a, key_b, small in kept:
        factors |= as_factors(pad(small.balanced, width), like, key_a, key_b)
    return dict(sorted(factors.items())), discarded((small.lost, small.energy) for *_, small in kept)


def discarded(layers: Iterable[tuple[float, float]]) -> float:
    """The share of all layers' energy that was lost, from (lost, energy) of each."""
    each = list(layers)
    energy = sum(whole for _, whole in each)
    return sum(lost for lost, _ in each) / energy if energy else 0.0


def change_norm(new: Adapter, old: Adapter, scaling: float, old_scaling: float | None = None) -> float:
    """Frobenius norm of the change s' B' A' - s B A over all layers, in float64.

    A tensor that is no factor of a product changes by its difference. The ranks may differ.

    Args:
        old_scaling: s where it is not s'.
    """
    outer = scaling if old_scaling is None else old_scaling
    square, factors = 0.0, set()
    for key_a, key_b in pairs(new):
        factors |= {key_a, key_b}
        change = stack([as_pair(new, key_a, key_b), as_pair(old, key_a, key_b)], [scaling, -outer])
        square += product_norm(change) ** 2
    for key in sorted(set(new) - factors):
        square += float((new[key].double() - old[key].double()).square().sum())
    return math.sqrt(square)


def shrink(new: Adapter, old: Adapter, scaling: float, limit: float) -> Adapter:
    """The adapter nearest to ``new`` on the line of factors from ``old`` whose change has norm <= ``limit``.

    Bisection, because the norm of the product is not linear along that line. Rank and scaling are the same on both
    sides.
    """
    length = _length_along(new, old, scaling)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if length(middle) <= limit:
            low = middle
        else:
            high = middle
    shorter, back = between(old, new, low), 2.0**-24
    # The factors were rounded to float32, which may have lengthened the change again by as little.
    while low and change_norm(shorter, old, scaling) > limit:
        low, back = max(0.0, low * (1 - back)), 2 * back
        shorter = between(old, new, low)
    return shorter


def _length_along(new: Adapter, old: Adapter, scaling: float) -> Callable[[float], float]:
    """t -> norm of the change at old + t (new - old), without another look at the factors.

    With D = B' - B and E = A' - A the change is t X + t^2 Y, where X = D A + B E and Y = D E.
    """
    products, factors = torch.zeros(2, 2, dtype=torch.float64), set()
    for key_a, key_b in pairs(new):
        factors |= {key_a, key_b}
        (b_new, a_new), (b, a) = as_pair(new, key_a, key_b), as_pair(old, key_a, key_b)
        d, e = scaling * (b_new - b), a_new - a
        products += gram([(torch.cat([d, scaling * b], 1), torch.cat([a, e], 0)), (d, e)])
    for key in sorted(set(new) - factors):
        products[0, 0] += (new[key].double() - old[key].double()).square().sum()
    (linear, cross), (_, square) = products.tolist()
    return lambda t: math.sqrt(max(0.0, t**2 * (linear + 2 * t * cross + t**2 * square)))


def length(tensors: Adapter) -> float:
    """Frobenius norm of all tensors together, in float64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def between(old: Adapter, new: Adapter, t: float) -> Adapter:
    """old + t (new - old), key by key."""
    return {key: (old[key].double() + t * (new[key].double() - old[key].double())).float() for key in new}
