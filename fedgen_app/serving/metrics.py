"""What the service counts, in Prometheus' text format; nothing of what a request holds."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "fedgen_serve_"
COUNTERS = {
    "requests_total": "Requests by path and HTTP status.",
    "received_bytes_total": "Bytes of bodies that were read.",
    "sent_bytes_total": "Bytes of answers.",
    "images_total": "Images and latents that were computed.",
    "batches_total": "Batches of requests that were computed together.",
    "mixtures_total": "Distinct mixtures, summed over batches.",
    "busy_seconds_total": "Seconds in which the worker computed.",
    "request_seconds_total": "Seconds of carried-out requests, waiting included.",
}
GAUGES = {
    "waiting": "Requests that wait for the worker.",
    "open": "Requests in work, bodies that still come and answers that are not read yet included.",
}


@dataclass
class Metrics:
    """Counters and gauges; counters may be raised from any thread."""

    gauges: dict[str, Callable[[], float]] = field(default_factory=dict)
    _counts: Counter[tuple[str, str]] = field(default_factory=Counter, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def add(self, name: str, value: float = 1, labels: Mapping[str, str | int] | None = None) -> None:
        """Raise a counter; labels are of our own making, never a client's."""
        if name not in COUNTERS:
            raise KeyError(name)
        told = ",".join(f'{key}="{text}"' for key, text in (labels or {}).items())
        with self._lock:
            self._counts[name, told] += value  # type: ignore[assignment]

    def text(self) -> str:
        """All of them."""
        with self._lock:
            counts = dict(self._counts)
        lines = []
        for name, about in COUNTERS.items():
            lines += [f"# HELP {PREFIX}{name} {about}", f"# TYPE {PREFIX}{name} counter"]
            found = {told: value for (counted, told), value in counts.items() if counted == name} or {"": 0}
            lines += [
                f"{PREFIX}{name}{'{' + told + '}' if told else ''} {value:.12g}"
                for told, value in sorted(found.items())
            ]
        for name, about in GAUGES.items():
            lines += [f"# HELP {PREFIX}{name} {about}", f"# TYPE {PREFIX}{name} gauge"]
            lines += [f"{PREFIX}{name} {self.gauges[name]():.12g}"] if name in self.gauges else []
        return "\n".join(lines) + "\n"
