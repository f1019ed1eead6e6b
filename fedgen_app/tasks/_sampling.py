"""Images from noise: DDIM or DPM-Solver++ with classifier-free guidance, the same whatever the batch and the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from fedgen_app.learning.backbone import Backbone
from fedgen_app.runs.progress import step_bar
from fedgen_app.settings import SampleSettings
from fedgen_app.tasks._denoiser import predict, told_of
from fedgen_app.tasks._pipeline import Pipeline


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
            told = told_of(pipeline, model, batch + [""] * len(batch) if guided else batch)
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
