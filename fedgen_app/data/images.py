"""Read images: bundled pictures, arrays (.npz, IDX), folders of image files, or a data set of the hub."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import logging
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedgen_app.data.local import (
    Split,
    files_below,
    hub_dataset,
    is_saved,
    label_name,
    quiet_datasets,
    saved_dataset,
    split_files,
    utf8_text,
)
from fedgen_app.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

ByteArray = NDArray[np.uint8]

ENDINGS = frozenset(
    (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
)
TABLES = ("metadata.csv", "metadata.jsonl")  # captions of a folder's images, as `datasets` names them
SPLIT_FOLDERS = frozenset(("train", "test", "validation", "valid", "val", "dev"))
# The one folder that images lie in is their class, unless it is called what every such folder is called.
NO_CLASS = frozenset(("images", "image", "imgs", "img", "pictures", "photos", "data"))

IMAGES = ("images", "x", "data")  # names of an .npz file's arrays, as they are usually called
LABELS = ("labels", "label", "y", "targets")
IDX_PREFIX = {"train": "train", "test": "t10k"}
IDX_BYTES = 0x08  # the type code of unsigned bytes in an IDX file's header

GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")  # Pillow's modes without colour
DEEP = ("I", "I;16", "I;16B", "I;16L")  # those of 16 bits per pixel; Pillow opens some of them with 32

# What Pillow raises for files that are missing, broken, empty or absurdly large; its decoders add what they stumble
# over. DecompressionBombError is missing: it can be named only once Pillow is imported.
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, TypeError, EOFError, LookupError, ArithmeticError),
    *(RuntimeError, MemoryError, struct.error, zlib.error),
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pictures:
    """Images of one split, all of one size.

    name: how a model card names the source.
    pixels: (n, resolution, resolution, channels), channels 1 (grey) or 3 (RGB).
    labels: one per image where the source has labels.
    captions: one per image where the source has captions.
    classes: names of the classes 0, 1, ... where the source declares them; () where labels are only seen.
    skipped: images left out because they could not be read.
    """

    name: str
    pixels: ByteArray
    labels: tuple[str, ...] | None
    captions: tuple[str, ...] | None
    classes: tuple[str, ...]
    skipped: int

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class _Asked:
    """How the images are wanted; the fields are ``load_images``' arguments."""

    source: str
    resolution: int
    channels: int
    text_column: str
    label_column: str

    def check(self, columns: Iterable[str]) -> None:
        """Raise DataError where a column that was asked for by name is not there."""
        there = list(columns)
        for wanted in (self.label_column, self.text_column if self.text_column != "text" else ""):
            if wanted and wanted not in there:
                raise DataError(f"{self.source} has no column {wanted!r}; its columns: {', '.join(there)}")


