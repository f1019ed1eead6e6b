"""FedOpt (Reddi et al. 2020, arXiv 2003.00295): an adaptive server optimiser on the mean change of the factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedgen_app.federation.aggregation import mean_of_factors
from fedgen_app.federation.method import GlobalState, Round, Rule, Update

FIRST, SECOND = "first-moment.", "second-moment."
# (v, change^2, beta2) -> the next v
SecondMoment = Callable[[Tensor, Tensor, float], Tensor]


def adaptive(second_moment: SecondMoment) -> Rule:
    """m = beta1 m + (1 - beta1) change; x = x + learning-rate m / (sqrt(v) + tau).

    As in the paper's algorithm 2: m starts at 0, v at tau^2, and neither is corrected for its start.
    """

    def rule(state: GlobalState, updates: Sequence[Update], round_: Round) -> GlobalState:
        settings = round_.settings.fedopt
        adapter, extra = dict(state.adapter), dict(state.extra)
        for key, mean in mean_of_factors([u.adapter for u in updates], [u.num_examples for u in updates]).items():
            old = state.adapter[key].double()
            change = mean.double() - old
            m = extra.get(FIRST + key, torch.zeros_like(mean)).double()
            v = extra.get(SECOND + key, torch.full_like(mean, settings.tau**2)).double()
            m = settings.beta1 * m + (1 - settings.beta1) * change
            v = second_moment(v, change**2, settings.beta2)
            adapter[key] = (old + settings.learning_rate * m / (v.sqrt() + settings.tau)).float()
            extra[FIRST + key], extra[SECOND + key] = m.float(), v.float()
        return GlobalState(adapter, state.residual, extra)

    return rule
