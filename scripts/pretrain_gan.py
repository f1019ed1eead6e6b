"""Train a small GAN from nothing, with classes or without, to be a backbone of the task ``gan``.

    python scripts/pretrain_gan.py --images fashion-rest/ --classes t-shirt,trouser,pullover,dress,coat,shirt \
        --spare "sandal,sneaker,bag,ankle boot" --output fedgen_assets/gan --minutes 15 --threads 1

With ``--classes`` only their images are seen; the classes of ``--spare`` get a place, for adapters to fill. The result
is config.json and model.safetensors (float16) with a moving average of the generator's weights, and samples.png; what
was done stands in training.json. With --checkpoint DIR an interrupted training goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch
from _training import arguments

from fedgen_app.tasks._pretraining import Recipe, pretrain_gan, read_rows, save, side_of


def numbers(text: str) -> list[int]:
    """Comma-separated numbers."""
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Comma-separated names."""
    return [part.strip() for part in text.split(",") if part.strip()]


def common(description: str) -> argparse.ArgumentParser:
    """The options of both scripts for the small networks."""
    parser = arguments(description, "folder for the networks")
    parser.add_argument("--images", required=True, help="what the setting `dataset` takes: a folder or file")
    parser.add_argument("--classes", type=names, default=[], help="names of the classes to train on; none: all images")
    parser.add_argument("--spare", type=names, default=[], help="names of classes that get a place and no image")
    parser.add_argument("--batch-size", type=int, default=Recipe.batch_size)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--checkpoint", type=Path, help="folder to save to, and to go on from")
    return parser


def recipe_of(args: argparse.Namespace) -> Recipe:
    """What the common options say."""
    return Recipe(args.minutes, args.steps, args.batch_size, args.learning_rate)


def main() -> None:
    """Train and save."""
    parser = common(__doc__)
    parser.add_argument("--latent", type=int, default=64)
    parser.add_argument("--generator", type=numbers, default=[96, 64, 32, 16], help="widths from 4x4 pixels up")
    parser.add_argument("--discriminator", type=numbers, default=[32, 64, 96], help="widths from half the side down")
    parser.add_argument("--r1", type=float, default=1.0, help="gamma of the penalty on the discriminator's slope")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = read_rows(args.images, side_of(args.discriminator), args.classes)
    model, training = pretrain_gan(
        rows,
        args.classes + args.spare,
        recipe_of(args),
        args.generator,
        args.discriminator,
        args.latent,
        args.r1,
        args.checkpoint,
        functools.partial(print, flush=True),
    )
    notes = {"classes": args.classes, "spare": args.spare, "images": len(rows["pixels"]), "r1": args.r1}
    save(args.output, model, training, notes)


if __name__ == "__main__":
    main()
