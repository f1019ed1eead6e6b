"""Tiny diffusers pipelines with random weights, one of each kind, and small image data sets."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from helpers import tiny_config, workspace, write_tokenizer
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from fedgen_app.learning import adapters
from fedgen_app.learning.backbone import Backbone, open_backbone
from fedgen_app.settings import Settings, Value

SIDE = 16  # pixels of every test image
CLASSES = ("disc", "square", "cross")
PROMPT_TOKENS = 16  # "a photo of a disc" is 13 of them; longer prompts are cut


def make_unet(channels: int, width: int, conditional: bool = True, classes: int | None = None) -> torch.nn.Module:
    """Two blocks, the lower one with attention; its last layer is no zero, so that everything it is told matters."""
    if not conditional:
        return UNet2DModel(
            sample_size=SIDE,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=4,
            num_class_embeds=classes,
        )
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def make_vae() -> AutoencoderKL:
    """From 16x16 colour images to 8x8 latents of four channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
        scaling_factor=0.5,
    )


def save_text_parts(folder: Path, width: int) -> None:
    """A tokenizer and a CLIP text encoder."""
    (folder / "tokenizer").mkdir(parents=True)
    size = write_tokenizer(folder / "tokenizer")
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"model_max_length": PROMPT_TOKENS, "pad_token": "<|end|>"})
    )
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=PROMPT_TOKENS,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")


def save_index(folder: Path, unet: torch.nn.Module, scheduler: DDPMScheduler, vae: AutoencoderKL | None) -> None:
    """The folder of a Stable Diffusion pipeline, with or without an autoencoder."""
    index: dict[str, object] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.36.0",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"] if vae else [None, None],
    }
    unet.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    if vae:
        vae.save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text(json.dumps(index))


def make_unconditional(folder: Path) -> None:
    """DDPMPipeline, grey, noise prediction."""
    DDPMPipeline(make_unet(1, 0, conditional=False), DDPMScheduler(100)).save_pretrained(folder)


def make_classes(folder: Path) -> None:
    """DDPMPipeline, grey, told a class by its number."""
    unet = make_unet(1, 0, conditional=False, classes=len(CLASSES))
    DDPMPipeline(unet, DDPMScheduler(100)).save_pretrained(folder)


def make_text(folder: Path) -> None:
    """Text-conditional in pixel space, grey, velocity prediction."""
    save_text_parts(folder, 16)
    schedule = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    save_index(folder, make_unet(1, 16), schedule, None)


def make_latent(folder: Path) -> None:
    """Stable Diffusion: text-conditional in latent space, colour, noise prediction."""
    save_text_parts(folder, 16)
    unet = make_unet(4, 16)
    unet.register_to_config(sample_size=SIDE // 2)
    save_index(folder, unet, DDPMScheduler(100, beta_schedule="scaled_linear", clip_sample=False), make_vae())


def make_dit(folder: Path) -> None:
    """DiT: class-conditional in latent space, with a learned variance."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=SIDE // 2,
        patch_size=2,
        num_embeds_ada_norm=len(CLASSES),
        norm_num_groups=4,
    )
    names = dict(enumerate(CLASSES))
    pipeline = DiTPipeline(transformer, make_vae(), DDIMScheduler(100, clip_sample=False), id2label=names)
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": {str(n): c for n, c in names.items()}}))


MAKERS: dict[str, Callable[[Path], None]] = {
    "unconditional": make_unconditional,
    "classes": make_classes,
    "text": make_text,
    "latent": make_latent,
    "dit": make_dit,
}


@functools.cache
def tiny_pipeline(kind: str) -> Path:
    """The folder of a pipeline, made once; all weights drawn anew, so that no layer is zero."""
    folder = workspace() / f"tiny-{kind}"
    torch.manual_seed(0)
    MAKERS[kind](folder)
    return folder


def draw(label: int, generator: np.random.Generator) -> np.ndarray:
    """A bright shape somewhere in a dark square, (SIDE, SIDE) uint8."""
    y, x = np.mgrid[:SIDE, :SIDE] - generator.integers(6, 10, (2, 1, 1))
    shape = (x**2 + y**2 < 16, np.maximum(abs(x), abs(y)) < 4, np.minimum(abs(x), abs(y)) < 2)[label]
    return np.clip(shape * 180 + generator.normal(30, 10, shape.shape), 0, 255).astype(np.uint8)


def write_images(file: Path, each: int, seed: int) -> None:
    """An .npz file with so many images of every class, in random order."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(len(CLASSES)), each))
    images = np.stack([draw(int(label), generator) for label in labels])
    np.savez(file, images=images, labels=labels, names=np.array(CLASSES))


def class_folders(folder: Path, each: int, broken: int = 0) -> Path:
    """Folders train and test with so many PNGs of every class, and so many files that are none."""
    generator = np.random.default_rng(6)
    for part in ("train", "test"):
        for label, name in enumerate(CLASSES):
            place = folder / part / name
            place.mkdir(parents=True)
            for number in range(each):
                Image.fromarray(draw(label, generator)).save(place / f"{number}.png")
        for number in range(broken):
            (folder / part / CLASSES[0] / f"broken-{number}.png").write_bytes(b"no picture")
    return folder


@functools.cache
def tiny_images() -> Path:
    """A folder with 60 images to train on and 48 to test on."""
    folder = workspace() / "shapes"
    folder.mkdir()
    write_images(folder / "train.npz", 20, 1)
    write_images(folder / "test.npz", 16, 2)
    return folder


def image_config(output: Path, kind: str = "text", **overrides: Value) -> dict[str, Value]:
    """A whole run config of a few seconds; ``kind`` may also be the folder of a pipeline."""
    chosen: dict[str, Value] = {
        "task": "diffusion",
        "backbone": str(tiny_pipeline(kind) if kind in MAKERS else kind),
        "dataset": str(tiny_images()),
        "label_column": "",
        "metrics__samples": 12,
        "metrics__features": "bundled",
        "samples__steps": 3,
        "samples__count": 2,
        "test_sequences": 12,
        "batch_size": 8,
    }
    return tiny_config(output, **(chosen | overrides))


def image_settings(kind: str = "text", **overrides: Value) -> Settings:
    """The same as settings, of a run without a folder."""
    return Settings.from_run_config(image_config(Path(), kind, **overrides))


def loud(kind: str = "text", **overrides: Value) -> Backbone:
    """A backbone with an adapter in it that changes what it draws."""
    opened = open_backbone(image_settings(kind, **overrides))
    generator = torch.Generator().manual_seed(7)
    adapters.write(opened.model, {key: torch.randn(shape, generator=generator) / 4 for key, shape in opened.layout})
    return opened
