"""Tiny GANs and variational autoencoders with random weights, with classes and without."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from helpers import workspace
from pipelines import CLASSES, image_config

from fedgen_app.learning import adapters
from fedgen_app.learning.backbone import Backbone, open_backbone
from fedgen_app.settings import Settings, Value
from fedgen_app.tasks._networks import GAN, VAE

LATENT = 6
RISING, FALLING = [12, 8, 8], [8, 12]  # 16x16 pixels, as the test images
KINDS = ("gan", "gan-classes", "vae", "vae-classes")


@functools.cache
def tiny_networks(kind: str) -> Path:
    """The folder of a kind, made once."""
    folder = workspace() / f"tiny-{kind}"
    classes = list(CLASSES) if kind.endswith("classes") else []
    torch.manual_seed(0)
    model: Any
    if kind.startswith("gan"):
        model = GAN(1, LATENT, classes, generator=RISING, discriminator=FALLING)
    else:
        model = VAE(1, LATENT, classes, encoder=FALLING, decoder=RISING)
    model.save_pretrained(folder)
    return folder


def network_config(output: Path, kind: str, **overrides: Value) -> dict[str, Value]:
    """A whole run config of a few seconds."""
    chosen: dict[str, Value] = {"task": kind.partition("-")[0], **overrides}
    return image_config(output, str(chosen.pop("backbone", tiny_networks(kind))), **chosen)


def network_settings(kind: str, **overrides: Value) -> Settings:
    """The same as settings, of a run without a folder."""
    return Settings.from_run_config(network_config(Path(), kind, **overrides))


def adapted(kind: str, scale: float = 0.1, **overrides: Value) -> Backbone:
    """A backbone with an adapter in it that changes what it draws."""
    opened = open_backbone(network_settings(kind, **overrides))
    generator = torch.Generator().manual_seed(7)
    drawn = {key: torch.randn(shape, generator=generator) * scale for key, shape in opened.layout}
    adapters.write(opened.model, drawn)
    return opened
