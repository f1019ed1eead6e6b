"""What a sweep file becomes: runs with names, each with all its settings, checked before anything starts."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedgen_app.errors import SettingsError
from fedgen_app.settings import Settings, Value, absolute, check
from fedgen_app.sweeps.spec import MANAGED, PREPARED, SEED, VARIANT, Step, SweepFile, Target

LONGEST_NAME = 120  # characters; file systems allow 255 bytes

LoadPreset = Callable[[str], dict[str, Value]]


@dataclass(frozen=True)
class Run:
    """One run: its folder's name, its place on every axis but the seed, and all its settings."""

    name: str
    point: dict[str, Value]
    seed: int
    settings: dict[str, Value]
    prepared: tuple[str, ...] = ()  # settings that name what a preparation step makes


@dataclass(frozen=True)
class Sweep:
    """What a sweep file becomes.

    Attributes:
        axes: The values on every axis but the seed, in the file's order.
        rows: The axes that make the rows of a table; each combination of the others gets a table of its own.
        steps: Preparation steps by the name of the folder that they make, those that some run needs, in an order in
            which they can be carried out.
        named: Settings that the file itself gives, beside its preset and the axes.
    """

    title: str
    engine: str
    axes: dict[str, tuple[Value, ...]]
    rows: tuple[str, ...]
    runs: tuple[Run, ...]
    target: Target | None = None
    steps: dict[str, Step] = field(default_factory=dict)
    named: tuple[str, ...] = ()


def shown(value: Value) -> str:
    """A value as names and tables show it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value).removeprefix(PREPARED)


def expand(
    file: SweepFile,
    *,
    source: Path,
    output: Path,
    defaults: Mapping[str, Value],
    load_preset: LoadPreset,
    here: bool = True,
) -> Sweep:
    """Every run of a sweep, checked as ``fedgen run`` would check it.

    Args:
        source: The file; presets that are files, and scripts, are looked for beside it.
        output: The sweep's folder; ``prepared:NAME`` becomes a folder in it.
        here: Whether paths must exist on this machine.

    Raises:
        SettingsError: names every mistake of every run.
    """
    axes = _axes(file)
    seeds = file.grid.get(SEED, [defaults[SEED]])
    mistakes: dict[str, str] = {}
    runs, used = [], set()
    for values in itertools.product(*axes.values(), seeds):
        point, seed = dict(zip(axes, values, strict=False)), values[-1]
        place = point | {SEED: seed}
        if any(all(place.get(key) == value for key, value in entry.items()) for entry in file.exclude):
            continue
        name = _name(point, seed)
        try:
            wanted = dict(defaults) | _overrides(file, point, source, load_preset) | {SEED: seed}
            settings, needed = _resolved(wanted, file, output, here)
            used |= {wanted[key] for key in needed}
            runs.append(Run(name, point, int(seed), settings, needed))
        except SettingsError as error:
            for line in str(error).splitlines():
                mistakes.setdefault(line, name)
    if not runs and not mistakes:
        mistakes["exclude leaves no run"] = "all"
    if mistakes:
        raise SettingsError("\n".join(f"{source}: {line} (in run {name})" for line, name in mistakes.items()))
    steps = {
        name: step if not step.script else step.model_copy(update={"script": str(source.parent / step.script)})
        for name, step in _needed(file, used).items()
    }
    rows = tuple(file.rows or axes)
    given = (*file.set, *(key for variant in file.variants.values() for key in variant if key != "preset"))
    named = tuple(dict.fromkeys(key for key in given if key not in axes))
    return Sweep(file.title or source.stem, file.engine, axes, rows, _unique(runs), file.target, steps, named)


def _needed(file: SweepFile, used: Collection[Value]) -> dict[str, Step]:
    """The steps that runs name, each behind those that its own arguments name.

    Raises:
        SettingsError: a step builds on one that is not there, or in the end on itself.
    """
    needed: dict[str, Step] = {}

    def add(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise SettingsError(f"[prepare.{name}] builds on itself: {' <- '.join((*above, name))}")
        if name not in file.prepare:
            raise SettingsError(f"[prepare.{above[-1]}] builds on {PREPARED}{name}: there is no [prepare.{name}]")
        for other in file.prepare[name].builds_on:
            add(other, (*above, name))
        needed[name] = file.prepare[name]

    for name in file.prepare:
        if f"{PREPARED}{name}" in used:
            add(name, ())
    return needed


def _axes(file: SweepFile) -> dict[str, tuple[Value, ...]]:
    axes: dict[str, tuple[Value, ...]] = {VARIANT: tuple(file.variants)} if file.variants else {}
    return axes | {key: tuple(values) for key, values in file.grid.items() if key != SEED}


def _overrides(file: SweepFile, point: Mapping[str, Value], source: Path, load_preset: LoadPreset) -> dict[str, Value]:
    """What differs from the defaults: preset, the variant's preset, ``set``, the variant, the grid; the later wins."""
    variant = dict(file.variants.get(str(point.get(VARIANT)), {}))
    presets = [name for name in (file.preset, str(variant.pop("preset", ""))) if name]
    merged: dict[str, Value] = {}
    for name in presets:
        beside = source.parent / name
        loaded = load_preset(str(beside) if beside.is_file() else name)
        if SEED in loaded:
            raise SettingsError(
                f"preset {name!r} has {SEED} = {loaded[SEED]!r}: a sweep's seeds are those of grid.seed"
            )
        merged |= loaded
    if file.clients:
        merged["expected-clients"] = file.clients
    return merged | file.set | variant | {key: value for key, value in point.items() if key != VARIANT}


def _resolved(
    wanted: Mapping[str, Value], file: SweepFile, output: Path, here: bool
) -> tuple[dict[str, Value], tuple[str, ...]]:
    """All settings as ``fedgen run`` takes them, and the keys whose folder a preparation step makes."""
    needed = tuple(key for key, value in wanted.items() if isinstance(value, str) and value.startswith(PREPARED))
    unknown = [key for key in needed if str(wanted[key]).removeprefix(PREPARED) not in file.prepare]
    if unknown:
        raise SettingsError(
            "\n".join(
                f"{key} = {wanted[key]!r}: there is no [prepare.{str(wanted[key]).removeprefix(PREPARED)}]"
                for key in unknown
            )
        )
    folders = {key: str(output / "prepared" / str(wanted[key]).removeprefix(PREPARED)) for key in needed}
    plain = dict(wanted) | {MANAGED[0]: ""} | dict.fromkeys(needed, "bundled")
    settings = check(absolute(plain)) if here else Settings.from_run_config(plain)
    if not settings.expected_clients:
        raise SettingsError("clients is missing: say how many clients are simulated")
    return settings.flat() | folders, needed


def _name(point: Mapping[str, Value], seed: Value) -> str:
    parts = [
        _slug(shown(value)) if key in (VARIANT, "method", "task") else f"{key}-{_slug(shown(value))}"
        for key, value in point.items()
    ]
    return "_".join([*parts, f"seed-{seed}"])


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.") or "empty"


def _unique(runs: list[Run]) -> tuple[Run, ...]:
    """Names that no two runs share, on file systems that know no capitals either; long ones end in a digest."""
    count = Counter(run.name.lower() for run in runs)
    named = []
    for run in runs:
        name = run.name
        if count[name.lower()] > 1 or len(name) > LONGEST_NAME:
            mark = hashlib.sha256(json.dumps([run.point, run.seed]).encode()).hexdigest()[:8]
            name = f"{name[: LONGEST_NAME - 9]}_{mark}"
        named.append(Run(name, run.point, run.seed, run.settings, run.prepared))
    return tuple(named)
