"""How a backbone's images compare with real ones, whatever draws them: FID, KID, diversity, KID by class."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedgen_app.errors import MetricError, SettingsError
from fedgen_app.learning.task import Metrics
from fedgen_app.settings import Settings
from fedgen_app.tasks._pictures import Reference

Draw = Callable[[Sequence[str]], NDArray[np.uint8]]

log = logging.getLogger(__name__)


def likeness(
    settings: Settings, device: torch.device, reference: object, draw: Draw, seed: int, told: bool = True
) -> Metrics:
    """What ``draw`` makes of the reference's prompts, against its images; nothing where there is no reference.

    Args:
        draw: One image per prompt, (n, h, w, channels) uint8.
        told: Whether images depend on their prompts: without, classes are not compared one by one.

    Returns:
        ``fid``, ``kid``, ``kid_std``, ``samples`` (n), ``features`` (the extractor), ``fid_floor`` and ``kid_floor``
        (n real images against n others), ``diversity`` (spread of the features, 1: as real ones), ``kid_by_class``.
        On a client KID and diversity alone: FID is of no use with so few images.
    """
    if not isinstance(reference, Reference):
        return {}
    try:
        measured = _quality_of(settings, device, reference, draw, seed, told)
    # SettingsError: the server's file of weights is not on this device.
    except (MetricError, SettingsError) as error:
        if not reference.own:
            raise
        # Too few images, or no extractor on this device: no reason to go without a personal adapter.
        log.warning("KID is not measured: %s", error)
        return {}
    if reference.own:
        return {name: measured[name] for name in ("kid", "kid_std", "diversity") if name in measured}
    return measured


def _quality_of(
    settings: Settings, device: torch.device, real: Reference, draw: Draw, seed: int, told: bool
) -> Metrics:
    try:
        from fedgen_app.tasks import _quality
    except ModuleNotFoundError as error:
        raise MetricError(f"metrics.samples needs {error.name}: pip install 'fedgen-edge[sim]'") from None

    images = draw(real.prompts)
    extractor = _extractor(settings, device, real.own)
    drawn, there = _quality.extract(extractor, images), _quality.reference(extractor, real.pixels)
    found: Metrics = {**_quality.compare(drawn, there, seed), "samples": len(images), "features": extractor.name}
    if len(real.others) == len(real.pixels):
        floor = _quality.compare(_quality.reference(extractor, real.others), there, seed)
        found |= {"fid_floor": floor["fid"], "kid_floor": floor["kid"]}
    found["diversity"] = _quality.diversity(drawn, there)
    if real.labels and told:
        found["kid_by_class"] = _quality.per_class(drawn, real.labels, there, real.labels, seed)
    return found


def _extractor(settings: Settings, device: torch.device, own: bool) -> Any:
    """What turns images into features.

    ``auto`` is the bundled extractor for the bundled pictures, else Inception; where that cannot be had, the bundled
    one with a warning: the metrics' ``features`` says which it was. Not on a client (``own``): its KID goes into a
    mean with the others', and a mean over two extractors says nothing.
    """
    from fedgen_app.tasks import _quality

    wanted = settings.metrics.features
    if wanted != "auto":
        return _quality.open_extractor(wanted, device)
    if settings.dataset == "bundled":
        return _quality.open_extractor("bundled", device)
    return _quality.open_extractor("inception", device) if own else _inception_or_bundled(device)


@functools.lru_cache(maxsize=1)
def _inception_or_bundled(device: torch.device) -> Any:
    """One of them for as long as the process lives: the rounds of a run are compared with each other."""
    from fedgen_app.tasks import _quality

    try:
        return _quality.open_extractor("inception", device)
    except MetricError as error:
        log.warning("%s; measured with the bundled extractor instead", error)
        return _quality.open_extractor("bundled", device)
