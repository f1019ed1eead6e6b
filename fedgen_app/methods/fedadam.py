"""FedAdam (Reddi et al. 2020, arXiv 2003.00295): Adam on the server, on the mean change of the factors."""

from __future__ import annotations

from torch import Tensor

from fedgen_app.federation.method import Method
from fedgen_app.methods._fedopt import adaptive


def second_moment(v: Tensor, square: Tensor, beta2: float) -> Tensor:
    """v = beta2 v + (1 - beta2) change^2."""
    return beta2 * v + (1 - beta2) * square


METHOD = Method(rule=adaptive(second_moment))
