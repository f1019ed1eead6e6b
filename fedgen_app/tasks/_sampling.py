"""Images from noise: DDIM or DPM-Solver++ with classifier-free guidance, the same whatever the batch and the device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.mixture import Rows, unmixed
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
        # Not another kind of solver that the folder may name: some draw noise of their own. Without variance_type: the
        # learned variance's channels, which it would cut off, are gone already.
        scheduler = cast(Any, DPMSolverMultistepScheduler).from_config(
            pipeline.schedule,
            timestep_spacing="trailing",
            variance_type=None,
            algorithm_type="dpmsolver++",
            final_sigmas_type="zero",
        )
    count = min(options.steps, len(pipeline.noise))
    scheduler.set_timesteps(count, device=pipeline.device)
    # Diffusers counts down in floats, which for some counts (61 of 1000) goes one timestep too far: to -1.
    if len(scheduler.timesteps) > count:
        scheduler.timesteps = scheduler.timesteps[:count]
        if options.sampler == "dpm-solver":
            scheduler.sigmas = torch.cat([scheduler.sigmas[:count], scheduler.sigmas[-1:]])
            scheduler.num_inference_steps = count
    return scheduler


def guided(pipeline: Pipeline, options: SampleSettings) -> bool:
    """Whether each step takes two predictions; a UNet with classes but without the class of no class has no second."""
    return options.guidance != 1 and pipeline.condition != "none" and pipeline.denoiser != "UNet2DModel"


@torch.inference_mode()
def pass_seconds(backbone: Backbone, prompt: str, options: SampleSettings, side: int) -> float:
    """How long one step of one image takes, the shorter of two: the first one also warms the machine up."""
    pipeline, model = cast(Pipeline, backbone.processor), backbone.model
    model.eval()
    told = told_of(pipeline, model, [prompt, ""] if guided(pipeline, options) else [prompt])
    noisy = torch.zeros((2 if guided(pipeline, options) else 1, pipeline.channels, side, side), device=pipeline.device)
    found = []
    for _ in range(2):
        began = time.perf_counter()
        # To the CPU, so that the device has to be done.
        predict(pipeline, model, noisy, torch.zeros(len(noisy), dtype=torch.long, device=pipeline.device), told).cpu()
        found.append(time.perf_counter() - began)
    return min(found)


@torch.inference_mode()
def generate(
    backbone: Backbone, texts: Sequence[str], seed: int, options: SampleSettings, side: int = 0, rows: Rows = unmixed
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One image per prompt, (n, h, w, channels) uint8; the same whatever the batch.

    Args:
        side: Of the denoiser's input; 0: as it was made for.
        rows: Which mixture of adapters acts on each image's rows (``mixture.active``); else the model is as it is.
    """
    pipeline, model = cast(Pipeline, backbone.processor), backbone.model
    model.eval()
    start = noise(pipeline, len(texts), seed, side)
    doubled = guided(pipeline, options)
    finished = []
    with step_bar("generating") as on_step:
        for first in range(0, len(texts), options.batch):
            chosen = range(first, min(first + options.batch, len(texts)))
            # With guidance both predictions come from one pass, which is faster than two of half its size.
            with rows([*chosen, *chosen] if doubled else chosen):
                batch = [texts[number] for number in chosen] + ([""] * len(chosen) if doubled else [])
                told = told_of(pipeline, model, batch, each=rows is not unmixed)
                for done, latest in _steps(backbone, start[first : chosen.stop], told, options):
                    current = latest
                    on_step(first + int(len(chosen) * done), len(texts))
            finished.append(to_pixels(pipeline, current))
    return np.concatenate(finished)


def noise(pipeline: Pipeline, count: int, seed: int, side: int = 0) -> Tensor:
    """What images begin as, (count, channels, side, side); side 0: as the denoiser was made for."""
    side = side or pipeline.side
    # On the CPU and for all at once, so that neither the device nor the batch changes what is drawn.
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, pipeline.channels, side, side), generator=generator)


@torch.inference_mode()
def advance(
    backbone: Backbone,
    encoded: Tensor,
    current: Tensor,
    options: SampleSettings,
    begin: int = 0,
    end: int | None = None,
    rows: Rows = unmixed,
) -> Tensor:
    """Steps ``begin`` to ``end`` (None: the last) of images whose prompts are encoded already, on the CPU.

    Args:
        encoded: What a text-conditional denoiser is told of each, (n, length, width).
        current: The noise, or what was reached after ``begin`` steps, (n, channels, side, side).
        rows: As in ``generate``.
    """
    pipeline, model = cast(Pipeline, backbone.processor), backbone.model
    model.eval()
    doubled = guided(pipeline, options)
    reached = []
    for first in range(0, len(current), options.batch):
        chosen = range(first, min(first + options.batch, len(current)))
        with rows([*chosen, *chosen] if doubled else chosen):
            told, here = encoded[first : chosen.stop].to(pipeline.device), current[first : chosen.stop]
            if doubled:
                free = told_of(pipeline, model, [""] * len(chosen), each=rows is not unmixed)
                told = torch.cat([told, cast(Tensor, free)])
            for _, latest in _steps(backbone, here, told, options, begin, end):
                here = latest
        reached.append(here.cpu())
    return torch.cat(reached)


def _steps(
    backbone: Backbone,
    start: Tensor,
    told: Tensor | None,
    options: SampleSettings,
    begin: int = 0,
    end: int | None = None,
) -> Iterator[tuple[float, Tensor]]:
    """The share of the steps that is done, and the inputs after it; with guidance ``told`` is twice as long.

    Args:
        begin: Steps that ``start`` has behind it. With DDIM a step depends on nothing before it.
    """
    pipeline, doubled = cast(Pipeline, backbone.processor), guided(cast(Pipeline, backbone.processor), options)
    scheduler = _scheduler(pipeline, options)
    current = start.to(pipeline.device) * (1.0 if begin else scheduler.init_noise_sigma)
    for number, timestep in list(enumerate(scheduler.timesteps))[begin:end]:
        inputs = torch.cat([current, current]) if doubled else current
        predicted = predict(pipeline, backbone.model, inputs, timestep.expand(len(inputs)), told)
        if doubled:
            predicted, free = predicted.chunk(2)
            predicted = free + options.guidance * (predicted - free)
        current = scheduler.step(predicted, timestep, current).prev_sample
        yield (number + 1) / len(scheduler.timesteps), current


def to_pixels(pipeline: Pipeline, current: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Images (n, h, w, channels) uint8 of finished inputs."""
    if pipeline.has_vae:
        latents = current / pipeline.latent["factor"] + pipeline.latent["shift"]
        # One by one: an autoencoder's activations are many times larger than its input.
        current = torch.cat([pipeline.vae.decode(one[None].to(pipeline.dtype)).sample.float() for one in latents])
    scaled = ((current + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()
