"""The picture of samples: its size, where an image lies in it, and prompts that are shown."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from fedgen_app.learning.task import Sample
from fedgen_app.tasks._grid import BETWEEN, GAP, LEAST_SIDE, LINE, one, side_by_side


def drawn(prompts: Sequence[str], side: int = 16, channels: int = 1, start: int = 0) -> list[Sample]:
    """Images of one level each, counted up by ten."""
    levels = range(start, start + 10 * len(prompts), 10)
    return [Sample(p, np.full((side, side, channels), n, np.uint8)) for p, n in zip(prompts, levels, strict=True)]


def opened(png: bytes) -> Image.Image:
    assert png.startswith(b"\x89PNG")
    return Image.open(io.BytesIO(png)).convert("RGB")


def margin(page: Image.Image, columns: int, side: int = LEAST_SIDE) -> int:
    """What is left of the images."""
    return page.width - columns * (side + GAP) - BETWEEN


def test_images_of_one_prompt_stand_in_one_row() -> None:
    page = opened(one(drawn(["a disc", "a disc", "a cross", "a cross"])))
    assert page.height == 2 * (LEAST_SIDE + GAP)
    left = margin(page, 2)
    assert left > 8
    for row, column, level in ((0, 0, 0), (0, 1, 10), (1, 0, 20), (1, 1, 30)):
        corner = (left + column * (LEAST_SIDE + GAP), row * (LEAST_SIDE + GAP))
        for x, y in (corner, (corner[0] + LEAST_SIDE - 1, corner[1] + LEAST_SIDE - 1)):
            assert page.getpixel((x, y)) == (level,) * 3
        assert page.getpixel((corner[0] + LEAST_SIDE, corner[1])) == (255,) * 3, "a gap"


def test_blocks_stand_side_by_side_under_their_names() -> None:
    texts = ["a disc", "a cross", "a square"]
    blocks = {"frozen": drawn(texts), "global": drawn(texts, start=100), "client-0": drawn(texts, start=200)}
    page = opened(side_by_side(blocks))
    assert page.height == LINE + 3 * (LEAST_SIDE + GAP)
    left = page.width - 3 * (LEAST_SIDE + GAP + BETWEEN)
    for block, level in enumerate((0, 100, 200)):
        x = left + block * (LEAST_SIDE + GAP + BETWEEN)
        for row in range(3):
            assert page.getpixel((x + 5, LINE + row * (LEAST_SIDE + GAP) + 5)) == (level + 10 * row,) * 3
        heading = np.asarray(page.crop((x, 0, x + LEAST_SIDE, LINE)))
        assert heading.min() < 128, "no name above the block"
    prompts = np.asarray(page.crop((0, LINE, left, page.height)))
    assert prompts.min() < 128, "no prompts on the left"


def test_images_without_prompts_stand_in_rows_of_ten() -> None:
    page = opened(one(drawn([""] * 23)))
    assert page.height == 3 * (LEAST_SIDE + GAP)
    left = margin(page, 10)
    for number in (0, 9, 10, 22):
        x, y = left + number % 10 * (LEAST_SIDE + GAP), number // 10 * (LEAST_SIDE + GAP)
        assert page.getpixel((x, y)) == (10 * number,) * 3


@pytest.mark.parametrize(("side", "shown"), [(8, 64), (16, 64), (40, 80), (64, 64), (100, 100)])
def test_small_images_are_enlarged_by_whole_factors(side: int, shown: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    page = opened(one([Sample("a disc", pixels)]))
    assert page.height == shown + GAP
    left = margin(page, 1, shown)
    found = np.asarray(page.crop((left, 0, left + shown, shown)))
    assert np.array_equal(found, pixels.repeat(shown // side, 0).repeat(shown // side, 1))


def test_a_long_or_unprintable_prompt_neither_fails_nor_fills_the_page() -> None:
    short = opened(one(drawn(["x" * 40]))).width
    assert opened(one(drawn(["x" * 4000]))).width <= short + 10
    for prompt in ("a\nb\x00\u202e", "素描 🎨", "\ud800"):
        assert opened(one(drawn([prompt]))).height == LEAST_SIDE + GAP


def test_the_same_samples_give_the_same_bytes() -> None:
    assert one(drawn(["a disc", "a cross"])) == one(drawn(["a disc", "a cross"]))
