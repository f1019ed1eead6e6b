"""What a device may ask the inference service: read from a body, and refused where anything of it makes no sense."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from fedgen_app.errors import ServiceError, SettingsError
from fedgen_app.federation.clustering import Numbers
from fedgen_app.federation.hybrid import likened
from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.mixture import Mixture
from fedgen_app.learning.task import Shapes
from fedgen_app.serving import body

Kind = Literal["images", "latents", "adapters"]
KINDS: tuple[Kind, ...] = ("images", "latents", "adapters")
GLOBAL = -1  # the global adapter, among the clusters'
PROMPT, VECTOR, CLUSTERS, WEIGHTS = "prompt", "vector", "clusters", "weights"
BACKBONE, SPACE, SEED, STEPS, GUIDANCE, SAMPLER, DONE = (
    *("backbone", "space", "seed", "steps"),
    *("guidance", "sampler", "done"),
)
SAMPLERS = ("ddim", "dpm-solver")
WHOLE = re.compile(r"0|[1-9]\d{0,18}", re.ASCII)
DECIMAL = re.compile(r"\d{1,4}(\.\d{1,17})?", re.ASCII)
OFF = 1e-3  # by how much a direction's length may differ from 1
MOST_GUIDANCE = 100.0


@dataclass(frozen=True)
class Frame:
    """What one service can be asked.

    Attributes:
        fingerprint: Of the backbone.
        shapes: What prompts and latents look like; None: no images here.
        clusters: Those that have an adapter.
        has_global: Whether there is a global adapter.
        centroids: By cluster, where the clusters come from prompts; in the space that ``space`` marks.
        most_images: In one request.
        most_steps: Of one image.
    """

    fingerprint: str
    shapes: Shapes | None
    clusters: tuple[int, ...]
    has_global: bool
    centroids: Mapping[int, Numbers]
    space: str
    temperature: float
    most_images: int
    most_steps: int

    @property
    def width(self) -> int:
        """Of a direction; 0 where there are no centroids."""
        return next((len(centre) for centre in self.centroids.values()), 0)

    @property
    def compared(self) -> str:
        """The space whose vectors are compared with the centroids; "" where there are none."""
        return self.space if self.centroids else ""

    @functools.cached_property
    def most_bytes(self) -> int:
        """Of a body: one of the largest request that would be carried out."""
        numbers = self.width * 4 + len(self.clusters) * 8
        if self.shapes:
            numbers += 4 * int(np.prod(self.shapes.prompt))
        return body.LENGTH + body.MOST_HEADER + self.most_images * numbers + 8 * len(self.clusters)


@dataclass(frozen=True)
class Ask:
    """A request that can be carried out.

    Attributes:
        mixtures: One for each thing.
        prompt: (things, *shapes.prompt); empty for adapters.
        done: After how many of the steps the device goes on; 0: not at all.
    """

    kind: Kind
    mixtures: tuple[Mixture, ...]
    prompt: Tensor
    seed: int = 0
    steps: int = 1
    guidance: float = 1.0
    sampler: Literal["ddim", "dpm-solver"] = "ddim"
    done: int = 0

    @property
    def together(self) -> tuple[object, ...]:
        """What requests that share a forward pass have in common."""
        return self.kind, self.steps, self.guidance, self.sampler, self.done

    @property
    def work(self) -> int:
        """Steps of single images, which is what requests are weighed by against one another."""
        return len(self.mixtures) * (self.done or self.steps)


def scaled(backbone: Backbone) -> dict[str, str]:
    """How an adapter for this model is scaled, as the facts beside a mixed one say it."""
    config = cast(Any, backbone.model).peft_config["default"]
    return {"alpha": repr(float(config.lora_alpha)), "rslora": str(config.use_rslora).lower()}


def parse(kind: Kind, data: bytes, frame: Frame) -> Ask:
    """A request's body against what this service can be asked.

    Raises:
        ServiceError: 400: it is no body; 409: the device has another backbone, or its vector lies in another space;
            422: a value is wrong. The text repeats nothing of the body.
    """
    try:
        tensors, facts = body.read(data)
    except body.MalformedError as error:
        raise ServiceError(400, f"the body should be safetensors: {error}") from None
    _same_backbone(facts.pop(BACKBONE, ""), frame)
    mixtures = _mixtures(tensors, facts.pop(SPACE, None), frame)
    if kind == "adapters":
        _nothing_else(tensors, facts)
        if len(mixtures or (None,)) != 1:
            raise ServiceError(422, f"{VECTOR}, {WEIGHTS}: should have one row: one adapter in one request")
        return Ask(kind, mixtures or _global(frame, 1), torch.empty(0))
    if frame.shapes is None:
        raise ServiceError(404, "this service gives adapters, no images")
    prompt = _prompt(tensors.pop(PROMPT, None), frame.shapes, frame.most_images)
    if mixtures and len(mixtures) != len(prompt):
        raise ServiceError(422, f"{VECTOR}, {WEIGHTS}: should have a row for each image")
    most = min(frame.most_steps, frame.shapes.steps)
    steps = _whole(facts, STEPS, 1, most)
    found = Ask(
        kind=kind,
        mixtures=mixtures or _global(frame, len(prompt)),
        prompt=prompt,
        seed=_whole(facts, SEED, 0, 2**63 - 1),
        steps=steps,
        guidance=_guidance(facts.pop(GUIDANCE, "")),
        sampler=_sampler(facts.pop(SAMPLER, ""), kind),
        done=_whole(facts, DONE, 1, steps - 1) if kind == "latents" else 0,
    )
    _nothing_else(tensors, facts)
    return found


def _same_backbone(fingerprint: str, frame: Frame) -> None:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", fingerprint):
        raise ServiceError(422, f"{BACKBONE}: should be the fingerprint of the device's backbone")
    if fingerprint != frame.fingerprint:
        raise ServiceError(409, f"another backbone: the device has {fingerprint}, this service {frame.fingerprint}")


def _mixtures(tensors: dict[str, Tensor], space: str | None, frame: Frame) -> tuple[Mixture, ...]:
    """From a direction in the centroids' space or from explicit weights, one per row; neither: none."""
    vector, clusters, weights = (tensors.pop(name, None) for name in (VECTOR, CLUSTERS, WEIGHTS))
    if (vector is None) != (space is None):
        raise ServiceError(422, f"{VECTOR} and {SPACE} go together")
    if (clusters is None) != (weights is None) or (vector is not None and weights is not None):
        raise ServiceError(422, f"should have {CLUSTERS} and {WEIGHTS}, or {VECTOR}, or none of them")
    if vector is not None:
        return _likened(vector, str(space), frame)
    return _weighted(clusters, weights, frame) if clusters is not None and weights is not None else ()


