"""The tasks of the small networks but for their losses: how folders are opened, what is told, drawn and measured."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedgen_app.errors import BackboneError, SettingsError
from fedgen_app.learning.backbone import Backbone, facts_of
from fedgen_app.learning.mixture import Rows, unmixed
from fedgen_app.learning.task import Examples, Held, Loaded, Loss, Metrics, Render, Sample, Task
from fedgen_app.learning.training import Trained
from fedgen_app.seeds import derive
from fedgen_app.settings import LoraSettings, Settings
from fedgen_app.tasks import _grid
from fedgen_app.tasks._likeness import check, client_metrics, likeness
from fedgen_app.tasks._networks import GAN, PARTS, VAE
from fedgen_app.tasks._pictures import load_data, load_test, requirements, split
from fedgen_app.tasks._sources import prompts

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HUB_FILES = (CONFIG, WEIGHTS, "README.md")
AT_ONCE = 256  # images per forward pass
# (model, latents (n, latent), class numbers (n,) or None) -> images (n, channels, side, side) in -1..1
Draws = Callable[[nn.Module, Tensor, Tensor | None], Tensor]
Networks = type[GAN] | type[VAE]


@dataclass(frozen=True)
class SmallFacts:
    """What belongs to a GAN or a VAE; ``_facts.Facts``."""

    image_channels: int
    resolution: int
    latent: int
    classes: tuple[str, ...]
    has_vae: bool = False  # it is one, or needs none: it takes pixels

    @property
    def condition(self) -> Literal["none", "class"]:
        """What it is told of an image."""
        return "class" if self.classes else "none"

    @property
    def class_count(self) -> int:
        """Number of classes; 0 without."""
        return len(self.classes)

    def side_for(self, resolution: int) -> int:
        """Side of the images.

        Raises:
            SettingsError: another resolution is wanted.
        """
        if resolution not in (0, self.resolution):
            raise SettingsError(f"resolution = {resolution}: this backbone takes {self.resolution} only; 0 says that")
        return self.resolution

    def class_of(self, label: str) -> int:
        """The number of a class from its name or its number.

        Raises:
            SettingsError: there is no such class.
        """
        if label in self.classes:
            return self.classes.index(label)
        if label.isdecimal() and int(label) < self.class_count:
            return int(label)
        raise SettingsError(f"label {label!r} is no class of this backbone; it knows {', '.join(self.classes)}")


def facts(backbone: Backbone) -> SmallFacts:
    """What belongs to this backbone."""
    return cast(SmallFacts, backbone.processor)


def embed(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """Nothing here reads a text.

    Raises:
        SettingsError: always.
    """
    raise SettingsError("clusters.encoder = 'backbone': this one has no text encoder; take 'bundled', or a folder")


def takes(backbone: Backbone) -> frozenset[str]:
    """A prompt, where there are classes."""
    return frozenset(("prompt",) if facts(backbone).classes else ())


def config(folder: Path) -> dict[str, object]:
    """The networks' shapes and the classes' names."""
    return {CONFIG: facts_of(folder / CONFIG)} if (folder / CONFIG).is_file() else {}


def weight_files(folder: Path) -> list[Path]:
    """The one file of weights."""
    return sorted(folder.glob(WEIGHTS))


def open_small(kind: Networks, folder: Path, held: Held) -> Loaded:
    """The networks of a folder, and what belongs to them.

    Raises:
        BackboneError: the folder holds no such networks.
        SettingsError: fewer bits are wanted.
    """
    if held.bits:
        raise SettingsError(f"backbone-bits = {held.bits}: a GAN or VAE is too small for it; use 0")
    try:
        # Not ``from_pretrained``, which prints a line, and takes a file that lacks weights.
        model = kind(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise BackboneError(f"{folder}: no {kind.__name__} of FedGen-Edge's own kind: {first}") from None
    known = SmallFacts(model.channels, model.side, model.latent, model.classes)
    return Loaded(model.eval().to(held.device, held.dtype), known)


def lora_targets(model: nn.Module, lora: LoraSettings) -> tuple[str, ...]:
    """All layers: convolutions, and the linear ones for the latent, the class and the features.

    Raises:
        SettingsError: the adapter is wanted in something that these networks do not have.
    """
    if lora.text_encoder:
        raise SettingsError("lora.text-encoder = true: a GAN or VAE has none; for task = diffusion only")
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return tuple(name for name in PARTS if name in leaves)


def save_memory(model: nn.Module) -> None:
    """Refuse: there is nothing to save in networks this small.

    Raises:
        SettingsError: always.
    """
    raise SettingsError("gradient-checkpointing = true: a GAN or VAE is too small for it; use false")


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """(n, h, w, channels) from 0 to 255, of (n, channels, h, w) in -1..1."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


