"""Read images: bundled pictures, arrays (.npz, IDX), folders of image files, or a data set of the hub."""

from __future__ import annotations

import gzip
import io
import logging
import math
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedgen_app.data.local import Split, choose_split, hub_dataset, is_saved, label_name, quiet_datasets
from fedgen_app.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

ByteArray = NDArray[np.uint8]

IMAGES = ("images", "x", "data")  # names of an .npz file's arrays, as they are usually called
LABELS = ("labels", "y", "targets")
IDX_PREFIX = {"train": "train", "test": "t10k"}
IDX_BYTES = 0x08  # the type code of unsigned bytes in an IDX file's header

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

    source: "bundled"; an .npz file (all of it is the training split); a folder with train.npz and test.npz, or with
    IDX files as MNIST has them; a folder of image files, sorted into class folders or with captions in metadata.csv or
    .jsonl; a folder written by ``datasets.save_to_disk``; or a hub id ``owner/name[:config][@revision]``. Images are
    scaled so that the shorter side is ``resolution``, and cut square from the middle. channels: 1 grey, 3 RGB, 0: as
    the first image is. label_column "": a column named label where there is one; a ``text_column`` other than "text"
    has to be there.

    Raises DataError where the source, a column or every image is missing.
    """
    path = Path(source).expanduser()
    if source == "bundled":
        import fedgen_assets

        path = Path(fedgen_assets.path("pictures"))
    if path.is_file():
        if path.suffix.lower() != ".npz":
            raise DataError(f"{source}: an image data set is an .npz file, a folder or a hub id")
        return _from_npz(path, path.name, resolution, channels) if split == "train" else None
    if path.is_dir():
        name = "bundled pictures" if source == "bundled" else path.resolve().name
        if any(path.glob("*.npz")):
            file = path / f"{split}.npz"
            if not file.is_file():
                _absent(split, f"{path} holds no {file.name}")
                return None
            return _from_npz(file, name, resolution, channels)
        if any(path.glob("*idx3-ubyte*")):
            return _from_idx(path, name, split, resolution, channels)
        dataset = _folder_split(path, source, split)
    else:
        name, dataset = source, hub_dataset(source, split)
    if dataset is None:
        return None
    return _from_records(dataset, name, source, resolution, channels, text_column, label_column)


def _absent(split: Split, reason: str) -> None:
    """A test split may be absent."""
    if split == "train":
        raise DataError(reason)


def _from_npz(file: Path, name: str, resolution: int, channels: int) -> Pictures:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images = next((arrays[key] for key in IMAGES if key in arrays), None)
            labels = next((arrays[key] for key in LABELS if key in arrays), None)
            classes = tuple(str(c) for c in arrays["names"]) if "names" in arrays else ()
            captions = tuple(str(c) for c in arrays["captions"]) if "captions" in arrays else None
            there = ", ".join(arrays.files)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} cannot be read as .npz: {error}") from None
    if images is None:
        raise DataError(f"{file}: no array named {' or '.join(IMAGES)}, only {there}")
    return _from_arrays(str(file), name, images, labels, captions, classes, resolution, channels)


def _from_idx(folder: Path, name: str, split: Split, resolution: int, channels: int) -> Pictures | None:
    """MNIST's own files: http://yann.lecun.com/exdb/mnist, plain or gzipped."""
    arrays = {}
    for kind in ("images-idx3", "labels-idx1"):
        stem = folder / f"{IDX_PREFIX[split]}-{kind}-ubyte"
        file = next((f for f in (stem, stem.with_name(stem.name + ".gz")) if f.is_file()), None)
        if file is not None:
            arrays[kind] = _idx(file)
    if "images-idx3" not in arrays:
        _absent(split, f"{folder} holds no {IDX_PREFIX[split]}-images-idx3-ubyte")
        return None
    return _from_arrays(
        str(folder), name, arrays["images-idx3"], arrays.get("labels-idx1"), None, (), resolution, channels
    )


