"""What an encoded requirement gives away: an attacker with the encoder and a list of candidates looks for the nearest.

One prompt per device, the worst case: a mean over several prompts tells less of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgen_app.federation.protection import drawn, epsilon, noisy, rotation
from fedgen_app.seeds import derive
from fedgen_app.settings import Settings

Numbers = NDArray[np.float64]
NO_KEY, PAIRS = "encoder and candidates", "the same and {} prompts with their vectors"


@dataclass(frozen=True)
class Recovery:
    """How often the true prompt was the nearest candidate, and among the five nearest."""

    protection: str
    attacker: str
    epsilon: float
    top1: float
    top5: float

    def as_json(self) -> dict[str, Any]:
        """With null for an epsilon that is infinite."""
        return asdict(self) | {"epsilon": self.epsilon if math.isfinite(self.epsilon) else None}

    def as_text(self) -> tuple[str, str, str, str, str]:
        """Cells of a table."""
        spent = f"{self.epsilon:.3g}" if math.isfinite(self.epsilon) else "none"
        return self.protection, self.attacker, spent, f"{self.top1:.1%}", f"{self.top5:.1%}"


def ranks(sent: Numbers, candidates: Numbers, truth: Sequence[int]) -> list[int]:
    """How many candidates are more similar to each sent vector than the true one is.

    Args:
        sent: (prompts, width).
        candidates: (candidates, width), directions.
        truth: The place among the candidates of each prompt.
    """
    likeness = sent @ candidates.T
    own = likeness[np.arange(len(sent)), list(truth)]
    return [int(n) for n in (likeness > own[:, None] + 1e-12).sum(axis=1)]


def turned_back(sent: Numbers, known: Numbers, known_sent: Numbers) -> Numbers:
    """What an attacker makes of rotated vectors with pairs of before and after: orthogonal Procrustes.

    Schoenemann 1966. With as many pairs in general position as the vectors are wide it finds the rotation exactly.
    """
    u, _, v = np.linalg.svd(known_sent.T @ known)
    return np.asarray(sent @ (u @ v), np.float64)


def recoveries(
    candidates: Numbers, truth: Sequence[int], sigmas: Sequence[float], settings: Settings, known: int = 0
) -> list[Recovery]:
    """Recovery without protection, with noise, with a rotation, with both, and with a rotation that is partly known.

    Args:
        candidates: (n, width), directions.
        truth: Which of them the devices asked for.
        known: How many prompts the attacker knows beside their vectors; 0: as many as the vectors are wide, at most
            half of the candidates.
    """
    width, delta = candidates.shape[1], settings.clusters.delta
    clean = candidates[list(truth)]
    draw = np.random.default_rng(derive(settings.seed, "audit"))
    key = rotation(draw.bytes(32), width)
    pairs = min(known or width, max(1, len(candidates) // 2))
    learned = draw.permutation(len(candidates))[:pairs]

    others = [place for place, true in enumerate(truth) if true not in set(learned.tolist())] or list(range(len(truth)))

    def row(protection: str, attacker: str, sigma: float, sent: Numbers) -> Recovery:
        places = ranks(sent, candidates, truth)
        if attacker != NO_KEY:  # what it knows it need not find
            places = [places[other] for other in others]
        first, five = (float(np.mean([place < n for place in places])) for n in (1, 5))
        return Recovery(protection, attacker, epsilon(sigma, delta), first, five)

    def with_noise(rows: Numbers, sigma: float) -> Numbers:
        return np.stack([noisy(each, drawn(width, sigma, draw)) for each in rows])

    found = [row("none", NO_KEY, 0.0, clean)]
    found += [row(f"noise {sigma:g}", NO_KEY, sigma, with_noise(clean, sigma)) for sigma in sigmas]
    found.append(row("rotation", NO_KEY, 0.0, clean @ key.T))
    back = turned_back(clean @ key.T, candidates[learned], candidates[learned] @ key.T)
    found.append(row("rotation", PAIRS.format(pairs), 0.0, back))
    for sigma in sigmas:
        sent, seen = with_noise(clean, sigma) @ key.T, with_noise(candidates[learned], sigma) @ key.T
        back = turned_back(sent, candidates[learned], seen)
        found.append(row(f"rotation and noise {sigma:g}", PAIRS.format(pairs), sigma, back))
    return found