def load_images(
    source: str,
    split: Split,
    *,
    resolution: int,
    channels: int = 0,
    text_column: str = "text",
    label_column: str = "",
) -> Pictures | None:
    """Read one split of ``source``; None where there is no test split.

    source: "bundled"; an .npz or .parquet file (all of it is the training split); a folder with train.npz and
    test.npz, with IDX files as MNIST has them, or with ``[PREFIX.]train*.parquet``; a folder of image files; a folder
    written by ``datasets.save_to_disk``; or a hub id ``owner/name[:config][@revision]``.

    In a folder of image files, ``train`` and ``test`` are the splits; without them, every image trains. An image's
    class is the folder it lies in. Where there is a metadata.csv or .jsonl, the images are those that its column
    file_name names, and its other columns are theirs.

    Images are scaled so that the shorter side is ``resolution``, and cut square from the middle; what is transparent
    becomes white. channels: 1 grey, 3 RGB, 0: as the first image is. label_column "": a column named label where there
    is one; a ``text_column`` other than "text" has to be there.

    Raises DataError where the source, a column or every image is missing.
    """
    asked = _Asked(source, resolution, channels, text_column, label_column)
    path = Path(source).expanduser()
    if source == "bundled":
        import fedgen_assets

        path = Path(fedgen_assets.path("pictures"))
    name = "bundled pictures" if source == "bundled" else path.resolve().name
    if path.is_file():
        kind = path.suffix.lower()
        if kind not in (".npz", ".parquet"):
            raise DataError(f"{source}: an image data set is an .npz or .parquet file, a folder or a hub id")
        if split == "test":
            return None
        return _from_npz(path, name, asked) if kind == ".npz" else _from_parquet([path], name, asked)
    if not path.is_dir():
        hub = hub_dataset(source, split, (".npz", ".parquet"))
        return None if hub is None else _from_dataset(hub, source, asked)
    if is_saved(path):
        saved = saved_dataset(path, split)
        return None if saved is None else _from_dataset(saved, name, asked)
    if any((path / f"{part}.npz").is_file() for part in ("train", "test")):
        file = path / f"{split}.npz"
        if not file.is_file():
            _absent(split, f"{path} holds no {file.name}")
            return None
        return _from_npz(file, name, asked)
    if any(_idx_file(path, part, "images", 3) for part in ("train", "test")):
        return _from_idx(path, name, split, asked)
    if any(file for place in (path, path / "data") for file in place.glob("*.parquet")):
        files = split_files(path, split, (".parquet",))
        return _from_parquet(files, name, asked) if files else None
    return _from_folder(path, name, split, asked)


def _absent(split: Split, reason: str) -> None:
    """A test split may be absent."""
    if split == "train":
        raise DataError(reason)


def _from_npz(file: Path, name: str, asked: _Asked) -> Pictures:
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


def _from_idx(folder: Path, name: str, split: Split, asked: _Asked) -> Pictures | None:
    """MNIST's own files: http://yann.lecun.com/exdb/mnist, plain or gzipped."""
    if asked.label_column not in ("", *LABELS) or asked.text_column != "text":
        asked.check(("label",))
    images, labels = _idx_file(folder, split, "images", 3), _idx_file(folder, split, "labels", 1)
    if images is None:
        _absent(split, f"{folder} holds no {IDX_PREFIX[split]}-images-idx3-ubyte")
        return None
    return _from_arrays(images, name, _idx(images), _idx(labels) if labels else None, None, (), asked)


def _idx_file(folder: Path, split: str, kind: str, dimensions: int) -> Path | None:
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
    asked: _Asked,
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
            pixels[index] = _squared(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image), size, channels)
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


def _from_folder(folder: Path, name: str, split: Split, asked: _Asked) -> Pictures | None:
    # Not by the builder `imagefolder` of `datasets`: one image called test.png, or one class called val, makes it
    # leave out all other images; it gives no label where there is one class only, as on many a device; and it drops
    # the classes where there are captions.
    folder = folder.resolve()  # so that a path in a table can be compared with it
    files = files_below(folder)
    images = [file for file in files if file.suffix.lower() in ENDINGS]
    base = _split_folder(folder, images, split)
    if base is None:
        return None
    tables = [file for file in files if file.name.lower() in TABLES]
    # A table next to the split folders names the images of all of them.
    tables = [table for table in tables if table.is_relative_to(base)] or [
        t for t in tables if base.is_relative_to(t.parent)
    ]
    if len({table.parent for table in tables}) < len(tables):
        raise DataError(f"{asked.source} has two kinds of metadata in one folder; keep one")
    captions = labels = None
    if tables:
        rows = [row for table in tables for row in _table(table, folder, base)]
        images = [file for file, _ in rows]
        columns = dict.fromkeys(column for _, row in rows for column in row)
    else:
        rows, columns = [], {}
        images = [file for file in images if file.is_relative_to(base)]
    if not images:
        raise DataError(f"{asked.source} holds no image ({' '.join(sorted(ENDINGS))})")
    labelled = asked.label_column or next((key for key in ("label", "labels") if key in columns), "")
    if labelled in columns:
        labels = [label_name(row.get(labelled), None) for _, row in rows]
    elif (folders := _classes(images, base)) is not None:
        labels, columns = folders, columns | {"label": None}
    asked.check(columns)
    if asked.text_column in columns:
        captions = [_caption(row.get(asked.text_column)) for _, row in rows]
    return _decoded(images, len(images), name, labels, captions, (), asked)


