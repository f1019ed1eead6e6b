"""Train a small variational autoencoder from nothing, with classes or without, to be a backbone of the task ``vae``.

    python scripts/pretrain_vae.py --images fashion-rest/ --output my-vae --minutes 5

With ``--classes`` only their images are seen; the classes of ``--spare`` get a place, for adapters to fill. The result
is config.json and model.safetensors (float16) with a moving average of the weights, and samples.png; what was done
stands in training.json. With --checkpoint DIR an interrupted training goes on where it stopped.
"""

from __future__ import annotations

import functools

import torch
from pretrain_gan import common, numbers, recipe_of

from fedgen_app.tasks._pretraining import pretrain_vae, read_rows, save, side_of


def main() -> None:
    """Train and save."""
    parser = common(__doc__)
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--encoder", type=numbers, default=[32, 64, 96], help="widths from half the side down")
    parser.add_argument("--decoder", type=numbers, default=[96, 64, 32, 16], help="widths from 4x4 pixels up")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = read_rows(args.images, side_of(args.encoder), args.classes)
    model, training = pretrain_vae(
        rows,
        args.classes + args.spare,
        recipe_of(args),
        args.encoder,
        args.decoder,
        args.latent,
        args.checkpoint,
        functools.partial(print, flush=True),
    )
    save(args.output, model, training, {"classes": args.classes, "spare": args.spare, "images": len(rows["pixels"])})


if __name__ == "__main__":
    main()
