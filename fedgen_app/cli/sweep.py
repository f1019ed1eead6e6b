"""``fedgen sweep``: many runs from one file, and a table of what they reached."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from filelock import FileLock, Timeout
from rich.console import Console

from fedgen_app.cli import presets
from fedgen_app.cli.launch import find_app, terminated
from fedgen_app.errors import LockedError, RunError, SettingsError
from fedgen_app.files import to_json, write_atomic
from fedgen_app.settings import defaults, read_toml
from fedgen_app.sweeps import plan, records, runner, spec
from fedgen_app.sweeps.board import Board

JobsOption = Annotated[int | None, typer.Option(min=1, help="Runs at a time; default: one per core, one on a GPU.")]


def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep file, TOML; see docs/sweeps.md.")],
    output: Annotated[Path | None, typer.Option(help="The sweep's folder; default: runs/<file's name>.")] = None,
    jobs: JobsOption = None,
) -> None:
    """Carry out every run of a sweep file that is not complete yet, then write its tables and plots."""
    carry_out(read_toml(file), file, output or Path("runs") / file.stem, jobs)


def carry_out(tree: Mapping[str, Any], source: Path, output: Path, jobs: int | None) -> None:
    """Plan, run, tabulate.

    Raises:
        SettingsError: a mistake in the file; nothing was started.
        RunError: runs failed; the tables are written and name them.
        KeyboardInterrupt: interrupted; the same command goes on.
    """
    app_dir, folder = find_app(None), output.resolve()
    standard = defaults(app_dir)
    planned = plan.expand(
        spec.parse(tree, source.name), source=source, output=folder, defaults=standard, load_preset=presets.load
    )
    runner.check_folders(planned, folder, standard)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_once = min(jobs or runner.default_jobs(cores, planned.runs), len(planned.runs))
    threads = max(1, cores // at_once)
    signal.signal(signal.SIGTERM, terminated)
    console = Console()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            write_atomic(folder / "sweep.json", to_json({"command": _command(), "file": dict(tree)}))
            failed = _run(planned, folder, app_dir, at_once, threads, console)
            _tabulate(planned, folder, failed, at_once, threads, console)
    except Timeout:
        raise LockedError(f"{folder}: another sweep is at work in this folder") from None
    except OSError as error:
        raise SettingsError(f"{folder}: cannot be written: {error.strerror}") from None
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        raise
    if failed:
        raise RunError(f"{len(failed)} of {len(planned.runs)} runs failed: {', '.join(failed)}")


def _command() -> str:
    return shlex.join(["fedgen", *sys.argv[1:]])


def _run(planned: plan.Sweep, folder: Path, app_dir: Path, jobs: int, threads: int, console: Console) -> dict[str, str]:
    board = Board(console, len(planned.runs))
    try:
        runner.prepare(planned, folder, max(1, jobs * threads), board.show)
        return runner.carry_out(
            planned,
            folder,
            app_dir=app_dir,
            defaults=defaults(app_dir),
            jobs=jobs,
            threads=threads,
            show=board.show,
        )
    finally:
        board.close()


def _tabulate(
    planned: plan.Sweep, folder: Path, failed: Mapping[str, str], jobs: int, threads: int, console: Console
) -> None:
    from fedgen_app.sweeps import markdown, plots, tables

    found = records.collect(planned, folder, failed)
    rows = records.rows_of(found)
    tables.write_runs(folder / "runs.csv", planned, found)
    tables.write_rows(folder / "table.csv", planned, rows)
    drawn = plots.draw(planned, rows, folder)
    markdown.write(folder / "table.md", planned, rows, command=_command(), plots=drawn, jobs=jobs, threads=threads)
    console.print(f"table: {folder / 'table.md'}", markup=False, highlight=False, soft_wrap=True)