def _idx(file: Path) -> ByteArray:
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        raise DataError(f"{file} cannot be read: {error}") from None
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != IDX_BYTES:
        raise DataError(f"{file} is no IDX file of bytes")
    dimensions, start = raw[3], 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    if len(raw) - start != math.prod(shape):
        raise DataError(f"{file} is cut short: {len(raw) - start} bytes for shape {tuple(shape)}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _from_arrays(
    source: str,
    name: str,
    images: NDArray[Any],
    labels: NDArray[Any] | None,
    captions: tuple[str, ...] | None,
    classes: tuple[str, ...],
    resolution: int,
    channels: int,
) -> Pictures:
    from PIL import Image

    if images.dtype != np.uint8:
        raise DataError(f"{source}: images are {images.dtype}, should be uint8 from 0 to 255")
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise DataError(
            f"{source}: images have shape {images.shape}, should be (n, h, w), (n, h, w, 1) or (n, h, w, 3)"
        )
    for what, values in (("labels", labels), ("captions", captions)):
        if values is not None and len(values) != len(images):
            raise DataError(f"{source}: {len(images)} images but {len(values)} {what}")
    if len(images) == 0:
        raise DataError(f"{source} holds no image")
    wanted = channels or images.shape[3]
    if images.shape[1:] == (resolution, resolution, wanted):
        pixels = np.ascontiguousarray(images)
    else:
        each = (Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in images)
        pixels = np.stack([_squared(image, resolution, wanted) for image in each])
    named = None if labels is None else tuple(_class(classes, int(label), source) for label in labels.ravel())
    return Pictures(name, pixels, named, captions, classes, 0)


def _class(classes: Sequence[str], label: int, source: str) -> str:
    if not classes:
        return str(label)
    if not 0 <= label < len(classes):
        raise DataError(f"{source}: label {label} has no name; there are {len(classes)} names")
    return classes[label]


def _folder_split(path: Path, source: str, split: Split) -> Any:
    datasets = quiet_datasets()
    try:
        if is_saved(path):
            splits = datasets.load_from_disk(str(path))
            splits = splits if isinstance(splits, datasets.DatasetDict) else {"train": splits}
        elif any(path.rglob("*.parquet")):
            splits = datasets.load_dataset(str(path))
        else:
            splits = datasets.load_dataset("imagefolder", data_dir=str(path.resolve()))
    except (OSError, ValueError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source} holds no images or cannot be read: {error.__cause__ or error}") from error
    return choose_split(splits, split, source)


def _from_records(
    dataset: Any, name: str, source: str, resolution: int, channels: int, text_column: str, label_column: str
) -> Pictures:
    datasets = quiet_datasets()
    features = dataset.features
    column = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise DataError(f"{source} has no column of images; its columns: {', '.join(dataset.column_names)}")
    for wanted in (label_column, text_column if text_column != "text" else ""):
        if wanted and wanted not in features:
            raise DataError(f"{source} has no column {wanted!r}; its columns: {', '.join(dataset.column_names)}")
    raw = dataset.cast_column(column, datasets.Image(decode=False))
    kept, pixels = _decoded(raw[column], resolution, channels)
    skipped = len(raw) - len(kept)
    if not kept:
        raise DataError(f"{source} holds no image that can be read ({skipped} cannot)")
    if skipped:
        log.warning("%d of %d images could not be read and are left out", skipped, len(raw))
    labelled = label_column or next((key for key in ("label", "labels") if key in features), "")
    labels = captions = None
    classes: tuple[str, ...] = ()
    if labelled:
        values, kind = list(raw[labelled]), features[labelled]
        labels = tuple(label_name(values[index], kind) for index in kept)
        # Folders become classes in the order of their names: on two devices the same number can mean two things.
        from_folders = dataset.builder_name == "imagefolder"
        classes = () if from_folders else tuple(getattr(kind, "names", None) or ())
    if text_column in features:
        texts = list(raw[text_column])
        captions = tuple(str(texts[index] or "") for index in kept)
    return Pictures(name, np.stack(pixels), labels, captions, classes, skipped)


def _decoded(stored: Iterable[Any], resolution: int, channels: int) -> tuple[list[int], list[ByteArray]]:
    """Indices and pixels of the images that can be read; stored: mappings with ``bytes`` or ``path``."""
    from PIL import Image, ImageOps

    kept, pixels = [], []
    for index, entry in enumerate(stored):
        try:
            with Image.open(io.BytesIO(entry["bytes"]) if entry["bytes"] else entry["path"]) as opened:
                upright = ImageOps.exif_transpose(opened)
                channels = channels or (1 if upright.mode in ("L", "1", "I;16") else 3)
                pixels.append(_squared(upright, resolution, channels))
        # Everything that Pillow says of a file that is missing, broken, empty or absurdly large.
        except (OSError, ValueError, SyntaxError, TypeError, EOFError, Image.DecompressionBombError) as error:
            log.debug("image %d cannot be read: %s", index, error)
            continue
        kept.append(index)
    return kept, pixels


def _squared(image: Image, resolution: int, channels: int) -> ByteArray:
    """(resolution, resolution, channels): the shorter side scaled, the longer one cut from the middle."""
    from PIL.Image import Resampling

    converted = image.convert("RGB" if channels == 3 else "L")
    width, height = converted.size
    if (width, height) != (resolution, resolution):
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
        converted = converted.resize((resolution, resolution), Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return np.asarray(converted, np.uint8).reshape(resolution, resolution, channels)
