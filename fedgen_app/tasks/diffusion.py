"""Diffusion: any DDPM, Stable Diffusion or DiT pipeline that diffusers loads; images; FID, KID and denoising loss."""

from __future__ import annotations

import dataclasses
import functools
import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedgen_app.errors import BackboneError, MetricError, SettingsError
from fedgen_app.files import write_atomic
from fedgen_app.learning.adapters import pairs
from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.task import Batch, Examples, Loaded, Loss, Metrics, Render, Sample, Task
from fedgen_app.runs.progress import step_bar
from fedgen_app.seeds import derive
from fedgen_app.settings import LoraSettings, SampleSettings, Settings
from fedgen_app.tasks import _grid
from fedgen_app.tasks._pictures import Reference, load_data, load_test, prompts, split
from fedgen_app.tasks._pipeline import Adapted, Pipeline, load_text_encoder, open_pipeline, place_of, weight_files

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
MEASURED_ROWS = 64  # per forward pass of an evaluation
PLAIN_PLACES = 256  # at most: attention over so few may keep the products of all pairs
LEAST_DRAWS = 512  # of noise in an evaluation: a small hold-out is measured several times over
log = logging.getLogger(__name__)
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


def load_backbone(folder: Path, dtype: torch.dtype, device: torch.device, lora: LoraSettings) -> Loaded:
    """The denoiser, and with ``lora.text-encoder`` the text encoder beside it.

    Raises:
        BackboneError: the folder is no pipeline that is known here.
        SettingsError: an adapter is wanted in a text encoder that is not there.
    """
    denoiser, pipeline = open_pipeline(folder, dtype, device)
    if not lora.text_encoder:
        return Loaded(denoiser, pipeline)
    if pipeline.condition != "text":
        raise SettingsError("lora.text-encoder = true: this backbone has no text encoder")
    if pipeline.kind != LOADED_BY_DIFFUSERS:
        raise SettingsError(
            f"lora.text-encoder = true: for a {LOADED_BY_DIFFUSERS} only, and this is a {pipeline.kind}"
        )
    adapted = Adapted(denoiser, load_text_encoder(folder, dtype, device))
    return Loaded(adapted, dataclasses.replace(pipeline, learns_text=True))


def save_memory(model: nn.Module) -> None:
    """Gradient checkpointing in the denoiser."""
    cast(Any, model.unet if isinstance(model, Adapted) else model).enable_gradient_checkpointing()


def predict(pipeline: Pipeline, model: nn.Module, noisy: Tensor, timesteps: Tensor, told: Tensor | None) -> Tensor:
    """What the denoiser says of noisy inputs, (n, channels, side, side) float32.

    Args:
        told: Hidden states (n, length, width), class numbers (n,), or None, as ``pipeline.condition`` has it.
    """
    network = cast(Any, model.unet if pipeline.learns_text else model)
    inputs = noisy.to(pipeline.dtype)
    if pipeline.condition == "text":
        assert told is not None
        output = network(inputs, timesteps, encoder_hidden_states=told.to(pipeline.dtype)).sample
    elif pipeline.condition == "class":
        output = network(inputs, timestep=timesteps, class_labels=told).sample
    else:
        output = network(inputs, timesteps).sample
    # A denoiser that learned its variance says it in further channels, which the samplers here do not use.
    return cast(Tensor, output[:, : pipeline.channels].float())


def _told(pipeline: Pipeline, model: nn.Module, batch: Batch, numbers: Tensor | None) -> Tensor | None:
    """What the denoiser is told: numbers of captions looked up, or encoded where the text encoder learns."""
    if numbers is None or pipeline.condition != "text":
        return numbers
    if not pipeline.learns_text:
        return batch["hidden"][numbers]
    distinct, place = torch.unique(numbers, return_inverse=True)
    encoder = cast(Any, model).text_encoder
    return cast(Tensor, encoder(batch["tokens"][distinct]).last_hidden_state[place])


