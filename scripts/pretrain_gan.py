"""Train a small class-conditional GAN from nothing: a generator and a discriminator for square images.

    python scripts/pretrain_gan.py --images fashion-rest/ --classes t-shirt,trouser,pullover,dress,coat,shirt \
        --spare "sandal,sneaker,bag,ankle boot" --output fedgen_assets/gan --minutes 12 --threads 1

Only the images of ``--classes`` are seen; the classes of ``--spare`` get a place, for adapters to fill. The result is a
folder that the task ``gan`` opens (config.json, model.safetensors in float16), with a moving average of the generator's
weights and samples.png; what was done stands in training.json. With --checkpoint DIR an interrupted training goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedgen_app.data.images import load_images
from fedgen_app.learning.task import Sample
from fedgen_app.tasks import _grid
from fedgen_app.tasks._adversarial import BETAS, Adversarial
from fedgen_app.tasks._networks import GAN


@dataclass(frozen=True)
class Recipe:
    """AdamW for each half, one step each on every batch, and a moving average. Ends after `minutes` or `steps`."""

    minutes: float | None
    steps: int | None
    batch_size: int = 64
    learning_rate: float = 1e-3
    final_rate: float = 0.1  # of the learning rate, which falls linearly
    r1: float = 1.0
    average: float = 0.998
    seed: int = 1

    def progress(self, step: int, seconds: float) -> float:
        """How much of the training is done, 0 to 1."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        return min(1.0, seconds / (60 * (self.minutes or 1.0)))


class Training:
    """Everything that goes on from step to step, and how it is kept."""

    def __init__(self, model: GAN, recipe: Recipe, checkpoint: Path | None) -> None:
        self.model, self.recipe = model, recipe
        self.file = checkpoint / "state.pt" if checkpoint else None
        self.averaged = copy.deepcopy(model.generator).requires_grad_(False)
        self.halves: dict[str, nn.Module] = {"discriminator": model.discriminator, "generator": model.generator}
        self.optimizers = {
            name: torch.optim.AdamW(half.parameters(), lr=recipe.learning_rate, betas=BETAS, weight_decay=0.0)
            for name, half in self.halves.items()
        }
        self.step, self.seconds = 0, 0.0
        if self.file and self.file.exists():
            state = torch.load(self.file, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.averaged.load_state_dict(state["averaged"])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state[name])
            self.step, self.seconds = state["step"], state["seconds"]
            print(f"resumed at step {self.step}", flush=True)

    def save(self) -> None:
        """Write the checkpoint whole or not at all."""
        if not self.file:
            return
        state = {"model": self.model.state_dict(), "averaged": self.averaged.state_dict()}
        state |= {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        state |= {"step": self.step, "seconds": self.seconds}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.file.with_suffix(".new"))
        os.replace(self.file.with_suffix(".new"), self.file)

    def learn(self, pixels: Tensor, labels: Tensor) -> dict[str, float]:
        """One step of each half; each one's loss."""
        progress = self.recipe.progress(self.step, self.seconds)
        rate = self.recipe.learning_rate * (1 - (1 - self.recipe.final_rate) * progress)
        # What is drawn depends on (seed, step) alone: a resumed training sees the same.
        draw = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        chosen = torch.randint(len(pixels), (self.recipe.batch_size,), generator=draw)
        batch = {"pixels": pixels[chosen], "class": labels[chosen]}
        objective, losses = Adversarial(self.model.latent, self.recipe.r1), {}
        for name, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = rate
            value = getattr(objective, name)(self.model, batch, draw)
            value.backward(inputs=list(self.halves[name].parameters()))
            optimizer.step()
            optimizer.zero_grad()
            losses[name] = float(value.detach())
        self.step += 1
        pace = min(self.recipe.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.generator.parameters()), 1 - pace)
        return losses


