"""What hides an encoded requirement: a rotation that the server does not know, and noise.

Neither makes it harmless; ``docs/clusters.md`` says what still leaks, and ``fedgen audit-prompts`` measures it.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedgen_app.errors import SettingsError

Numbers = NDArray[np.float64]
SENSITIVITY = 2.0  # two directions are at most this far apart
SHORTEST_KEY = 32  # bytes
WIDEST = 4096  # of a vector that a device turns: takes 0.8 GB there; the time grows with the third power
BLOCK = 256  # rows of a rotation that are drawn at once


def read_key(file: Path) -> bytes:
    """The secret that devices share and the server does not have.

    Raises:
        SettingsError: it is not there, or too short to be secret.
    """
    try:
        key = file.expanduser().read_bytes().strip()
    except OSError as error:
        raise SettingsError(f"cluster key {file}: {error.strerror}") from None
    if len(key) < SHORTEST_KEY:
        raise SettingsError(f"cluster key {file}: {len(key)} bytes, should be {SHORTEST_KEY} or more, drawn at random")
    return key


def key_mark(key: bytes) -> str:
    """Tells whether two devices have the same key, and nothing of the key itself."""
    return hashlib.sha256(b"fedgen cluster key mark" + key).hexdigest()


def rotation(key: bytes, width: int) -> Numbers:
    """An orthogonal matrix (width, width), uniform over all of them, that the key alone decides.

    Gaussian numbers come from SHAKE-256, which gives every device the same whatever its libraries; QR of them with a
    positive diagonal is uniform (Mezzadri 2007, arXiv math-ph/0609050). Cosines survive it exactly.

    Raises:
        SettingsError: it would be wider than ``WIDEST``.
    """
    if width > WIDEST:
        raise SettingsError(f"cluster key: the encoder's vectors have {width} numbers, a rotation at most {WIDEST}")
    stream = hashlib.shake_256(b"fedgen cluster rotation" + width.to_bytes(4, "big") + key)
    raw = np.frombuffer(stream.digest(16 * width * width), "<u8").reshape(2, width, width)
    gaussian = np.empty((width, width))
    for start in range(0, width, BLOCK):  # or the steps between would take several times the memory of the result
        rows = raw[:, start : start + BLOCK]
        uniform = ((rows >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
        gaussian[start : start + BLOCK] = np.sqrt(-2 * np.log(uniform[0])) * np.cos(2 * math.pi * uniform[1])
    del raw, rows
    q, r = np.linalg.qr(gaussian)
    q *= np.sign(np.diagonal(r))
    return np.asarray(q, np.float64)


def noisy(vector: Numbers, noise: Numbers) -> Numbers:
    """The direction of the sum: normalising afterwards costs no privacy."""
    added = vector + noise
    return np.asarray(added / np.linalg.norm(added), np.float64)


def drawn(width: int, sigma: float, generator: np.random.Generator) -> Numbers:
    """Gaussian noise of standard deviation sigma in each of ``width`` numbers."""
    return generator.normal(0.0, sigma, width)


def epsilon(sigma: float, delta: float, sensitivity: float = SENSITIVITY) -> float:
    """The smallest epsilon for which Gaussian noise of this size is (epsilon, delta) differentially private.

    The analytic Gaussian mechanism (Balle and Wang 2018, arXiv 1805.06530, theorem 8), by bisection. Without noise it
    is infinite.
    """
    if not sigma:
        return math.inf
    import torch  # here alone, so that provisioning reads a key without it

    def spent(eps: float) -> float:
        middle, shift = sensitivity / (2 * sigma), eps * sigma / sensitivity
        tails = torch.special.log_ndtr(torch.tensor([middle - shift, -middle - shift], dtype=torch.float64))
        return float(tails[0].exp() - (eps + tails[1]).exp())

    low, high = 0.0, 1.0
    if spent(low) <= delta:
        return 0.0
    while spent(high) > delta:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high
