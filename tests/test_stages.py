"""Drawing in stages: one after the other they are the whole, wherever the cut is."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import image_settings, loud

from fedgen_app.errors import DataError
from fedgen_app.learning.backbone import open_backbone
from fedgen_app.tasks.diffusion import TASK
from fedgen_app.tasks.vae import TASK as VAE

STAGES: Any = TASK.stages
TEXTS = ["a photo of a disc", "a photo of a cross", "a photo of a disc"]


@pytest.mark.parametrize("split", [1, 3, 6])
@pytest.mark.parametrize(("kind", "guidance"), [("text", 1.0), ("text", 3.0), ("latent", 3.0), ("text-encoder", 3.0)])
def test_a_cut_anywhere_changes_nothing(kind: str, guidance: float, split: int) -> None:
    changes: dict[str, Any] = {"lora__text_encoder": kind == "text-encoder", "samples__guidance": guidance}
    name = "latent" if kind == "text-encoder" else kind
    settings = image_settings(name, samples__steps=7, samples__batch=2, **changes)
    backbone = loud(name, **changes)
    whole = TASK.sample(settings, backbone, TEXTS, 11)
    shapes = STAGES.shapes(settings, backbone)
    encoded, noise = STAGES.encode(backbone, TEXTS), STAGES.noise(settings, backbone, len(TEXTS), 11)
    assert encoded.shape == (3, *shapes.prompt) and noise.shape == (3, *shapes.latent)
    half = STAGES.advance(settings, backbone, encoded, noise, 0, split)
    done = STAGES.advance(settings, backbone, encoded, half, split, 7)
    straight = STAGES.advance(settings, backbone, encoded, noise, 0, 7)
    assert torch.equal(done, straight)
    for sample, image in zip(whole, STAGES.finish(backbone, done), strict=True):
        assert np.abs(sample.content.astype(int) - image).max() <= 1  # a text encoder's batch is another one
    assert not torch.allclose(half, done, atol=0.01)


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver"])
def test_a_count_of_steps_that_floats_miss_is_kept(sampler: str) -> None:
    settings, backbone = image_settings("text", samples__steps=29, samples__sampler=sampler), loud("text")
    (whole,) = TASK.sample(settings, backbone, TEXTS[:1], 11)
    reached = STAGES.noise(settings, backbone, 1, 11)
    for begin, end in ((0, 20), (20, 29)) if sampler == "ddim" else ((0, 29),):
        reached = STAGES.advance(settings, backbone, STAGES.encode(backbone, TEXTS[:1]), reached, begin, end)
    assert np.abs(whole.content.astype(int) - STAGES.finish(backbone, reached)[0]).max() <= 1


def test_pictures_survive_their_packing() -> None:
    for kind, channels in (("text", 1), ("latent", 3)):
        settings, backbone = image_settings(kind), open_backbone(image_settings(kind))
        draw = np.random.default_rng(0)
        images = list(draw.integers(0, 256, (3, 16, 16, channels), np.uint8))
        data = STAGES.pack(images)
        assert all(map(np.array_equal, STAGES.unpack(settings, backbone, data, 3), images))
        huge = bytearray(data)
        huge[16:24] = struct.pack(">II", 60_000, 60_000)  # width and height
        huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
        jpeg = io.BytesIO()
        Image.open(io.BytesIO(data)).save(jpeg, "jpeg")
        for wrong, count in (
            (data, 2),
            (data[:-30], 3),
            (b"", 3),
            (b"a text", 3),
            (jpeg.getvalue(), 3),
            (bytes(huge), 3),
        ):
            with pytest.raises(DataError, match="picture"):
                STAGES.unpack(settings, backbone, wrong, count)


def test_only_hidden_states_hide_a_prompt() -> None:
    for kind in ("text", "latent"):
        assert STAGES.hides(open_backbone(image_settings(kind)))
    for kind in ("classes", "dit", "unconditional"):
        assert not STAGES.hides(open_backbone(image_settings(kind)))
    assert VAE.stages is None
