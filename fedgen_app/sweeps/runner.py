"""Carries a sweep out: what is missing is run or resumed, some at a time, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fedgen_app.engines.keeper import ended_with, last_lines
from fedgen_app.errors import RunError, SettingsError
from fedgen_app.files import to_json, write_atomic
from fedgen_app.runs.progress import Tail
from fedgen_app.settings import Value
from fedgen_app.sweeps import child
from fedgen_app.sweeps.plan import Run, Sweep
from fedgen_app.sweeps.spec import PREPARED, Step

TICK = 0.2  # seconds between two looks at the runs
NOT_COMPARED = ("output-dir", "resume-from", "resume-round")
KILLED = -9
MEMORY = 4 * 10**9  # bytes of one run: 1 to 2 GB with the bundled models, 3 to 4 with one of 135 million parameters

Show = Callable[[str, Mapping[str, Any]], None]


def folder_of(output: Path, run: Run) -> Path:
    """The run folder."""
    return output / "runs" / run.name


def log_of(output: Path, name: str) -> Path:
    """What a run or a preparation step printed."""
    return output / "logs" / f"{name}.log"


def status_of(folder: Path) -> str:
    """``status`` of results.json; "" where there is none yet, "damaged" where it cannot be read."""
    file = folder / "results.json"
    if not file.exists():
        return ""
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return "damaged"


def check_folders(sweep: Sweep, output: Path, defaults: Mapping[str, Value]) -> None:
    """Nobody may take runs with other settings for those of this sweep.

    Raises:
        SettingsError: names every setting in which a run that is there differs from the file, and every preparation
            step that has changed since.
    """
    mistakes = []
    made = recipes(sweep, output)
    for run in sweep.runs:
        file = folder_of(output, run) / "launch.json"
        if not file.exists():
            continue
        for name in {Path(str(run.settings[key])).name for key in run.prepared}:
            note = note_of(output, name)
            if note.exists() and json.loads(note.read_text(encoding="utf-8")) != made[name]:
                mistakes.append(f"{file.parent}: stands on another [prepare.{name}] than the file's")
        try:
            before = dict(defaults) | json.loads(file.read_text(encoding="utf-8"))["run_config"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsError(f"{file.parent}: not a run folder, or a damaged one: {error}") from None
        for key, value in run.settings.items():
            if key not in NOT_COMPARED and before[key] != value:
                mistakes.append(f"{file.parent}: {key} = {value!r}, but the run there has {before[key]!r}")
    if mistakes:
        raise SettingsError("\n".join([*mistakes, "name another --output, or delete these run folders"]))


def arguments_of(run: Run, folder: Path, engine: str, app_dir: Path, defaults: Mapping[str, Value]) -> list[str]:
    """The command line of ``fedgen`` that starts a run, or goes on with it."""
    if (folder / "launch.json").exists():
        return ["resume", str(folder)]
    changed = {key: value for key, value in run.settings.items() if key not in NOT_COMPARED and value != defaults[key]}
    sets = [f"--set={key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changed.items()]
    return ["run", str(app_dir), "--engine", engine, "--output", str(folder), *sets]


def prepare(sweep: Sweep, output: Path, threads: int, show: Show) -> None:
    """Carry out the preparation steps whose folder is not there yet, one after the other.

    Raises:
        RunError: a step failed; its last line is the reason.
    """
    for name, wanted in recipes(sweep, output).items():
        folder, note = output / "prepared" / name, note_of(output, name)
        if folder.is_dir() and note.exists() and json.loads(note.read_text(encoding="utf-8")) == wanted:
            continue
        note.unlink(missing_ok=True)
        show(name, {"event": "preparing"})
        log_file = log_of(output, f"prepare-{name}")
        process = child.start([child.PREPARE, str(folder), json.dumps(wanted["step"])], log_file, threads)
        try:
            while process.poll() is None:
                time.sleep(TICK)
        finally:
            child.interrupt([process])
        if process.returncode:
            raise RunError(f"preparation {name} failed: {reason_of(process.returncode, log_file)}")
        write_atomic(note, to_json(wanted))
        show(name, {"event": "prepared"})


def note_of(output: Path, name: str) -> Path:
    """Where it is written down how a prepared folder was made."""
    return output / "prepared" / f"{name}.json"


def recipes(sweep: Sweep, output: Path) -> dict[str, dict[str, Any]]:
    """How each prepared folder is made, with how those are made that it builds on: what is other is made anew."""
    made: dict[str, dict[str, Any]] = {}
    for name, step in sweep.steps.items():
        made[name] = {
            "step": _with_folders(step, output).model_dump(),
            "on": {other: made[other] for other in step.builds_on},
        }
    return made


def _with_folders(step: Step, output: Path) -> Step:
    """The step with ``prepared:NAME`` among its arguments as that folder: a step may build on an earlier one."""
    arguments = {
        key: str(output / "prepared" / value.removeprefix(PREPARED))
        if isinstance(value, str) and value.startswith(PREPARED)
        else value
        for key, value in step.arguments.items()
    }
    return step.model_copy(update={"arguments": arguments})


def reason_of(status: int, log_file: Path) -> str:
    """The last line that a process printed, or the signal that ended it."""
    if status == KILLED:
        return f"killed by the system, which may have run out of memory: fewer --jobs; {log_file}"
    said = last_lines(log_file.read_bytes(), 1).removeprefix("fedgen: ") if status >= 0 else ""
    return said or f"{ended_with(status)}; {log_file}"


@dataclass
class _Working:
    run: Run
    process: subprocess.Popen[bytes]
    tail: Tail


def carry_out(
    sweep: Sweep, output: Path, *, app_dir: Path, defaults: Mapping[str, Value], jobs: int, threads: int, show: Show
) -> dict[str, str]:
    """Run or resume what is not completed, ``jobs`` at a time.

    However this ends, no process is left, and what had begun can be resumed.

    Returns:
        The reason of each run that failed, by its name.
    """
    waiting = [run for run in sweep.runs if status_of(folder_of(output, run)) != "completed"]
    for run in sweep.runs:
        if run not in waiting:
            show(run.name, {"event": "there"})
    working: list[_Working] = []
    failed: dict[str, str] = {}
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                run = waiting.pop(0)
                folder = folder_of(output, run)
                arguments = arguments_of(run, folder, sweep.engine, app_dir, defaults)
                show(run.name, {"event": "resumed" if arguments[0] == "resume" else "started"})
                tail = Tail(folder / "events.jsonl")
                working.append(_Working(run, child.start(arguments, log_of(output, run.name), threads), tail))
            time.sleep(TICK)
            working = [one for one in working if not _ended(one, output, failed, show)]
    finally:
        child.interrupt([one.process for one in working])
    return failed


def _ended(one: _Working, output: Path, failed: dict[str, str], show: Show) -> bool:
    """Show what is new of a run; True where its process has ended."""
    status = one.process.poll()
    for event in one.tail:
        show(one.run.name, event)
    if status is None:
        return False
    child.interrupt([one.process])
    if status == 0:
        show(one.run.name, {"event": "completed"})
        return True
    failed[one.run.name] = reason_of(status, log_of(output, one.run.name))
    show(one.run.name, {"event": "failed", "reason": failed[one.run.name]})
    return True


def default_jobs(cores: int, runs: Sequence[Run]) -> int:
    """One run per core as far as the free memory goes; one alone where they would share a GPU."""
    if any(run.settings["device"] != "cpu" for run in runs):
        import torch

        if torch.cuda.is_available():
            return 1
    return max(1, min(cores, int(psutil.virtual_memory().available) // MEMORY))
