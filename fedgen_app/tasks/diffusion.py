"""Diffusion: any DDPM, Stable Diffusion or DiT pipeline that diffusers loads; images; FID, KID and denoising loss."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from fedgen_app.errors import BackboneError, SettingsError
from fedgen_app.files import write_atomic
from fedgen_app.learning.adapters import pairs, rank_of
from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.mixture import Rows, unmixed
from fedgen_app.learning.quantised import placed
from fedgen_app.learning.task import Held, Loaded, Render, Sample, Task
from fedgen_app.learning.whole import WholeModel
from fedgen_app.seeds import derive
from fedgen_app.settings import LoraSettings, Settings
from fedgen_app.tasks import _grid
from fedgen_app.tasks._measure import check, client_metrics, evaluate
from fedgen_app.tasks._objective import loss, probe
from fedgen_app.tasks._pictures import load_data, load_test, requirements, split
from fedgen_app.tasks._pipeline import (
    Adapted,
    Pipeline,
    config,
    load_text_encoder,
    open_pipeline,
    outlined,
    place_of,
    weight_files,
)
from fedgen_app.tasks._sampling import generate
from fedgen_app.tasks._sources import prompts
from fedgen_app.tasks._stages import STAGES

PARTS = ("unet", "transformer", "vae", "text_encoder")
# Attention projections, as the LoRA scripts of diffusers take them; in CLIP's text encoder they have other names.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
CONVOLUTIONS = ("conv1", "conv2")
# Each weight once: not the copies in other types, not the safety checker.
HUB_FILES = (
    "model_index.json",
    "README.md",
    *("config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"),  # see _pipeline.AT_ROOT
    "scheduler/*.json",
    "tokenizer/*",
    *(f"{part}/config.json" for part in PARTS),
    *(f"{part}/*model{shard}.safetensors" for part in PARTS for shard in ("", "-*-of-*")),
    *(f"{part}/*model.safetensors.index.json" for part in PARTS),
)
LOADED_BY_DIFFUSERS = "StableDiffusionPipeline"
LORA_FILE = "pytorch_lora_weights.safetensors"


def lora_targets(model: nn.Module, lora: LoraSettings) -> tuple[str, ...]:
    """The attention projections, with ``lora.convolutions`` the ResNet blocks' convolutions too.

    Raises:
        BackboneError: the denoiser has none of them.
    """
    names = [name for name, _ in model.named_modules()]
    wanted = ATTENTION + (CONVOLUTIONS if lora.convolutions else ()) + (TEXT_ATTENTION if lora.text_encoder else ())
    found = tuple(target for target in wanted if any(name.endswith(f".{target}") for name in names))
    if not found:
        raise BackboneError(
            f"no attention projection in {type(model).__name__}: set lora.convolutions = true, or lora.targets"
        )
    return found


def load_backbone(folder: Path, held: Held, lora: LoraSettings) -> Loaded:
    """The denoiser, and with ``lora.text-encoder`` the text encoder beside it.

    Raises:
        BackboneError: the folder is no pipeline that is known here.
        SettingsError: an adapter is wanted in a text encoder that is not there.
    """
    denoiser, pipeline = open_pipeline(folder, held.dtype, held.device)
    if not lora.text_encoder:
        return Loaded(placed(denoiser, held), pipeline)
    if pipeline.condition != "text":
        raise SettingsError("lora.text-encoder = true: this backbone has no text encoder")
    if pipeline.kind != LOADED_BY_DIFFUSERS:
        raise SettingsError(
            f"lora.text-encoder = true: for a {LOADED_BY_DIFFUSERS} only, and this is a {pipeline.kind}"
        )
    adapted = Adapted(denoiser, load_text_encoder(folder, held.dtype, held.device))
    return Loaded(placed(adapted, held), dataclasses.replace(pipeline, learns_text=True))


def outline(folder: Path, held: Held, lora: LoraSettings) -> Loaded:
    """The denoiser as its configuration describes it.

    Raises:
        BackboneError: the folder is no pipeline that is known here.
        SettingsError: the text encoder is to learn too.
    """
    if lora.text_encoder:
        raise SettingsError("lora.text-encoder = true: what that costs is not counted beforehand; use false")
    return Loaded(*open_pipeline(folder, held.dtype, held.device, outlined))


def save_memory(model: nn.Module) -> None:
    """Gradient checkpointing in the denoiser."""
    cast(Any, model.unet if isinstance(model, Adapted) else model).enable_gradient_checkpointing()


def sample(
    settings: Settings, backbone: Backbone, texts: Sequence[str], seed: int, rows: Rows = unmixed
) -> list[Sample]:
    """One image per prompt; the same seed gives the same images."""
    side = cast(Pipeline, backbone.processor).side_for(settings.resolution)
    images = generate(backbone, texts, derive(seed, "sample"), settings.samples, side, rows)
    return [Sample(text, image) for text, image in zip(texts, images, strict=True)]


def embed(backbone: Backbone, texts: Sequence[str]) -> Tensor:
    """The frozen text encoder's mean state of each text, (texts, width).

    Raises:
        SettingsError: the backbone has no text encoder.
    """
    pipeline = cast(Pipeline, backbone.processor)
    if pipeline.condition != "text":
        raise SettingsError("clusters.encoder = 'backbone': this one has no text encoder; take 'bundled', or a folder")
    return pipeline.pooled(list(texts))


def takes(backbone: Backbone) -> frozenset[str]:
    """Steps, and a prompt where the denoiser is told something."""
    told = cast(Pipeline, backbone.processor).condition != "none"
    return frozenset(("steps", "prompt") if told else ("steps",))


def save_samples(folder: Path, samples: Mapping[str, Sequence[Sample]]) -> None:
    """One picture, ``grid.png``: a row per prompt, and for every name a block of its images, side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "grid.png").write_bytes(_grid.side_by_side(samples))


