"""What ``run`` and ``resume`` share: start an engine, show what happens, end with the truth."""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

import fedgen_app
from fedgen_app.errors import FedgenError, LockedError, RunError, SettingsError
from fedgen_app.files import to_json, write_atomic
from fedgen_app.runs import report
from fedgen_app.runs.progress import Tail
from fedgen_app.settings import Value, read_toml

COMPLETED = "finished:completed"


class Engine(StrEnum):
    """How a simulation runs."""

    FLOWER = "flower"
    IN_PROCESS = "in-process"


@dataclass(frozen=True)
class Launch:
    """How a run was started; kept as launch.json so that ``resume`` does the same."""

    app_dir: str
    engine: str
    clients: int
    superlink: str
    run_config: dict[str, Value]


def find_app(app_dir: Path | None) -> Path:
    """The folder of the Flower app: the given one, the current one, or the checkout that this package runs from.

    Raises:
        SettingsError: none of them is one.
    """
    checkout = Path(fedgen_app.__file__).parents[1]
    for folder in [app_dir] if app_dir else [Path.cwd(), checkout]:
        file = folder / "pyproject.toml"
        if file.is_file() and "flwr" in read_toml(file).get("tool", {}):
            return folder.resolve()
    raise SettingsError(
        f"{app_dir or Path.cwd()}: no Flower app here (a folder with server_app.py, client_app.py and pyproject.toml)"
    )


class Display:
    """Events of a run as lines, and where a terminal is attached the replies of a round as a status."""

    def __init__(self, console: Console, live: bool) -> None:
        self.console = console
        self.status = console.status("starting") if live and console.is_terminal else None
        if self.status:
            self.status.start()

    def show(self, event: Mapping[str, Any]) -> None:
        """One event."""
        if self.status and event["event"] == "reply":
            self.status.update(f"{event['what']}: {event['done']} of {event['of']} clients have answered")
        if text := report.line(event):
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the status line away."""
        if self.status:
            self.status.stop()


def terminated(number: int, frame: object) -> None:
    """SIGTERM ends a run as Ctrl-C does."""
    raise KeyboardInterrupt


def _take(folder: Path, launch: Launch) -> None:
    """Make the run folder and note in it how it was started, unless a run is writing there.

    Raises:
        SettingsError: the folder cannot be written.
        LockedError: another process is at it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            write_atomic(folder / "launch.json", to_json(asdict(launch)))
    except Timeout:
        raise LockedError(f"{folder}: another run is writing into this folder") from None
    except OSError as error:
        raise SettingsError(f"{folder}: cannot be written: {error.strerror}") from None


def execute(launch: Launch, folder: Path) -> None:
    """Run to the end, show the table.

    Raises:
        FedgenError: the run failed; its text is the reason.
        KeyboardInterrupt: it was interrupted, by Ctrl-C or SIGTERM.
    """
    signal.signal(signal.SIGTERM, terminated)
    _take(folder, launch)
    console = Console()
    display = Display(console, live=launch.engine == Engine.FLOWER or bool(launch.superlink))
    try:
        if launch.superlink or launch.engine == Engine.FLOWER:
            _with_flower(launch, folder, display)
        else:
            _in_process(launch, display)
    except KeyboardInterrupt:
        _settle(folder, "interrupted", "interrupted")
        print(f"to go on: fedgen resume {folder}", file=sys.stderr)
        raise
    except LockedError:
        raise
    except FedgenError as error:
        raise type(error)(_settle(folder, "failed", str(error))) from error
    except Exception as error:  # whatever breaks the run: its traceback, then the reason as the last line
        traceback.print_exc()
        raise RunError(_settle(folder, "failed", f"{type(error).__name__}: {error}")) from error
    finally:
        display.close()
    show_results(folder, console)


def _with_flower(launch: Launch, folder: Path, display: Display) -> None:
    from fedgen_app.engines import flower

    tail = Tail(folder / "events.jsonl")
    reason = ""

    def tick() -> None:
        nonlocal reason
        for event in tail:
            display.show(event)
            reason = event["reason"] if event["event"] == "end" else reason

    app_dir, log_file = Path(launch.app_dir), folder / "flower.log"
    if launch.superlink:
        status = flower.submit(app_dir, launch.run_config, superlink=launch.superlink, log_file=log_file, tick=tick)
    else:
        gpus = _gpus_per_client(launch)
        status = flower.simulate(
            app_dir,
            launch.run_config,
            clients=launch.clients,
            log_file=log_file,
            gpus_per_client=gpus,
            tick=tick,
        )
    tick()
    if status != COMPLETED:
        raise RunError(f"{reason or f'the run ended as {status}'}; what every process said: {log_file}")


def _gpus_per_client(launch: Launch) -> float:
    """All clients that run at the same time share one GPU, where the settings do not forbid it."""
    if launch.run_config["device"] == "cpu":
        return 0.0
    import torch

    return 0.25 if torch.cuda.is_available() else 0.0


def _in_process(launch: Launch, display: Display) -> None:
    import logging

    from fedgen_app.engines import in_process
    from fedgen_app.federation import session

    logging.getLogger("flwr").setLevel(logging.WARNING)
    session.listeners.append(display.show)
    try:
        in_process.run(Path(launch.app_dir), launch.run_config, launch.clients)
    finally:
        session.listeners.remove(display.show)


def _settle(folder: Path, status: str, reason: str) -> str:
    """Correct a results.json that a killed ServerApp left at "running"; the reason, with how to go on."""
    file = folder / "results.json"
    if file.exists():
        results = json.loads(file.read_text(encoding="utf-8"))
        if results["status"] == "running":
            write_atomic(file, to_json(results | {"status": status, "reason": reason}))
    if (folder / "checkpoints").is_dir() and "fedgen resume" not in reason:
        return f"{reason}; to go on: fedgen resume {folder}"
    return reason


def show_results(folder: Path, console: Console) -> None:
    """The short table at the end of a run."""
    if not (folder / "results.json").exists():  # the ServerApp ran on another machine
        console.print(f"completed; the run folder lies on the server, as {folder}", highlight=False, soft_wrap=True)
        return
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    final = results["final"]
    metrics, rows = report.table(results)
    names = [name.replace("_", " ") for name in metrics]
    table = Table(title=f"{results['task']}, {results['method']}: {' and '.join(dict.fromkeys(filter(None, names)))}")
    places = ["server's test set", "clients' own hold-out"]
    if len(set(filter(None, names))) > 1:  # two metrics: each column says which
        places = [f"{place}: {name}" for place, name in zip(places, names, strict=True)]
    for column in ("adapter", *places):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if basis := report.basis(final["metrics"] or {}):
        console.print(f"{names[0]}{basis}", highlight=False, soft_wrap=True)
    uplink = final["uplink_bytes_per_client_round"]
    if uplink is not None:
        console.print(
            f"uplink per client and round: {report.size(uplink)}; the full model would be "
            f"{report.size(final['full_model_bytes'])} ({final['uplink_reduction']:.2%} less)",
            highlight=False,
            soft_wrap=True,
        )
    for sign in results.get("signs", []):
        console.print(f"note: {sign}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"adapter: {folder / 'global'}", highlight=False, soft_wrap=True)
