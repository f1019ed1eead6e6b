"""What a client keeps on its own disk: its adapter after each round, and the personal adapter in the end.

Nothing here is ever sent. A client that is asked to repeat a round starts from the state before it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from fedgen_app.learning.adapters import Adapter, load_adapter, save_adapter

OWN = "own/"  # in front of the keys of a method's own tensors
ROUND_FILE = re.compile(r"round-(\d{4,})\.safetensors")


@dataclass(frozen=True)
class Kept:
    """What a client left behind: its adapter, and its method's own tensors."""

    adapter: Adapter = field(default_factory=dict)
    own: Adapter = field(default_factory=dict)


def load_kept(file: Path) -> Kept:
    """The state in one of a client's files.

    Raises:
        AdapterError: the file is damaged.
    """
    joined = load_adapter(file)
    own = {key.removeprefix(OWN): tensor for key, tensor in joined.items() if key.startswith(OWN)}
    return Kept({key: tensor for key, tensor in joined.items() if not key.startswith(OWN)}, own)


class PersonalStore:
    """One client's state of one run, in ``folder/state/``."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def _numbers(self) -> list[int]:
        names = [f.name for f in (self.folder / "state").glob("round-*.safetensors")]
        return sorted(int(match[1]) for match in map(ROUND_FILE.fullmatch, names) if match)

    def _file(self, number: int) -> Path:
        return self.folder / "state" / f"round-{number:04d}.safetensors"

    def before(self, number: int) -> Kept:
        """The state after the last round before ``number`` that this client took part in; empty where there is none.

        Raises:
            AdapterError: the file is damaged.
        """
        earlier = [n for n in self._numbers() if n < number]
        return load_kept(self._file(earlier[-1])) if earlier else Kept()

    def save(self, number: int, kept: Kept, averaged: int = 0) -> None:
        """Keep the state after a round, which ends later ones; a crash leaves the old file or the new one.

        Args:
            averaged: The last round that counted on the server: the state after it is kept, however old.
        """
        joined = kept.adapter | {f"{OWN}{key}": tensor for key, tensor in kept.own.items()}
        save_adapter(joined, self._file(number), {"round": str(number)})
        numbers = self._numbers()
        # Later ones are of rounds that the run went back behind: nobody may start from them again.
        abandoned, done = [n for n in numbers if n > number], [n for n in numbers if n <= number]
        counted = [n for n in done if n <= averaged][-1:]
        for other in set(abandoned + done[: -self.keep]) - set(counted):
            self._file(other).unlink(missing_ok=True)
