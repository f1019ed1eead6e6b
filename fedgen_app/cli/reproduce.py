"""``fedgen reproduce``: the studies of the papers, each a sweep that is ready, in three sizes."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fedgen_app.cli import sweep
from fedgen_app.errors import SettingsError
from fedgen_app.settings import PACKAGE, read_toml

FOLDER = PACKAGE / "studies"


class Scale(StrEnum):
    """How much of a study."""

    SMOKE = "smoke"
    SMALL = "small"
    FULL = "full"


def names() -> list[str]:
    """The studies that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def load(name: str, scale: Scale) -> dict[str, Any]:
    """A study at one scale, as the tables of a sweep file: what the scale says wins over what all share.

    Raises:
        SettingsError: there is no such study.
    """
    if name not in names():
        raise SettingsError(f"{name}: no such study ({', '.join(names())})")
    tree = read_toml(FOLDER / f"{name}.toml")
    scales = tree.pop("scales")
    merged = _merged(tree, scales[scale.value])
    return merged | {"title": f"{tree['title']}, scale {scale.value}"}


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Tables merge key by key; anything else is replaced."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else value
    return result


def reproduce(
    name: Annotated[str, typer.Argument(help="A study; --list shows them.")] = "",
    scale: Annotated[Scale, typer.Option(help="smoke: minutes; small: about an hour on two cores; full: a GPU.")] = (
        Scale.SMALL
    ),
    output: Annotated[Path | None, typer.Option(help="Its folder; default: runs/<name>-<scale>.")] = None,
    jobs: sweep.JobsOption = None,
    list_: Annotated[bool, typer.Option("--list", help="List the studies, one line each.")] = False,
) -> None:
    """Carry out a study of the papers, or go on with it."""
    if list_:
        width = max(map(len, names()))
        for study in names():
            print(f"{study:<{width}}  {read_toml(FOLDER / f'{study}.toml')['about']}")
        return
    if not name:
        raise SettingsError(f"which study? {', '.join(names())}; --list says what each is about")
    tree = load(name, scale)
    sweep.carry_out(tree, FOLDER / f"{name}.toml", output or Path("runs") / f"{name}-{scale.value}", jobs)
