"""Pictures in four visual styles, made from plain ones: what a city's worth of users with unlike tastes would draw.

Every picture gets one style, so that styles cross the classes. The transforms draw nothing at random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedgen_app.data.decoding import Pictures

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.float64]


def _outline(light: Numbers) -> Numbers:
    """Dark lines on white where the picture changes: the size of its gradient."""
    down, right = np.gradient(light, axis=(1, 2))
    return np.asarray(1 - np.clip(2.5 * np.hypot(down, right), 0, 1), np.float64)


def _negative(light: Numbers) -> Numbers:
    """Light and dark exchanged."""
    return 1 - light


def _mosaic(light: Numbers) -> Numbers:
    """Tiles of 4x4 pixels, each of its mean in five greys, with dark joints."""
    n, height, width, channels = light.shape
    tall, wide = 4 * (-(-height // 4)), 4 * (-(-width // 4))
    padded = np.pad(light, ((0, 0), (0, tall - height), (0, wide - width), (0, 0)), mode="edge")
    tiles = padded.reshape(n, tall // 4, 4, wide // 4, 4, channels).mean((2, 4))
    whole: Numbers = (np.round(4 * tiles) / 4).repeat(4, 1).repeat(4, 2)[:, :height, :width]
    whole[:, ::4] *= 0.5
    whole[:, :, ::4] *= 0.5
    return whole


def _hatched(light: Numbers) -> Numbers:
    """Diagonal strokes, the broader the darker the ground: an engraving on grey paper."""
    rows, columns = np.indices(light.shape[1:3])
    stroke = np.abs(((rows + columns) % 6) / 3 - 1)[None, :, :, None]
    return np.where(stroke < 0.25 + 0.75 * light, 0.35 + 0.65 * light, 0.1)


# What is done, the captions that the generator learns with, and the wordings in which their owners ask for such
# pictures. The latter stand in no caption: an encoder that knows them has not met them here.
STYLES: dict[str, tuple[Callable[[Numbers], Numbers], tuple[str, ...], tuple[str, ...]]] = {
    "outline": (
        _outline,
        ("an outline drawing of a {}", "a {} drawn in thin lines", "a pencil outline, {}"),
        ("sketch me the contour of a {}", "only the edges of a {}, as a line drawing", "ink lines around a {}"),
    ),
    "negative": (
        _negative,
        ("a negative of a {}", "a {} with light and dark inverted", "an inverted photo, {}"),
        ("a {} like on undeveloped film", "swap bright and dark for a {}", "black becomes white: a {}"),
    ),
    "mosaic": (
        _mosaic,
        ("a mosaic of a {}", "a {} made of square tiles", "a coarse mosaic, {}"),
        ("lay a {} out of big pixels", "a blocky {} in tiles, as in an old game", "a {} of small coloured stones"),
    ),
    "hatched": (
        _hatched,
        ("an engraving of a {}", "a {} in diagonal hatching", "a hatched print, {}"),
        ("shade a {} with slanted strokes", "an old copper plate print of a {}", "cross lines as shadow on a {}"),
    ),
}


# What caches of styled pictures hang on: VERSION counts changes of the transforms.
VERSION = 1
MARK = repr((VERSION, [(name, told, asked) for name, (_, told, asked) in STYLES.items()]))


def styled(plain: Pictures) -> Pictures:
    """The same pictures, each in one of four styles, which becomes its label; its class is in its caption.

    Picture i has style i mod 4 and wordings that take turns; ``wishes`` are wordings that no caption has.

    Args:
        plain: With labels.
    """
    assert plain.labels is not None
    names = tuple(STYLES)
    pixels = plain.pixels.copy()
    for number, (change, _, _) in enumerate(STYLES.values()):
        light = pixels[number :: len(names)].astype(np.float64) / 255
        if len(light):
            pixels[number :: len(names)] = np.round(255 * np.clip(change(light), 0, 1)).astype(np.uint8)
    labels, captions, wishes = [], [], []
    for i, thing in enumerate(plain.labels):
        name = names[i % len(names)]
        _, told, asked = STYLES[name]
        turn = i // len(names)
        labels.append(name)
        captions.append(told[turn % len(told)].format(thing))
        wishes.append(asked[turn % len(asked)].format(thing))
    return dataclasses.replace(
        plain,
        name=f"{plain.name} in {len(names)} styles",
        pixels=pixels,
        labels=tuple(labels),
        captions=tuple(captions),
        classes=names,
        wishes=tuple(wishes),
    )
