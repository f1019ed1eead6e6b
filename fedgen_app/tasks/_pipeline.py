"""A diffusers folder by what its components are: the denoiser, and what turns images and prompts into its inputs."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel
from transformers.utils import logging as transformers_logging

from fedgen_app.errors import BackboneError, SettingsError
from fedgen_app.learning.backbone import facts_of
from fedgen_app.learning.encoder import mean_of_tokens

Condition = Literal["none", "class", "text"]

INDEX = "model_index.json"
DENOISERS = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
PREDICTIONS = ("epsilon", "v_prediction", "sample")  # what a denoiser may have learned to tell
# The parts that generating needs, and where each describes itself; a tokenizer's files all do.
CONFIG = {
    **dict.fromkeys(("unet", "transformer", "vae", "text_encoder"), "config.json"),
    "scheduler": "scheduler_config.json",
    "tokenizer": "*",
}
# Copies of the same weights in other types, and parts that are no part of generating.
OTHER_COPIES = (".fp16", ".bf16", "non_ema", "safety_checker", "flax", "openvino")
HALF = re.compile(r"\.(fp|bf)16|\.?non_ema")
DESCRIBED = (".json", ".txt", ".model")  # endings of what a tokenizer is made of
# What the oldest pipelines, such as google/ddpm-cifar10-32, have in no folder of its own.
AT_ROOT = ("unet", "scheduler")
ENCODED = 64  # prompts per forward pass of a text encoder


class Adapted(nn.Module):
    """UNet and text encoder as one module: what carries the adapter where both of them learn."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder


@dataclass(frozen=True, eq=False)
class Pipeline:
    """What belongs to a denoiser.

    Attributes:
        kind: The class that model_index.json names, such as ``StableDiffusionPipeline``.
        denoiser: The denoiser's class.
        part: The denoiser's place in the folder: ``unet`` or ``transformer``.
        condition: What the denoiser is told beside the noisy image.
        channels: Of the denoiser's input.
        side: Height and width of the denoiser's input that it was made for.
        classes: Names of the classes, where the folder has them; the class of no class is ``len`` of all classes.
        class_count: Number of classes; 0 without.
        schedule: The scheduler's configuration.
        learns_text: The text encoder carries an adapter as well; prompts are then embedded in every step.
    """

    folder: Path
    kind: str
    denoiser: str
    part: str
    condition: Condition
    channels: int
    side: int
    levels: int
    class_count: int
    classes: tuple[str, ...]
    schedule: dict[str, Any]
    has_vae: bool
    device: torch.device
    dtype: torch.dtype
    learns_text: bool = False

    @functools.cached_property
    def noise(self) -> Any:
        """The forward process, with the betas and the prediction of the folder's scheduler, whatever its class."""
        return cast(Any, DDPMScheduler).from_config(self.schedule)

    @functools.cached_property
    def vae(self) -> Any:
        """The autoencoder, loaded when first needed: the training loop never does."""
        return _component(AutoencoderKL, self.folder, "vae", self.dtype, self.device)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the prompts."""
        return _described(self.folder, "tokenizer", lambda f: AutoTokenizer.from_pretrained(f, local_files_only=True))

    @functools.cached_property
    def text_encoder(self) -> nn.Module:
        """The frozen text encoder, loaded when first needed."""
        return load_text_encoder(self.folder, self.dtype, self.device)

    @functools.cached_property
    def latent(self) -> dict[str, float]:
        """Channels, factor, shift and downscaling of the latents; read without loading the autoencoder."""
        config = _facts(self.folder, "vae", "config.json")
        return {
            "channels": int(config.get("latent_channels") or 4),
            "factor": float(config.get("scaling_factor") or 0.18215),
            "shift": float(config.get("shift_factor") or 0.0),
            "downscaling": 2 ** (len(config["block_out_channels"]) - 1),
        }

    @property
    def image_channels(self) -> int:
        """Of the images: 3 where an autoencoder makes them, else the denoiser's own."""
        return 3 if self.has_vae else self.channels

    @property
    def resolution(self) -> int:
        """Side of the images that the backbone was made for, in pixels."""
        return self.side * (int(self.latent["downscaling"]) if self.has_vae else 1)

    def side_for(self, resolution: int) -> int:
        """Side of the denoiser's input for images of ``resolution`` pixels (0: as it was made for).

        Raises:
            SettingsError: the denoiser cannot take such images.
        """
        if not resolution or resolution == self.resolution:
            return self.side
        if self.denoiser == "DiTTransformer2DModel":
            raise SettingsError(f"resolution = {resolution}: this DiT takes {self.resolution} only; 0 says that")
        step = (int(self.latent["downscaling"]) if self.has_vae else 1) * 2 ** (self.levels - 1)
        if resolution % step:
            raise SettingsError(f"resolution = {resolution}: should be a multiple of {step} for this backbone")
        return resolution // (int(self.latent["downscaling"]) if self.has_vae else 1)

    def tokens(self, prompts: list[str]) -> Tensor:
        """Token ids, (prompts, length) int64; longer prompts are cut."""
        length = self.tokenizer.model_max_length
        limit = int(_facts(self.folder, "text_encoder", "config.json")["max_position_embeddings"])
        encoded = self.tokenizer(
            prompts, padding="max_length", max_length=min(length, limit), truncation=True, return_tensors="pt"
        )
        return cast(Tensor, encoded.input_ids)

    @torch.inference_mode()
    def embed(self, prompts: list[str]) -> Tensor:
        """Hidden states of the frozen text encoder, (prompts, length, width) float32 on the CPU."""
        pieces = torch.split(self.tokens(prompts), ENCODED)
        return torch.cat([self.text_encoder(p.to(self.device)).last_hidden_state.float().cpu() for p in pieces])

    @torch.inference_mode()
    def pooled(self, prompts: list[str]) -> Tensor:
        """Mean of the frozen text encoder's hidden states over a prompt's own tokens, (prompts, width)."""
        hidden, width = self.embed(prompts), self.tokens(prompts[:1]).shape[1]
        used = [len(self.tokenizer(text, truncation=True, max_length=width).input_ids) for text in prompts]
        return mean_of_tokens(hidden, (torch.arange(width)[None] < torch.tensor(used)[:, None]).long())

    def class_of(self, label: str) -> int:
        """The number of a class from its name or its number.

        Raises:
            SettingsError: the backbone has no such class.
        """
        if label in self.classes:
            return self.classes.index(label)
        for number, names in enumerate(self.classes):  # ImageNet's have several: "tench, Tinca tinca"
            if label in map(str.strip, names.split(",")):
                return number
        if label.isdecimal() and int(label) < self.class_count:
            return int(label)
        some = ", ".join(self.classes[:5]) or f"0 to {self.class_count - 1}"
        raise SettingsError(f"label {label!r} is no class of this backbone; it knows {some}")


