"""Images in arrays: .npz files, and IDX files as MNIST has them."""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgen_app.data.decoding import Asked, ByteArray, Pictures, absent, squared
from fedgen_app.data.local import Split
from fedgen_app.errors import DataError

IMAGES = ("images", "x", "data")  # names of an .npz file's arrays, as they are usually called
LABELS = ("labels", "label", "y", "targets")
IDX_PREFIX = {"train": "train", "test": "t10k"}
IDX_BYTES = 0x08  # the type code of unsigned bytes in an IDX file's header


def from_npz(file: Path, name: str, asked: Asked) -> Pictures:
    """The images of an .npz file; DataError where it is damaged or an array is missing or of another kind."""
    if not zipfile.is_zipfile(file):
        raise DataError(f"{file} cannot be read as .npz: it is damaged or something else")
    # A label column's usual names stand for each other: settings made for another kind of source fit as well.
    labels_of = LABELS if asked.label_column in ("", *LABELS) else (asked.label_column,)
    captions_of = "captions" if asked.text_column == "text" else asked.text_column
    try:
        with np.load(file, allow_pickle=False) as arrays:
            there = ", ".join(arrays.files)
            images, labels, captions, names = (
                next((np.asarray(arrays[key]) for key in keys if key in arrays.files), None)
                for keys in (IMAGES, labels_of, (captions_of,), ("names",))
            )
    # RuntimeError: an encrypted or unknown way of packing; MemoryError: a header that promises too much.
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        RuntimeError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise DataError(f"{file} cannot be read as .npz: {error}") from error
    if images is None:
        raise DataError(f"{file}: no array named {' or '.join(IMAGES)}, only {there}")
    for wanted, found in ((asked.label_column, labels), (captions_of if captions_of != "captions" else "", captions)):
        if wanted and found is None:
            raise DataError(f"{file} has no array {wanted!r}; its arrays: {there}")
    return _from_arrays(file, name, images, labels, _texts(file, captions), _texts(file, names) or (), asked)


def _texts(file: Path, array: NDArray[Any] | None) -> tuple[str, ...] | None:
    if array is None:
        return None
    if array.ndim != 1 or array.dtype.kind != "U":
        raise DataError(f"{file}: captions and names are one row of strings, not {array.dtype} {array.shape}")
    return tuple(map(str, array))


def from_idx(folder: Path, name: str, split: Split, asked: Asked) -> Pictures | None:
    """MNIST's own files: http://yann.lecun.com/exdb/mnist, plain or gzipped."""
    if asked.label_column not in ("", *LABELS) or asked.text_column != "text":
        asked.check(("label",))
    images, labels = idx_file(folder, split, "images", 3), idx_file(folder, split, "labels", 1)
    if images is None:
        absent(split, f"{folder} holds no {IDX_PREFIX[split]}-images-idx3-ubyte")
        return None
    return _from_arrays(images, name, _idx(images), _idx(labels) if labels else None, None, (), asked)


def idx_file(folder: Path, split: str, kind: str, dimensions: int) -> Path | None:
    """A split's file of "images" (three dimensions) or "labels" (one); None where there is none."""
    names = (f"{IDX_PREFIX[split]}-{kind}{mark}idx{dimensions}-ubyte{end}" for mark in "-." for end in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _idx(file: Path) -> ByteArray:
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != IDX_BYTES:
        raise DataError(f"{file} is no IDX file of bytes")
    dimensions, start = raw[3], 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    if len(raw) - start != math.prod(shape):
        raise DataError(f"{file} is damaged: {max(0, len(raw) - start)} bytes for shape {tuple(shape)}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _from_arrays(
    file: Path,
    name: str,
    images: NDArray[Any],
    labels: NDArray[Any] | None,
    captions: tuple[str, ...] | None,
    classes: tuple[str, ...],
    asked: Asked,
) -> Pictures:
    from PIL import Image

    if images.dtype != np.uint8:
        raise DataError(f"{file}: images are {images.dtype}, should be uint8 from 0 to 255")
    shape = images.shape
    if images.ndim == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise DataError(f"{file}: images have shape {shape}, should be (n, h, w), (n, h, w, 1) or (n, h, w, 3)")
    if images.size == 0:
        raise DataError(f"{file} holds no image")
    if labels is not None and labels.shape not in ((len(images),), (len(images), 1)):
        raise DataError(f"{file}: {len(images)} images but labels of shape {labels.shape}")
    if captions is not None and len(captions) != len(images):
        raise DataError(f"{file}: {len(images)} images but {len(captions)} captions")
    named = None if labels is None else _labels(file, labels.ravel(), classes)
    size, channels = asked.resolution, asked.channels or images.shape[3]
    if images.shape[1:] == (size, size, channels):
        pixels = np.require(images, requirements=("C", "W"))  # what np.frombuffer gives cannot be written to
    else:
        pixels = np.empty((len(images), size, size, channels), np.uint8)
        for index, image in enumerate(images):
            pixels[index] = squared(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image), size, channels)
    return Pictures(name, pixels, named, captions, classes, 0)


def _labels(file: Path, labels: NDArray[Any], classes: Sequence[str]) -> tuple[str, ...]:
    if labels.dtype.kind == "U":
        return tuple(map(str, labels))
    if labels.dtype.kind == "f" and np.isfinite(labels).all() and (labels == np.rint(labels)).all():
        labels = labels.astype(np.int64)  # how numbers come out of a spreadsheet
    if labels.dtype.kind not in "iub":
        raise DataError(f"{file}: labels are {labels.dtype}, should be whole numbers or strings")
    numbers = [int(label) for label in labels]
    if not classes:
        return tuple(map(str, numbers))
    wrong = next((number for number in numbers if not 0 <= number < len(classes)), None)
    if wrong is not None:
        raise DataError(f"{file}: label {wrong} has no name; there are {len(classes)} names")
    return tuple(classes[number] for number in numbers)
