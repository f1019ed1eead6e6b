"""What a client keeps on its own disk: its adapter after each round, and the personal adapter in the end.

Nothing here is ever sent. A client that is asked to repeat a round starts from the state before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedgen_app.learning.adapters import Adapter, Layout, load_adapter, save_adapter

ROUND_FILE = re.compile(r"round-(\d{4,})\.safetensors")


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

    def before(self, number: int, layout: Layout) -> Adapter | None:
        """The state after the last round before ``number`` that this client took part in.

        Raises:
            AdapterError: the file is damaged.
        """
        earlier = [n for n in self._numbers() if n < number]
        return load_adapter(self._file(earlier[-1]), layout) if earlier else None

    def save(self, number: int, adapter: Mapping[str, Tensor]) -> None:
        """Keep the state after a round, which ends later ones; a crash leaves the old file or the new one."""
        save_adapter(adapter, self._file(number), {"round": str(number)})
        numbers = self._numbers()
        # Later ones are of rounds that the run went back behind: nobody may start from them again.
        abandoned, done = [n for n in numbers if n > number], [n for n in numbers if n <= number]
        for other in abandoned + done[: -self.keep]:
            self._file(other).unlink(missing_ok=True)
