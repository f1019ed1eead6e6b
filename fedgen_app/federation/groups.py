"""Groups of clients, each with a state of its own: what the server holds, and level 1, each group's own rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fedgen_app.federation.clustering import Numbers
from fedgen_app.federation.method import EPOCH, ClientId, GlobalState, Method, Round, Rule, Update
from fedgen_app.learning.adapters import Adapter

PARTS = ("adapter", "residual", "extra")


@dataclass(frozen=True)
class Groups:
    """The states of all groups, and who is where.

    Without clusters there is one group, everybody is in it, and ``shared`` is its state.

    Attributes:
        states: One per cluster.
        shared: The global state: of one group its own, else the clusters' mean.
        where: The cluster of every client that has one.
        examples: How much each cluster weighs in the global adapter.
        kinship: How similar each cluster is to each other one; absent: nothing is known, all are alike.
        centroids: The direction of each cluster's encoded requirements, where it is formed by them.
        clustered: Whether clients have been told apart yet.
        free: The first number that no cluster ever had.
        space: The mark of the space of the centroids: which encoder, which key (``requirement.space_of``).
        counts: Examples of every client that has a cluster, as it told them last.
        joined: Who came to the nearest centroid after the clusters were formed.
    """

    states: Mapping[int, GlobalState]
    shared: GlobalState
    where: Mapping[ClientId, int] = field(default_factory=dict)
    examples: Mapping[int, float] = field(default_factory=dict)
    kinship: Mapping[tuple[int, int], float] = field(default_factory=dict)
    centroids: Mapping[int, Numbers] = field(default_factory=dict)
    clustered: bool = False
    free: int = 1
    space: str = ""
    counts: Mapping[ClientId, float] = field(default_factory=dict)
    joined: tuple[ClientId, ...] = ()

    @classmethod
    def single(cls, state: GlobalState) -> Groups:
        """Everybody together."""
        return cls({0: state}, state)

    def state_of(self, client: ClientId) -> GlobalState:
        """What a client starts from; without a cluster the global state."""
        return self.states[self.where[client]] if client in self.where else self.shared

    def members(self, cluster: int) -> list[ClientId]:
        """Who is in a cluster, in the order in which they were put there."""
        return [client for client, own in self.where.items() if own == cluster]

    def parts(self) -> dict[str, Adapter]:
        """The tensors of a checkpoint: the global state's, and of clusters each one's under its number."""
        found = dict(self.shared.tensors)
        for cluster, state in self.states.items() if self.clustered else ():
            found |= {f"cluster-{cluster}-{part}": tensors for part, tensors in state.tensors.items()}
        if self.centroids:
            found["centroids"] = as_tensors(self.centroids)
        return found

    def facts(self) -> dict[str, Any]:
        """What else a checkpoint holds of clusters, as JSON; nothing without them."""
        if not self.clustered:
            return {}
        return {
            "clusters": {
                "numbers": sorted(self.states),
                "where": [[client, cluster] for client, cluster in self.where.items()],
                "examples": [[cluster, count] for cluster, count in self.examples.items()],
                "kinship": [[one, other, value] for (one, other), value in self.kinship.items()],
                "space": self.space,
                "counts": [[client, count] for client, count in self.counts.items()],
                "free": self.free,
                "joined": list(self.joined),
            }
        }

    @classmethod
    def restored(cls, parts: Mapping[str, Adapter], facts: Mapping[str, Any]) -> Groups:
        """The inverse of ``parts`` and ``facts``."""

        def state(prefix: str) -> GlobalState:
            adapter, residual, extra = (parts.get(f"{prefix}{part}", {}) for part in PARTS)
            return GlobalState(adapter, residual, extra)

        known = facts.get("clusters")
        if known is None:
            return cls.single(state(""))
        return cls(
            states={number: state(f"cluster-{number}-") for number in known["numbers"]},
            shared=state(""),
            where={client: cluster for client, cluster in known["where"]},
            examples={cluster: count for cluster, count in known["examples"]},
            kinship={(one, other): value for one, other, value in known["kinship"]},
            centroids={int(key): tensor.double().numpy() for key, tensor in parts.get("centroids", {}).items()},
            space=known.get("space", ""),
            counts={client: count for client, count in known.get("counts", [])},  # an older checkpoint has none
            clustered=True,
            free=known["free"],
            joined=tuple(known.get("joined", [])),
        )


def as_tensors(centroids: Mapping[int, Numbers]) -> Adapter:
    """Centroids by cluster as float32 tensors, for a file."""
    return {str(cluster): torch.from_numpy(np.asarray(centre, np.float32)) for cluster, centre in centroids.items()}


def rule_in_each(
    groups: Groups,
    updates: Sequence[Update],
    home: Mapping[ClientId, int],
    rule: Rule,
    round_: Round,
    objection: Callable[[int], str | None],
) -> tuple[Groups, dict[int, str]]:
    """Level 1: the method's rule inside each cluster, with the cluster's own state.

    Args:
        home: From which cluster's state each client started; an update of another one is left out.
        objection: Why so few updates cannot be used; None: they can.

    Returns:
        The groups, and why a cluster stays as it is.
    """
    states, stays = dict(groups.states), {}
    for cluster, state in groups.states.items():
        own = [update for update in updates if home.get(update.client) == cluster]
        reason = objection(len(own)) or (None if own else "no usable reply")
        if reason:
            stays[cluster] = reason
            states[cluster] = replace(state, facts={})
            continue
        count = len(groups.members(cluster)) if groups.clustered else round_.clients
        states[cluster] = rule(state, own, replace(round_, clients=max(1, count)))
    return replace(groups, states=states), stays


def regrouped(
    groups: Groups, where: Mapping[ClientId, int], examples: Mapping[ClientId, float], method: Method, number: int
) -> Groups:
    """The same states with clients in other places.

    A new cluster starts from a copy of the state of the cluster that most of its members' examples come from, or, where
    they come from none, from the global state. A vanished one's state is dropped, and its number is not used again. A
    method whose clients keep tensors that belong to the server's starts those anew wherever the members changed.

    Args:
        where: Every client's cluster, numbered by ``clustering.matched``.
        examples: Of every client.
    """
    states: dict[int, GlobalState] = {}
    for cluster in sorted(set(where.values())):
        own = [client for client, place in where.items() if place == cluster]
        came: dict[int, float] = {}
        for client in own:
            if client in groups.where:
                came[groups.where[client]] = came.get(groups.where[client], 0.0) + examples.get(client, 0.0)
        kept = groups.clustered and cluster in groups.states
        origin = cluster if kept else max(sorted(came), key=lambda place: came[place]) if came else None
        states[cluster] = groups.shared if origin is None else groups.states[origin]
        # Of one cluster that holds all there is nothing to begin anew.
        if len(set(where.values())) > 1 and set(groups.members(cluster) if kept else ()) != set(own):
            states[cluster] = anew(states[cluster], method, cluster, number, bound_to_basis=False)
    weights = {c: float(sum(examples.get(m, 0) for m, p in where.items() if p == c)) for c in states}
    return replace(
        groups,
        states=states,
        where=dict(where),
        examples=weights,
        clustered=True,
        free=max(groups.free, *(cluster + 1 for cluster in states)),
    )


def anew(state: GlobalState, method: Method, cluster: int, number: int, bound_to_basis: bool = True) -> GlobalState:
    """The state without the method's own tensors (moments, control variates), where these no longer fit.

    Those that clients have a counterpart of are marked, so that a client drops its own.

    Args:
        bound_to_basis: The factors' basis changed; else only the members did, which moments do not depend on.
    """
    if method.tied:
        return replace(state, extra={EPOCH: torch.tensor([float(cluster), float(number)])})
    return replace(state, extra={}) if bound_to_basis else state
