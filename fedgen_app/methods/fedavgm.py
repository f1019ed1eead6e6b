"""FedAvgM (Hsu et al. 2019, arXiv 1909.06335): the server's momentum on the mean change of the factors.

v = momentum v + (mean - x); x = x + learning-rate v.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedgen_app.federation.aggregation import mean_of_factors
from fedgen_app.federation.method import GlobalState, Method, Round, Update

MOMENTUM = "momentum."


def rule(state: GlobalState, updates: Sequence[Update], round_: Round) -> GlobalState:
    """One step of the server; ``extra`` holds the momentum v, zero at first."""
    settings = round_.settings.fedavgm
    adapter, extra = dict(state.adapter), dict(state.extra)
    for key, mean in mean_of_factors([u.adapter for u in updates], [u.num_examples for u in updates]).items():
        old = state.adapter[key].double()
        before = extra.get(MOMENTUM + key, torch.zeros_like(mean)).double()
        velocity = settings.momentum * before + (mean.double() - old)
        adapter[key] = (old + settings.learning_rate * velocity).float()
        extra[MOMENTUM + key] = velocity.float()
    return GlobalState(adapter, state.residual, extra)


METHOD = Method(rule=rule)
