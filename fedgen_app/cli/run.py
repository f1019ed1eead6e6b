"""``fedgen run``: check everything, then run the federation to its end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fedgen_app.cli import presets
from fedgen_app.cli.launch import Engine, Launch, execute, find_app
from fedgen_app.errors import SettingsError
from fedgen_app.settings import Settings, Value, absolute, check, defaults

DEFAULT_CLIENTS = 10


def run(
    app_dir: Annotated[Path | None, typer.Argument(help="Folder of the Flower app; default: this one.")] = None,
    preset: Annotated[str, typer.Option(help="A preset's name (see `fedgen presets`) or a TOML file.")] = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting; may be repeated.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run folder; default: runs/<time>-<task>-<method>.")] = None,
    clients: Annotated[int | None, typer.Option(min=1, help="Number of simulated clients.")] = None,
    engine: Annotated[Engine, typer.Option(help="How to simulate.")] = Engine.FLOWER,
    superlink: Annotated[str, typer.Option(help="Submit to this connection of Flower's config.toml instead.")] = "",
) -> None:
    """Run a federation: exit status 0 if and only if it completed."""
    found = find_app(app_dir)
    config = defaults(found) | (presets.load(preset) if preset else {}) | dict(map(assignment, set_ or []))
    if output is not None:
        config["output-dir"] = str(output)
    settings = check(absolute(config))
    if settings.resume_from:
        raise SettingsError(f"resume-from = {settings.resume_from!r}: to go on with a run: fedgen resume RUN_DIR")
    if superlink and engine is not Engine.FLOWER:
        raise SettingsError(f"--engine {engine.value}: --superlink {superlink} runs under Flower")
    if superlink and clients:
        raise SettingsError(f"--clients {clients}: --superlink {superlink} has the clients that it has")
    if (
        clients
        and settings.expected_clients not in (0, clients)
        and any(text.startswith("expected-clients=") for text in set_ or [])
    ):
        raise SettingsError(f"--clients {clients}: --set expected-clients={settings.expected_clients} says otherwise")
    number = 0 if superlink else clients or settings.expected_clients or DEFAULT_CLIENTS
    folder = Path(settings.output_dir) if settings.output_dir else _default_folder(settings)
    if (folder / "launch.json").exists() or (folder / "settings.json").exists():
        raise SettingsError(
            f"--output {folder}: holds a run already; to go on with it: fedgen resume {folder}; else name another"
        )
    _check_method(settings, number)
    run_config = settings.flat() | {"output-dir": str(folder)}
    if not superlink:
        run_config["expected-clients"] = number
    execute(Launch(str(found), engine.value, number, superlink, run_config), folder)


def _check_method(settings: Settings, clients: int) -> None:
    """What only the method and the number of clients (0: unknown) can tell: after all else, as it loads torch."""
    from fedgen_app.federation.compatibility import check_method
    from fedgen_app.federation.robust import objection
    from fedgen_app.federation.roster import chosen_count

    check_method(settings)
    if clients and (reason := objection(settings.aggregation, chosen_count(clients, settings.fraction_train))):
        raise SettingsError(reason)


def _default_folder(settings: Settings) -> Path:
    """``runs/<time>-<task>-<method>`` in the current folder; a number behind it where that is taken already."""
    first = Path.cwd() / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{settings.task}-{settings.method}"
    folder, number = first, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = first.with_name(f"{first.name}-{number}")
        except OSError as error:
            raise SettingsError(f"{folder}: cannot be made: {error.strerror}") from None


def assignment(text: str) -> tuple[str, Value]:
    """Key and value of one ``--set``.

    Raises:
        SettingsError: it is not KEY=VALUE.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SettingsError(f"--set {text}: should be KEY=VALUE")
    return key.strip(), value
