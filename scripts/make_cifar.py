"""Turn the published CIFAR-10 into the folder that the presets read: train.npz and test.npz with names of classes.

    python scripts/make_cifar.py --source cifar-10-batches-py --output cifar10

``--source`` is the unpacked "CIFAR-10 python version" (https://www.cs.toronto.edu/~kriz/cifar.html), or a folder with
train.npz and test.npz whose arrays are images (n, 32, 32, 3) uint8 and labels 0 to 9. CIFAR-10's images have no licence
of their own and are not part of this repository.
"""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
SIDE = 32
# What an array in a pickle consists of; a pickle could name any other function, and loading would call it.
ALLOWED = {
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class ArraysOnly(pickle.Unpickler):
    """Reads dictionaries, lists, numbers, texts and arrays."""

    def find_class(self, module: str, name: str) -> Any:
        """The few that an array needs; SystemExit for any other."""
        if (module, name) not in ALLOWED:
            raise SystemExit(f"--source: a batch wants {module}.{name}, which is no part of CIFAR-10")
        return super().find_class(module, name)


def read_batch(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) uint8 and labels (n,) of a published batch; a row is 1024 reds, then greens, then blues."""
    with file.open("rb") as content:
        batch = ArraysOnly(content, encoding="bytes").load()
    rows = np.asarray(batch[b"data"], np.uint8)
    return rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), np.asarray(batch[b"labels"], np.int64)


def read(source: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a split, from the published batches or from an .npz file."""
    file = source / f"{split}.npz"
    if file.is_file():
        with np.load(file, allow_pickle=False) as arrays:
            return arrays["images"], arrays["labels"].astype(np.int64)
    missing = [name for name in BATCHES[split] if not (source / name).is_file()]
    if missing:
        raise SystemExit(f"--source {source}: holds neither {file.name} nor {', '.join(missing)}")
    parts = [read_batch(source / name) for name in BATCHES[split]]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return images, labels


def main() -> None:
    """Read, check and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="cifar-10-batches-py, or a folder of .npz files")
    parser.add_argument("--output", type=Path, required=True, help="folder for train.npz and test.npz")
    args = parser.parse_args()
    found = {split: read(args.source, split) for split in BATCHES}
    for split, (images, labels) in found.items():
        wrong = images.dtype != np.uint8 or images.shape != (len(labels), SIDE, SIDE, 3)
        if wrong or labels.min() < 0 or labels.max() >= len(NAMES):
            raise SystemExit(
                f"--source {args.source}: {split}: {images.dtype} {images.shape} with labels {set(labels)}"
            )
    args.output.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in found.items():
        np.savez_compressed(args.output / f"{split}.npz", images=images, labels=labels, names=np.array(NAMES))
        print(f"{split}: {len(images)} images")


if __name__ == "__main__":
    main()
