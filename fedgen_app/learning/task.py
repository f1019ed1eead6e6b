"""What a task is: the functions that make the federation one of a language model, an image generator, ..."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fedgen_app.data.partition import Partition
from fedgen_app.learning.mixture import Rows, unmixed
from fedgen_app.settings import LoraSettings, Settings

if TYPE_CHECKING:
    from fedgen_app.learning.backbone import Backbone

# Numbers by name, and numbers by class. The server's may hold a name as well ("features").
Metrics = dict[str, Any]
Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch, torch.Generator], Tensor]


@dataclass(frozen=True)
class Held:
    """How a frozen model's weights are held.

    Attributes:
        dtype: Of the weights, and what is computed in.
        bits: Of each weight of the linear layers; 0: as ``dtype`` says.
    """

    dtype: torch.dtype
    device: torch.device
    bits: int = 0


@dataclass(frozen=True)
class Loaded:
    """A frozen model as a task loads it, with what belongs to it (a tokenizer, a scheduler, ...)."""

    model: nn.Module
    processor: Any


@dataclass(frozen=True)
class Share:
    """Which part of the data a client owns: one part of a partition, or all of a device's own folder.

    ``pooled``: the training rows of all parts together; the hold-out stays the part's own. ``prompts``: the file in
    which a device's owner says what it is to generate.
    """

    index: int = 0
    count: int = 1
    folder: str = ""
    pooled: bool = False
    prompts: str = ""


@dataclass(frozen=True)
class Examples:
    """Rows to train on or to evaluate.

    Attributes:
        rows: Tensors of equal first dimension n.
        counts: What the metrics count (words, bytes, ...).
        shared: Tensors that rows point into (the embeddings of distinct captions); every batch has them whole.
        reference: What generated things are compared with; None where nothing is to be generated.
        skipped: Records of the source that could not be read and are left out.
    """

    rows: Batch
    counts: Mapping[str, int] = field(default_factory=dict)
    shared: Batch = field(default_factory=dict)
    reference: Any = None
    skipped: int = 0

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))


@dataclass(frozen=True)
class LocalData:
    """What one client owns: its training rows and its hold-out.

    Attributes:
        classes: Names that the server knows as well, in the same order: metrics by class travel under their numbers.
        skipped: Records of the whole source (in a simulation all clients') that could not be read and are left out.
    """

    train: Examples
    holdout: Examples
    classes: tuple[str, ...] = ()
    skipped: int = 0


@dataclass(frozen=True)
class Sample:
    """One generated thing: its prompt and a text or an image."""

    prompt: str
    content: Any


@dataclass(frozen=True)
class Probe:
    """The largest pieces of work on a backbone, to be counted and never done.

    Attributes:
        batch: One batch of training.
        measure: One forward pass of an evaluation.
    """

    batch: Batch
    measure: Callable[[], object]


class Sampler(Protocol):
    """Generates one thing per prompt."""

    def __call__(
        self, settings: Settings, backbone: Backbone, texts: Sequence[str], seed: int, rows: Rows = unmixed
    ) -> list[Sample]:
        """In the order of the prompts; ``rows`` chooses each sample's mixture of adapters (``mixture.active``)."""
        ...


@dataclass(frozen=True)
class Shapes:
    """What one generated thing is made of while it is on its way between two machines.

    Attributes:
        prompt: Of one encoded prompt.
        latent: Of one half-finished thing.
        steps: More of them than this there are not.
        content: Of one finished thing, in bytes.
    """

    prompt: tuple[int, ...]
    latent: tuple[int, ...]
    steps: int
    content: tuple[int, ...]


class Advance(Protocol):
    """Takes half-finished things some steps further."""

    def __call__(
        self,
        settings: Settings,
        backbone: Backbone,
        encoded: Tensor,
        current: Tensor,
        begin: int,
        end: int,
        rows: Rows = unmixed,
    ) -> Tensor:
        """From after step ``begin`` to after step ``end``, on the CPU; ``rows`` as in ``Sampler``."""
        ...


@dataclass(frozen=True)
class Stages:
    """``Task.sample`` cut into stages that may happen on two machines; one after the other they are ``sample``.

    Attributes:
        hides: Whether an encoded prompt is something else than the prompt itself, which the number of a class is not.
        shapes: What travels between them.
        encode: Prompts as the model is told them, (texts, *shapes.prompt), with the adapter that is in the model.
        noise: What so many things begin as, by the seed that ``sample`` takes.
        advance: Some of the steps.
        finish: The contents of samples (``Sample.content``).
        pack: Contents as one file's bytes.
        unpack: The inverse, of so many things. Raises ``DataError``.
    """

    hides: Callable[[Backbone], bool]
    shapes: Callable[[Settings, Backbone], Shapes]
    encode: Callable[[Backbone, Sequence[str]], Tensor]
    noise: Callable[[Settings, Backbone, int, int], Tensor]
    advance: Advance
    finish: Callable[[Backbone, Tensor], list[Any]]
    pack: Callable[[Sequence[Any]], bytes]
    unpack: Callable[[Settings, Backbone, bytes, int], list[Any]]


@dataclass(frozen=True)
class Render:
    """How samples become a file: its ending, its bytes, and whether a terminal can show them."""

    suffix: str
    encode: Callable[[Sequence[Sample]], bytes]
    printable: bool


@dataclass(frozen=True)
class Task:
    """A task as a frozen value of functions; ``tasks/<name>.py`` ends in ``TASK = Task(...)``.

    Attributes:
        lora_targets: Names of the layers that carry the adapter where the settings name none.
        hub_files: Patterns of the files that a backbone on the hub consists of.
        weight_files: Those of a backbone's files whose weights are used.
        config: What else decides what a backbone computes (``facts_of`` its schedule, its tokenizer, ...), by name. The
            fingerprint is of both.
        load_backbone: Reads the frozen model from a folder; raises SettingsError where it cannot hold it that way.
        save_memory: Makes the model compute activations again in the backward pass instead of keeping them.
        load_data: What one client owns, as rows of tensors.
        load_test: The server's own test set; None where the data set has none.
        split: Who owns which documents in a simulation of so many clients.
        check: Called once on the server before any client works, with its test set and, where the run goes on, the
            frozen backbone's metrics as they were; raises for what would fail or mislead later, and warns of what
            will take long.
        loss: The function that training minimises: mean loss of a batch.
        evaluate: Metrics of the model as it is now; the seed fixes whatever noise they need.
        client_metrics: The names of the numbers that a client may send, each with its place in the client's entry of
            results.json: ``{"kid": ("kid",), "kid_by_class_3": ("kid_by_class", "bag")}``. Only the server asks.
        requirements: What a client wants, in words that never leave it: a device's own prompts (``Share.prompts``, else
            prompts.txt in its folder), in a simulation its captions or the beginnings of its documents.
        embed: Texts through the backbone's own text encoder without any adapter, (texts, width).
        sample: Generates from the model as it is now, or with each sample's mixture of adapters, one thing per prompt.
        takes: Which of ``fedgen generate``'s options mean something: some of "prompt", "length" and "steps".
        prompts: What to generate from where the user names nothing.
        render: One file's bytes that show samples.
        save_samples: Writes named lists of samples into a folder.
        export: Writes what other software than PEFT opens, beside the adapter in PEFT's format.
        usage: Lines of Python for the model card that load the adapter from FOLDER; ``dataset`` of the settings it is
            given is what lies on this machine.
        bundled_backbone: The name of the bundled backbone under ``fedgen_assets``; "" where there is none.
        outline: The same model without its weights, from its configuration, on torch's default device; None: what a
            run costs cannot be told before.
        probe: The largest pieces of work on such a backbone.
        train: A training loop of the task's own with the arguments of ``training.train``; None: that one.
        stages: What generating is made of where it may happen on two machines; None: it happens on one.
    """

    lora_targets: Callable[[nn.Module, LoraSettings], tuple[str, ...]]
    hub_files: tuple[str, ...]
    weight_files: Callable[[Path], list[Path]]
    config: Callable[[Path], Mapping[str, object]]
    load_backbone: Callable[[Path, Held, LoraSettings], Loaded]
    save_memory: Callable[[nn.Module], None]
    load_data: Callable[[Settings, Backbone, Share], LocalData]
    load_test: Callable[[Settings, Backbone], Examples | None]
    split: Callable[[Settings, Backbone, int], Partition]
    check: Callable[[Settings, Backbone, Examples | None, Metrics | None], None]
    loss: Callable[[Settings, Backbone], Loss]
    evaluate: Callable[[Settings, Backbone, Examples, int], Metrics]
    client_metrics: Callable[[Settings, Backbone], Mapping[str, tuple[str, ...]]]
    requirements: Callable[[Settings, Backbone, Share], list[str]]
    embed: Callable[[Backbone, Sequence[str]], Tensor]
    sample: Sampler
    takes: Callable[[Backbone], frozenset[str]]
    prompts: Callable[[Settings, Backbone], tuple[str, ...]]
    render: Render
    save_samples: Callable[[Path, Mapping[str, Sequence[Sample]]], None]
    export: Callable[[Path, Backbone, Mapping[str, Tensor]], None]
    usage: Callable[[Settings, Backbone], Sequence[str]]
    bundled_backbone: str
    outline: Callable[[Path, Held, LoraSettings], Loaded] | None = None
    probe: Callable[[Settings, Backbone], Probe] | None = None
    train: Callable[..., Any] | None = None
    stages: Stages | None = None