def place_of(folder: Path, part: str) -> Path:
    """Where a part of a pipeline lies: in a folder of its name, else, as diffusers has it, in the pipeline's."""
    own = folder / part
    return folder if part in AT_ROOT and not own.is_dir() else own


def _described(folder: Path, part: str, load: Any) -> Any:
    try:
        return load(place_of(folder, part))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise BackboneError(f"{folder / part}: cannot be loaded: {first}") from None


def _facts(folder: Path, part: str, name: str) -> dict[str, Any]:
    """A component's configuration."""
    found: dict[str, Any] = _described(folder, part, lambda f: json.loads((f / name).read_text(encoding="utf-8")))
    return found


def _component(kind: Any, folder: Path, part: str, dtype: torch.dtype, device: torch.device) -> Any:
    load = functools.partial(kind.from_pretrained, torch_dtype=dtype, use_safetensors=True, local_files_only=True)
    return _described(folder, part, load).requires_grad_(False).eval().to(device)


def load_text_encoder(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A frozen CLIP text encoder."""

    def load(place: Path) -> nn.Module:
        cast(Any, transformers_logging).disable_progress_bar()
        return cast(
            nn.Module,
            CLIPTextModel.from_pretrained(place, dtype=dtype, use_safetensors=True, local_files_only=True),
        )

    encoder: nn.Module = _described(folder, "text_encoder", load)
    return encoder.requires_grad_(False).eval().to(device)


def components(folder: Path) -> dict[str, str]:
    """The parts that model_index.json names and their classes; empty parts left out.

    Raises:
        BackboneError: the folder is no diffusers pipeline.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        named = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[0] is not None}
        return {"pipeline": str(index["_class_name"])} | {part: str(pair[1]) for part, pair in named.items()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BackboneError(f"{folder}: no diffusers pipeline: {INDEX}: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The weights of the parts that generate, each once.

    Raises:
        BackboneError: a part's weights are there as another copy only.
    """
    parts = components(folder)
    found: list[Path] = []
    for part in sorted(parts):
        at_root = part == "unet" and place_of(folder, part) == folder
        pattern = "diffusion_pytorch_model*.safetensors" if at_root else f"{part}/*.safetensors"
        files = sorted(folder.glob(pattern))
        plain = [f for f in files if not any(mark in str(f.relative_to(folder)) for mark in OTHER_COPIES)]
        if files and not plain and part in CONFIG:
            name = files[0].name
            raise BackboneError(
                f"{folder}: of {part} there is only {name}: rename it to {re.sub(HALF, '', name)}, and so with other "
                "parts; or download the files without such a mark in their names too"
            )
        found += plain
    return found


def config(folder: Path) -> dict[str, object]:
    """What beside the weights decides what is generated: the kinds of the parts, their configurations, the classes."""
    parts = components(folder)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    named = {part: kind for part, kind in parts.items() if part in CONFIG or part == "pipeline"}
    files = [f for part in named if part in CONFIG for f in sorted(place_of(folder, part).glob(CONFIG[part]))]
    facts = {str(f.relative_to(folder)): facts_of(f) for f in files if f.suffix in DESCRIBED}
    return {INDEX: [named, index.get("id2label")], **facts}


def outlined(kind: Any, folder: Path, part: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A part as its configuration describes it, without its weights, on torch's default device."""
    return _described(folder, part, lambda place: kind.from_config(kind.load_config(place)).to(dtype))


def open_pipeline(
    folder: Path, dtype: torch.dtype, device: torch.device, load: Callable[..., Any] = _component
) -> tuple[nn.Module, Pipeline]:
    """The denoiser of a folder and what belongs to it; each component by itself, whatever the pipeline's class.

    Raises:
        BackboneError: the folder is no pipeline, or one of a kind that is not known here.
    """
    parts = components(folder)
    part = next((p for p in ("unet", "transformer") if parts.get(p) in DENOISERS), None)
    if part is None or "scheduler" not in parts:
        found = ", ".join(f"{p} ({kind})" for p, kind in parts.items() if p != "pipeline")
        raise BackboneError(f"{folder}: no denoiser that is known here ({', '.join(DENOISERS)}) among {found}")
    model = load(getattr(diffusers, parts[part]), folder, part, dtype, device)
    condition, classes = _told(folder, parts, part, model.config)
    schedule = _facts(folder, "scheduler", "scheduler_config.json")
    if "beta_schedule" not in schedule and "trained_betas" not in schedule:
        raise BackboneError(f"{folder}: its {parts['scheduler']} has no beta schedule (flow matching?): not known here")
    if schedule.get("prediction_type", "epsilon") not in PREDICTIONS:
        raise BackboneError(
            f"{folder}: its denoiser predicts {schedule['prediction_type']!r}; known here: {', '.join(PREDICTIONS)}"
        )
    pipeline = Pipeline(
        folder=folder,
        kind=parts["pipeline"],
        denoiser=parts[part],
        part=part,
        condition=condition,
        channels=int(model.config["in_channels"]),
        side=_side(model.config.get("sample_size"), folder),
        levels=len(model.config.get("block_out_channels") or (1,)),
        class_count=classes,
        classes=_class_names(folder, classes),
        schedule=schedule,
        has_vae="vae" in parts,
        device=device,
        dtype=dtype,
    )
    if pipeline.has_vae:
        _fits(pipeline, parts["vae"])
    return model, pipeline


def _told(folder: Path, parts: Mapping[str, str], part: str, config: Mapping[str, Any]) -> tuple[Condition, int]:
    """What the denoiser is told beside the noisy image, and how many classes there are."""
    beside = ["addition_embed_type", "encoder_hid_dim_type"]
    if parts[part] == "UNet2DConditionModel":
        beside += ["class_embed_type", "num_class_embeds"]
    if any(config.get(name) for name in beside):
        raise BackboneError(
            f"{folder}: its UNet wants more than a prompt's hidden states (as SDXL's does): not known here"
        )
    if parts[part] == "DiTTransformer2DModel":
        return "class", int(config.get("num_embeds_ada_norm") or 1000)
    if parts[part] == "UNet2DConditionModel":
        if parts.get("text_encoder") != "CLIPTextModel" or "tokenizer" not in parts:
            raise BackboneError(f"{folder}: a UNet2DConditionModel needs a tokenizer and a CLIPTextModel beside it")
        return "text", 0
    classes = int(config.get("num_class_embeds") or 0)
    return ("class" if classes else "none"), classes


def _class_names(folder: Path, count: int) -> tuple[str, ...]:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    names = {int(number): name for number, name in (index.get("id2label") or {}).items()}
    return tuple(str(names.get(number, number)) for number in range(count)) if names else ()


def _fits(pipeline: Pipeline, kind: str) -> None:
    """Whether the autoencoder is one that is known here and makes what the denoiser takes."""
    if kind != "AutoencoderKL":
        raise BackboneError(f"{pipeline.folder}: its autoencoder is a {kind}, not an AutoencoderKL")
    made = int(pipeline.latent["channels"])
    if pipeline.channels != made:
        raise BackboneError(
            f"{pipeline.folder}: its denoiser takes {pipeline.channels} channels, its autoencoder makes {made} "
            "(inpainting?)"
        )


def _side(size: object, folder: Path) -> int:
    if isinstance(size, int) and size > 0:
        return size
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        return int(size[0])
    raise BackboneError(f"{folder}: its denoiser's sample_size is {size!r}, should be one number")