def _split_folder(folder: Path, images: Sequence[Path], split: Split) -> Path | None:
    """Where the images of ``split`` lie: in a folder of its name, else, those to train on, in ``folder`` itself."""
    tops = {parts[0].lower(): folder / parts[0] for parts in (i.relative_to(folder).parts for i in images) if parts[1:]}
    if set(tops) == {"data"} and not any(image.parent == folder for image in images):  # as hub downloads have it
        return _split_folder(folder / tops["data"].name, images, split)
    # A class may be called train, and so may the one class of a device; `train` next to `test` is a split.
    if tops and ("train" in tops and "test" in tops or set(tops) <= SPLIT_FOLDERS):
        if "train" not in tops:
            _absent(split, f"{folder} holds no folder train, only {', '.join(sorted(tops))}")
        return tops.get(split)
    return folder if split == "train" else None


def _table(table: Path, folder: Path, base: Path) -> list[tuple[Path, Mapping[str, Any]]]:
    """The images below ``base`` that ``table`` names, and what it says of each."""
    text = utf8_text(table).removeprefix("\ufeff")  # which some programs put before a .csv file
    try:
        if table.suffix.lower() == ".csv":
            entries: list[Any] = list(csv.DictReader(io.StringIO(text, newline=""), restval=""))
        else:
            entries = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (csv.Error, ValueError, RecursionError) as error:
        raise DataError(f"{table} cannot be read: {error}") from error
    rows: list[tuple[Path, Mapping[str, Any]]] = []
    for number, entry in enumerate(entries, start=1):
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            raise DataError(f"{table}: record {number} has no file_name")
        file = Path(os.path.normpath(table.parent / name))
        if not file.is_relative_to(folder):
            raise DataError(f"{table}: record {number} names {name}, which lies outside the folder")
        if file.is_relative_to(base):
            rows.append((file, {key: value for key, value in entry.items() if key not in (None, "file_name")}))
    return rows


def _classes(images: Sequence[Path], base: Path) -> list[str] | None:
    """The folder of each image; None where some lie in none, or all in one whose name says nothing."""
    if any(image.parent == base for image in images):
        return None
    names = [image.parent.name for image in images]
    only = set(names)
    return None if len(only) == 1 and only.pop().lower() in NO_CLASS else names


def _caption(value: object) -> str:
    """The first one where there are several; none is an empty one."""
    if isinstance(value, list):
        value = value[0] if value else None
    return "" if value is None else str(value)


