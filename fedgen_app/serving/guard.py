"""Who may ask, and how often: bearer tokens compared in constant time, and a bucket of requests for each client."""

from __future__ import annotations

import hmac
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedgen_app.errors import ServiceError, SettingsError

VARIABLE = "FEDGEN_TOKEN"
SHORTEST_TOKEN = 32  # characters
TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")  # what a bearer token may consist of (RFC 6750)
MOST_CLIENTS = 10_000  # whose buckets are kept


@dataclass(frozen=True)
class Limits:
    """What one service bears.

    Attributes:
        images: In one request.
        steps: Of one image.
        batch: Images of one forward pass.
        waiting: Requests that wait for the worker.
        arriving: Requests in work, from the first byte of their bodies to when their answers are read.
        held: Bytes of bodies of requests in work, or those of the largest one.
        alike: Connections of one address that are served.
        per_minute: Requests of one client that come back to its bucket.
        burst: Requests that a full bucket holds.
        head: Seconds that a connection may take to say what it wants.
        seconds: That a body may take to arrive.
        patience: Seconds that a request may take until it is answered, half of them until it is begun.
        reading: Seconds that a device may take to read the answer.
    """

    images: int = 8
    steps: int = 100
    batch: int = 16
    waiting: int = 64
    arriving: int = 256
    held: int = 512 * 1024**2
    alike: int = 256
    per_minute: int = 60
    burst: int = 20
    head: float = 10.0
    seconds: float = 30.0
    patience: float = 300.0
    reading: float = 120.0


class LaterError(ServiceError):
    """429, and in how many seconds to try again."""

    def __init__(self, message: str, wait: float) -> None:
        super().__init__(429, message)
        self.wait = math.ceil(wait)


def read_tokens(file: Path | None, variable: str) -> tuple[str, ...]:
    """One token per line of a file, else what the environment says; neither: none.

    Raises:
        SettingsError: the file is not there, or a token is too short or no token. It is not repeated.
    """
    source = f"--token-file {file}" if file else VARIABLE
    try:
        text = file.expanduser().read_text(encoding="utf-8") if file else variable
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{source}: {error.strerror if isinstance(error, OSError) else 'no text'}") from None
    tokens = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if file and not tokens:
        raise SettingsError(f"{source}: holds no token")
    for number, token in enumerate(tokens, 1):
        if len(token) < SHORTEST_TOKEN or not TOKEN.fullmatch(token):
            raise SettingsError(
                f"{source}: token {number} should be {SHORTEST_TOKEN} or more letters, digits and ._~+/=-, drawn at "
                "random: head -c 32 /dev/urandom | base64"
            )
    return tuple(tokens)


def holder(header: str, tokens: Sequence[str]) -> int | None:
    """Whose token an Authorization header has, by its place; without tokens everybody is 0.

    Every token is compared, each in constant time: how long it takes says nothing.
    """
    if not tokens:
        return 0
    scheme, _, given = header.partition(" ")
    same = [hmac.compare_digest(given.strip().encode(), token.encode()) for token in tokens]
    return same.index(True) if scheme.lower() == "bearer" and any(same) else None


@dataclass
class Buckets:
    """A bucket of requests per client that fills up again by and by.

    Attributes:
        rate: Requests per second that come back.
        burst: Requests that a full bucket holds.
    """

    rate: float
    burst: int
    now: Callable[[], float] = time.monotonic
    _left: dict[object, tuple[float, float]] = field(default_factory=dict, init=False)

    def take(self, client: object) -> float:
        """0: the request is let through; else the seconds until one will be."""
        now = self.now()
        left, since = self._left.get(client, (float(self.burst), now))
        left = min(float(self.burst), left + (now - since) * self.rate)
        wait = 0.0 if left >= 1 else (1 - left) / self.rate
        self._left[client] = (left if wait else left - 1, now)
        if len(self._left) > MOST_CLIENTS:
            self._forget(now)
        return wait

    def _forget(self, now: float) -> None:
        """Buckets that are full again say nothing; where that is too few, those that were used longest ago go."""
        kept = {c: (left, t) for c, (left, t) in self._left.items() if left + (now - t) * self.rate < self.burst}
        newest = sorted(kept, key=lambda client: kept[client][1])[-MOST_CLIENTS // 2 :]
        self._left = {client: kept[client] for client in newest}
