"""The tables of a sweep for programs: runs.csv and table.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from fedgen_app.files import write_atomic
from fedgen_app.sweeps.plan import Sweep, shown
from fedgen_app.sweeps.records import Record, Row, Spread
from fedgen_app.sweeps.spec import SEED


def write_runs(file: Path, sweep: Sweep, records: Sequence[Record]) -> None:
    """runs.csv: every run, whatever became of it."""
    names = list(dict.fromkeys(name for record in records for name in record.figures))
    head = [
        "run",
        "status",
        *sweep.axes,
        SEED,
        "final_source",
        "extractor",
        "target_reached",
        *names,
        "signs",
        "reason",
    ]
    lines = [
        [
            record.run.name,
            record.status,
            *(shown(record.run.point[axis]) for axis in sweep.axes),
            record.run.seed,
            record.source,
            record.basis,
            "" if record.reached is None else str(record.reached).lower(),
            *(record.figures.get(name, "") for name in names),
            " | ".join(record.signs),
            record.reason,
        ]
        for record in records
    ]
    _write_csv(file, head, lines)


def write_rows(file: Path, sweep: Sweep, rows: Sequence[Row]) -> None:
    """table.csv: one row per point; a mean and a standard deviation (n - 1) over the seeds of each figure.

    A figure of the server's test set and one of the clients' hold-outs never share a column. The rounds to the target
    have a mean only where every seed got there.
    """
    names = list(dict.fromkeys(name for row in rows for record in row.done for name in record.figures))
    names = [name for name in names if name != "rounds_to_target"]
    head = [*sweep.axes, "seeds", "missing", "final_source", "extractor"]
    head += [f"{name}_{part}" for name in names for part in ("mean", "sd", "n")]
    head += ["rounds_to_target_mean", "rounds_to_target_sd", "rounds_to_target", "signs"]
    lines = []
    for row in rows:
        line: list[object] = [shown(row.point[axis]) for axis in sweep.axes]
        line += [len(row.done), ", ".join(r.run.name for r in row.records if r.status != "completed")]
        line += [" and ".join(sorted({r.source for r in row.done})), " and ".join(sorted({r.basis for r in row.done}))]
        for name in names:
            line += _cells(row.spread(name))
        said, reached = row.target()
        line += [*_cells(reached)[:2], said or "reached by all", sum(bool(r.signs) for r in row.done)]
        lines.append(line)
    _write_csv(file, head, lines)


def _cells(spread: Spread | None) -> list[object]:
    if spread is None:
        return ["", "", 0]
    return [spread.mean, "" if spread.deviation is None else spread.deviation, spread.count]


def _write_csv(file: Path, head: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
    write_atomic(file, text.getvalue().encode())