def _from_parquet(files: Sequence[Path], name: str, asked: _Asked) -> Pictures:
    datasets = quiet_datasets()
    try:
        found = datasets.load_dataset(
            "parquet", data_files={"train": [glob.escape(str(file)) for file in files]}, split="train"
        )
    except (OSError, ValueError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{asked.source} holds no images or cannot be read: {error.__cause__ or error}") from error
    return _from_dataset(found, name, asked)


def _from_dataset(dataset: Dataset, name: str, asked: _Asked) -> Pictures:
    datasets = quiet_datasets()
    features = dataset.features
    column = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:  # written by something else than `datasets`, which notes what a column is
        column = next((key for key in ("image", "img") if key in features and _holds_files(features[key])), None)
    if column is None:
        raise DataError(f"{asked.source} has no column of images; its columns: {', '.join(dataset.column_names)}")
    asked.check(features)
    labels, captions = None, None
    classes: tuple[str, ...] = ()
    labelled = asked.label_column or next((key for key in ("label", "labels") if key in features), "")
    if labelled:
        kind = features[labelled]
        labels = [label_name(value, kind) for value in dataset[labelled]]
        # Folders become classes in the order of their names: on two devices the same number can mean two things.
        from_folders = dataset.builder_name == "imagefolder"
        classes = () if from_folders else tuple(getattr(kind, "names", None) or ())
    if asked.text_column in features:
        captions = [_caption(value) for value in dataset[asked.text_column]]
    raw = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    stored = (_stored(row[column]) for row in raw)
    return _decoded(stored, len(raw), name, labels, captions, classes, asked)


def _holds_files(feature: Any) -> bool:
    content = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(content, "dtype", "") in ("binary", "large_binary")


def _stored(entry: Any) -> bytes | Path | None:
    """A file's content, or else where it lies."""
    if not entry:
        return None
    return entry["bytes"] or (Path(entry["path"]) if entry["path"] else None)


def _decoded(
    stored: Iterable[bytes | Path | None],
    count: int,
    name: str,
    labels: Sequence[str] | None,
    captions: Sequence[str] | None,
    classes: tuple[str, ...],
    asked: _Asked,
) -> Pictures:
    """Those of ``count`` images that can be read; labels, captions: one per image, read or not.

    Raises DataError where none can be read.
    """
    from PIL import Image

    size, channels = asked.resolution, asked.channels
    pixels = np.empty((0, size, size, 1), np.uint8)
    kept: list[int] = []
    why = ""
    for index, each in enumerate(stored):
        try:
            image = _opened(each, size)
            depth = channels or (1 if image.mode in GREY else 3)
            square = _squared(image, size, depth)
        except (*UNREADABLE, Image.DecompressionBombError) as error:
            log.debug("image %d cannot be read: %s", index, error)
            why = why or f"{error}" or type(error).__name__
            continue
        if not kept:
            channels = depth
            pixels = np.empty((count, size, size, channels), np.uint8)
        pixels[len(kept)] = square
        kept.append(index)
    if not kept:
        raise DataError(
            f"{asked.source} holds no image{f' that can be read; of {count} the first: {why}' if count else ''}"
        )
    return Pictures(
        name,
        pixels[: len(kept)],
        None if labels is None else tuple(labels[index] for index in kept),
        None if captions is None else tuple(captions[index] for index in kept),
        classes,
        count - len(kept),
    )


def _opened(stored: bytes | Path | None, resolution: int) -> Image:
    """Load an image, the way up that its camera was held; of several frames the first.

    Raises what Pillow raises, and ValueError where there is nothing to open.
    """
    from PIL import Image, ImageOps

    if not stored:
        raise ValueError("there is no image")
    if isinstance(stored, Path) and not stored.is_file():  # a pipe or a device would be read for ever
        raise ValueError("there is no such file")
    with Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored) as opened:
        # A large JPEG is decoded at a half, a quarter or an eighth of its size where that is still twice what is asked.
        opened.draft(None, (2 * resolution, 2 * resolution))
        opened.load()
        return ImageOps.exif_transpose(opened)


def _squared(image: Image, resolution: int, channels: int) -> ByteArray:
    """(resolution, resolution, channels): the shorter side scaled, the longer one cut from the middle."""
    from PIL import Image as Images
    from PIL.Image import Resampling

    if image.mode in DEEP:  # Pillow's own conversion cuts off what is above 255
        image = Images.fromarray((np.clip(np.asarray(image, np.float64), 0, 65535) / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("pixels are fractions of unknown range")
    if image.has_transparency_data:  # whose colour is anything
        alpha = image.convert("RGBA")
        image = Images.alpha_composite(Images.new("RGBA", alpha.size, "white"), alpha)
    # By way of RGB, since few kinds of colour can become grey at once.
    converted = (image if image.mode == "L" else image.convert("RGB")).convert("L" if channels == 1 else "RGB")
    width, height = converted.size
    if (width, height) != (resolution, resolution):
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
        converted = converted.resize((resolution, resolution), Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return np.asarray(converted, np.uint8).reshape(resolution, resolution, channels)
