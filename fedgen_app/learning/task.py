"""What a task is: the functions that make the federation one of a language model, an image generator, ..."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedgen_app.data.partition import Partition
from fedgen_app.settings import Settings

if TYPE_CHECKING:
    from fedgen_app.learning.backbone import Backbone

Metrics = dict[str, float]
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Loaded:
    """A frozen model as a task loads it, with what belongs to it (a tokenizer, a scheduler, ...)."""

    model: nn.Module
    processor: Any


@dataclass(frozen=True)
class Share:
    """Which part of the data a client owns: one part of a partition, or all of a device's own folder."""

    index: int = 0
    count: int = 1
    folder: str = ""


@dataclass(frozen=True)
class Examples:
    """Rows to train on or to evaluate: tensors of equal first dimension n, and what the metrics count."""

    rows: Batch
    counts: Mapping[str, int]

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))


@dataclass(frozen=True)
class LocalData:
    """What one client owns: its training rows and its hold-out."""

    train: Examples
    holdout: Examples


@dataclass(frozen=True)
class Sample:
    """One generated thing: its prompt and a text or an image."""

    prompt: str
    content: Any


@dataclass(frozen=True)
class Task:
    """A task as a frozen value of functions; ``tasks/<name>.py`` ends in ``TASK = Task(...)``.

    Attributes:
        lora_targets: Names of the layers that carry the adapter where the settings name none.
        load_backbone: Reads the frozen model from a folder.
        load_data: What one client owns, as rows of tensors.
        load_test: The server's own test set; None where the data set has none.
        split: Who owns which documents in a simulation of so many clients.
        loss: Mean loss of a batch, to be differentiated.
        evaluate: Metrics of the model as it is now; the seed fixes whatever noise they need.
        sample: Generates from the model as it is now: (backbone, prompts, seed, length).
        prompts: What to generate from where the user names nothing.
        save_samples: Writes named lists of samples into a folder.
        bundled_backbone: The name of the bundled backbone under ``fedgen_assets``.
    """

    lora_targets: Callable[[nn.Module], tuple[str, ...]]
    load_backbone: Callable[[Path, torch.dtype, torch.device], Loaded]
    load_data: Callable[[Settings, Backbone, Share], LocalData]
    load_test: Callable[[Settings, Backbone], Examples | None]
    split: Callable[[Settings, int], Partition]
    loss: Callable[[nn.Module, Batch, torch.Generator], Tensor]
    evaluate: Callable[[Backbone, Examples, int], Metrics]
    sample: Callable[[Backbone, Sequence[str], int, int], list[Sample]]
    prompts: Callable[[Settings], tuple[str, ...]]
    save_samples: Callable[[Path, Mapping[str, Sequence[Sample]]], None]
    bundled_backbone: str
