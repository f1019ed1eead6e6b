"""Training the small networks from nothing, to be backbones: by steps or minutes, resumable, with a moving average."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedgen_app.data.images import load_images
from fedgen_app.errors import DataError
from fedgen_app.learning.task import Loss, Sample
from fedgen_app.tasks import _grid
from fedgen_app.tasks._adversarial import BETAS, Adversarial
from fedgen_app.tasks._networks import GAN, LEAST, VAE, Pictured
from fedgen_app.tasks._small import to_uint8
from fedgen_app.tasks.vae import negative_bound

KEPT_EVERY = 120.0  # seconds between checkpoints
TOLD_EVERY = 100  # steps between lines
SHOWN = 10  # images of a class in samples.png


@dataclass(frozen=True)
class Recipe:
    """AdamW without weight decay; the learning rate falls linearly. Ends after ``minutes`` or ``steps``.

    Attributes:
        final_rate: The last learning rate, as a fraction of the first.
        average: Of the weights that draw, kept from step to step.
    """

    minutes: float | None = None
    steps: int | None = None
    batch_size: int = 64
    learning_rate: float = 1e-3
    final_rate: float = 0.1
    average: float = 0.998
    seed: int = 1

    def progress(self, step: int, seconds: float) -> float:
        """How much of the training is done, 0 to 1.

        Raises:
            ValueError: neither or both of ``minutes`` and ``steps`` are given.
        """
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("a recipe needs either minutes or steps")
        if self.steps is not None:
            return min(1.0, step / self.steps)
        return min(1.0, seconds / (60 * (self.minutes or 1.0)))


@dataclass(frozen=True)
class Part:
    """One network, or several, with an optimiser of its own."""

    network: nn.Module
    loss: Loss
    betas: tuple[float, float] = (0.9, 0.999)


class Pretraining:
    """Everything that goes on from step to step, and how it is kept in ``checkpoint``/state.pt."""

    def __init__(
        self, model: nn.Module, parts: Mapping[str, Part], draws: nn.Module, recipe: Recipe, checkpoint: Path | None
    ) -> None:
        self.model, self.parts, self.draws, self.recipe = model, parts, draws, recipe
        self.file = checkpoint / "state.pt" if checkpoint else None
        self.averaged = copy.deepcopy(draws).requires_grad_(False)
        self.optimizers = {
            name: torch.optim.AdamW(part.network.parameters(), recipe.learning_rate, part.betas, weight_decay=0.0)
            for name, part in parts.items()
        }
        self.step, self.seconds = 0, 0.0
        if self.file and self.file.exists():
            state = torch.load(self.file, weights_only=True)
            for name, holder in self._holders().items():
                holder.load_state_dict(state[name])
            self.step, self.seconds = state["step"], state["seconds"]

    def _holders(self) -> dict[str, Any]:
        return {"model": self.model, "averaged": self.averaged, **self.optimizers}

    def save(self) -> None:
        """Write the checkpoint whole or not at all; nothing where none is wanted."""
        if not self.file:
            return
        state = {name: holder.state_dict() for name, holder in self._holders().items()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state | {"step": self.step, "seconds": self.seconds}, self.file.with_suffix(".new"))
        os.replace(self.file.with_suffix(".new"), self.file)

    def learn(self, rows: Mapping[str, Tensor]) -> dict[str, float]:
        """One step of each part on one batch; each one's loss."""
        progress = self.recipe.progress(self.step, self.seconds)
        # What is drawn depends on (seed, step) alone: a resumed training sees the same.
        draw = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        chosen = torch.randint(len(rows["pixels"]), (self.recipe.batch_size,), generator=draw)
        batch, losses = {name: tensor[chosen] for name, tensor in rows.items()}, {}
        for name, part in self.parts.items():
            optimizer = self.optimizers[name]
            optimizer.param_groups[0]["lr"] = self.recipe.learning_rate * (1 - (1 - self.recipe.final_rate) * progress)
            value = part.loss(self.model, batch, draw)
            torch.autograd.backward(value, inputs=list(part.network.parameters()))
            optimizer.step()
            optimizer.zero_grad()
            losses[name] = float(value.detach())
        self.step += 1
        pace = min(self.recipe.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, now in zip(self.averaged.parameters(), self.draws.parameters(), strict=True):
                mean.lerp_(now, 1 - pace)
        return losses

    def finish(self, rows: Mapping[str, Tensor], say: Callable[[str], None] = lambda line: None) -> None:
        """Go on to the recipe's end, then put the moving average in place."""
        saved = self.seconds
        while (progress := self.recipe.progress(self.step, self.seconds)) < 1:
            started = time.monotonic()
            losses = self.learn(rows)
            self.seconds += time.monotonic() - started
            if self.step % TOLD_EVERY == 0:
                told = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
                speed = self.step * self.recipe.batch_size / self.seconds
                say(f"step {self.step}  {progress:.1%}  {told}  {speed:.0f} images/s")
            if self.seconds - saved > KEPT_EVERY:
                self.save()
                saved = self.seconds
        self.save()
        self.draws.load_state_dict(self.averaged.state_dict())


def read_rows(source: str, side: int, wanted: Sequence[str] = ()) -> dict[str, Tensor]:
    """Training images of what the setting ``dataset`` takes: "pixels" uint8 (n, channels, side, side), "class" (n,).

    Args:
        wanted: Names of the classes whose images are taken, and the order of their numbers; none: all images, and no
            classes.

    Raises:
        DataError: there are no images, or none of a wanted class.
    """
    found = load_images(source, "train", resolution=side)
    if found is None:
        raise DataError(f"{source}: no training images")
    pixels = torch.from_numpy(found.pixels.transpose(0, 3, 1, 2).copy())
    if not wanted:
        return {"pixels": pixels}
    labels = found.labels or ()
    if missing := sorted(set(wanted) - set(labels)):
        raise DataError(f"{source}: no image of {', '.join(missing)}; there are {', '.join(sorted(set(labels)))}")
    kept = [number for number, label in enumerate(labels) if label in wanted]
    return {"pixels": pixels[kept], "class": torch.tensor([wanted.index(labels[number]) for number in kept])}


def pretrain_gan(
    rows: Mapping[str, Tensor],
    classes: Sequence[str],
    recipe: Recipe,
    generator: Sequence[int] = (96, 64, 32, 16),
    discriminator: Sequence[int] = (32, 64, 96),
    latent: int = 64,
    r1: float = 1.0,
    checkpoint: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[GAN, Pretraining]:
    """A GAN for these images (``read_rows``); ``classes`` may be more than there are images of."""
    torch.manual_seed(recipe.seed)
    model = GAN(rows["pixels"].shape[1], latent, list(classes), list(generator), list(discriminator))
    objective = Adversarial(latent, r1)
    parts = {
        "discriminator": Part(model.discriminator, objective.discriminator, BETAS),
        "generator": Part(model.generator, objective.generator, BETAS),
    }
    training = Pretraining(model, parts, model.generator, recipe, checkpoint)
    training.finish(rows, say)
    return model, training


def pretrain_vae(
    rows: Mapping[str, Tensor],
    classes: Sequence[str],
    recipe: Recipe,
    encoder: Sequence[int] = (32, 64, 96),
    decoder: Sequence[int] = (96, 64, 32, 16),
    latent: int = 32,
    checkpoint: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[VAE, Pretraining]:
    """A variational autoencoder for these images (``read_rows``); without classes it is told none."""
    torch.manual_seed(recipe.seed)
    model = VAE(rows["pixels"].shape[1], latent, list(classes), list(encoder), list(decoder))
    training = Pretraining(model, {"bits per dimension": Part(model, negative_bound)}, model, recipe, checkpoint)
    training.finish(rows, say)
    return model, training


def save(folder: Path, model: GAN | VAE, training: Pretraining, notes: Mapping[str, object]) -> None:
    """The folder of a backbone: config.json, model.safetensors in float16, samples.png, training.json."""
    report = {
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()},
        **notes,
        "recipe": asdict(training.recipe),
        "steps": training.step,
        "images_seen": training.step * training.recipe.batch_size,
        "minutes": round(training.seconds / 60, 1),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "samples.png").write_bytes(picture(model))
    copy.deepcopy(model).half().save_pretrained(folder)


@torch.no_grad()
def picture(model: GAN | VAE) -> bytes:
    """A PNG of what the model draws, a row per class."""
    assert isinstance(model, Pictured)
    names = [name for name in model.classes or ("",) for _ in range(SHOWN)]
    numbers = torch.tensor([model.classes.index(name) for name in names]) if model.classes else None
    latents = torch.randn((len(names), model.latent), generator=torch.Generator().manual_seed(0))
    images = model.generator(latents, numbers) if isinstance(model, GAN) else model.decoder(latents, numbers)[0]
    return _grid.one([Sample(name, image) for name, image in zip(names, to_uint8(images), strict=True)])


def side_of(halvings: Sequence[int]) -> int:
    """Side of the images that a discriminator or encoder of these widths takes, in pixels."""
    return int(LEAST * 2 ** len(halvings))
