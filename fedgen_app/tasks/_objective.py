"""What a denoiser learns and what its loss on images is: noise, velocity or the image, of pixels or latents."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.task import Batch, Examples, Loss, Probe
from fedgen_app.settings import Settings
from fedgen_app.tasks._denoiser import predict, told
from fedgen_app.tasks._pipeline import Pipeline

MEASURED_ROWS = 64  # per forward pass of an evaluation
TOKENS = 77  # in CLIP's prompts
LEAST_DRAWS = 512  # of noise in an evaluation: a small hold-out is measured several times over


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
        target = {"epsilon": drawn, "sample": clean}[kind]
    predicted = predict(pipeline, model, noisy, timesteps, told(pipeline, model, batch, numbers))
    return cast(Tensor, (predicted - target) ** 2).flatten(1).mean(1)


def _weights(pipeline: Pipeline, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR weights (arXiv 2303.09556, equation 4 and its form for v prediction), (n,)."""
    snr: Tensor = cast(Any, compute_snr)(pipeline.noise, timesteps).clamp(min=1e-8)
    kind = pipeline.noise.config.prediction_type
    capped = snr.clamp(max=gamma)
    return capped / (snr + 1) if kind == "v_prediction" else capped / snr if kind == "epsilon" else capped


def _numbers(pipeline: Pipeline, batch: Batch) -> Tensor | None:
    return {"text": batch.get("caption"), "class": batch.get("class"), "none": None}[pipeline.condition]


def loss(settings: Settings, backbone: Backbone) -> Loss:
    """The denoising objective of DDPM (arXiv 2006.11239, equation 14), of the noise or the velocity.

    A fraction ``diffusion.caption-dropout`` of the captions is left out, for guidance (arXiv 2207.12598). A DiT leaves
    out classes itself.
    """
    pipeline = cast(Pipeline, backbone.processor)
    gamma, dropout = settings.diffusion.min_snr, settings.diffusion.caption_dropout

    def denoising(model: nn.Module, batch: Batch, noise: torch.Generator) -> Tensor:
        rows = next(batch[name] for name in ("pixels", "moments") if name in batch)
        timesteps = torch.randint(len(pipeline.noise), (len(rows),), generator=noise, device=rows.device)
        numbers = _numbers(pipeline, batch)
        if pipeline.condition == "text" and numbers is not None and dropout:
            left_out = torch.rand(len(rows), generator=noise, device=rows.device) < dropout
            numbers = numbers.masked_fill(left_out, 0)
        errors = _errors(pipeline, model, batch, timesteps, noise, numbers)
        return (errors * _weights(pipeline, timesteps, gamma) if gamma else errors).mean()

    return denoising


def probe(settings: Settings, backbone: Backbone) -> Probe:
    """A batch of images with a prompt or a class each, and as many as are evaluated at once."""
    pipeline = cast(Pipeline, backbone.processor)
    side = pipeline.side_for(settings.resolution)

    def rows(count: int) -> dict[str, Tensor]:
        channels = pipeline.channels
        made = {"moments": torch.zeros(count, 2 * channels, side, side)}
        if not pipeline.has_vae:
            made = {"pixels": torch.zeros(count, channels, side, side, dtype=torch.uint8)}
        if pipeline.condition == "class":
            made["class"] = torch.zeros(count, dtype=torch.long)
        if pipeline.condition == "text":
            config = cast(Any, backbone.model.get_base_model()).config
            made |= {"caption": torch.zeros(count, dtype=torch.long)}
            made |= {"hidden": torch.zeros(count, TOKENS, config.cross_attention_dim)}
        return made

    def measure() -> Tensor:
        batch, noise = rows(MEASURED_ROWS), torch.Generator()
        steps = torch.zeros(MEASURED_ROWS, dtype=torch.long)
        return _errors(pipeline, backbone.model, batch, steps, noise, _numbers(pipeline, batch)).double().sum()

    return Probe(rows(settings.batch_size), measure)


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
