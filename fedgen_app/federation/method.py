"""What a method is: the functions that say what is trained, shared, sent, and how replies become the next state.

``methods/<name>.py`` ends in ``METHOD = Method(...)``. ``Method()`` is plain FedAvg of adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedgen_app.federation.aggregation import mean_of_factors
from fedgen_app.learning.adapters import Adapter

ClientId = int | str


@dataclass(frozen=True)
class Lora:
    """The adapter's shape as a rule needs it: W + scaling * B A with B (d_out, rank) and A (rank, d_in)."""

    rank: int
    alpha: float
    scaling: float


@dataclass(frozen=True)
class Round:
    """What a rule may depend on."""

    number: int
    lora: Lora
    seed: int


@dataclass(frozen=True)
class Update:
    """One admitted reply. ``extra`` holds a method's own tensors."""

    client: ClientId
    adapter: Adapter
    rank: int
    num_examples: float
    extra: Adapter = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GlobalState:
    """What a group of clients shares between rounds."""

    adapter: Adapter
    residual: Adapter = field(default_factory=dict)
    extra: Adapter = field(default_factory=dict)


Rule = Callable[[GlobalState, Sequence[Update], Round], GlobalState]


def weighted_mean(state: GlobalState, updates: Sequence[Update], round_: Round) -> GlobalState:
    """FedAvg of the shared tensors: mean of A and mean of B, weighted by examples.

    McMahan et al. 2017 (arXiv 1602.05629), on LoRA factors as in FedIT (arXiv 2305.05644).
    """
    mean = mean_of_factors([u.adapter for u in updates], [u.num_examples for u in updates])
    return GlobalState(state.adapter | mean, state.residual, state.extra)


def _whole_adapter(state: GlobalState, round_: Round) -> Adapter:
    return state.adapter


def _every_key(key: str, round_: Round) -> bool:
    return True


@dataclass(frozen=True)
class Method:
    """A federated method as a frozen value of functions.

    Attributes:
        rule: (state, admitted updates in client order, round) -> next state. Pure.
        sends: What goes down to a client.
        shares: Whether a key goes up. What does not go up stays on the client from round to round.
        trains: Whether a key learns in this round.
    """

    rule: Rule = weighted_mean
    sends: Callable[[GlobalState, Round], Adapter] = _whole_adapter
    shares: Callable[[str, Round], bool] = _every_key
    trains: Callable[[str, Round], bool] = _every_key
