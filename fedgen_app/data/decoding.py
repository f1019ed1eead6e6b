"""From an image file to square pixels: what every source of images ends in."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedgen_app.data.local import Split
from fedgen_app.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

ByteArray = NDArray[np.uint8]

GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")  # Pillow's modes without colour
DEEP = ("I", "I;16", "I;16B", "I;16L")  # those of 16 bits per pixel; Pillow opens some of them with 32

# What Pillow raises for files that are missing, broken, empty or absurdly large; its decoders add what they stumble
# over. DecompressionBombError is missing: it can be named only once Pillow is imported.
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, TypeError, EOFError, LookupError, ArithmeticError),
    *(RuntimeError, MemoryError, struct.error, zlib.error),
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images of one split, all of one size.

    name: how a model card names the source.
    pixels: (n, resolution, resolution, channels), channels 1 (grey) or 3 (RGB).
    labels: one per image where the source has labels.
    captions: one per image where the source has captions.
    classes: names of the classes 0, 1, ... where the source declares them; () where labels are only seen.
    skipped: images left out because they could not be read.
    wishes: one per image where whoever owns it would ask for it in other words than its caption's.
    """

    name: str
    pixels: ByteArray
    labels: tuple[str, ...] | None
    captions: tuple[str, ...] | None
    classes: tuple[str, ...]
    skipped: int
    wishes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class Asked:
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


def absent(split: Split, reason: str) -> None:
    """A test split may be absent."""
    if split == "train":
        raise DataError(reason)


def decoded(
    stored: Iterable[bytes | Path | None],
    count: int,
    name: str,
    labels: Sequence[str] | None,
    captions: Sequence[str] | None,
    classes: tuple[str, ...],
    asked: Asked,
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
            square = squared(image, size, depth)
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


def squared(image: Image, resolution: int, channels: int) -> ByteArray:
    """Pixels (resolution, resolution, channels): the shorter side scaled, the longer one cut from the middle."""
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