def _clean(pipeline: Pipeline, batch: Batch, noise: torch.Generator) -> Tensor:
    """The denoiser's noise-free input: pixels in -1..1, or one draw of each latent, scaled."""
    if not pipeline.has_vae:
        return batch["pixels"].float() / 127.5 - 1
    mean, log_variance = batch["moments"].chunk(2, dim=1)
    spread = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))  # as AutoencoderKL bounds it
    drawn = torch.randn(mean.shape, generator=noise, device=mean.device)
    return (mean + spread * drawn - pipeline.latent["shift"]) * pipeline.latent["factor"]


def _errors(
    pipeline: Pipeline,
    model: nn.Module,
    batch: Batch,
    timesteps: Tensor,
    noise: torch.Generator,
    numbers: Tensor | None,
) -> Tensor:
    """Mean squared error of every row's prediction, (n,): of the noise, or of the velocity."""
    clean = _clean(pipeline, batch, noise)
    drawn = torch.randn(clean.shape, generator=noise, device=clean.device)
    noisy = pipeline.noise.add_noise(clean, drawn, timesteps)
    kind = pipeline.noise.config.prediction_type
    if kind == "v_prediction":
        target = pipeline.noise.get_velocity(clean, drawn, timesteps)
    else:
        target = drawn if kind == "epsilon" else clean
    predicted = predict(pipeline, model, noisy, timesteps, _told(pipeline, model, batch, numbers))
    return cast(Tensor, (predicted - target) ** 2).flatten(1).mean(1)


