"""Arithmetic on adapters. Knows tensors and nothing of Flower, so that its tests are arithmetic.

All sums run in float64 and in the order of the arguments: the same replies give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedgen_app.learning.adapters import Adapter, pairs


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


def _product_norm(b: Tensor, a: Tensor) -> float:
    """Frobenius norm of B A from the small triangular factors of B and A^T; the product is never formed."""
    core = torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T
    return float(torch.linalg.matrix_norm(core))


def change_norm(new: Adapter, old: Adapter, scaling: float, old_scaling: float | None = None) -> float:
    """Frobenius norm of the change s' B' A' - s B A over all layers, in float64.

    The ranks of the two may differ. Convolution factors are read as matrices: A (rank, all else), B (d_out, rank).
    Tensors that are no factors count as they are: of a whole model it is the norm of the change of its weights.

    Args:
        scaling: Of ``new``.
        old_scaling: Of ``old``; None: the same.
    """
    square, outer = 0.0, scaling if old_scaling is None else old_scaling
    for key_a, key_b in pairs(new):
        a_new, a_old = (x[key_a].double().flatten(1) for x in (new, old))
        b_new, b_old = (x[key_b].double().flatten(1) for x in (new, old))
        square += _product_norm(torch.cat([scaling * b_new, outer * b_old], 1), torch.cat([a_new, -a_old], 0)) ** 2
    for key in (key for key in new if ".lora_" not in key):
        square += float((new[key].double() - old[key].double()).square().sum())
    return math.sqrt(square)


def shrink(new: Adapter, old: Adapter, scaling: float, limit: float) -> Adapter:
    """The adapter nearest to ``new`` on the line of factors from ``old`` whose change has norm <= ``limit``.

    Bisection, because the norm of the product is not linear along that line.
    """
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if change_norm(_between(old, new, middle), old, scaling) <= limit:
            low = middle
        else:
            high = middle
    return _between(old, new, low)


def _between(old: Adapter, new: Adapter, t: float) -> Adapter:
    return {key: (old[key].double() + t * (new[key].double() - old[key].double())).float() for key in new}
