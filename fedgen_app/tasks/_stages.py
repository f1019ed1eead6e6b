"""Drawing on two machines: a prompt encoded on one, steps taken on the other, the rest of them on the first again."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedgen_app.errors import DataError
from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.mixture import Rows, unmixed
from fedgen_app.learning.task import Shapes, Stages
from fedgen_app.seeds import derive
from fedgen_app.settings import Settings
from fedgen_app.tasks import _sampling
from fedgen_app.tasks._denoiser import told_of
from fedgen_app.tasks._pipeline import Pipeline


def hides(backbone: Backbone) -> bool:
    """Whether the denoiser is told hidden states: the number of a class is the word itself."""
    return cast(Pipeline, backbone.processor).condition == "text"


def shapes(settings: Settings, backbone: Backbone) -> Shapes:
    """Hidden states of a prompt, the denoiser's input, and an image."""
    pipeline = cast(Pipeline, backbone.processor)
    side = pipeline.side_for(settings.resolution)
    prompt = tuple(encode(backbone, [""]).shape[1:])
    pixels = settings.resolution or pipeline.resolution
    image = (pixels, pixels, pipeline.image_channels)
    return Shapes(prompt, (pipeline.channels, side, side), len(pipeline.noise), image)


@torch.inference_mode()
def encode(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """Hidden states, (texts, length, width) float32 on the CPU; of a text encoder that learns with its adapter."""
    backbone.model.eval()
    return cast(Tensor, told_of(backbone.processor, backbone.model, texts)).float().cpu()


def noise(settings: Settings, backbone: Backbone, count: int, seed: int) -> Tensor:
    """What ``diffusion.sample`` begins with."""
    pipeline = cast(Pipeline, backbone.processor)
    return _sampling.noise(pipeline, count, derive(seed, "sample"), pipeline.side_for(settings.resolution))


def advance(
    settings: Settings,
    backbone: Backbone,
    encoded: Tensor,
    current: Tensor,
    begin: int,
    end: int,
    rows: Rows = unmixed,
) -> Tensor:
    """Steps of DDIM without noise of its own, which depend on nothing before them; from the noise also the others'."""
    return _sampling.advance(backbone, encoded, current, settings.samples, begin, end, rows)


@torch.inference_mode()
def finish(backbone: Backbone, current: Tensor) -> list[Any]:
    """Images (h, w, channels) uint8."""
    pipeline = cast(Pipeline, backbone.processor)
    return list(_sampling.to_pixels(pipeline, current.to(pipeline.device)))


def pack(images: Sequence[Any]) -> bytes:
    """One PNG, the images one below the other."""
    column = np.concatenate(images)
    target = io.BytesIO()
    Image.fromarray(column[..., 0] if column.shape[2] == 1 else column).save(target, "png")
    return target.getvalue()


def unpack(settings: Settings, backbone: Backbone, data: bytes, count: int) -> list[Any]:
    """So many images of the backbone's size.

    Raises:
        DataError: the bytes are none.
    """
    pipeline = cast(Pipeline, backbone.processor)
    side, channels = settings.resolution or pipeline.resolution, pipeline.image_channels
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            # Before anything of a claimed size is allocated.
            if picture.size != (side, side * count) or picture.mode != {1: "L", 3: "RGB"}[channels]:
                raise DataError(f"a picture of {picture.size} pixels, not {count} of {side}x{side}")
            column = np.asarray(picture).reshape(count, side, side, channels)
    # What Pillow says of a file that is none, or is damaged, or claims to be huge.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"not a picture: {type(error).__name__}") from None
    return list(column)


STAGES = Stages(hides, shapes, encode, noise, advance, finish, pack, unpack)