def check_space(space: str, centroids: str) -> None:
    """Whether a vector can be compared with the centroids: the device asks itself that before it sends one.

    Raises:
        ServiceError: 409: it lies in another space; 422: no centroids are there.
    """
    if not centroids:
        raise ServiceError(422, f"{VECTOR}: the clusters of this run do not come from prompts; send {WEIGHTS}")
    if space != centroids:
        raise ServiceError(
            409, f"{VECTOR}: of another encoder or another secret key than the run's devices have; or send {WEIGHTS}"
        )


def _likened(vector: Tensor, space: str, frame: Frame) -> tuple[Mixture, ...]:
    check_space(space, frame.compared)
    _shaped(VECTOR, vector, torch.float32, (frame.width,), frame.most_images)
    rows = vector.double().numpy()
    if not np.allclose(np.linalg.norm(rows, axis=1), 1, atol=OFF):
        raise ServiceError(422, f"{VECTOR}: each row should have length 1")
    return tuple(likened(row, frame.centroids, frame.temperature) for row in rows)


def _weighted(clusters: Tensor, weights: Tensor, frame: Frame) -> tuple[Mixture, ...]:
    if clusters.dtype != torch.int64 or clusters.ndim != 1:
        raise ServiceError(422, f"{CLUSTERS}: should be whole numbers, (clusters,)")
    named = [int(number) for number in clusters]
    if len(set(named)) < len(named) or not set(named) <= set(frame.clusters):
        there = ", ".join(map(str, frame.clusters)) or "none"
        raise ServiceError(422, f"{CLUSTERS}: should name clusters of this run, each once; there are {there}")
    _shaped(WEIGHTS, weights, torch.float64, (len(named),), frame.most_images)
    try:
        return tuple(Mixture.of(dict(zip(named, row, strict=True))) for row in weights.tolist())
    except SettingsError as error:
        raise ServiceError(422, f"{WEIGHTS}: {error}") from None


def _global(frame: Frame, count: int) -> tuple[Mixture, ...]:
    if not frame.has_global:
        raise ServiceError(422, f"this run has no global adapter: send {VECTOR} or {WEIGHTS}")
    return (Mixture.of({GLOBAL: 1.0}),) * count


def _prompt(prompt: Tensor | None, shapes: Shapes, most: int) -> Tensor:
    if prompt is None:
        raise ServiceError(422, f"{PROMPT} is missing: the encoded prompts")
    _shaped(PROMPT, prompt, torch.float32, shapes.prompt, most)
    return prompt


def _shaped(name: str, tensor: Tensor, dtype: torch.dtype, row: tuple[int, ...], most: int) -> None:
    if tensor.dtype != dtype or tensor.ndim != len(row) + 1 or tuple(tensor.shape[1:]) != row:
        raise ServiceError(422, f"{name}: should be {str(dtype).removeprefix('torch.')} of shape (rows, {_sizes(row)})")
    if not 1 <= len(tensor) <= most:
        raise ServiceError(422, f"{name}: should have 1 to {most} rows")


def _sizes(row: tuple[int, ...]) -> str:
    return ", ".join(map(str, row))


def _whole(facts: dict[str, str], name: str, least: int, most: int) -> int:
    text = facts.pop(name, "")
    if not WHOLE.fullmatch(text) or not least <= int(text) <= most:
        raise ServiceError(422, f"{name}: should be a whole number from {least} to {most}")
    return int(text)


def _guidance(text: str) -> float:
    if not DECIMAL.fullmatch(text) or float(text) > MOST_GUIDANCE:
        raise ServiceError(422, f"{GUIDANCE}: should be a number from 0 to {MOST_GUIDANCE:g}")
    return float(text)


def _sampler(text: str, kind: Kind) -> Literal["ddim", "dpm-solver"]:
    allowed = SAMPLERS if kind == "images" else SAMPLERS[:1]  # the other one's steps depend on those before them
    if text not in allowed:
        raise ServiceError(422, f"{SAMPLER}: should be {' or '.join(allowed)}")
    return cast(Literal["ddim", "dpm-solver"], text)


def _nothing_else(tensors: Collection[str], facts: Collection[str]) -> None:
    if tensors or facts:
        raise ServiceError(422, f"{len(tensors)} tensors and {len(facts)} facts too many")
