"""One seed for each thing that is random, derived from the run's seed, so that order and place change nothing."""

from __future__ import annotations

import hashlib


def derive(seed: int, *parts: int | str) -> int:
    """A 63-bit seed for the thing that ``parts`` name, e.g. ``derive(seed, "train", round, client)``."""
    text = "\x1f".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
