"""Local-only: every client trains its own adapter and shares nothing; what federation has to beat."""

from __future__ import annotations

from fedgen_app.federation.lowrank import truncate
from fedgen_app.federation.method import GlobalState, Lora, Method, Round
from fedgen_app.federation.robust import only
from fedgen_app.learning.adapters import Adapter


def nothing(state: GlobalState, round_: Round) -> Adapter:
    """No tensor goes down."""
    return {}


def is_shared(key: str, round_: Round) -> bool:
    """No key goes up."""
    return False


def fit(adapter: Adapter, lora: Lora, own: Lora) -> Adapter:
    """The seeded start at the client's rank."""
    return truncate(adapter, own.rank)


METHOD = Method(
    sends=nothing,
    shares=is_shared,
    fit=fit,
    has_global=False,
    refuses=only(because="there is nothing to aggregate", layer_wise=False),
)
