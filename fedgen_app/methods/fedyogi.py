"""FedYogi (Reddi et al. 2020, arXiv 2003.00295): Yogi on the server, whose step shrinks less abruptly than Adam's."""

from __future__ import annotations

from torch import Tensor

from fedgen_app.federation.method import Method
from fedgen_app.methods._fedopt import adaptive


def second_moment(v: Tensor, square: Tensor, beta2: float) -> Tensor:
    """v = v - (1 - beta2) change^2 sign(v - change^2)."""
    return v - (1 - beta2) * square * (v - square).sign()


METHOD = Method(rule=adaptive(second_moment))
