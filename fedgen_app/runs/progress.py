"""A bar over the steps of a round, where a terminal is attached."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


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
