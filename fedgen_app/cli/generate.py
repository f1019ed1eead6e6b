"""``fedgen generate``: let a run's model write or draw, with the global, a personal or clusters' adapters, or none."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgen_app.cli import mixing
from fedgen_app.cli import via as remote
from fedgen_app.cli.finished import adapter_file, adapters_in, settings_of
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
    cluster_encoder: Annotated[
        str,
        typer.Option(metavar="FOLDER", help="Likewise: where the encoder that the run names lies on this device."),
    ] = "",
    frozen: Annotated[bool, typer.Option("--frozen", help="With no adapter.")] = False,
    adapter: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="With the adapter in this folder, such as a device's own.")
    ] = None,
    backbone: Annotated[
        str,
        typer.Option(metavar="FOLDER", help="Where the same backbone lies here; default: as the run says."),
    ] = "",
    via: Annotated[
        str, typer.Option(metavar="URL", help="Through the service `fedgen serve` there, with --mix as its adapters.")
    ] = "",
    split: Annotated[
        int, typer.Option(min=0, help="With --via, images: so many steps there, the rest here; 0: all there.")
    ] = 0,
    token_file: Annotated[
        Path | None, typer.Option(help="With --via: the service's token; default: FEDGEN_TOKEN of the environment.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(help="With --via: certificate of an own authority; default: the system's.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What to continue or to draw; may be repeated; default: the run's own prompts."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many samples per prompt.")] = 1,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Default: the run's seed.")] = None,
    length: Annotated[int, typer.Option(min=0, help="Text: new tokens; 0: as the run's settings say.")] = 0,
    steps: Annotated[int, typer.Option(min=0, max=1000, help="Images: sampler steps; 0: likewise.")] = 0,
    output: Annotated[Path | None, typer.Option(help="A file; default: the terminal, images: generated.png.")] = None,
) -> None:
    """Generate samples."""
    if sum(map(bool, (client, cluster, frozen, mix and not via, adapter))) > 1:
        names = "--client, --cluster, --adapter, " + ("--frozen" if via else "--mix and --frozen")
        raise SettingsError(f"{names} exclude each other")
    folder, prompts = run_dir.resolve(), [text for text in prompt or [] if text]
    settings = settings_of(folder)
    asked = settings.sampling(**{key: value for key, value in (("length", length), ("steps", steps)) if value})
    wanted = mixing.asked(folder / "clusters", mix, prompts) if mix and not via else []
    far = remote.asked(via, split, token_file, ca, mix or [], prompts, asked)
    by_prompt = None in (far.mixes if far else wanted)
    for option, value in (("--cluster-key", cluster_key), ("--cluster-encoder", cluster_encoder)):
        if value and not by_prompt:
            raise SettingsError(f"{option} {value}: serves --mix auto alone")
    if far:
        named = {"--client": client, "--cluster": cluster, "--adapter": adapter, "--frozen": frozen}
        remote.check_adapter(far, settings, named)
    file = adapter / "adapter_model.safetensors" if adapter else adapter_file(folder, client, cluster)
    needed = bool(adapter) or not frozen and (remote.needs_adapter(far, settings) if far else not mix)
    if needed and not file.is_file():
        there = ", ".join(adapters_in(folder)) or f"none before its end; to go on with it: fedgen resume {folder}"
        raise SettingsError(f"{file}: no such adapter in this run; there are {there}")

    from fedgen_app.federation.method import load_method
    from fedgen_app.learning import adapters
    from fedgen_app.learning.backbone import load_task, open_backbone

    task = load_task(settings.task)
    opened = open_backbone(settings, backbone, weights=load_method(settings.method).weights)
    _refuse(settings.task, task.takes(opened), prompt=prompts[0] if prompts else "", length=length, steps=steps)
    own = prompts or task.prompts(settings, opened)
    texts = [text for text in own for _ in range(count)]
    drawn = settings.seed if seed is None else seed
    arguments = (asked, opened, texts, drawn)
    if mix and not far:
        mixtures = _mixtures(settings, task, opened, own, wanted, folder / "clusters", cluster_key, cluster_encoder)
        samples = _mixed(*arguments, task, [m for m in mixtures for _ in range(count)], folder / "clusters")
    else:
        if needed:
            adapters.write(opened.model, adapters.load_adapter(file))
        with opened.model.disable_adapter() if frozen else contextlib.nullcontext():
            if far:
                samples = far.samples(asked, task, opened, own, count, drawn, cluster_key, cluster_encoder)
            else:
                samples = task.sample(*arguments)
    _put(task, samples, output)


def _put(task: Task, samples: Sequence[Sample], output: Path | None) -> None:
    """Into a file, or onto the terminal."""
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
    encoder: str,
) -> list[Mixture]:
    """One per text; said in a line each."""
    from fedgen_app.federation.hybrid import mixtures_for
    from fedgen_app.federation.protection import read_key
    from fedgen_app.learning.mixture import Mixture

    each = list(wanted) * len(texts) if len(wanted) == 1 else list(wanted)
    by_prompt = [text for text, weights in zip(texts, each, strict=True) if weights is None]
    key = read_key(key_file) if key_file else b""
    found = iter(mixtures_for(settings, task, backbone, by_prompt, folder, key, encoder) if by_prompt else ())
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
