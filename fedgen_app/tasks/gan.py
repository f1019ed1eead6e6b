"""GAN: a small generator and discriminator of our own kind; images; FID, KID and the sliced Wasserstein distance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedgen_app.errors import SettingsError
from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.task import Examples, Held, Loaded, Loss, Metrics
from fedgen_app.seeds import derive
from fedgen_app.settings import LoraSettings, Settings
from fedgen_app.tasks._adversarial import Adversarial, train
from fedgen_app.tasks._networks import GAN
from fedgen_app.tasks._small import conditions, facts, generate, open_small, small_task

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
    return open_small(GAN, folder, held)


def draws(model: nn.Module, latents: Tensor, numbers: Tensor | None) -> Tensor:
    """What the generator makes of latents, (n, channels, side, side) in -1..1."""
    images: Tensor = cast(Any, model).generator(latents, numbers)
    return images


def loss(settings: Settings, backbone: Backbone) -> Loss:
    """Both halves' losses (see ``_adversarial``), of which ``train`` takes each on its own."""
    return Adversarial(facts(backbone).latent, settings.gan.r1)


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


def distance(backbone: Backbone, examples: Examples, seed: int) -> Metrics:
    """``sliced_wasserstein``: the distance of the rows from drawn images of the same classes, pixels from 0 to 1.

    A small hold-out is measured against several drawings of each of its rows, so that what is drawn counts for less.
    """
    times = -(-LEAST_DRAWN // len(examples))
    texts = conditions(backbone, examples) * times
    drawn = generate(backbone, draws, texts, derive(seed, "distance"))
    real = examples.rows["pixels"].flatten(1).float() / 255
    made = torch.from_numpy(drawn).permute(0, 3, 1, 2).flatten(1).float() / 255
    return {"sliced_wasserstein": sliced_wasserstein(real, made, seed) * math.sqrt(real.shape[1])}


# A discriminator's loss says nothing of the images, as it is as good as its opponent is bad: it is no metric.
TASK = small_task(
    GAN,
    draws,
    load_backbone=load_backbone,
    loss=loss,
    measured=distance,
    always=("sliced_wasserstein",),
    call="images = model.generator",
    bundled_backbone="gan",
    train=train,
)
