"""GAN: a small generator and discriminator of our own kind; images; FID, KID and the sliced Wasserstein distance."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedgen_app.errors import SettingsError
from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.mixture import Rows, unmixed
from fedgen_app.learning.task import Examples, Held, Loaded, Loss, Metrics, Render, Sample, Task
from fedgen_app.seeds import derive
from fedgen_app.settings import LoraSettings, Settings
from fedgen_app.tasks import _grid, _small
from fedgen_app.tasks._adversarial import Adversarial, train
from fedgen_app.tasks._likeness import check, client_metrics, likeness
from fedgen_app.tasks._networks import GAN
from fedgen_app.tasks._pictures import load_data, load_test, requirements, split
from fedgen_app.tasks._sources import prompts

DIRECTIONS = 256  # of the sliced Wasserstein distance
LEAST_DRAWN = 512  # images against which a small hold-out is measured


def load_backbone(folder: Path, held: Held, lora: LoraSettings) -> Loaded:
    """Both halves from a folder with ``config.json`` and ``model.safetensors``.

    Raises:
        BackboneError: the folder holds no GAN of this kind.
        SettingsError: float16, in which the penalty on the discriminator's slope overflows.
    """
    if held.dtype == torch.float16:
        raise SettingsError("dtype = 'float16': a GAN's losses need more range; use float32 or bfloat16")
    return _small.open_small(GAN, folder, held)


def draws(model: nn.Module, latents: Tensor, numbers: Tensor | None) -> Tensor:
    """What the generator makes of latents, (n, channels, side, side) in -1..1."""
    images: Tensor = cast(Any, model).generator(latents, numbers)
    return images


def loss(settings: Settings, backbone: Backbone) -> Loss:
    """Both halves' losses (see ``_adversarial``), of which ``train`` takes each on its own."""
    return Adversarial(_small.facts(backbone).latent, settings.gan.r1)


def sliced_wasserstein(one: Tensor, other: Tensor, seed: int) -> float:
    """Distance of two sets of images in pixel space: the root of the mean over directions of W2 squared.

    Rabin et al., "Wasserstein barycenter and its application to texture mixing" (2011): along a direction, the
    distance of two sets of equal size is that of their sorted projections. Needs no extractor, so that every device
    can measure it; times the root of the number of pixels, it is in the units of one pixel's value.

    Args:
        one: (n, d) float; other: (k n, d) float, for some whole k.
    """
    directions = torch.randn((one.shape[1], DIRECTIONS), generator=torch.Generator().manual_seed(seed))
    directions = directions / directions.norm(dim=0)
    near, far = ((images.double() @ directions.double()).sort(dim=0).values for images in (one, other))
    return float((near.repeat_interleave(len(far) // len(near), dim=0) - far).square().mean().sqrt())


def distance(backbone: Backbone, examples: Examples, seed: int) -> float:
    """Sliced Wasserstein distance of the rows from drawn images of the same classes, pixels from 0 to 1.

    A small hold-out is measured against several drawings of each of its rows, so that what is drawn counts for less.
    """
    times = -(-LEAST_DRAWN // len(examples))
    texts = _small.conditions(backbone, examples) * times
    drawn = _small.generate(backbone, draws, texts, derive(seed, "distance"))
    real = examples.rows["pixels"].flatten(1).float() / 255
    made = torch.from_numpy(drawn).permute(0, 3, 1, 2).flatten(1).float() / 255
    return sliced_wasserstein(real, made, seed) * math.sqrt(real.shape[1])


def evaluate(settings: Settings, backbone: Backbone, examples: Examples, seed: int) -> Metrics:
    """FID, KID and what goes with them where there are images to compare with, and ``sliced_wasserstein``.

    A discriminator's loss says nothing of the images: it is as good as its opponent is bad. So none is reported.
    """
    draw = functools.partial(_small.generate, backbone, draws, seed=derive(seed, "measured"))
    told = bool(_small.facts(backbone).classes)
    found = likeness(settings, backbone, examples.reference, draw, seed, told)
    return {**found, "sliced_wasserstein": distance(backbone, examples, seed)}


def sample(
    settings: Settings, backbone: Backbone, texts: Sequence[str], seed: int, rows: Rows = unmixed
) -> list[Sample]:
    """One image per class name; the same seed gives the same images."""
    return _small.sample(settings, backbone, draws, texts, seed, rows)


def export(folder: Path, backbone: Backbone, adapter: Mapping[str, Tensor]) -> None:
    """Nothing: no other software opens such a GAN."""


def usage(settings: Settings, backbone: Backbone) -> list[str]:
    """How to load the adapter with PEFT."""
    return _small.usage(backbone, "GAN", "images = model.generator")


TASK = Task(
    lora_targets=_small.lora_targets,
    hub_files=_small.HUB_FILES,
    weight_files=_small.weight_files,
    config=_small.config,
    load_backbone=load_backbone,
    save_memory=_small.save_memory,
    load_data=load_data,
    load_test=load_test,
    split=split,
    check=check,
    loss=loss,
    evaluate=evaluate,
    client_metrics=functools.partial(client_metrics, always=("sliced_wasserstein",)),
    requirements=requirements,
    embed=_small.embed,
    sample=sample,
    takes=_small.takes,
    prompts=prompts,
    render=Render(".png", _grid.one, printable=False),
    save_samples=_small.save_samples,
    export=export,
    usage=usage,
    bundled_backbone="gan",
    train=train,
)
