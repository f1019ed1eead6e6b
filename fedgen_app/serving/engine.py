"""A finished run's model and adapters, and what is computed with them for several requests at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedgen_app.errors import SettingsError
from fedgen_app.federation.hybrid import adapters_of, centroids_of
from fedgen_app.federation.method import load_method, lora_of
from fedgen_app.federation.summary import CENTROIDS
from fedgen_app.learning import mixture
from fedgen_app.learning.adapters import Adapter, load_adapter
from fedgen_app.learning.backbone import Backbone, load_task, open_backbone
from fedgen_app.learning.export import ADAPTER_FILE
from fedgen_app.learning.mixture import Mixture
from fedgen_app.learning.task import Shapes, Stages, Task
from fedgen_app.serving import asks, body
from fedgen_app.serving.asks import GLOBAL, Ask, Frame
from fedgen_app.serving.guard import Limits
from fedgen_app.settings import Settings


@dataclass(frozen=True)
class Engine:
    """What answers are computed from.

    Attributes:
        parts: Every cluster's adapter, and the global one under ``GLOBAL``.
        batch: Images of one forward pass.
    """

    settings: Settings
    task: Task
    backbone: Backbone
    parts: dict[int, Adapter]
    frame: Frame
    batch: int

    def carry_out(self, batch: Sequence[Ask]) -> list[bytes]:
        """The answers' bodies of requests that have ``together`` in common."""
        if batch[0].kind == "adapters":
            return [self._adapter(ask.mixtures[0]) for ask in batch]
        assert self.task.stages is not None
        return self._drawn(batch, self.task.stages)

    def _adapter(self, wanted: Mixture) -> bytes:
        mixed = mixture.combined(wanted, self.parts, lambda rank: scaling(self.settings, rank))
        return body.write(mixed, asks.scaled(self.backbone))

    def _drawn(self, batch: Sequence[Ask], stages: Stages) -> list[bytes]:
        first = batch[0]
        sizes = [len(ask.mixtures) for ask in batch]
        settings = self.settings.sampling(
            steps=first.steps,
            guidance=first.guidance,
            sampler=first.sampler,
            batch=self.batch,  # whatever the run itself draws at once
        )
        start = torch.cat([stages.noise(settings, self.backbone, len(a.mixtures), a.seed) for a in batch])
        prompts = torch.cat([ask.prompt for ask in batch])
        wanted = [one for ask in batch for one in ask.mixtures]
        until = first.done or first.steps
        with mixture.active(self.backbone.model, self.parts, wanted) as rows:
            reached = stages.advance(settings, self.backbone, prompts, start, 0, until, rows)
        each = torch.split(reached, sizes)
        if first.done:
            return [body.write({"latents": one}, {"done": str(first.done)}) for one in each]
        return [stages.pack(stages.finish(self.backbone, one)) for one in each]


def scaling(settings: Settings, rank: int) -> float:
    """Of an adapter of this rank."""
    return lora_of(settings).at(rank).scaling


def open_engine(folder: Path, settings: Settings, clusters: Sequence[int], limits: Limits, place: str = "") -> Engine:
    """The model and adapters of a finished run, every adapter tried once.

    Args:
        folder: The run folder.
        clusters: Those that have an adapter.
        place: This machine's own place of the backbone.

    Raises:
        SettingsError: all weights learned.
        AdapterError: an adapter is damaged or does not fit.
    """
    if load_method(settings.method).weights != "adapter":
        raise SettingsError(f"method = {settings.method!r}: all weights learned, there are no adapters to serve")
    task, backbone = load_task(settings.task), open_backbone(settings, place)
    parts = adapters_of(folder / "clusters", clusters)
    if (folder / "global" / ADAPTER_FILE).is_file():
        parts[GLOBAL] = load_adapter(folder / "global" / ADAPTER_FILE)
    known = (folder / "clusters" / CENTROIDS).is_file()
    centroids, space = centroids_of(folder / "clusters") if known else ({}, "")
    frame = Frame(
        fingerprint=backbone.fingerprint,
        shapes=_shapes(settings, task, backbone),
        clusters=tuple(clusters),
        has_global=GLOBAL in parts,
        centroids={cluster: centre for cluster, centre in centroids.items() if cluster in parts},
        space=space,
        temperature=settings.clusters.temperature,
        most_images=limits.images,
        most_steps=limits.steps,
    )
    engine = Engine(settings, task, backbone, parts, frame, limits.batch)
    with mixture.active(backbone.model, parts, [Mixture.of({cluster: 1.0}) for cluster in parts]):
        pass
    return engine


def _shapes(settings: Settings, task: Task, backbone: Backbone) -> Shapes | None:
    """Of prompts and latents; None where prompts would be plain, or nothing is drawn: then adapters alone are given."""
    if task.stages is None or not task.stages.hides(backbone):
        return None
    return task.stages.shapes(settings, backbone)
