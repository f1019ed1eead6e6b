"""``fedgen audit-prompts``: how many prompts a server would read out of encoded requirements, with each protection."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgen_app.cli import presets
from fedgen_app.cli.launch import find_app
from fedgen_app.cli.run import assignment
from fedgen_app.errors import SettingsError
from fedgen_app.settings import Settings, absolute, check, defaults

if TYPE_CHECKING:
    from fedgen_app.federation.leakage import Recovery


def audit_prompts(
    candidates: Annotated[Path, typer.Argument(help="What an attacker would try: two prompts or more, one per line.")],
    prompts: Annotated[Path | None, typer.Option(help="What devices asked for; default: the candidates.")] = None,
    preset: Annotated[str, typer.Option(help="A preset's name or a TOML file: its backbone and encoder.")] = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting; may be repeated.")
    ] = None,
    noise: Annotated[
        str, typer.Option(help="Standard deviations of the noise to try, and clusters.noise where it is set.")
    ] = "0.05,0.1,0.2,0.5",
    known: Annotated[
        int, typer.Option(min=0, help="Prompts that the attacker got hold of; 0: half, if it needs so many.")
    ] = 0,
    output: Annotated[Path | None, typer.Option(help="Also write the figures as JSON into this file.")] = None,
) -> None:
    """Measure what encoded prompts leak, by looking for the nearest candidate."""
    config = defaults(find_app(None)) | (presets.load(preset) if preset else {}) | dict(map(assignment, set_ or []))
    settings = check(absolute(config))
    tried, twice = _lines(candidates)
    asked, again = _lines(prompts) if prompts else (tried, 0)
    if len(tried) < 2:
        raise SettingsError(f"{candidates}: should hold two prompts or more, one per line")
    places = {text: place for place, text in enumerate(tried)}
    missing = [text for text in asked if text not in places]
    if missing:
        raise SettingsError(f"{prompts}: {len(missing)} prompts are no candidates; an attacker could not name them")
    try:
        sigmas = [float(text) for text in noise.split(",") if text.strip()]
    except ValueError:
        raise SettingsError(f"--noise {noise}: should be numbers with commas between them") from None
    if any(not 0 < sigma < float("inf") for sigma in sigmas):
        raise SettingsError(f"--noise {noise}: should be above 0")
    if settings.clusters.noise and settings.clusters.noise not in sigmas:
        sigmas.append(settings.clusters.noise)
    if known > len(tried) // 2:
        raise SettingsError(f"--known {known}: should be at most half of the {len(tried)} candidates")
    if output is not None and (output.is_dir() or not os.access(output if output.exists() else output.parent, os.W_OK)):
        raise SettingsError(f"--output {output}: is no file that can be written")
    found = _measure(settings, tried, [places[text] for text in asked], sigmas, known)
    _show(found, len(tried), len(asked))
    for file, count in ((candidates, twice), (prompts, again)):
        if count:
            typer.echo(f"{file}: lines that repeat another one: {count}; a prompt counts once")
    if output is not None:
        try:
            output.write_text(json.dumps([row.as_json() for row in found], indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise SettingsError(f"--output {output}: {error.strerror}") from None


def _measure(settings: Settings, tried: list[str], truth: list[int], sigmas: list[float], known: int) -> list[Recovery]:
    from fedgen_app.federation.leakage import recoveries
    from fedgen_app.federation.protection import read_key
    from fedgen_app.learning.backbone import load_task, open_backbone
    from fedgen_app.learning.encoder import encode

    key = read_key(Path(settings.clusters.key)) if settings.clusters.key else b""
    task, backbone = load_task(settings.task), open_backbone(settings)
    vectors = encode(settings, task, backbone, tried)
    return recoveries(vectors, truth, sigmas, settings, known, key)


def _lines(file: Path) -> tuple[list[str], int]:
    """The prompts of a file, each once, and how many lines repeat one."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: {error}") from None
    given = [line for line in lines if line]
    if not given:
        raise SettingsError(f"{file}: no prompt in it")
    found = list(dict.fromkeys(given))
    return found, len(given) - len(found)


def _show(found: list[Recovery], candidates: int, prompts: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from fedgen_app.federation.cosines import MOST_CANDIDATES, MOST_DEVICES

    counted = "1 prompt" if prompts == 1 else f"{prompts} prompts, each"
    table = Table(title=f"{counted} sought among {candidates} candidates")
    for column in ("protection", "what the attacker has", "epsilon", "first guess", "among five"):
        table.add_column(column, justify="left" if column in ("protection", "what the attacker has") else "right")
    for row in found:
        table.add_row(*row.as_text())
    table.add_row("(chance)", "", "", f"{1 / candidates:.1%}", f"{min(1, 5 / candidates):.1%}")
    console = Console()
    console.print(table)
    if candidates > MOST_CANDIDATES:
        console.print(f"more than {MOST_CANDIDATES} candidates: what the cosines among devices tell was not tried")
    elif prompts == 1:
        console.print("one prompt: there are no cosines among devices, so that what they tell was not tried")
    elif prompts > MOST_DEVICES:
        console.print(f"by the cosines among devices the first {MOST_DEVICES} prompts were sought")