def _weights(pipeline: Pipeline, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR weights (arXiv 2303.09556, equation 4 and its form for v prediction), (n,)."""
    snr: Tensor = cast(Any, compute_snr)(pipeline.noise, timesteps).clamp(min=1e-8)
    kind = pipeline.noise.config.prediction_type
    capped = snr.clamp(max=gamma)
    return capped / (snr + 1) if kind == "v_prediction" else capped / snr if kind == "epsilon" else capped


def _numbers(pipeline: Pipeline, batch: Batch) -> Tensor | None:
    return {"text": batch.get("caption"), "class": batch.get("class"), "none": None}[pipeline.condition]


def _plain_attention(settings: Settings, backbone: Backbone) -> bool:
    """Whether training is faster with plain products in the attention of a UNet, and has the memory for them.

    On a CPU the fused attention's backward pass is slow: without it a step of the bundled UNet takes 0.7 of the time.
    """
    pipeline, model = cast(Pipeline, backbone.processor), cast(Any, backbone.model.get_base_model())
    blocks = (model.unet if pipeline.learns_text else model).config.get("down_block_types", ())
    level = next((level for level, kind in enumerate(blocks) if "Attn" in kind), len(blocks) - 1)
    places = (pipeline.side_for(settings.resolution) >> max(level, 0)) ** 2
    return backbone.device.type == "cpu" and places <= PLAIN_PLACES


def loss(settings: Settings, backbone: Backbone) -> Loss:
    """The denoising objective of DDPM (arXiv 2006.11239, equation 14), of the noise or the velocity.

    A fraction ``diffusion.caption-dropout`` of the captions is left out, for guidance (arXiv 2207.12598). A DiT leaves
    out classes itself.
    """
    pipeline = cast(Pipeline, backbone.processor)
    gamma, dropout = settings.diffusion.min_snr, settings.diffusion.caption_dropout
    plain = not settings.gradient_checkpointing and _plain_attention(settings, backbone)

    def denoising(model: nn.Module, batch: Batch, noise: torch.Generator) -> Tensor:
        rows = next(batch[name] for name in ("pixels", "moments") if name in batch)
        timesteps = torch.randint(len(pipeline.noise), (len(rows),), generator=noise, device=rows.device)
        numbers = _numbers(pipeline, batch)
        if pipeline.condition == "text" and numbers is not None and dropout:
            left_out = torch.rand(len(rows), generator=noise, device=rows.device) < dropout
            numbers = numbers.masked_fill(left_out, 0)
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            errors = _errors(pipeline, model, batch, timesteps, noise, numbers)
        return (errors * _weights(pipeline, timesteps, gamma) if gamma else errors).mean()

    return denoising


@torch.inference_mode()
def denoising_loss(backbone: Backbone, examples: Examples, seed: int) -> float:
    """Mean squared error over the rows, unweighted, at timesteps spread evenly; the seed fixes the noise.

    Every row is measured equally often, and a small set several times over.
    """
    pipeline = cast(Pipeline, backbone.processor)
    backbone.model.eval()
    noise = torch.Generator(backbone.device).manual_seed(seed)
    count = len(examples)
    draws = -(-LEAST_DRAWS // count)
    shuffled = torch.randperm(count * draws, generator=torch.Generator().manual_seed(seed))
    steps = (shuffled.double() + 0.5) * len(pipeline.noise) / len(shuffled)
    shared = {name: tensor.to(backbone.device) for name, tensor in examples.shared.items()}
    total = 0.0
    for chosen in torch.split(torch.arange(count * draws), MEASURED_ROWS):
        batch = shared | {name: rows[chosen % count].to(backbone.device) for name, rows in examples.rows.items()}
        timesteps = steps[chosen].long().to(backbone.device)
        total += float(
            _errors(pipeline, backbone.model, batch, timesteps, noise, _numbers(pipeline, batch)).double().sum()
        )
    return total / len(shuffled)


def _scheduler(pipeline: Pipeline, options: SampleSettings) -> Any:
    """DDIM (arXiv 2010.02502) without noise of its own, or DPM-Solver++ (arXiv 2211.01095)."""
    clips = not pipeline.has_vae  # pixels have bounds, latents have none
    if options.sampler == "ddim":
        scheduler = cast(Any, DDIMScheduler).from_config(
            pipeline.schedule, clip_sample=clips, timestep_spacing="trailing"
        )
    else:
        # Without variance_type: the learned variance's channels, which it would cut off, are gone already.
        scheduler = cast(Any, DPMSolverMultistepScheduler).from_config(
            pipeline.schedule, timestep_spacing="trailing", variance_type=None
        )
    scheduler.set_timesteps(min(options.steps, len(pipeline.noise)), device=pipeline.device)
    return scheduler


def _told_of(pipeline: Pipeline, model: nn.Module, texts: Sequence[str]) -> Tensor | None:
    """What the denoiser is told of prompts; ``""`` is the empty prompt, or the class of no class."""
    if pipeline.condition == "none":
        return None
    if pipeline.condition == "class":
        numbers = [pipeline.class_of(text) if text else pipeline.class_count for text in texts]
        return torch.tensor(numbers, device=pipeline.device)
    distinct = sorted(set(texts))
    if pipeline.learns_text:
        hidden = cast(Any, model).text_encoder(pipeline.tokens(distinct).to(pipeline.device)).last_hidden_state
    else:
        hidden = pipeline.embed(distinct).to(pipeline.device)
    return cast(Tensor, hidden[[distinct.index(text) for text in texts]])


@torch.inference_mode()
def generate(
    backbone: Backbone, texts: Sequence[str], seed: int, options: SampleSettings, side: int = 0
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One image per prompt, (n, h, w, channels) uint8; the same whatever the batch.

    Args:
        side: Of the denoiser's input; 0: as it was made for.
    """
    pipeline, model = cast(Pipeline, backbone.processor), backbone.model
    model.eval()
    side = side or pipeline.side
    # On the CPU and for all at once, so that neither the device nor the batch changes what is drawn.
    noise = torch.Generator().manual_seed(seed)
    start = torch.randn((len(texts), pipeline.channels, side, side), generator=noise)
    # A UNet with classes but without the class of no class cannot be guided.
    guided = options.guidance != 1 and pipeline.condition != "none" and pipeline.denoiser != "UNet2DModel"
    finished = []
    with step_bar("generating") as on_step:
        for first in range(0, len(texts), options.batch):
            batch = list(texts[first : first + options.batch])
            # With guidance both predictions come from one pass, which is faster than two of half its size.
            told = _told_of(pipeline, model, batch + [""] * len(batch) if guided else batch)
            scheduler = _scheduler(pipeline, options)
            current = start[first : first + options.batch].to(pipeline.device) * scheduler.init_noise_sigma
            for number, timestep in enumerate(scheduler.timesteps):
                inputs = torch.cat([current, current]) if guided else current
                predicted = predict(pipeline, model, inputs, timestep.expand(len(inputs)), told)
                if guided:
                    predicted, free = predicted.chunk(2)
                    predicted = free + options.guidance * (predicted - free)
                current = scheduler.step(predicted, timestep, current).prev_sample
                on_step(first + len(batch) * (number + 1) // len(scheduler.timesteps), len(texts))
            finished.append(_to_pixels(pipeline, current))
    return np.concatenate(finished)


def _to_pixels(pipeline: Pipeline, current: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Images (n, h, w, channels) uint8 of finished inputs."""
    if pipeline.has_vae:
        latents = current / pipeline.latent["factor"] + pipeline.latent["shift"]
        # One by one: an autoencoder's activations are many times larger than its input.
        current = torch.cat([pipeline.vae.decode(one[None].to(pipeline.dtype)).sample.float() for one in latents])
    scaled = ((current + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


def evaluate(settings: Settings, backbone: Backbone, examples: Examples, seed: int) -> Metrics:
    """The denoising loss; and where there are images to compare with, FID, KID and what goes with them.

    The frozen, the global and a personal adapter are measured with the same noise.

    Returns:
        ``fid``, ``kid``, ``kid_std``, ``samples`` (n), ``features`` (the extractor), ``fid_floor`` and ``kid_floor``
        (n real images against n others), ``diversity`` (spread of the features, 1: as real ones), ``kid_by_class``,
        and ``denoising_loss``. On a client KID and diversity alone: FID is of no use with so few images.
    """
    measured: Metrics = {}
    if isinstance(examples.reference, Reference):
        try:
            measured = _quality_of(settings, backbone, examples.reference, seed)
        # SettingsError: the server's file of weights is not on this device.
        except (MetricError, SettingsError) as error:
            if not examples.reference.own:
                raise
            # Too few images, or no extractor on this device: no reason to go without a personal adapter.
            log.warning("KID is not measured: %s", error)
        if examples.reference.own:
            measured = {name: measured[name] for name in ("kid", "kid_std", "diversity") if name in measured}
    return {**measured, "denoising_loss": denoising_loss(backbone, examples, seed)}


def _quality_of(settings: Settings, backbone: Backbone, real: Reference, seed: int) -> Metrics:
    try:
        from fedgen_app.tasks import _quality
    except ModuleNotFoundError as error:
        raise MetricError(f"metrics.samples needs {error.name}: pip install 'fedgen-edge[sim]'") from None

    pipeline = cast(Pipeline, backbone.processor)
    side = pipeline.side_for(settings.resolution)
    images = generate(backbone, real.prompts, derive(seed, "measured"), settings.samples, side)
    extractor = _extractor(settings, backbone.device, real.own)
    drawn, there = _quality.extract(extractor, images), _quality.reference(extractor, real.pixels)
    found: Metrics = {**_quality.compare(drawn, there, seed), "samples": len(images), "features": extractor.name}
    if len(real.others) == len(real.pixels):
        floor = _quality.compare(_quality.reference(extractor, real.others), there, seed)
        found |= {"fid_floor": floor["fid"], "kid_floor": floor["kid"]}
    found["diversity"] = _quality.diversity(drawn, there)
    if real.labels:
        found["kid_by_class"] = _quality.per_class(drawn, real.labels, there, real.labels, seed)
    return found


def _extractor(settings: Settings, device: torch.device, own: bool) -> Any:
    """What turns images into features.

    ``auto`` is the bundled extractor for the bundled pictures, else Inception; where that cannot be had, the bundled
    one with a warning: the metrics' ``features`` says which it was. Not on a client (``own``): its KID goes into a
    mean with the others', and a mean over two extractors says nothing.
    """
    from fedgen_app.tasks import _quality

    wanted = settings.metrics.features
    if wanted != "auto":
        return _quality.open_extractor(wanted, device)
    if settings.dataset == "bundled":
        return _quality.open_extractor("bundled", device)
    return _quality.open_extractor("inception", device) if own else _inception_or_bundled(device)


@functools.lru_cache(maxsize=1)
def _inception_or_bundled(device: torch.device) -> Any:
    """One of them for as long as the process lives: the rounds of a run are compared with each other."""
    from fedgen_app.tasks import _quality

    try:
        return _quality.open_extractor("inception", device)
    except MetricError as error:
        log.warning("%s; measured with the bundled extractor instead", error)
        return _quality.open_extractor("bundled", device)


def sample(settings: Settings, backbone: Backbone, texts: Sequence[str], seed: int) -> list[Sample]:
    """One image per prompt; the same seed gives the same images."""
    side = cast(Pipeline, backbone.processor).side_for(settings.resolution)
    images = generate(backbone, texts, derive(seed, "sample"), settings.samples, side)
    return [Sample(text, image) for text, image in zip(texts, images, strict=True)]


def save_samples(folder: Path, samples: Mapping[str, Sequence[Sample]]) -> None:
    """One picture, ``grid.png``: a row per prompt, and for every name a block of its images, side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "grid.png").write_bytes(_grid.side_by_side(samples))


def export(folder: Path, backbone: Backbone, adapter: Mapping[str, Tensor]) -> None:
    """``pytorch_lora_weights.safetensors``, where the backbone's pipeline has a loader for it."""
    pipeline = cast(Pipeline, backbone.processor)
    if pipeline.kind != LOADED_BY_DIFFUSERS:
        return
    config = cast(Any, backbone.model.peft_config["default"])
    parts: dict[str, dict[str, Tensor]] = {"unet": {}, "text_encoder": {}}
    for key, tensor in adapter.items():
        name = key.removeprefix("base_model.model.")
        part, _, rest = name.partition(".") if pipeline.learns_text else ("unet", "", name)
        parts[part][rest] = tensor
    metadata = {}
    for part, tensors in parts.items():
        layers = [a.removesuffix(".lora_A.weight") for a, _ in pairs(tensors)]
        metadata[part] = {
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "use_rslora": config.use_rslora,
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


def usage(backbone: Backbone) -> list[str]:
    """How to load the adapter: with diffusers' own loader, else with PEFT into the denoiser."""
    pipeline = cast(Pipeline, backbone.processor)
    if pipeline.kind == LOADED_BY_DIFFUSERS:
        # One type for all parts: else transformers keeps the file's and diffusers takes float32.
        options = ("" if pipeline.has_vae else ", vae=None") + ", torch_dtype=torch.float32"
        lines = [
            "import torch",
            "from diffusers import StableDiffusionPipeline",
            "",
            f"pipeline = StableDiffusionPipeline.from_pretrained({backbone.reference!r}{options})",
            "pipeline.load_lora_weights(FOLDER)  # the folder of this file",
        ]
        if not pipeline.has_vae:
            side = 8 * pipeline.side  # the pipeline believes in an autoencoder that makes images eight times larger
            call = f'pipeline("a photo of a sneaker", height={side}, width={side}, output_type="latent")'
            lines.append(f"pixels = {call}.images  # in -1..1: there is no autoencoder")
        return lines
    inside = place_of(pipeline.folder, pipeline.part) != pipeline.folder
    subfolder = f", subfolder={pipeline.part!r}" if inside else ""
    return [
        f"from diffusers import DiffusionPipeline, {pipeline.denoiser}",
        "from peft import PeftModel",
        "",
        f"denoiser = {pipeline.denoiser}.from_pretrained({backbone.reference!r}{subfolder})",
        "PeftModel.from_pretrained(denoiser, FOLDER)  # puts the adapter into it; the folder of this file",
        f"pipeline = DiffusionPipeline.from_pretrained({backbone.reference!r}, {pipeline.part}=denoiser)",
    ]


TASK = Task(
    lora_targets=lora_targets,
    hub_files=HUB_FILES,
    weight_files=weight_files,
    load_backbone=load_backbone,
    save_memory=save_memory,
    load_data=load_data,
    load_test=load_test,
    split=split,
    loss=loss,
    evaluate=evaluate,
    sample=sample,
    prompts=prompts,
    render=Render(".png", _grid.one, printable=False),
    save_samples=save_samples,
    export=export,
    usage=usage,
    bundled_backbone="diffusion",
)