def train(training: Training, pixels: Tensor, labels: Tensor, samples: Path, shown: Sequence[str]) -> None:
    """Until the recipe's end; with a picture beside the checkpoint every 500 steps."""
    saved = training.seconds
    while (progress := training.recipe.progress(training.step, training.seconds)) < 1:
        started = time.monotonic()
        losses = training.learn(pixels, labels)
        training.seconds += time.monotonic() - started
        if training.step % 100 == 0:
            speed = training.step * training.recipe.batch_size / training.seconds
            told = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
            print(f"step {training.step}  {progress:.1%}  {told}  {speed:.0f} images/s", flush=True)
        if training.step % 500 == 0:
            draw(samples, training, shown)
        if training.seconds - saved > 120:
            training.save()
            saved = training.seconds
    training.save()


@torch.no_grad()
def draw(file: Path, training: Training, shown: Sequence[str], each: int = 10) -> None:
    """A picture of what the averaged generator draws, a row per class."""
    noise = torch.Generator().manual_seed(0)
    found = []
    for name in shown:
        number = torch.full((each,), training.model.classes.index(name))
        images = training.averaged(torch.randn((each, training.model.latent), generator=noise), number)
        scaled = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        found += [Sample(name, image) for image in scaled]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(_grid.one(found))


def choose(images: np.ndarray, labels: Sequence[str], wanted: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The images of the wanted classes, (n, channels, h, w) uint8, and the number of each one's class."""
    if missing := sorted(set(wanted) - set(labels)):
        raise SystemExit(f"--classes: no image of {', '.join(missing)}; there are {', '.join(sorted(set(labels)))}")
    kept = [i for i, label in enumerate(labels) if label in wanted]
    pixels = torch.from_numpy(np.ascontiguousarray(images[kept].transpose(0, 3, 1, 2)))
    return pixels, torch.tensor([wanted.index(labels[i]) for i in kept])


def numbers(text: str) -> list[int]:
    """Comma-separated numbers."""
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Comma-separated names."""
    return [part.strip() for part in text.split(",") if part.strip()]


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="what the setting `dataset` takes: a folder or file")
    parser.add_argument("--classes", type=names, required=True, help="names of the classes to train on")
    parser.add_argument("--spare", type=names, default=[], help="names of classes that get a place and no image")
    parser.add_argument("--output", type=Path, required=True, help="folder for the GAN")
    parser.add_argument("--latent", type=int, default=64)
    parser.add_argument("--generator", type=numbers, default=[96, 64, 32, 16], help="widths from 4x4 pixels up")
    parser.add_argument("--discriminator", type=numbers, default=[32, 64, 96], help="widths from half the side down")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="minutes of training")
    length.add_argument("--steps", type=int, help="steps of each half")
    parser.add_argument("--batch-size", type=int, default=Recipe.batch_size)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--r1", type=float, default=Recipe.r1)
    parser.add_argument("--checkpoint", type=Path, help="folder to save to, and to go on from")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = Recipe(args.minutes, args.steps, args.batch_size, args.learning_rate, r1=args.r1)
    side = 4 * 2 ** len(args.discriminator)
    found = load_images(args.images, "train", resolution=side)
    if found is None or found.labels is None:
        raise SystemExit(f"--images {args.images}: no training images with labels")
    pixels, labels = choose(found.pixels, found.labels, args.classes)
    torch.manual_seed(recipe.seed)
    model = GAN(pixels.shape[1], args.latent, args.classes + args.spare, args.generator, args.discriminator)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    print(f"{len(pixels)} images of {', '.join(args.classes)}; parameters: {sizes}", flush=True)
    training = Training(model, recipe, args.checkpoint)
    train(training, pixels, labels, (args.checkpoint or args.output) / "samples.png", args.classes)
    model.generator.load_state_dict(training.averaged.state_dict())
    model.half().save_pretrained(args.output)
    draw(args.output / "samples.png", training, args.classes)
    report = {
        "parameters": sizes,
        "classes": args.classes,
        "spare": args.spare,
        "images": len(pixels),
        "recipe": asdict(recipe),
        "steps": training.step,
        "images_seen": training.step * recipe.batch_size,
        "minutes": round(training.seconds / 60, 1),
    }
    (args.output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
