"""VAE: a small variational autoencoder of our own kind; images; bits per dimension, FID and KID."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.task import Batch, Examples, Held, Loaded, Loss, Metrics
from fedgen_app.settings import LoraSettings, Settings
from fedgen_app.tasks._networks import VAE
from fedgen_app.tasks._small import open_small, small_task

LEAST_LOG_SCALE = -7.0  # as PixelCNN++ has it: a likelihood of one value alone would be unbounded in training
LEAST_DRAWS = 512  # of latents in an evaluation: a small hold-out is measured several times over
MEASURED_ROWS = 64  # per forward pass of an evaluation


def load_backbone(folder: Path, held: Held, lora: LoraSettings) -> Loaded:
    """Encoder and decoder from a folder with ``config.json`` and ``model.safetensors``.

    Raises:
        BackboneError: the folder holds no VAE of this kind.
    """
    return open_small(VAE, folder, held)


def log_likelihood(values: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability, in nats, of 256 grey values under a logistic distribution cut into as many pieces.

    Salimans et al., PixelCNN++ (arXiv 1701.05517, equation 2) with one component: the outermost pieces have no end, so
    that the 256 probabilities add up to one.

    Args:
        values: uint8; mean, log_scale: of the same shape, for values from -1 to 1.
    """
    centred = values.float() / 127.5 - 1 - mean
    inverse = torch.exp(-log_scale.clamp(min=LEAST_LOG_SCALE))
    upper, lower = inverse * (centred + 1 / 255), inverse * (centred - 1 / 255)
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)): no difference of numbers close to each other.
    inside = logsigmoid(upper) + logsigmoid(-lower) + torch.log(-torch.expm1(lower - upper))
    return torch.where(values == 0, logsigmoid(upper), torch.where(values == 255, logsigmoid(-lower), inside))


def bound(model: nn.Module, batch: Batch, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of one draw of the latent, and KL from the prior, each (n,) in nats.

    Their sum is the negative evidence lower bound (Kingma and Welling, arXiv 1312.6114, equation 10 with one draw).
    """
    rows, numbers = batch["pixels"], batch.get("class")
    networks = cast(Any, model)
    mean, log_variance = networks.encoder(rows.float() / 127.5 - 1, numbers)
    log_variance = log_variance.clamp(-30.0, 20.0)
    drawn = torch.randn(mean.shape, generator=noise, device=mean.device)
    said, log_scale = networks.decoder(mean + drawn * torch.exp(0.5 * log_variance), numbers)
    missed = -log_likelihood(rows, said, log_scale).flatten(1).sum(1)
    divergence = 0.5 * (log_variance.exp() + mean**2 - 1 - log_variance).sum(1)
    return missed, divergence


def _per_dimension(nats: Tensor, rows: Tensor) -> Tensor:
    return nats / (math.log(2) * rows[0].numel())


def negative_bound(model: nn.Module, batch: Batch, noise: torch.Generator) -> Tensor:
    """Mean negative evidence lower bound of a batch, in bits per dimension."""
    missed, divergence = bound(model, batch, noise)
    return _per_dimension((missed + divergence).mean(), batch["pixels"])


def loss(settings: Settings, backbone: Backbone) -> Loss:
    """The negative evidence lower bound in bits per dimension."""
    return negative_bound


@torch.inference_mode()
def measured_bound(backbone: Backbone, examples: Examples, seed: int) -> Metrics:
    """``bits_per_dim``, an upper bound, and ``kl``, its part in nats per image that says how much the latent holds.

    Every row is measured equally often, a small set several times over; the seed fixes what is drawn.
    """
    backbone.model.eval()
    noise = torch.Generator(backbone.device).manual_seed(seed)
    count = len(examples)
    times = -(-LEAST_DRAWS // count)
    totals = torch.zeros(2, dtype=torch.float64)
    for chosen in torch.split(torch.arange(count * times) % count, MEASURED_ROWS):
        batch = {name: rows[chosen].to(backbone.device) for name, rows in examples.rows.items()}
        totals += torch.stack([part.double().sum().cpu() for part in bound(backbone.model, batch, noise)])
    missed, divergence = totals / (count * times)
    bits = _per_dimension(missed + divergence, examples.rows["pixels"])
    return {"bits_per_dim": float(bits), "kl": float(divergence)}


def draws(model: nn.Module, latents: Tensor, numbers: Tensor | None) -> Tensor:
    """The decoder's means, (n, channels, side, side) in -1..1; draws from the logistic would be noisy."""
    mean: Tensor = cast(Any, model).decoder(latents, numbers)[0]
    return mean


TASK = small_task(
    VAE,
    draws,
    load_backbone=load_backbone,
    loss=loss,
    measured=measured_bound,
    always=("bits_per_dim", "kl"),
    call="images, log_scales = model.decoder",
)
