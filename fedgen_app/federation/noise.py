"""A device's noise on what it wants, kept so that asking again, for another size of it, tells a server nothing new.

Noise of every size for one wish is a point of one Brownian path over sigma squared. Each larger one is then a smaller
one with more noise added, so all of them together tell what the smallest tells, and cost its epsilon alone.
"""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedgen_app.errors import DataError
from fedgen_app.federation.protection import drawn
from fedgen_app.files import write_atomic

Numbers = NDArray[np.float64]
ON_PATH = "~"  # in a name, between the wish and the size
ALONE = "@"  # the same of earlier versions, which drew anew for every size


@dataclass(frozen=True)
class Draws:
    """All noise that a device has put on what it wants.

    Attributes:
        file: Where it stays.
        paths: By wish and sigma; sigma 0 says that the wish was sent as it is.
        alone: Of earlier versions, by name: never used again, but their budget is spent.
    """

    file: Path
    paths: dict[str, dict[float, Numbers]]
    alone: dict[str, Numbers]

    @classmethod
    @contextlib.contextmanager
    def held(cls, file: Path) -> Iterator[Draws]:
        """As ``read``, and no other process draws meanwhile: two runs at once would put two noises on one wish.

        Raises:
            DataError: as ``read``.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            yield cls.read(file)

    @classmethod
    def read(cls, file: Path) -> Draws:
        """What the device has drawn so far; of an earlier version the smallest noise of a wish begins its path.

        Raises:
            DataError: the file is damaged, and new noise would spend the budget unnoticed.
        """
        paths: dict[str, dict[float, Numbers]] = {}
        alone: dict[str, Numbers] = {}
        try:
            known = load_file(file) if file.exists() else {}
            for name in sorted(known):
                what, on_path, sigma = name.partition(ON_PATH)
                if on_path:
                    paths.setdefault(what, {})[float(sigma)] = known[name]
                else:
                    alone[name] = known[name]
            for name in sorted(
                (name for name in alone if ALONE in name), key=lambda name: _sigma_of(name, alone[name])
            ):
                if (what := name.partition(ALONE)[0]) not in paths:
                    noise = alone.pop(name)
                    paths[what] = {_sigma_of(name, noise): noise}
            for name, noise in alone.items():
                _sigma_of(name, noise)
        except (OSError, SafetensorError, ValueError) as error:
            raise DataError(f"{file}: {error}") from None
        return cls(file, paths, alone)

    def spent_with(self, what: str, sigma: float) -> list[float]:
        """The sizes that cost budget once ``what`` is sent with this one: the smallest of each path, and all alone.

        Each is a mechanism of its own: their epsilons add up.
        """
        smallest = {wish: min(path) for wish, path in self.paths.items()}
        smallest[what] = min(sigma, smallest.get(what, sigma))
        return [*smallest.values(), *(_sigma_of(name, noise) for name, noise in self.alone.items())]

    def noise(self, what: str, width: int, sigma: float) -> Numbers:
        """Noise (width,) of standard deviation ``sigma``: the same for the same wish and size, and kept.

        Args:
            what: A mark of the prompts and their encoder. Not of the vector, whose last digits hang on the machine:
                other threads or libraries would make another wish of it. It stays in the file.

        Raises:
            DataError: what is kept for this wish is damaged.
        """
        path = self.paths.setdefault(what, {})
        if not all(each.shape == (width,) and np.isfinite(each).all() for each in path.values()):
            raise DataError(f"{self.file}: holds no noise of {width} finite numbers for what is wanted")
        if sigma not in path:
            path[sigma] = _point(path, width, sigma)
            kept = {
                f"{wish}{ON_PATH}{size!r}": noise for wish, sizes in self.paths.items() for size, noise in sizes.items()
            }
            write_atomic(self.file, save(kept | self.alone))
        return path[sigma].astype(np.float64)


def _point(path: dict[float, Numbers], width: int, sigma: float) -> Numbers:
    """A new point of a Brownian path over sigma squared, given those that are there; at 0 it is 0.

    Beyond the last an independent step, between two the Brownian bridge: a path is Markov, so others play no part.
    """
    below = max((size for size in path if size < sigma), default=0.0)
    above = min((size for size in path if size > sigma), default=None)
    start = path.get(below, np.zeros(width))
    generator = np.random.default_rng(secrets.randbits(128))
    if above is None:
        return start + drawn(width, _step(below, sigma), generator)
    share = (sigma - below) / (above - below) * ((sigma + below) / (above + below))
    size = math.sqrt(share * (1 - share)) * _step(below, above)
    return np.asarray(start + share * (path[above] - start) + drawn(width, size, generator), np.float64)


def _step(below: float, above: float) -> float:
    """The root of above^2 - below^2, which does not vanish for sizes that are nearly equal."""
    return math.sqrt(above - below) * math.sqrt(above + below)


def _sigma_of(name: str, noise: Numbers) -> float:
    """Of a draw of an earlier version; of one from before sigma stood in the name its numbers tell it, about."""
    _, mark, sigma = name.partition(ALONE)
    return float(sigma) if mark else float(np.sqrt(np.mean(np.square(noise))))
