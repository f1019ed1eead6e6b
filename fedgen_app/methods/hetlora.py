"""HetLoRA (Cho et al. 2024, arXiv 2401.06432): factors of any rank, zero-padded and weighted by their products' norms.

In terms of the largest rank's scaling s, a client's factors are sqrt(s_k / s) B_k and sqrt(s_k / s) A_k; their mean is
weighted by ||s_k B_k A_k||. Clients cut back to their own rank, and may give up directions that they do not use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fedgen_app.federation.lowrank import as_pair, product_norm, truncate
from fedgen_app.federation.method import GlobalState, Lora, Method, Round, Update
from fedgen_app.federation.robust import only
from fedgen_app.learning.adapters import Adapter, pairs


def rule(state: GlobalState, updates: Sequence[Update], round_: Round) -> GlobalState:
    """The weighted mean of the padded factors.

    Rows and columns that no client with a weight has stay as they are: the mean of nothing would be zero in both
    factors, and never learn again.
    """
    scalings = [round_.lora.at(u.rank).scaling for u in updates]
    weights = [s * _norm(u.adapter) for u, s in zip(updates, scalings, strict=True)]
    if not any(weights):
        weights = [u.num_examples for u in updates]
    total = sum(weights)
    reach = max(u.rank for u, weight in zip(updates, weights, strict=True) if weight)
    adapter = dict(state.adapter)
    for key in sorted(updates[0].adapter):
        axis = 0 if ".lora_A." in key else 1
        mean = torch.zeros(state.adapter[key].shape, dtype=torch.float64)
        for update, scaling, weight in zip(updates, scalings, weights, strict=True):
            fold = math.sqrt(scaling / round_.lora.scaling)
            mean.narrow(axis, 0, update.rank).add_(update.adapter[key].double(), alpha=fold * weight / total)
        mean.narrow(axis, reach, round_.lora.rank - reach).copy_(
            state.adapter[key].narrow(axis, reach, round_.lora.rank - reach)
        )
        adapter[key] = mean.float()
    return GlobalState(adapter, state.residual, state.extra)


def _norm(adapter: Adapter) -> float:
    """||B A|| over all layers."""
    return math.hypot(*(product_norm(as_pair(adapter, key_a, key_b)) for key_a, key_b in pairs(adapter)))


def fit(adapter: Adapter, lora: Lora, own: Lora) -> Adapter:
    """The first directions, each factor at the root of the client's own scaling."""
    fold = math.sqrt(lora.scaling / own.scaling)
    return truncate(adapter, own.rank, times_b=fold, times_a=fold)


METHOD = Method(
    rule=rule,
    fit=fit,
    refuses=only("norm-bound", "krum", "multi-krum", because="its weights are norms and not examples"),
)
