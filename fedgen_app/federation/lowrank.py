"""Algebra of low-rank pairs: sums, norms, inner products and best approximations of B A, which is never formed.

A pair is B (d_out, r) and A (r, d_in) in float64. Costs grow with (d_out + d_in) r^2, not with d_out d_in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgen_app.learning.adapters import Adapter

Pair = tuple[Tensor, Tensor]

# A direction this much weaker than the strongest lies below the rounding of the float32 factors that it comes from and
# goes into.
VANISHED = torch.finfo(torch.float32).eps
# What cancellation in float64 leaves behind, relative to the factors that cancel.
CANCELLED = 16 * torch.finfo(torch.float64).eps
# The expected length of a row of a fresh A (``learning.adapters.fresh``): uniform in +- 1 / sqrt(d_in), so 1 / sqrt(3).
FRESH_LENGTH = 3**-0.5


def as_pair(adapter: Mapping[str, Tensor], key_a: str, key_b: str) -> Pair:
    """The factors of one layer as matrices; a convolution's A (r, in, k, k) and B (out, r, 1, 1) are flattened."""
    return adapter[key_b].double().flatten(1), adapter[key_a].double().flatten(1)


def as_factors(pair: Pair, like: Mapping[str, Tensor], key_a: str, key_b: str) -> Adapter:
    """The way back: float32 factors in the form, but not of the rank, that the layer has in ``like``."""
    b, a = pair
    form_a, form_b = like[key_a].shape, like[key_b].shape
    return {
        key_a: a.float().reshape(-1, *form_a[1:]).contiguous(),
        key_b: b.float().reshape(form_b[0], -1, *form_b[2:]).contiguous(),
    }


def stack(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """The pair of the sum of w_k B_k A_k: B side by side, w_k A_k one below the other."""
    return (
        torch.cat([b for b, _ in pairs], 1),
        torch.cat([weight * a for (_, a), weight in zip(pairs, weights, strict=True)], 0),
    )


@dataclass(frozen=True)
class Compressed:
    """The leading part of a product's singular value decomposition, and how much the rest weighs.

    Attributes:
        left: (d_out, k), orthonormal columns.
        values: (k), falling, all of them above rounding.
        right: (k, d_in), orthonormal rows.
        energy: Squared Frobenius norm of the whole product.
        lost: Squared Frobenius norm of what was left out.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    energy: float
    lost: float

    @property
    def balanced(self) -> Pair:
        """B = U sqrt(S) and A = sqrt(S) V^T."""
        root = self.values.sqrt()
        return self.left * root, root[:, None] * self.right


def compress(pair: Pair, rank: int) -> Compressed:
    """The best approximation of B A of at most this rank (Eckart and Young 1936), from QR of both and SVD of the core.

    The entry of largest size of every left vector is positive, so that the signs are no accident.
    """
    b, a = pair
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    # Column by column: beside a large A and a zero B, which add nothing, the others must not look small.
    floor = max(VANISHED * float(values[0]), CANCELLED * float(b.norm(dim=0) @ a.norm(dim=1)))
    kept = min(rank, int((values > floor).sum()))
    left, right = q_b @ u[:, :kept], v[:kept] @ q_a.T
    if kept:
        signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
        left, right = left * signs, right * signs.T
    squares = values**2
    return Compressed(left, values[:kept], right, float(squares.sum()), float(squares[kept:].sum()))


def pad(pair: Pair, rank: int) -> Pair:
    """The same product in factors of a larger rank; what is added is zero in both and never learns."""
    b, a = pair
    missing = rank - len(a)
    return torch.cat([b, b.new_zeros(len(b), missing)], 1), torch.cat([a, a.new_zeros(missing, a.shape[1])], 0)


def refill(pair: Pair, rank: int, seed: int, length: float = FRESH_LENGTH) -> Pair:
    """The same product in factors of a larger rank that can still learn: new rows in A, zero columns in B.

    Were both zero, both gradients would be zero for ever. The new rows have this length and are orthogonal to A's and
    to each other as long as d_in leaves room; beyond that they only point in random directions.
    """
    b, a = pair
    missing, width = rank - len(a), a.shape[1]
    if missing <= 0:
        return b, a
    rows = torch.randn(missing, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    room = min(missing, max(0, width - len(a)))
    if room:
        basis = torch.linalg.qr(a.T).Q
        free = rows[:room].T
        for _ in range(2):  # once leaves rounding behind where the basis is nearly complete
            free = free - basis @ (basis.T @ free)
        rows[:room] = torch.linalg.qr(free).Q.T
    rows = rows * (length / rows.norm(dim=1, keepdim=True))
    return torch.cat([b, b.new_zeros(len(b), missing)], 1), torch.cat([a, rows], 0)


def truncate(adapter: Mapping[str, Tensor], rank: int, times_b: float = 1.0, times_a: float = 1.0) -> Adapter:
    """The first directions of every layer: B[:, :rank] and A[:rank], each times its own factor."""
    cut = {}
    for key, tensor in adapter.items():
        is_a = ".lora_A." in key
        kept = tensor[:rank] if is_a else tensor[:, :rank]
        cut[key] = (kept.double() * (times_a if is_a else times_b)).float().contiguous()
    return cut


def product_norm(pair: Pair) -> float:
    """Frobenius norm of B A, from the triangular factors of B and of A^T."""
    b, a = pair
    return float(torch.linalg.matrix_norm(torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T))


def gram(pairs: Sequence[Pair]) -> Tensor:
    """Inner products (n, n) of n products: <B_i A_i, B_j A_j> is the sum over (B_i^T B_j) * (A_i A_j^T)."""
    all_b, all_a = stack(pairs, [1.0] * len(pairs))
    ranks = [len(a) for _, a in pairs]
    whole = torch.zeros(len(pairs), len(pairs), dtype=torch.float64)
    for i, (b, a) in enumerate(pairs):
        end = sum(ranks[: i + 1])
        terms = (b.T @ all_b[:, :end]) * (a @ all_a[:end].T)
        row = torch.stack([block.sum() for block in torch.split(terms, ranks[: i + 1], 1)])
        whole[i, : i + 1] = whole[: i + 1, i] = row
    return whole
