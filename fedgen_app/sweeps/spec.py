"""A sweep file: a preset, fixed settings and lists of values; read, typed, and checked against itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from fedgen_app.errors import SettingsError
from fedgen_app.runs.report import HEADLINES
from fedgen_app.settings import KEYS, Value, flatten_toml

SEED = "seed"
TRAIN_LOSS = "train_loss"
VARIANT = "variant"
PREPARED = "prepared:"
MANAGED = ("output-dir", "resume-from", "resume-round")  # the sweep itself sets these
FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")

Values = Annotated[list[Value], Field(min_length=1)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Target(_Table):
    """``target``: how good is good enough; the table says after how many rounds each row got there.

    A metric is that of the server's test set; ``train_loss`` is the clients' own, each from its own cluster's adapter.
    """

    metric: Literal[(*HEADLINES, TRAIN_LOSS)]  # type: ignore[valid-type]
    value: float


class Step(_Table):
    """``prepare.NAME``: a function ``module:name`` or a script that makes the folder behind ``prepared:NAME``."""

    call: Annotated[str, Field(pattern=r"^([\w.]+:\w+)?$")] = ""
    script: str = ""
    arguments: dict[str, Any] = {}

    @property
    def builds_on(self) -> list[str]:
        """The steps whose folders are among its arguments."""
        texts = [value for value in self.arguments.values() if isinstance(value, str)]
        return [text.removeprefix(PREPARED) for text in texts if text.startswith(PREPARED)]

    @model_validator(mode="after")
    def _one_of_both(self) -> Step:
        if bool(self.call) == bool(self.script):
            raise PydanticCustomError("step", "should have either call or script")
        return self


class SweepFile(_Table):
    """The file as it is written, nested tables of settings flattened."""

    title: str = ""
    about: str = ""
    preset: str = ""
    engine: Literal["in-process", "flower"] = "in-process"
    clients: Annotated[int, Field(ge=1)] | None = None
    rows: list[str] = []
    set: dict[str, Value] = {}
    grid: dict[str, Values] = {}
    variants: dict[str, dict[str, Value]] = {}
    exclude: list[dict[str, Value]] = []
    target: Target | None = None
    prepare: dict[str, Step] = {}


def parse(tree: Mapping[str, Any], source: str) -> SweepFile:
    """A sweep file's tables, typed.

    Raises:
        SettingsError: names every mistake with its key and value.
    """
    mistakes: list[str] = []
    flat = dict(tree)
    for key, flatten in (("set", _flat), ("grid", _flat_lists)):
        if isinstance(tree.get(key), Mapping):
            flat[key] = flatten(tree[key], key, mistakes)
    if isinstance(tree.get("variants"), Mapping):
        flat["variants"] = {
            label: _flat(table, f"variants.{label}", mistakes) if isinstance(table, Mapping) else table
            for label, table in tree["variants"].items()
        }
    if isinstance(tree.get("exclude"), list):
        flat["exclude"] = [
            _flat(table, "exclude", mistakes) if isinstance(table, Mapping) else table for table in tree["exclude"]
        ]
    try:
        file = SweepFile.model_validate(flat)
    except ValidationError as error:
        mistakes += [_explain(e["loc"], e["input"], e["msg"]) for e in error.errors()]
    if not mistakes:
        mistakes += _contradictions(file)
    if mistakes:
        raise SettingsError("\n".join(f"{source}: {line}" for line in dict.fromkeys(mistakes)))
    return file


def _flat(tree: Mapping[str, Any], place: str, mistakes: list[str]) -> dict[str, Value]:
    try:
        return flatten_toml(tree)
    except SettingsError as error:
        mistakes.append(f"{place}.{error}")
        return {}


def _flat_lists(tree: Mapping[str, Any], place: str, mistakes: list[str], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flat_lists(value, place, mistakes, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {prefix + key: value}
        )
    return flat


def _explain(location: tuple[int | str, ...], value: object, message: str) -> str:
    key = ".".join(str(part) for part in location if part not in ("bool", "int", "float", "str"))
    if message == "Extra inputs are not permitted":
        return f"{key} = {value!r}: a sweep file has no such key ({', '.join(SweepFile.model_fields)})"
    return f"{key} = {value!r}: {message.replace('Input should', 'should')}"


def _contradictions(file: SweepFile) -> Iterator[str]:
    """What is well-formed and still cannot be meant."""
    variants = {f"variants.{label}": table for label, table in file.variants.items()}
    tables: dict[str, Mapping[str, Any]] = {"set": file.set, "grid": file.grid, **variants}
    for place, table in tables.items():
        for key, value in table.items():
            if key == "preset" and place.startswith("variants."):
                continue
            if key in MANAGED:
                yield f"{place}.{key} = {value!r}: the sweep sets it itself"
            elif key not in KEYS:
                yield f"{place}.{key} = {value!r}: no such setting"
            elif key in file.grid and place != "grid":
                yield f"{place}.{key} = {value!r}: grid.{key} = {file.grid[key]!r} says otherwise"
            elif key == SEED and place != "grid":
                yield f"{place}.{key} = {value!r}: seeds stand in grid.seed, one or several"
    for key, values in file.grid.items():
        if repeated := [value for value, count in Counter(map(repr, values)).items() if count > 1]:
            yield f"grid.{key} = {values!r}: {', '.join(repeated)} stands there twice"
    for name in file.prepare:
        if not FOLDER_NAME.fullmatch(name):
            yield f"prepare.{name}: should be fit for a folder's name"
    axes = [VARIANT] * bool(file.variants) + [key for key in file.grid if key != SEED]
    for row in file.rows:
        if row not in axes:
            yield f"rows = {row!r}: should be an axis of this sweep other than the seed ({', '.join(axes) or 'none'})"
    for entry in file.exclude:
        for key, value in entry.items():
            allowed = list(file.variants) if key == VARIANT else file.grid.get(key, [])
            if value not in allowed:
                yield f"exclude.{key} = {value!r}: no run of this sweep has it"