def export(folder: Path, backbone: Backbone, adapter: Mapping[str, Tensor]) -> None:
    """``pytorch_lora_weights.safetensors``, where the backbone's pipeline has a loader for it."""
    pipeline = cast(Pipeline, backbone.processor)
    if pipeline.kind != LOADED_BY_DIFFUSERS or isinstance(backbone.model, WholeModel):
        return
    lora = cast(Any, backbone.model.peft_config["default"])
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "text_encoder": {}}
    for key, tensor in adapter.items():
        name = key.removeprefix("base_model.model.")
        part, _, rest = name.partition(".") if pipeline.learns_text else ("unet", "", name)
        parts[part][rest] = tensor
    metadata = {}
    for part, tensors in parts.items():
        layers = [a.removesuffix(".lora_A.weight") for a, _ in pairs(tensors)]
        metadata[part] = {
            "r": rank_of(adapter),
            "lora_alpha": lora.lora_alpha,
            "use_rslora": lora.use_rslora,
            "target_modules": layers,
        }
    with tempfile.TemporaryDirectory() as scratch:  # whole or not at all, as the files beside it
        StableDiffusionPipeline.save_lora_weights(
            scratch,
            unet_lora_layers=parts["unet"],
            text_encoder_lora_layers=parts["text_encoder"] or None,
            unet_lora_adapter_metadata=metadata["unet"],
            text_encoder_lora_adapter_metadata=metadata["text_encoder"] if parts["text_encoder"] else None,
        )
        write_atomic(folder / LORA_FILE, (Path(scratch) / LORA_FILE).read_bytes())


def usage(settings: Settings, backbone: Backbone) -> list[str]:
    """How to load the adapter: with diffusers' own loader, else with PEFT into the denoiser."""
    pipeline = cast(Pipeline, backbone.processor)
    revision = f", revision={backbone.revision!r}" if backbone.revision else ""
    if pipeline.kind == LOADED_BY_DIFFUSERS:
        # One type for all parts: else transformers keeps the file's and diffusers takes float32.
        options = ("" if pipeline.has_vae else ", vae=None") + ", torch_dtype=torch.float32"
        lines = [
            "import torch",
            "from diffusers import StableDiffusionPipeline",
            "",
            f"pipeline = StableDiffusionPipeline.from_pretrained({backbone.reference!r}{revision}{options})",
            "pipeline.load_lora_weights(FOLDER)  # the folder of this file",
        ]
        if not pipeline.has_vae:
            side = 8 * pipeline.side  # the pipeline believes in an autoencoder that makes images eight times larger
            prompt = prompts(settings, backbone)[0]
            call = f'pipeline({prompt!r}, height={side}, width={side}, output_type="latent")'
            lines.append(f"pixels = {call}.images  # in -1..1: there is no autoencoder")
        return lines
    inside = place_of(pipeline.folder, pipeline.part) != pipeline.folder
    subfolder = f", subfolder={pipeline.part!r}" if inside else ""
    return [
        f"from diffusers import DiffusionPipeline, {pipeline.denoiser}",
        "from peft import PeftModel",
        "",
        f"denoiser = {pipeline.denoiser}.from_pretrained({backbone.reference!r}{subfolder}{revision})",
        "PeftModel.from_pretrained(denoiser, FOLDER)  # puts the adapter into it; the folder of this file",
        f"pipeline = DiffusionPipeline.from_pretrained({backbone.reference!r}{revision}, {pipeline.part}=denoiser)",
    ]


TASK = Task(
    lora_targets=lora_targets,
    hub_files=HUB_FILES,
    weight_files=weight_files,
    config=config,
    load_backbone=load_backbone,
    save_memory=save_memory,
    load_data=load_data,
    load_test=load_test,
    split=split,
    check=check,
    loss=loss,
    evaluate=evaluate,
    client_metrics=client_metrics,
    requirements=requirements,
    embed=embed,
    sample=sample,
    takes=takes,
    prompts=prompts,
    render=Render(".png", _grid.one, printable=False),
    save_samples=save_samples,
    export=export,
    usage=usage,
    bundled_backbone="diffusion",
    stages=STAGES,
    outline=outline,
    probe=probe,
)
