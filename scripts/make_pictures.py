"""Make the bundled pictures from Fashion-MNIST: all ten classes, padded to 32x32, the pre-training's images apart.

    python scripts/make_pictures.py --source fashion-mnist/ --output fedgen_assets/pictures --rest fashion-rest/

``--source`` is a folder with the four IDX files (MIT licence, https://github.com/zalandoresearch/fashion-mnist). The
first ``--train`` images of each class go to train.npz, ``--test`` of the test set's to test.npz; all other training
images go to ``--rest``, for scripts/pretrain_diffusion.py, so that the backbone has seen none of the bundled ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedgen_app.data.decoding import Pictures
from fedgen_app.data.images import load_images

NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIDE = 28


def load(source: str, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (n, 32, 32), two black pixels on every side, and labels (n,)."""
    found: Pictures | None = load_images(source, "train" if split == "train" else "test", resolution=SIDE)
    if found is None or found.labels is None:
        raise SystemExit(f"{source}: no labelled {split} images")
    padded = np.pad(found.pixels[..., 0], ((0, 0), (2, 2), (2, 2)))
    return padded, np.array([int(label) for label in found.labels], np.uint8)


def first_of_each(labels: NDArray[np.uint8], count: int) -> NDArray[np.bool_]:
    """True for the first ``count`` of every class."""
    taken = np.zeros(len(labels), bool)
    for label in range(len(NAMES)):
        taken[np.flatnonzero(labels == label)[:count]] = True
    return taken


def save(file: Path, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
    """Images (n, 32, 32) uint8, labels, and the classes' names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, images=images, labels=labels, names=np.array(NAMES))
    print(f"{file}: {len(images)} images, {file.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    """Cut the data set in three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder with the four IDX files")
    parser.add_argument("--output", type=Path, required=True, help="folder for train.npz and test.npz")
    parser.add_argument("--rest", type=Path, help="folder for the images that are left: train.npz, and the test set")
    parser.add_argument("--train", type=int, default=1000, help="training images of each class")
    parser.add_argument("--test", type=int, default=200, help="test images of each class")
    args = parser.parse_args()
    images, labels = load(args.source, "train")
    chosen = first_of_each(labels, args.train)
    save(args.output / "train.npz", images[chosen], labels[chosen])
    test_images, test_labels = load(args.source, "test")
    tested = first_of_each(test_labels, args.test)
    save(args.output / "test.npz", test_images[tested], test_labels[tested])
    if args.rest:
        save(args.rest / "train.npz", images[~chosen], labels[~chosen])
        save(args.rest / "test.npz", test_images[~tested], test_labels[~tested])


if __name__ == "__main__":
    main()
