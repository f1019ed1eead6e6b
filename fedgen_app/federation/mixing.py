"""Level 2: clusters learn from each other, and a global adapter is their mean; in the space of the products s B A.

Averaging factors of different clusters would give cross terms, as their bases differ. So a mixture of products is
stacked, which is exact, and compressed to the rank. Where one factor is the same for all, or stays on the clients, the
mean of the other is exact already.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from fedgen_app.federation.aggregation import absorb, discarded
from fedgen_app.federation.clustering import attention
from fedgen_app.federation.groups import Groups, anew
from fedgen_app.federation.lowrank import Pair, as_factors, as_pair, product_norm, stack
from fedgen_app.federation.method import GlobalState, Method, Round
from fedgen_app.federation.robust import objection
from fedgen_app.learning.adapters import Adapter, fresh, pairs
from fedgen_app.seeds import derive


def interact(groups: Groups, method: Method, round_: Round) -> tuple[Groups, dict[int, float]]:
    """dW_c <- (1 - l) dW_c + l sum over j != c of w_cj dW_j, for all clusters at once from what they were.

    w_c is a softmax over the similarity of the clusters, divided by ``clusters.temperature``; l is
    ``clusters.strength``.

    Returns:
        The groups, and for each cluster the share of its mixture's energy that the rank could not hold.
    """
    settings, states, lost = round_.settings.clusters, dict(groups.states), {}
    if len(states) < 2 or not settings.strength:
        return groups, {}
    heeded = bounded(groups, method, round_)
    for cluster, state in groups.states.items():
        kin = {other: groups.kinship.get((cluster, other), 0.0) for other in groups.states if other != cluster}
        heard = attention(kin, settings.temperature)
        weights = {other: settings.strength * weight * heeded[other] for other, weight in heard.items()}
        weights[cluster] = 1 - settings.strength
        order = sorted(weights)
        mixture, lost[cluster], turned = mixed(
            state,
            [groups.states[other] for other in order],
            [weights[other] for other in order],
            method,
            replace(round_, seed=derive(round_.seed, "interact", cluster)),
        )
        states[cluster] = anew(mixture, method, cluster, round_.number) if turned else mixture
    return replace(groups, states=states), lost


def with_global(groups: Groups, method: Method, round_: Round) -> tuple[Groups, float]:
    """The global state: the clusters' mean weighted by their examples, at the rank; one cluster's is its own.

    It serves newcomers and generation and does not feed back.

    Returns:
        The groups, and the share of the mean's energy that the rank could not hold.
    """
    order = sorted(groups.states)
    if len(order) == 1:
        return replace(groups, shared=groups.states[order[0]]), 0.0
    total = sum(groups.examples[cluster] for cluster in order)
    heeded = bounded(groups, method, round_)
    weights = [groups.examples[cluster] / total * heeded[cluster] for cluster in order]
    states, base = [groups.states[cluster] for cluster in order], groups.states[order[0]]
    if any(state.residual for state in states):  # the residual takes all of it
        base = GlobalState(fresh(round_.layout, derive(round_.settings.seed, "global")))
    seed = derive(round_.settings.seed, "global", round_.number)
    mean, lost, _ = mixed(base, states, weights, method, replace(round_, seed=seed))
    return replace(groups, shared=replace(mean, extra={})), lost


def bounded(groups: Groups, method: Method, round_: Round) -> dict[int, float]:
    """What each cluster's dW is multiplied by before others take it: 1, behind a robust rule no more than fits.

    No dW is longer than ``aggregation.norm-bound`` times the median one: of two the smaller. Only those count for it
    that have the members for the rule: others were never trained, and near zero. Whole weights have no such dW.
    """
    aggregation = round_.settings.aggregation
    if aggregation.robust == "none" or method.weights == "model":
        return dict.fromkeys(groups.states, 1.0)
    norms = {cluster: length(state, round_.lora.scaling) for cluster, state in groups.states.items()}
    trained = [norms[c] for c in norms if norms[c] and objection(aggregation, len(groups.members(c))) is None]
    limit = aggregation.norm_bound * statistics.median_low(trained or norms.values())
    return {cluster: min(1.0, limit / norm) if norm else 1.0 for cluster, norm in norms.items()}


def length(state: GlobalState, scaling: float) -> float:
    """Frobenius norm, over all layers, of all that a state adds to the backbone: s B A and the residual."""
    square = 0.0
    for key_a, key_b in pairs(state.adapter):
        parts, weights = [as_pair(state.adapter, key_a, key_b)], [scaling]
        if state.residual:
            parts, weights = [*parts, as_pair(state.residual, key_a, key_b)], [scaling, 1.0]
        square += product_norm(stack(parts, weights)) ** 2
    return math.sqrt(square)


def mixed(
    base: GlobalState, states: Sequence[GlobalState], weights: Sequence[float], method: Method, round_: Round
) -> tuple[GlobalState, float, bool]:
    """The weighted sum of the states' products, as a state that has all else from ``base``.

    With residuals, the residual takes everything and the adapter stays. A layer of which both factors go down to the
    clients is stacked and compressed to the rank. Of any other the factors that go down are added up, number by number;
    those that do not go down are fixed or the clients' own, and stay.

    Returns:
        The state, the share of energy that was lost to compression, and whether the factors' basis changed.
    """
    if any(state.residual for state in states):
        residual, lost = absorb(
            {},
            _into_residual(base, states, weights, round_),
            base.adapter,
            round_.settings.aggregation.residual_rank,
        )
        return replace(base, residual=residual, facts={}), lost, False
    sent = set(method.sends(base, round_))
    adapter, layers, done = dict(base.adapter), [], set()
    scaling, rank = round_.lora.scaling, round_.lora.rank
    for key_a, key_b in pairs(base.adapter):
        if {key_a, key_b} <= sent:
            whole = stack([as_pair(state.adapter, key_a, key_b) for state in states], [w * scaling for w in weights])
            pair, energy = method.factored(whole, rank, scaling, derive(round_.seed, "refill", key_a))
            adapter |= as_factors(pair, base.adapter, key_a, key_b)
            layers.append(energy)
            done |= {key_a, key_b}
    adapter |= _added([state.adapter for state in states], weights, sorted(sent - done))
    return replace(base, adapter=adapter, facts={}), discarded(layers), bool(layers)


def _added(adapters: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float], keys: Collection[str]) -> Adapter:
    """Weighted sums of single tensors, in float64."""
    return {key: sum(w * x[key].double() for x, w in zip(adapters, weights, strict=True)).float() for key in keys}  # type: ignore[union-attr]


def _into_residual(
    base: GlobalState, states: Sequence[GlobalState], weights: Sequence[float], round_: Round
) -> Iterator[tuple[str, str, Pair]]:
    """What the residual has to be so that it and the base's adapter make the mixture."""
    scaling = round_.lora.scaling
    for key_a, key_b in pairs(base.adapter):
        terms: list[Pair] = [as_pair(base.adapter, key_a, key_b)]
        factors = [-scaling]
        for state, weight in zip(states, weights, strict=True):
            terms.append(as_pair(state.adapter, key_a, key_b))
            factors.append(weight * scaling)
            if state.residual:
                terms.append(as_pair(state.residual, key_a, key_b))
                factors.append(weight)
        yield key_a, key_b, stack(terms, factors)
