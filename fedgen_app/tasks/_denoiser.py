"""What a denoiser is asked, and what it is told beside the noisy image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedgen_app.learning.task import Batch
from fedgen_app.tasks._pipeline import Pipeline


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


def told(pipeline: Pipeline, model: nn.Module, batch: Batch, numbers: Tensor | None) -> Tensor | None:
    """What the denoiser is told of rows: numbers of captions looked up, or encoded where the text encoder learns."""
    if numbers is None or pipeline.condition != "text":
        return numbers
    if not pipeline.learns_text:
        return batch["hidden"][numbers]
    distinct, place = torch.unique(numbers, return_inverse=True)
    encoder = cast(Any, model).text_encoder
    return cast(Tensor, encoder(batch["tokens"][distinct]).last_hidden_state[place])


def told_of(pipeline: Pipeline, model: nn.Module, texts: Sequence[str], each: bool = False) -> Tensor | None:
    """What the denoiser is told of prompts; ``""`` is the empty prompt, or the class of no class.

    Args:
        each: A text encoder that learns sees a prompt once for every row, as rows may have adapters of their own.
    """
    if pipeline.condition == "none":
        return None
    if pipeline.condition == "class":
        classes = [pipeline.class_of(text) if text else pipeline.class_count for text in texts]
        return torch.tensor(classes, device=pipeline.device)
    if each and pipeline.learns_text:
        tokens = pipeline.tokens(list(texts)).to(pipeline.device)
        return cast(Tensor, cast(Any, model).text_encoder(tokens).last_hidden_state)
    distinct = sorted(set(texts))
    name, rows = ("tokens", pipeline.tokens) if pipeline.learns_text else ("hidden", pipeline.embed)
    numbers = torch.tensor([distinct.index(text) for text in texts], device=pipeline.device)
    return told(pipeline, model, {name: rows(distinct).to(pipeline.device)}, numbers)
