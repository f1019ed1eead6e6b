"""Robust rules (``aggregation.robust``): what becomes of the updates before a method's rule sees them.

What a client did is the change of the product, s (B_k A_k - B A), from what it received (B, A). Its norm and all
distances come from factors (``lowrank.gram``), so no dense matrix is formed. Only the two rules named ``factor-`` work
on the factors themselves.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedgen_app.errors import RunError
from fedgen_app.federation.aggregation import between, change_norm, shrink
from fedgen_app.federation.lowrank import Pair, as_pair, gram
from fedgen_app.federation.method import GlobalState, Lora, Round, Rule, Update
from fedgen_app.learning.adapters import Adapter, pairs
from fedgen_app.settings import AggregationSettings, Settings

Fit = Callable[[Adapter, Lora, Lora], Adapter]
Widen = Callable[[Adapter, Lora, Adapter, Lora], Adapter]

# Smallest number of clients that a rule works with when f of them attack. Krum: Blanchard et al. 2017 (NeurIPS,
# arXiv 1703.02757); the others need a majority.
NEEDED: dict[str, tuple[str, Callable[[int], int]]] = {
    "norm-bound": ("2f + 1", lambda f: 2 * f + 1),
    "krum": ("2f + 3", lambda f: 2 * f + 3),
    "multi-krum": ("2f + 3", lambda f: 2 * f + 3),
    "geometric-median": ("2f + 1", lambda f: 2 * f + 1),
    "factor-median": ("2f + 1", lambda f: 2 * f + 1),
    "factor-trimmed-mean": ("2f + 1", lambda f: 2 * f + 1),
}
FACTOR_RULES = ("factor-median", "factor-trimmed-mean")
PRODUCT_RULES = tuple(name for name in NEEDED if name not in FACTOR_RULES)
# Weiszfeld: distances below this share of the usual one count as this (Pillutla et al. 2022, arXiv 1912.13445, smooth
# with 1e-6); the steps cost n^2 numbers each, so it goes on until nothing moves.
SMOOTHING = 1e-6
MOST_STEPS, STANDSTILL = 1000, 1e-12


def only(*allowed: str, because: str, layer_wise: bool = True) -> Callable[[Settings], Iterable[str]]:
    """For ``Method.refuses``: the method can have these rules beside it and no others, and weights by layer or not."""

    def objections(settings: Settings) -> Iterable[str]:
        name = settings.aggregation.robust
        if name not in ("none", *allowed):
            fitting = ", ".join(("none", *allowed))
            yield f"aggregation.robust = {name!r}: method = {settings.method} takes {fitting}, because {because}"
        if settings.aggregation.layer_wise and not layer_wise:
            yield f"aggregation.layer-wise = true: method = {settings.method} cannot have it, because {because}"

    return objections


def attackers(aggregation: AggregationSettings, clients: int) -> int:
    """f, how many of so many clients are taken for attackers: floor(aggregation.attackers * clients), at least one.

    With none, multi-Krum would keep everyone and the trimmed mean trim nobody: no guard at all.
    """
    return max(1, math.floor(aggregation.attackers * clients + 1e-9))  # 0.29 * 100 is 28.999...


def objection(aggregation: AggregationSettings, clients: int) -> str | None:
    """Why so few clients cannot carry the rule; None where they can."""
    if aggregation.robust == "none":
        return None
    f = attackers(aggregation, clients)
    formula, needed = NEEDED[aggregation.robust]
    if clients >= needed(f):
        return None
    return (
        f"aggregation.robust = {aggregation.robust!r} needs {formula} = {needed(f)} replies against f = {f} attackers "
        f"(aggregation.attackers = {aggregation.attackers:g}), and there are {clients}"
    )


def robust(rule: Rule, fit: Fit | None = None, widen: Widen | None = None) -> Rule:
    """The rule behind the guard that ``aggregation.robust`` names."""

    def guarded(state: GlobalState, updates: Sequence[Update], round_: Round) -> GlobalState:
        name = round_.settings.aggregation.robust
        return rule(state, reweigh(name, updates, state, round_, fit, widen), round_)

    return guarded


def reweigh(
    name: str,
    updates: Sequence[Update],
    state: GlobalState,
    round_: Round,
    fit: Fit | None = None,
    widen: Widen | None = None,
) -> list[Update]:
    """The updates that the method's rule is to see: clipped, chosen, weighed anew, or replaced by their middle.

    Args:
        name: One of the values of ``aggregation.robust``.
        fit: How the method cuts the server's adapter for a client of a smaller rank.
        widen: The way back, where the rule averages factors of several ranks.

    Raises:
        RunError: there are too few updates for this rule.
    """
    if name == "none":
        return list(updates)
    settings = round_.settings.aggregation.model_copy(update={"robust": name})
    if reason := objection(settings, len(updates)):
        raise RunError(reason)
    f = attackers(settings, len(updates))
    if name in FACTOR_RULES:
        return [_middle(updates, f if name == "factor-trimmed-mean" else None)]
    received = _received(updates, state, round_, fit)
    averaged = widen or not fit  # the factors, not the products
    beside = gram_beside_the_others(updates, state.adapter, round_.lora, widen) if averaged else None
    if name == "norm-bound":
        return _bounded(updates, received, round_.lora, settings.norm_bound, beside)
    products = gram_of_changes(updates, received, round_.lora)
    products = products if beside is None else products + beside
    if name == "krum":
        return [updates[_by_score(products, f)[0]]]
    if name == "multi-krum":
        return [updates[i] for i in sorted(_by_score(products, f)[: len(updates) - f])]
    return _towards_the_middle(updates, products)


def _received(updates: Sequence[Update], state: GlobalState, round_: Round, fit: Fit | None) -> list[Adapter]:
    """What each client had when it started: the server's adapter at the client's rank."""
    at_rank = {round_.lora.rank: state.adapter}
    for rank in {u.rank for u in updates} - set(at_rank):
        if fit is None:
            raise RunError(f"an update of rank {rank} in a method that has rank {round_.lora.rank} alone")
        at_rank[rank] = fit(state.adapter, round_.lora, round_.lora.at(rank))
    return [at_rank[u.rank] for u in updates]


def _change(new: Adapter, old: Adapter, key_a: str, key_b: str, scaling: float) -> Pair:
    """B' A' - B A as (B' - B) A' + B (A' - A): small changes do not drown in the rounding of what they change."""
    (b_new, a_new), (b_old, a_old) = as_pair(new, key_a, key_b), as_pair(old, key_a, key_b)
    return scaling * torch.cat([b_new - b_old, b_old], 1), torch.cat([a_new, a_new - a_old], 0)


def gram_of_changes(updates: Sequence[Update], received: Sequence[Adapter], lora: Lora) -> Tensor:
    """Inner products (n, n) of what the clients changed, over all layers, in float64.

    A factor that was not shared is the received one. A tensor that is no factor changes by its difference.
    """
    new = [old | u.adapter for u, old in zip(updates, received, strict=True)]
    scalings = [lora.at(u.rank).scaling for u in updates]
    shared = set(updates[0].adapter)
    layers = [pair for pair in pairs(new[0]) if shared & set(pair)]
    whole = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for key_a, key_b in layers:
        whole += gram([_change(n, o, key_a, key_b, s) for n, o, s in zip(new, received, scalings, strict=True)])
    for key in sorted(shared - {key for pair in layers for key in pair}):
        rows = torch.stack([(n[key].double() - o[key].double()).flatten() for n, o in zip(new, received, strict=True)])
        whole += rows @ rows.T
    return whole


def gram_beside_the_others(
    updates: Sequence[Update], received: Adapter, lora: Lora, widen: Widen | None = None
) -> Tensor:
    """Inner products (n, n) of what each client's factors change in the product of means, to first order.

    s (dB_k A' + B' dA_k), where B' and A' are the medians of the numbers of all clients that have the direction. A
    client that sends c A and B / c has the same product for every c, and so no distance in ``gram_of_changes``; here c
    shows.

    Args:
        received: The server's adapter.
        widen: How a client of a smaller rank is brought to the largest.
    """
    ranks = [u.rank for u in updates]
    if widen:
        updates = [replace(u, adapter=widen(u.adapter, lora.at(u.rank), received, lora)) for u in updates]
    new = [received | u.adapter for u in updates]
    shared = set(updates[0].adapter)
    whole = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for key_a, key_b in (pair for pair in pairs(received) if shared & set(pair)):
        b_old, a_old = as_pair(received, key_a, key_b)
        each = [as_pair(adapter, key_a, key_b) for adapter in new]
        b_mid, a_mid = (_middle_of(f, ranks, axis) for f, axis in zip(zip(*each, strict=True), (1, 0), strict=True))
        whole += gram(
            [(lora.scaling * torch.cat([b - b_old, b_mid], 1), torch.cat([a_mid, a - a_old])) for b, a in each]
        )
    return whole


def _middle_of(factors: Sequence[Tensor], ranks: Sequence[int], axis: int) -> Tensor:
    """The median of each number over those that have its direction, which ``axis`` counts; over all if none has."""
    middle, begin = [], 0
    for end in sorted({*ranks, factors[0].shape[axis]}):  # directions begin to end - 1: the same clients have them
        having = [f for f, rank in zip(factors, ranks, strict=True) if rank >= end] or factors
        middle.append(_trimmed_mean([factor.narrow(axis, begin, end - begin) for factor in having]))
        begin = end
    return torch.cat(middle, axis)


def _bounded(
    updates: Sequence[Update], received: Sequence[Adapter], lora: Lora, times: float, beside: Tensor | None
) -> list[Update]:
    """No change longer than ``times`` the median one; longer ones go back along the line of their factors."""
    new = [old | u.adapter for u, old in zip(updates, received, strict=True)]
    if beside is not None:  # linear along that line
        new = _shortened(new, received, beside.diagonal().clamp(min=0).sqrt().tolist(), times)
        updates = [replace(u, adapter={key: n[key] for key in u.adapter}) for u, n in zip(updates, new, strict=True)]
    scalings = [lora.at(u.rank).scaling for u in updates]
    norms = [change_norm(n, o, s) for n, o, s in zip(new, received, scalings, strict=True)]
    limit = times * statistics.median(norms)
    bounded = []
    for update, whole, old, scaling, norm in zip(updates, new, received, scalings, norms, strict=True):
        if norm > limit:
            shorter = shrink(whole, old, scaling, limit)
            update = replace(update, adapter={key: shorter[key] for key in update.adapter})
        bounded.append(update)
    return bounded


def _shortened(
    new: Sequence[Adapter], received: Sequence[Adapter], norms: Sequence[float], times: float
) -> list[Adapter]:
    limit = times * statistics.median(norms)
    return [
        between(old, adapter, limit / norm) if norm > limit else adapter
        for adapter, old, norm in zip(new, received, norms, strict=True)
    ]


def distances(products: Tensor) -> Tensor:
    """Distances (n, n) between points from their inner products."""
    squares = products.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * products).clamp(min=0).sqrt()


def _by_score(products: Tensor, f: int) -> list[int]:
    """Places by Krum's score, best first: the sum of squared distances to the n - f - 2 nearest others.

    Blanchard et al. 2017 (arXiv 1703.02757).
    """
    n, squares = len(products), distances(products) ** 2
    squares.fill_diagonal_(math.inf)
    scores = squares.sort(dim=1).values[:, : n - f - 2].sum(dim=1).tolist()
    return sorted(range(n), key=lambda i: (scores[i], i))


def weiszfeld(products: Tensor, weights: Sequence[float]) -> list[float]:
    """Weights, summing to 1, of the mean that is the weighted geometric median, from inner products (n, n).

    Smoothed Weiszfeld: each weight is divided by the distance to the present mean, until nothing moves. Pillutla et
    al. 2022 (arXiv 1912.13445).
    """
    given = torch.tensor(weights, dtype=torch.float64)
    given = given / given.sum()
    # Between most of the points, so that a few far ones do not set it; where most coincide, anything small will do.
    apart = distances(products)
    floor = SMOOTHING * float(apart.median(dim=1).values.median() or apart.max())
    if not floor:
        return [float(s) for s in given]
    share = given
    for _ in range(MOST_STEPS):
        away = (products.diagonal() - 2 * products @ share + share @ products @ share).clamp(min=0).sqrt()
        nearer = given / away.clamp(min=floor)
        nearer = nearer / nearer.sum()
        still = float((nearer - share).abs().max()) < STANDSTILL
        share = nearer
        if still:
            break
    return [float(s) for s in share]


def _towards_the_middle(updates: Sequence[Update], products: Tensor) -> list[Update]:
    examples = [u.num_examples for u in updates]
    shares = weiszfeld(products, examples)
    return [replace(u, num_examples=share * sum(examples)) for u, share in zip(updates, shares, strict=True)]


def _middle(updates: Sequence[Update], trim: int | None) -> Update:
    """One update in place of all: each number's median, or its mean without the ``trim`` smallest and largest.

    Yin et al. 2018 (arXiv 1803.01498). Every client counts once, whatever it says about its examples.
    """
    middle = {
        key: _trimmed_mean([u.adapter[key].double() for u in updates], trim).float() for key in updates[0].adapter
    }
    return replace(updates[0], adapter=middle, num_examples=sum(u.num_examples for u in updates), extra={}, metrics={})


def _trimmed_mean(tensors: Sequence[Tensor], trim: int | None = None) -> Tensor:
    """Number by number the mean without the ``trim`` smallest and largest; None: the median."""
    count = len(tensors)
    cut = (count - 1) // 2 if trim is None else trim
    return torch.stack(list(tensors)).sort(dim=0).values[cut : count - cut].mean(dim=0)
