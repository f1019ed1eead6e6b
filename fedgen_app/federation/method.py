"""What a method is: the functions that say what is trained, shared, sent, and how replies become the next state.

``methods/<name>.py`` ends in ``METHOD = Method(...)``. ``Method()`` is plain FedAvg of adapters.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from fedgen_app.federation.aggregation import mean_of_factors, refactored
from fedgen_app.federation.local import Learned, Lesson, fine_tune, plain
from fedgen_app.federation.lowrank import Pair
from fedgen_app.learning.adapters import Adapter, Layout
from fedgen_app.settings import Settings

ClientId = int | str
# A state's own tensor that says which cluster's variates, begun anew in which round, the others belong to.
EPOCH = "epoch"


@dataclass(frozen=True)
class Lora:
    """The adapter's shape as a rule needs it: W + scaling * B A with B (d_out, rank) and A (rank, d_in)."""

    rank: int
    alpha: float
    rslora: bool = False

    @property
    def scaling(self) -> float:
        """s = alpha / r, with rsLoRA alpha / sqrt(r)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def at(self, rank: int) -> Lora:
        """The same on a device of another rank: alpha stays, so the scaling differs."""
        return replace(self, rank=rank)


def lora_of(settings: Settings) -> Lora:
    """The adapter's shape that the settings ask for."""
    return Lora(settings.lora.rank, settings.lora.alpha, settings.lora.rslora)


@dataclass(frozen=True)
class Round:
    """What a method's functions may depend on.

    Attributes:
        number: From 1; personalisation comes after the last.
        lora: Of the largest adapter, which is the server's.
        layout: Keys and shapes of that adapter.
        clients: How many there are in the run, chosen or not.
    """

    number: int
    lora: Lora
    seed: int
    settings: Settings
    layout: Layout = ()
    clients: int = 1


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
    """What a group of clients shares between rounds.

    Attributes:
        adapter: Of the largest rank.
        residual: A second, frozen pair of factors that is added with scaling 1, whatever its rank.
        extra: What else the server remembers: moments, control variates.
        facts: Numbers about the last aggregation, for the round's entry in results.json; not part of a checkpoint.
    """

    adapter: Adapter
    residual: Adapter = field(default_factory=dict)
    extra: Adapter = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Adapter]:
        """What a checkpoint keeps."""
        return {"adapter": self.adapter, "residual": self.residual, "extra": self.extra}


Rule = Callable[[GlobalState, Sequence[Update], Round], GlobalState]


def weighted_mean(state: GlobalState, updates: Sequence[Update], round_: Round) -> GlobalState:
    """FedAvg of the shared tensors: mean of A and mean of B, weighted by examples.

    McMahan et al. 2017 (arXiv 1602.05629), on LoRA factors as in FedIT (arXiv 2305.05644).
    """
    mean = mean_of_factors([u.adapter for u in updates], [u.num_examples for u in updates])
    return GlobalState(state.adapter | mean, state.residual, state.extra)


def whole_adapter(state: GlobalState, round_: Round) -> Adapter:
    """All of the server's adapter goes down."""
    return state.adapter


def _nothing(state: GlobalState, round_: Round) -> Adapter:
    return {}


def _every_key(key: str, round_: Round) -> bool:
    return True


def _no_extra(shared: Layout, round_: Round) -> Layout:
    return ()


def _no_objection(settings: Settings) -> Iterable[str]:
    return ()


@dataclass(frozen=True)
class Method:
    """A federated method as a frozen value of functions.

    Attributes:
        rule: (state, admitted updates in client order, round) -> next state. Pure.
        sends: What of the adapter goes down to a client. The residual goes down whole, where there is one.
        sends_extra: What of the state's own tensors goes down.
        shares: Whether a key goes up. What does not go up stays on the client from round to round.
        shares_extra: (layout of what is shared, round) -> layout of the method's own tensors that go up with it.
        trains: Whether a key learns in this round.
        local: What a client does with what it received.
        personal: How a client comes to its personal adapter in the end.
        fit: (adapter of the largest rank, its shape, the client's shape) -> the client's version; None: all clients
            have the same rank.
        widen: (a client's adapter, its shape, the server's adapter, its shape) -> the client's at the largest rank, the
            server's where it has no directions: for rules that average factors of several ranks.
        factored: A product as the server's factors, as ``aggregation.refactored``; where clusters mix.
        tied: Clients keep tensors that belong to the server's own; both begin anew together (``EPOCH``).
        refuses: Why it cannot work with these settings, one line each.
        has_global: Whether the server's adapter is a model. Without, there is no ``global/`` and no server metric.
        weights: What trains and travels: an adapter, or the whole model.
        pooled: One client owns everyone's training data and takes everyone's steps.
    """

    rule: Rule = weighted_mean
    sends: Callable[[GlobalState, Round], Adapter] = whole_adapter
    sends_extra: Callable[[GlobalState, Round], Adapter] = _nothing
    shares: Callable[[str, Round], bool] = _every_key
    shares_extra: Callable[[Layout, Round], Layout] = _no_extra
    trains: Callable[[str, Round], bool] = _every_key
    local: Callable[[Lesson], Learned] = plain
    personal: Callable[[Lesson], Adapter] = fine_tune
    fit: Callable[[Adapter, Lora, Lora], Adapter] | None = None
    widen: Callable[[Adapter, Lora, Adapter, Lora], Adapter] | None = None
    factored: Callable[[Pair, int, float, int], tuple[Pair, tuple[float, float]]] = refactored
    tied: bool = False
    refuses: Callable[[Settings], Iterable[str]] = _no_objection
    has_global: bool = True
    weights: Literal["adapter", "model"] = "adapter"
    pooled: bool = False


def load_method(name: str) -> Method:
    """The method of a settings value: ``methods/<name>.py`` ends in ``METHOD``."""
    return cast(Method, importlib.import_module(f"fedgen_app.methods.{name.replace('-', '_')}").METHOD)
