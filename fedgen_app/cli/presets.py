"""``fedgen presets``: the ready settings, one line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedgen_app.errors import SettingsError
from fedgen_app.settings import PACKAGE, Value, flatten_toml, read_toml

FOLDER = PACKAGE / "presets"


def names() -> list[str]:
    """The presets that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def load(preset: str) -> dict[str, Value]:
    """The settings of a preset, by name or from a TOML file.

    Raises:
        SettingsError: there is no such preset and no such file.
    """
    if preset in names():
        return flatten_toml(read_toml(FOLDER / f"{preset}.toml"))
    if not Path(preset).is_file():
        raise SettingsError(f"--preset {preset}: no such file, and no preset of that name ({', '.join(names())})")
    table: dict[str, Any] = read_toml(Path(preset))
    return flatten_toml(table)


def describe(name: str) -> str:
    """The comment on the first line of a preset."""
    return (FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def presets() -> None:
    """List the presets that come with the package."""
    width = max(len(name) for name in names())
    for name in names():
        print(f"{name:<{width}}  {describe(name)}")
