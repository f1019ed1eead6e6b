"""How far a run is: its events as another process writes them, and a bar over the steps of a round."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def step_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with (steps done, steps in all); it draws nothing where nobody watches."""
    if not sys.stderr.isatty():
        yield lambda done, of: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(title, total=None)

        def update(done: int, of: int) -> None:
            progress.update(bar, completed=done, total=of)

        yield update


class Tail:
    """New events of an events.jsonl that another process writes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.position = file.stat().st_size if file.exists() else 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.file.exists():
            return
        with self.file.open("rb") as stream:
            stream.seek(self.position)
            for line in stream:
                if not line.endswith(b"\n"):  # still being written
                    return
                self.position += len(line)
                yield json.loads(line)
