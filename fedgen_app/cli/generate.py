"""``fedgen generate``: let a run's model write or draw, with the global, a personal, a cluster's or no adapter."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from fedgen_app.errors import SettingsError
from fedgen_app.settings import Settings


def generate(
    run_dir: Annotated[Path, typer.Argument(help="The run folder.")],
    client: Annotated[str, typer.Option(help="With this client's personal adapter.")] = "",
    cluster: Annotated[str, typer.Option(help="With this cluster's adapter.", hidden=True)] = "",
    frozen: Annotated[bool, typer.Option("--frozen", help="With no adapter.")] = False,
    prompt: Annotated[str, typer.Option(help="What to continue or to draw; default: the run's own prompts.")] = "",
    count: Annotated[int, typer.Option(min=1, help="How many samples per prompt.")] = 1,
    seed: Annotated[int | None, typer.Option(min=0, help="Default: the run's seed.")] = None,
    length: Annotated[int, typer.Option(min=0, help="Text: new tokens; 0: as the run's settings say.")] = 0,
    steps: Annotated[int, typer.Option(min=0, max=1000, help="Images: sampler steps; 0: likewise.")] = 0,
    output: Annotated[Path | None, typer.Option(help="A file; default: the terminal, images: generated.png.")] = None,
) -> None:
    """Generate samples."""
    if sum(map(bool, (client, cluster, frozen))) > 1:
        raise SettingsError("--client, --cluster and --frozen exclude each other")
    folder = run_dir.resolve()
    settings = _settings(folder)
    file = _adapter_file(folder, client, cluster)
    if not frozen and not file.is_file():
        there = ", ".join(_adapters(folder)) or f"none before its end; to go on with it: fedgen resume {folder}"
        raise SettingsError(f"{file}: no such adapter in this run; there are {there}")

    from fedgen_app.federation.client import load_method
    from fedgen_app.learning import adapters
    from fedgen_app.learning.backbone import load_task, open_backbone

    task = load_task(settings.task)
    backbone = open_backbone(settings, weights=load_method(settings.method).weights)
    _refuse(settings.task, task.takes(backbone), prompt=prompt, length=length, steps=steps)
    texts = [text for text in ([prompt] if prompt else task.prompts(settings, backbone)) for _ in range(count)]
    changed = {key: value for key, value in (("length", length), ("steps", steps)) if value}
    asked = settings.model_copy(update={"samples": settings.samples.model_copy(update=changed)})
    arguments = (asked, backbone, texts, settings.seed if seed is None else seed)
    if frozen:
        with backbone.model.disable_adapter():
            samples = task.sample(*arguments)
    else:
        adapters.write(backbone.model, adapters.load_adapter(file))
        samples = task.sample(*arguments)
    shown = task.render.encode(samples)
    if output is None and task.render.printable:
        print(shown.decode(), end="")
        return
    file = output or _free(task.render.suffix)
    try:
        file.write_bytes(shown)
    except OSError as error:
        raise SettingsError(f"--output {file}: {error.strerror}") from None
    if not task.render.printable:
        print(file)


def _refuse(task: str, taken: Collection[str], **given: str | int) -> None:
    for name, value in given.items():
        if value and name not in taken:
            there = ", ".join(f"--{each}" for each in sorted(taken))
            raise SettingsError(f"--{name} {value}: means nothing to the backbone of this {task} run; use {there}")


def _free(suffix: str) -> Path:
    """The first of generated, generated-2, ... that is not there yet."""
    later = (Path(f"generated-{number}{suffix}") for number in itertools.count(2))
    return next(file for file in itertools.chain([Path(f"generated{suffix}")], later) if not file.exists())


def _settings(folder: Path) -> Settings:
    try:
        run_config = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{folder}: not a run folder: {error}") from None
    return Settings.from_run_config(run_config)


def _adapter_file(folder: Path, client: str, cluster: str) -> Path:
    for option, value in (("--client", client), ("--cluster", cluster)):
        if value and (Path(value).name != value or value.startswith(".")):
            raise SettingsError(f"{option} {value}: should be an id such as {', '.join(_adapters(folder)[:3])}")
    part = f"clients/{client}" if client else f"clusters/{cluster}" if cluster else "global"
    whole = folder / part / "model.safetensors"  # where all weights learned
    return whole if whole.is_file() else folder / part / "adapter_model.safetensors"


def _adapters(folder: Path) -> list[str]:
    return [str(f.parent.relative_to(folder)) for f in sorted(folder.glob("**/*model.safetensors"))]
