"""FedSVD (Lee et al. 2025, arXiv 2505.12805): B is trained and averaged, then SVD turns A with what was learnt.

B is averaged over one A for all, which is exact. Then B A = U S V^T gives A = V^T, of orthonormal rows, and B = U S.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedgen_app.federation.lowrank import Pair, as_factors, as_pair, compress, refill
from fedgen_app.federation.method import GlobalState, Method, Round, Update, weighted_mean
from fedgen_app.learning.adapters import pairs
from fedgen_app.seeds import derive


def is_b(key: str, round_: Round) -> bool:
    """Whether it is a factor B."""
    return ".lora_B." in key


def rule(state: GlobalState, updates: Sequence[Update], round_: Round) -> GlobalState:
    """The same product from an A of orthonormal rows; rows that the product does not need are drawn anew."""
    mean = weighted_mean(state, updates, round_)
    adapter = dict(mean.adapter)
    for key_a, key_b in pairs(adapter):
        seed = derive(round_.seed, "refill", key_a)
        turned, _ = orthonormal(as_pair(adapter, key_a, key_b), round_.lora.rank, 1.0, seed)
        adapter |= as_factors(turned, adapter, key_a, key_b)
    return GlobalState(adapter, mean.residual, mean.extra)


def orthonormal(product: Pair, rank: int, scaling: float, seed: int) -> tuple[Pair, tuple[float, float]]:
    """As ``aggregation.refactored``, with B = U S / s and A = V^T."""
    whole = compress(product, rank)
    turned = (whole.left * (whole.values / scaling), whole.right)
    return refill(turned, rank, seed, length=1.0), (whole.lost, whole.energy)


METHOD = Method(rule=rule, shares=is_b, trains=is_b, factored=orthonormal)
