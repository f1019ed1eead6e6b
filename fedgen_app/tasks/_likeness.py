"""How a backbone's images compare with real ones, whatever draws them: FID, KID, diversity, KID by class."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from fedgen_app.data.images import BUNDLED
from fedgen_app.errors import CheckpointError, MetricError, SettingsError
from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.task import Examples, Metrics
from fedgen_app.settings import Settings
from fedgen_app.tasks._facts import Facts
from fedgen_app.tasks._pictures import Reference
from fedgen_app.tasks._sources import class_names, training_pictures

OWN = ("kid", "kid_std", "diversity", "kid_by_class")  # what a client says of its images
Draw = Callable[[Sequence[str]], NDArray[np.uint8]]

log = logging.getLogger(__name__)


def check(settings: Settings, backbone: Backbone, test: Examples | None, frozen: Metrics | None) -> None:
    """Before any client works: a size and prompts that the backbone knows, and the extractor that the run began with.

    Raises:
        SettingsError: the backbone has no such ``resolution``, or ``samples.prompts`` names what it cannot be told.
        CheckpointError: the frozen backbone was measured with another extractor than there is now.
    """
    known = cast(Facts, backbone.processor)
    known.side_for(settings.resolution)
    for prompt in settings.samples.prompts:
        if known.condition == "none":
            raise SettingsError(f"samples.prompts = {prompt!r}: this backbone is told nothing; leave it empty")
        if known.condition == "class":
            try:
                known.class_of(prompt)
            except SettingsError as error:
                raise SettingsError(f"samples.prompts = {prompt!r}: {error}") from None
    if test is not None and isinstance(test.reference, Reference) and frozen is not None and "features" in frozen:
        _same_extractor(settings, backbone, frozen["features"])


def _same_extractor(settings: Settings, backbone: Backbone, before: str) -> None:
    now = _extractor(settings, backbone.device, own=False).name
    if now != before:
        raise CheckpointError(
            f"the run's images were measured with {before}, and metrics.features = {settings.metrics.features!r} gives "
            f"{now} on this machine now: figures of two extractors do not compare. In launch.json of the run folder, "
            f"set metrics.features to what gives {before}: bundled, inception or a file of its weights"
        )


def client_metrics(settings: Settings, backbone: Backbone, always: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What a client may send and where it stands in results.json: ``always``, and where asked for KID, by class too."""
    plain: dict[str, tuple[str, ...]] = {name: (name,) for name in always}
    if not settings.metrics.personal_samples:
        return plain
    shared = training_pictures(settings, backbone, settings.dataset) if settings.dataset else None
    classes = enumerate(class_names(settings, cast(Facts, backbone.processor), shared))
    return (
        {name: (name,) for name in OWN[:-1]}
        | plain
        | {f"{OWN[-1]}_{number}": (OWN[-1], name) for number, name in classes}
    )


def likeness(
    settings: Settings, backbone: Backbone, reference: object, draw: Draw, seed: int, told: bool = True
) -> Metrics:
    """What ``draw`` makes of the reference's prompts, against its images; nothing where there is no reference.

    Args:
        draw: One image per prompt, (n, h, w, channels) uint8.
        told: Whether images depend on their prompts: without, classes are not compared one by one.

    Returns:
        ``fid``, ``kid``, ``kid_std``, ``samples`` (n), ``features`` (the extractor), ``fid_floor`` and ``kid_floor``
        (n real images against n others), ``diversity`` (spread of the features, 1: as real ones), ``kid_by_class``.
        On a client no FID, which is of no use with so few images, and no floor.
    """
    if not isinstance(reference, Reference):
        return {}
    try:
        return _quality_of(settings, backbone.device, reference, draw, seed, told)
    # SettingsError: the server's file of weights is not on this device.
    except (MetricError, SettingsError) as error:
        if not reference.own:
            raise
        # Too few images, or no extractor on this device: no reason to go without a personal adapter.
        log.warning("KID is not measured: %s", error)
        return {}


def _quality_of(
    settings: Settings, device: torch.device, real: Reference, draw: Draw, seed: int, told: bool
) -> Metrics:
    try:
        from fedgen_app.tasks import _features, _quality
    except ModuleNotFoundError as error:
        raise MetricError(f"metrics.samples needs {error.name}: pip install 'fedgen-edge[sim]'") from None

    images, extractor = draw(real.prompts), _extractor(settings, device, real.own)
    drawn = _features.extract(extractor, images)
    found: Metrics
    if real.own:
        there = _features.reference(extractor, real.pixels)
        found = dict(_quality.kid(drawn, there, seed))
    else:
        known = _known(extractor, real, seed)
        there = known.features
        found = {**_quality.compare(drawn, known, seed), "samples": len(images), "features": extractor.name}
        found |= {f"{name}_floor": known.floor[name] for name in ("fid", "kid") if known.floor}
    found["diversity"] = _quality.diversity(drawn, there)
    if real.labels and told:
        found["kid_by_class"] = _quality.per_class(drawn, real.labels, there, real.labels, seed)
    return found


@functools.lru_cache(maxsize=1)
def _known(extractor: Any, real: Reference, seed: int) -> Any:
    """What is known of the server's real images, for as long as the process lives."""
    from fedgen_app.tasks import _quality

    return _quality.real_side(extractor, real.pixels, real.others, seed)


def _extractor(settings: Settings, device: torch.device, own: bool) -> Any:
    """What turns images into features.

    ``auto`` is the bundled extractor for the bundled pictures, else Inception; where that cannot be had, the bundled
    one with a warning: the metrics' ``features`` says which it was. Not on a client (``own``): its KID goes into a
    mean with the others', and a mean over two extractors says nothing.
    """
    from fedgen_app.tasks import _features

    wanted = settings.metrics.features
    if wanted != "auto":
        return _features.open_extractor(wanted, device)
    if settings.dataset in BUNDLED:
        return _features.open_extractor("bundled", device)
    return _features.open_extractor("inception", device) if own else _inception_or_bundled(device)


@functools.lru_cache(maxsize=1)
def _inception_or_bundled(device: torch.device) -> Any:
    """One of them for as long as the process lives: the rounds of a run are compared with each other."""
    from fedgen_app.tasks import _features

    try:
        return _features.open_extractor("inception", device)
    except MetricError as error:
        log.warning("%s; measured with the bundled extractor instead", error)
        return _features.open_extractor("bundled", device)