@torch.inference_mode()
def generate(
    backbone: Backbone, draws: Draws, texts: Sequence[str], seed: int, rows: Rows = unmixed
) -> NDArray[np.uint8]:
    """One image per class name, or per empty text without classes, (n, h, w, channels) uint8; the same for one seed."""
    known, model = facts(backbone), backbone.model
    model.eval()
    # On the CPU and for all at once, so that the device does not change what is drawn.
    latents = torch.randn((len(texts), known.latent), generator=torch.Generator().manual_seed(seed))
    numbers = torch.tensor([known.class_of(text) for text in texts]) if known.classes else None
    parts = []
    for chosen in torch.split(torch.arange(len(texts)), AT_ONCE):
        told = None if numbers is None else numbers[chosen].to(backbone.device)
        with rows(chosen.tolist()):
            images = draws(model, latents[chosen].to(backbone.device), told).float().cpu()
        parts.append(to_uint8(images))
    return np.concatenate(parts)


def sample(
    draws: Draws, settings: Settings, backbone: Backbone, texts: Sequence[str], seed: int, rows: Rows = unmixed
) -> list[Sample]:
    """One image per class name; the same seed gives the same images."""
    facts(backbone).side_for(settings.resolution)
    images = generate(backbone, draws, texts, derive(seed, "sample"), rows)
    return [Sample(text, image) for text, image in zip(texts, images, strict=True)]


def conditions(backbone: Backbone, examples: Examples) -> tuple[str, ...]:
    """What each row's image is: the name of its class, or nothing."""
    if "class" not in examples.rows:
        return ("",) * len(examples)
    return tuple(facts(backbone).classes[int(number)] for number in examples.rows["class"])


def save_samples(folder: Path, samples: Mapping[str, Sequence[Sample]]) -> None:
    """One picture, ``grid.png``: a row per class, and for every name a block of its images, side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "grid.png").write_bytes(_grid.side_by_side(samples))


def usage(backbone: Backbone, networks: Networks, call: str) -> list[str]:
    """How to load the adapter with PEFT, and draw four images."""
    known, kind = facts(backbone), networks.__name__
    told = ", torch.zeros(4, dtype=torch.long)" if known.classes else ""
    drawn = f"four of class {known.classes[0]}" if known.classes else "four images"
    return [
        "import torch",
        f"from fedgen_app.tasks._networks import {kind}",
        "from peft import PeftModel",
        "",
        f"base = {kind}.from_pretrained({backbone.reference!r}).float()",
        "model = PeftModel.from_pretrained(base, FOLDER)  # the folder of this file",
        f"{call}(torch.randn(4, {known.latent}){told})  # {drawn}, in -1..1",
    ]


def _export(folder: Path, backbone: Backbone, adapter: Mapping[str, Tensor]) -> None:
    """Nothing: no other software opens such networks."""


def small_task(
    networks: Networks,
    draws: Draws,
    *,
    load_backbone: Callable[[Path, Held, LoraSettings], Loaded],
    loss: Callable[[Settings, Backbone], Loss],
    measured: Callable[[Backbone, Examples, int], Metrics],
    always: tuple[str, ...],
    call: str,
    bundled_backbone: str = "",
    train: Callable[..., Trained] | None = None,
) -> Task:
    """A task for networks of ``_networks``.

    Args:
        measured: What is measured on rows beside FID and KID, which need images to compare with; the last is the seed.
        always: Its metrics, in the order in which they are shown.
        call: The line of Python, up to its arguments, that draws with a loaded ``model``.
    """

    def evaluate(settings: Settings, backbone: Backbone, examples: Examples, seed: int) -> Metrics:
        draw = functools.partial(generate, backbone, draws, seed=derive(seed, "measured"))
        told = bool(facts(backbone).classes)
        found = likeness(settings, backbone, examples.reference, draw, seed, told)
        return {**found, **measured(backbone, examples, seed)}

    return Task(
        lora_targets=lora_targets,
        hub_files=HUB_FILES,
        weight_files=weight_files,
        config=config,
        load_backbone=load_backbone,
        save_memory=save_memory,
        load_data=load_data,
        load_test=load_test,
        split=split,
        check=check,
        loss=loss,
        evaluate=evaluate,
        client_metrics=functools.partial(client_metrics, always=always),
        requirements=requirements,
        embed=embed,
        sample=functools.partial(sample, draws),
        takes=takes,
        prompts=prompts,
        render=Render(".png", _grid.one, printable=False),
        save_samples=save_samples,
        export=_export,
        usage=lambda settings, backbone: usage(backbone, networks, call),
        bundled_backbone=bundled_backbone,
        train=train,
    )
