"""Who asked for what, read from the cosines among the devices alone: a rotation leaves them as they are.

The attacker looks for the candidates that lie to each other as the sent vectors do. One pair of devices fits a few
pairs of candidates, a third device settles which and in what order, and every other one follows. What it finds is a
lower bound: assigning under noise is a hard problem (quadratic assignment), and someone may search for longer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Places = NDArray[np.int64]
MOST_CANDIDATES = 10_000  # all their pairs are looked at
MOST_DEVICES = 1000  # all theirs are kept
AT_ONCE = 2**22  # numbers in memory for one step
FEWEST = 256  # assignments that are followed, however many candidates there are
ANCHORS = 12  # devices that are assigned one after the other, before all others at once
FINALISTS = 8
ROUNDS = 30  # of assigning all anew, given all the others


def mismatches(sent: Numbers, candidates: Numbers, scale: float = 1.0) -> Numbers:
    """How badly each candidate fits each device, given what the others are taken for, (devices, candidates).

    Root mean square over the other devices of the difference between the cosine that is seen and the candidates' own.

    Args:
        sent: (devices, width), directions; two or more.
        candidates: (candidates, width), directions; time and memory grow with the square of ``candidates``.
        scale: What cosines were shrunk by: 1 + width sigma^2 under noise of that sigma.
    """
    seen = scale * (sent @ sent.T)
    best, least = np.empty(0), np.inf
    for assigned in _search(seen, candidates):
        costs, total = _settled(seen, candidates, assigned)
        if total < least:
            best, least = costs, total
    return np.sqrt(np.maximum(best, 0) / (len(sent) - 1))


def _search(seen: Numbers, candidates: Numbers) -> list[Places]:
    """Candidates for the first anchors, the likeliest assignments first: a beam search that narrows as it goes.

    Returns:
        Pairs of rows: the anchors and what they are taken for.
    """
    order = _rarest_first(seen, candidates)[:ANCHORS]
    keep = max(FEWEST, AT_ONCE // len(candidates))
    found, costs = _pairs(float(seen[order[0], order[1]]), candidates, keep)
    for m in range(2, len(order)):
        keep = max(FEWEST, keep // 4)
        whole = np.repeat(costs[:, None], len(candidates), axis=1)
        for j in range(m):
            taken, which = np.unique(found[:, j], return_inverse=True)
            whole += np.square(candidates[taken] @ candidates.T - seen[order[m], order[j]])[which]
        chosen = _least(whole.ravel(), keep)
        costs = whole.ravel()[chosen]
        beam, candidate = np.divmod(chosen, len(candidates))
        found = np.column_stack([found[beam], candidate])
    return [np.stack([order, found[best]]) for best in _least(costs, FINALISTS)]


def _rarest_first(seen: Numbers, candidates: Numbers) -> Places:
    """The devices, those first whose cosine is farthest from what is usual: it fits the fewest pairs."""
    mean = candidates.mean(axis=0)
    unusual = np.abs(seen - float(mean @ mean))
    np.fill_diagonal(unusual, -1)
    pair = np.array(np.divmod(int(unusual.argmax()), len(seen)))
    others = np.setdiff1d(np.argsort(-unusual.max(axis=1), kind="stable"), pair, assume_unique=True)
    return np.concatenate([pair, others])


def _pairs(cosine: float, candidates: Numbers, keep: int) -> tuple[Places, Numbers]:
    """The ordered pairs of candidates whose cosine is nearest, (pairs, 2), and the squares of the differences."""
    count = len(candidates)
    found, costs = np.empty(0, np.int64), np.empty(0)
    step = max(1, AT_ONCE // count)
    for start in range(0, count, step):
        gaps = np.square(candidates[start : start + step] @ candidates.T - cosine).ravel()
        chosen = _least(gaps, keep)
        found, costs = np.concatenate([found, chosen + start * count]), np.concatenate([costs, gaps[chosen]])
        chosen = _least(costs, keep)
        found, costs = found[chosen], costs[chosen]
    return np.column_stack(np.divmod(found, count)), costs


def _settled(seen: Numbers, candidates: Numbers, assigned: Places) -> tuple[Numbers, float]:
    """Assign all devices anew, given all the others, as long as that fits better.

    Returns:
        The costs (devices, candidates) and their sum over the assigned.
    """
    devices, taken = assigned
    best, least = np.empty(0), np.inf
    for _ in range(ROUNDS):
        costs = _costs(seen, candidates, devices, taken)
        if len(devices) == len(seen):
            total = float(costs[devices, taken].sum())
            if total >= least:
                break
            best, least = costs, total
        devices, taken = np.arange(len(seen)), costs.argmin(axis=1)
    return best, least


def _costs(seen: Numbers, candidates: Numbers, devices: Places, taken: Places) -> Numbers:
    """Sums of squared differences to the ``devices`` that are ``taken`` for candidates, each without its own."""
    own = candidates[taken] @ candidates.T  # (devices, candidates)
    there = seen[:, devices]
    costs = np.square(there).sum(axis=1)[:, None] - 2 * there @ own + np.square(own).sum(axis=0)
    costs[devices] -= np.square(seen[devices, devices][:, None] - own)
    return np.asarray(costs, np.float64)


def _least(costs: Numbers, keep: int) -> Places:
    """The places of the ``keep`` smallest, smallest first."""
    chosen = np.argpartition(costs, keep - 1)[:keep] if len(costs) > keep else np.arange(len(costs))
    return np.asarray(chosen[np.argsort(costs[chosen], kind="stable")], np.int64)
