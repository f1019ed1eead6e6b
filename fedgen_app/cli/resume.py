"""``fedgen resume``: go on with a run from its newest checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedgen_app.cli.launch import Engine, Launch, execute, find_app, show_results
from fedgen_app.errors import CheckpointError, SettingsError
from fedgen_app.settings import Settings


def resume(
    run_dir: Annotated[Path, typer.Argument(help="The run folder.")],
    round_: Annotated[
        int, typer.Option("--round", min=0, help="Go back to the checkpoint of this round; 0: the newest.")
    ] = 0,
    engine: Annotated[Engine | None, typer.Option(help="How to simulate; default: as before.")] = None,
) -> None:
    """Go on with an interrupted run; a completed one needs no work."""
    folder = run_dir.resolve()
    launch = _launched(folder)
    if _status(folder) == "completed" and not round_:
        print("the run is complete")
        show_results(folder, Console())
        return
    if engine and launch.superlink:
        raise SettingsError(f"--engine {engine.value}: the run is on the SuperLink {launch.superlink}")
    run_config = launch.run_config | {
        "output-dir": str(folder),
        "resume-from": str(folder),
        "resume-round": round_,
    }
    Settings.from_run_config(run_config)
    execute(replace(launch, engine=(engine or Engine(launch.engine)).value, run_config=run_config), folder)


def _launched(folder: Path) -> Launch:
    """How the run was started; a run of `flwr run` left only its settings."""
    if not folder.is_dir():
        raise SettingsError(f"{folder}: no such run folder")
    try:
        if (folder / "launch.json").exists():
            return Launch(**json.loads((folder / "launch.json").read_text(encoding="utf-8")))
        run_config = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        clients = results.get("partition", {}).get("clients", 0)
        if not clients:
            raise SettingsError(
                f"{folder}: `flwr run` started it, on devices or before its clients were known; go on with: flwr run . "
                f"--run-config FILE, with this folder's settings and resume-from = {str(folder)!r} in FILE"
            )
        return Launch(str(find_app(None)), Engine.FLOWER.value, clients, "", run_config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SettingsError(f"{folder}: not a run folder, or a damaged one: {error}") from None


def _status(folder: Path) -> str:
    file = folder / "results.json"
    if not file.exists():
        return ""
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["status"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
