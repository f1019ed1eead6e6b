"""What a sweep shows while it works: one line per run that has ended, and on a terminal a bar for each that works."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fedgen_app.runs import report


class Board:
    """One line per run that has ended; a bar for each that works."""

    def __init__(self, console: Console, runs: int) -> None:
        self.console = console
        self.runs = runs
        self.ended = 0
        columns = (TextColumn("  {task.description}"), BarColumn(20), TextColumn("{task.fields[said]}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
        self._bars: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}
        if console.is_terminal:
            self._progress.start()

    def close(self) -> None:
        """Take the bars away."""
        if self.console.is_terminal:
            self._progress.stop()

    def show(self, name: str, event: Mapping[str, Any]) -> None:
        """One event of a run, or of the sweep about it."""
        kind = event["event"]
        if kind in ("started", "resumed", "preparing"):
            self._began[name] = time.monotonic()
            self._bars[name] = self._progress.add_task(name, total=None, said=kind)
        elif kind == "start":
            self._progress.update(self._bars[name], total=event["rounds"], completed=event["done"])
        elif kind == "round":
            self._progress.update(self._bars[name], completed=event["round"])
            self._said(name, event["metrics"])
        elif kind == "frozen":
            self._said(name, event["metrics"])
        elif kind == "prepared":
            self._line(name, f"prepared in {self._seconds(name)}")
        elif kind == "there":
            self.ended += 1
            self._line(name, "complete already")
        elif kind == "completed":
            self.ended += 1
            self._line(name, f"completed in {self._seconds(name)}")
        elif kind == "failed":
            self.ended += 1
            self._line(name, f"FAILED: {event['reason']}")

    def _said(self, name: str, metrics: Mapping[str, Any] | None) -> None:
        if metrics:
            best = report.headline(metrics)
            self._progress.update(
                self._bars[name], said=f"{best.replace('_', ' ')} {report.number(metrics[best])}", refresh=False
            )

    def _seconds(self, name: str) -> str:
        return f"{time.monotonic() - self._began[name]:.0f} s"

    def _line(self, name: str, text: str) -> None:
        if name in self._bars:
            self._progress.remove_task(self._bars.pop(name))
        place = f"[{self.ended}/{self.runs}] " if not text.startswith("prepared") else ""
        self.console.print(f"{place}{name}: {text}", markup=False, highlight=False, soft_wrap=True)
