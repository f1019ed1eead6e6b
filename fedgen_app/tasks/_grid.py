"""Generated images as one PNG: a row per prompt, blocks side by side."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fedgen_app.learning.task import Sample

LEAST_SIDE = 64  # pixels: smaller images are shown larger, by whole factors, without smoothing
GAP = 2  # between images
BETWEEN = 12  # between blocks
LINE = 16  # height of a heading
FONT = 12
CAPTION = 40  # characters of a prompt that are shown


def one(samples: Sequence[Sample]) -> bytes:
    """A PNG of the images, those of one prompt in one row."""
    return side_by_side({"": samples})


def side_by_side(blocks: Mapping[str, Sequence[Sample]]) -> bytes:
    """A PNG of several blocks of the same prompts, each under its name, with the prompts on the left.

    Samples of one prompt that stand one after the other share a row.
    """
    rows = {name: _rows(samples) for name, samples in blocks.items()}
    first = next(iter(rows.values()))
    height, width = first[0][1][0].shape[:2]
    scale = max(1, -(-LEAST_SIDE // min(height, width)))
    cell_width, cell_height = width * scale + GAP, height * scale + GAP
    font = ImageFont.load_default(FONT)
    texts = [_shown(prompt) for prompt, _ in first]
    margin = 8 + max((round(font.getlength(text)) for text in texts), default=0)
    head = LINE if any(blocks) else 0
    columns = {name: max(len(images) for _, images in found) for name, found in rows.items()}
    whole = margin + sum(count * cell_width + BETWEEN for count in columns.values())
    page = Image.new("RGB", (whole, head + len(first) * cell_height), "white")
    pen = ImageDraw.Draw(page)
    for row, text in enumerate(texts):
        pen.text((4, head + row * cell_height + (cell_height - FONT) // 2), text, "black", font)
    left = margin
    for name, found in rows.items():
        pen.text((left, 0), name, "black", font)
        for row, (_, images) in enumerate(found):
            for column, pixels in enumerate(images):
                picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
                enlarged = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
                page.paste(enlarged, (left + column * cell_width, head + row * cell_height))
        left += columns[name] * cell_width + BETWEEN
    target = io.BytesIO()
    page.save(target, "png")
    return target.getvalue()


def _rows(samples: Sequence[Sample]) -> list[tuple[str, list[np.ndarray]]]:
    """Prompts with their images, in order; without prompts, rows of ten."""
    if not any(sample.prompt for sample in samples):
        images = [sample.content for sample in samples]
        return [("", images[start : start + 10]) for start in range(0, len(images), 10)]
    rows: list[tuple[str, list[np.ndarray]]] = []
    for sample in samples:
        if not rows or rows[-1][0] != sample.prompt:
            rows.append((sample.prompt, []))
        rows[-1][1].append(sample.content)
    return rows


def _shown(prompt: str) -> str:
    printable = "".join(character if character.isprintable() else "?" for character in prompt)
    return printable if len(printable) <= CAPTION else printable[: CAPTION - 1] + "…"
