"""``fedgen generate``: let a run's model write or draw, with the global, a personal or clusters' adapters, or none."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgen_app.cli import mixing
from fedgen_app.errors import SettingsError
from fedgen_app.settings import Settings

if TYPE_CHECKING:
    from fedgen_app.learning.backbone import Backbone
    from fedgen_app.learning.mixture import Mixture
    from fedgen_app.learning.task import Sample, Task


def generate(
    run_dir: Annotated[Path, typer.Argument(help="The run folder.")],
    client: Annotated[str, typer.Option(help="With this client's personal adapter.")] = "",
    cluster: Annotated[str, typer.Option(help="With this cluster's adapter.")] = "",
    mix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MIX",
            help="With the sum of several clusters' adapters: cluster:weight,..., or auto: by the prompt; may be "
            "repeated, one for each --prompt.",
        ),
    ] = None,
    cluster_key: Annotated[
        Path | None, typer.Option(help="With --mix auto: the key that the run's devices share, where they have one.")
    ] = None,
    frozen: Annotated[bool, typer.Option("--frozen", help="With no adapter.")] = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What to continue or to draw; may be repeated; default: the run's own prompts."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many samples per prompt.")] = 1,
    seed: Annotated[int | None, typer.Option(min=0, help="Default: the run's seed.")] = None,
    length: Annotated[int, typer.Option(min=0, help="Text: new tokens; 0: as the run's settings say.")] = 0,
    steps: Annotated[int, typer.Option(min=0, max=1000, help="Images: sampler steps; 0: likewise.")] = 0,
    output: Annotated[Path | None, typer.Option(help="A file; default: the terminal, images: generated.png.")] = None,
) -> None:
    """Generate samples."""
    if sum(map(bool, (client, cluster, frozen, mix))) > 1:
        raise SettingsError("--client, --cluster, --mix and --frozen exclude each other")
    folder, prompts = run_dir.resolve(), [text for text in prompt or [] if text]
    settings = _settings(folder)
    wanted = mixing.asked(folder / "clusters", mix, prompts) if mix else []
    if cluster_key is not None and None not in wanted:
        raise SettingsError(f"--cluster-key {cluster_key}: serves --mix auto alone")
    file = _adapter_file(folder, client, cluster)
    if not (frozen or mix) and not file.is_file():
        there = ", ".join(_adapters(folder)) or f"none before its end; to go on with it: fedgen resume {folder}"
        raise SettingsError(f"{file}: no such adapter in this run; there are {there}")

    from fedgen_app.federation.client import load_method
    from fedgen_app.learning import adapters
    from fedgen_app.learning.backbone import load_task, open_backbone

    task = load_task(settings.task)
    backbone = open_backbone(settings, weights=load_method(settings.method).weights)
    _refuse(settings.task, task.takes(backbone), prompt=prompts[0] if prompts else "", length=length, steps=steps)
    own = prompts or task.prompts(settings, backbone)
    texts = [text for text in own for _ in range(count)]
    changed = {key: value for key, value in (("length", length), ("steps", steps)) if value}
    asked = settings.model_copy(update={"samples": settings.samples.model_copy(update=changed)})
    arguments = (asked, backbone, texts, settings.seed if seed is None else seed)
    if mix:
        mixtures = _mixtures(settings, task, backbone, own, wanted, folder / "clusters", cluster_key)
        samples = _mixed(*arguments, task, [m for m in mixtures for _ in range(count)], folder / "clusters")
    elif frozen:
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


def _mixtures(
    settings: Settings,
    task: Task,
    backbone: Backbone,
    texts: Sequence[str],
    wanted: Sequence[dict[int, float] | None],
    folder: Path,
    key_file: Path | None,
) -> list[Mixture]:
    """One per text; said in a line each."""
    from fedgen_app.federation.hybrid import mixtures_for
    from fedgen_app.federation.protection import read_key
    from fedgen_app.learning.mixture import Mixture

    each = list(wanted) * len(texts) if len(wanted) == 1 else list(wanted)
    by_prompt = [text for text, weights in zip(texts, each, strict=True) if weights is None]
    key = read_key(key_file) if key_file else b""
    found = iter(mixtures_for(settings, task, backbone, by_prompt, folder, key) if by_prompt else ())
    mixtures = [next(found) if weights is None else Mixture.of(weights) for weights in each]
    for text, mixture in zip(texts, mixtures, strict=True):
        typer.echo(f"{text!r}: {mixture}" if text else str(mixture), err=True)
    return mixtures


def _mixed(
    settings: Settings,
    backbone: Backbone,
    texts: Sequence[str],
    seed: int,
    task: Task,
    mixtures: Sequence[Mixture],
    folder: Path,
) -> list[Sample]:
    from fedgen_app.federation.hybrid import adapters_of
    from fedgen_app.learning.mixture import active

    parts = adapters_of(folder, {cluster for mixture in mixtures for cluster, _ in mixture.weights})
    with active(backbone.model, parts, mixtures) as rows:
        return task.sample(settings, backbone, texts, seed, rows)


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
