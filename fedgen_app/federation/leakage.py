"""What an encoded requirement gives away to an attacker with the encoder and a list of candidates.

It looks for the nearest or, behind a rotation, for those that lie to each other as the sent vectors do. One prompt per
device, the worst case: a mean over several prompts tells less of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgen_app.federation.cosines import MOST_CANDIDATES, MOST_DEVICES, mismatches
from fedgen_app.federation.protection import drawn, epsilon, noisy, rotation
from fedgen_app.seeds import derive
from fedgen_app.settings import Settings

Numbers = NDArray[np.float64]
NEAREST = "encoder and candidates"
COSINES = "the same and the cosines among devices"
PAIRS = "the same and {} prompts with their vectors"


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


def ranks(scores: Numbers, truth: Sequence[int]) -> list[int]:
    """How many candidates score higher for each prompt than the true one does.

    Args:
        scores: (prompts, candidates).
        truth: The place among the candidates of each prompt.
    """
    own = scores[np.arange(len(scores)), list(truth)]
    return [int(n) for n in (scores > own[:, None] + 1e-12).sum(axis=1)]


def turned_back(sent: Numbers, known: Numbers, known_sent: Numbers) -> Numbers:
    """What an attacker makes of rotated vectors with pairs of before and after: orthogonal Procrustes.

    Schoenemann 1966. With as many pairs in general position as the vectors are wide it finds the rotation exactly.
    """
    u, _, v = np.linalg.svd(known_sent.T @ known)
    return np.asarray(sent @ (u @ v), np.float64)


def comparable(candidates: int, devices: int) -> bool:
    """Whether the attack by the cosines among devices is tried: it needs two, and takes too long with a long list."""
    return devices > 1 and candidates <= MOST_CANDIDATES


def recoveries(
    candidates: Numbers,
    truth: Sequence[int],
    sigmas: Sequence[float],
    settings: Settings,
    known: int = 0,
    secret: bytes = b"",
) -> list[Recovery]:
    """Recovery without protection, with noise, with a rotation, with both, and with a rotation that is partly known.

    Args:
        candidates: (n, width), directions.
        truth: Which of them the devices asked for. By their cosines the first ``cosines.MOST_DEVICES`` are sought.
        known: How many prompts the attacker knows beside their vectors, at most half of the candidates; 0: as many as
            the vectors are wide, if half of the candidates are so many.
        secret: The key of the rotation; empty: one is drawn.
    """
    width, delta = candidates.shape[1], settings.clusters.delta
    clean = candidates[list(truth)]
    draw = np.random.default_rng(derive(settings.seed, "audit"))
    key = rotation(secret or draw.bytes(32), width)
    pairs = min(known or width, max(1, len(candidates) // 2))
    learned = draw.permutation(len(candidates))[:pairs]
    told = set(learned.tolist())
    others = [place for place, true in enumerate(truth) if true not in told] or list(range(len(truth)))

    def row(protection: str, attacker: str, sigma: float, places: Sequence[int]) -> Recovery:
        first, five = (float(np.mean([place < n for place in places])) for n in (1, 5))
        return Recovery(protection, attacker, epsilon(sigma, delta), first, five)

    def nearest(sent: Numbers) -> list[int]:
        return ranks(sent @ candidates.T, truth)

    def with_noise(rows: Numbers, sigma: float) -> Numbers:
        return np.stack([noisy(each, drawn(width, sigma, draw)) for each in rows])

    def against_rotation(protection: str, sigma: float, sent: Numbers, seen: Numbers) -> Iterator[Recovery]:
        if comparable(len(candidates), len(truth)):
            some = sent[:MOST_DEVICES].astype(np.float32).astype(np.float64)  # as it travels
            unlike = mismatches(some, candidates, 1 + width * sigma**2)
            yield row(protection, COSINES, sigma, ranks(-unlike, truth[:MOST_DEVICES]))
        places = nearest(turned_back(sent, candidates[learned], seen))
        yield row(protection, PAIRS.format(pairs), sigma, [places[other] for other in others])  # known need no search

    found = [row("none", NEAREST, 0.0, nearest(clean))]
    found += [row(f"noise {sigma:g}", NEAREST, sigma, nearest(with_noise(clean, sigma))) for sigma in sigmas]
    found.append(row("rotation", NEAREST, 0.0, nearest(clean @ key.T)))
    found += against_rotation("rotation", 0.0, clean @ key.T, candidates[learned] @ key.T)
    for sigma in sigmas:
        sent, seen = with_noise(clean, sigma) @ key.T, with_noise(candidates[learned], sigma) @ key.T
        found += against_rotation(f"rotation and noise {sigma:g}", sigma, sent, seen)
    return found
