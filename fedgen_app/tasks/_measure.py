"""What images of a model are worth: FID and KID against real ones, and the denoising loss."""

from __future__ import annotations

import functools
import logging
from typing import Any, cast

import torch

from fedgen_app.data.images import BUNDLED
from fedgen_app.errors import CheckpointError, MetricError, SettingsError
from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.task import Examples, Metrics
from fedgen_app.seeds import derive
from fedgen_app.settings import Settings
from fedgen_app.tasks._objective import denoising_loss
from fedgen_app.tasks._pictures import Reference, class_names
from fedgen_app.tasks._pipeline import Pipeline
from fedgen_app.tasks._sampling import generate, pass_seconds

OWN = ("kid", "kid_std", "diversity", "kid_by_class")  # what a client says of its images, beside the loss
LONG = 900.0  # seconds of measuring, in a whole run, that are worth a warning
log = logging.getLogger(__name__)


def check(settings: Settings, backbone: Backbone, test: Examples | None, frozen: Metrics | None) -> None:
    """Before any client works: prompts that the backbone knows, and the extractor that the run began with.

    Warns where measuring will take long.

    Raises:
        SettingsError: ``samples.prompts`` names what this backbone cannot be told.
        CheckpointError: the frozen backbone was measured with another extractor than there is now.
    """
    pipeline = cast(Pipeline, backbone.processor)
    for prompt in settings.samples.prompts:
        if pipeline.condition == "none":
            raise SettingsError(f"samples.prompts = {prompt!r}: this backbone is told nothing; leave it empty")
        if pipeline.condition == "class":
            try:
                pipeline.class_of(prompt)
            except SettingsError as error:
                raise SettingsError(f"samples.prompts = {prompt!r}: {error}") from None
    if test is None or not isinstance(test.reference, Reference):
        return
    if frozen is not None and "features" in frozen:
        _same_extractor(settings, backbone, frozen["features"])
    _warn_of_cost(settings, backbone, test.reference)


def _same_extractor(settings: Settings, backbone: Backbone, before: str) -> None:
    now = _extractor(settings, backbone.device, own=False).name
    if now != before:
        raise CheckpointError(
            f"the run's images were measured with {before}, and metrics.features = {settings.metrics.features!r} gives "
            f"{now} on this machine now: figures of two extractors do not compare. In launch.json of the run folder, "
            f"set metrics.features to what gives {before}: bundled, inception or a file of its weights"
        )


def _warn_of_cost(settings: Settings, backbone: Backbone, real: Reference) -> None:
    rounds, every = settings.num_server_rounds, settings.evaluate_every
    times = 1 + (-(-rounds // every) if every else 1)  # the frozen backbone; then every so many rounds, and the last
    pipeline, options = cast(Pipeline, backbone.processor), settings.samples
    steps = len(real.pixels) * min(options.steps, len(pipeline.noise))
    once = steps * pass_seconds(backbone, real.prompts[0], options, pipeline.side_for(settings.resolution))
    if once * times > LONG:
        log.warning(
            "measuring takes up to %s each time and %s in the whole run: %d images of %d steps, %d times; what lowers "
            "it: metrics.samples, samples.steps, samples.guidance=1, and a larger evaluate-every",
            *(_span(once), _span(once * times), len(real.pixels), steps // len(real.pixels), times),
        )


def _span(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"


def client_metrics(settings: Settings, backbone: Backbone) -> dict[str, tuple[str, ...]]:
    """What a client may send and where it stands in results.json: its loss and, where asked for, KID, by class too."""
    if not settings.metrics.personal_samples:
        return {"denoising_loss": ("denoising_loss",)}
    classes = enumerate(class_names(settings, backbone))
    return {name: (name,) for name in (*OWN[:-1], "denoising_loss")} | {
        f"{OWN[-1]}_{number}": (OWN[-1], name) for number, name in classes
    }


def evaluate(settings: Settings, backbone: Backbone, examples: Examples, seed: int) -> Metrics:
    """The denoising loss; and where there are images to compare with, FID, KID and what goes with them.

    The frozen, the global and a personal adapter are measured with the same noise.

    Returns:
        ``fid``, ``kid``, ``kid_std``, ``samples`` (n), ``features`` (the extractor), ``fid_floor`` and ``kid_floor``
        (n real images against n others), ``diversity`` (spread of the features, 1: as real ones), ``kid_by_class``,
        and ``denoising_loss``. On a client no FID, which is of no use with so few images, and no floor.
    """
    measured: Metrics = {}
    if isinstance(examples.reference, Reference):
        try:
            measured = _quality_of(settings, backbone, examples.reference, seed)
        # SettingsError: the server's file of weights is not on this device.
        except (MetricError, SettingsError) as error:
            if not examples.reference.own:
                raise
            # Too few images, or no extractor on this device: no reason to go without a personal adapter.
            log.warning("KID is not measured: %s", error)
        if examples.reference.own:
            measured = {name: measured[name] for name in OWN if name in measured}
    return {**measured, "denoising_loss": denoising_loss(backbone, examples, seed)}


def _quality_of(settings: Settings, backbone: Backbone, real: Reference, seed: int) -> Metrics:
    try:
        from fedgen_app.tasks import _quality
    except ModuleNotFoundError as error:
        raise MetricError(f"metrics.samples needs {error.name}: pip install 'fedgen-edge[sim]'") from None

    pipeline = cast(Pipeline, backbone.processor)
    side = pipeline.side_for(settings.resolution)
    images = generate(backbone, real.prompts, derive(seed, "measured"), settings.samples, side)
    extractor = _extractor(settings, backbone.device, real.own)
    drawn, there = _quality.extract(extractor, images), _quality.reference(extractor, real.pixels)
    found: Metrics = {**_quality.compare(drawn, there, seed), "samples": len(images), "features": extractor.name}
    if len(real.others) == len(real.pixels):
        floor = _quality.compare(_quality.reference(extractor, real.others), there, seed)
        found |= {"fid_floor": floor["fid"], "kid_floor": floor["kid"]}
    found["diversity"] = _quality.diversity(drawn, there)
    if real.labels:
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
    if settings.dataset in BUNDLED:
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
