"""What images of a model are worth: FID and KID against real ones, and the denoising loss."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.task import Examples, Metrics
from fedgen_app.seeds import derive
from fedgen_app.settings import Settings
from fedgen_app.tasks import _likeness
from fedgen_app.tasks._objective import denoising_loss
from fedgen_app.tasks._pictures import Reference
from fedgen_app.tasks._pipeline import Pipeline
from fedgen_app.tasks._sampling import generate, pass_seconds

LONG = 900.0  # seconds of measuring, in a whole run, that are worth a warning
log = logging.getLogger(__name__)


def check(settings: Settings, backbone: Backbone, test: Examples | None, frozen: Metrics | None) -> None:
    """Before any client works: prompts that the backbone knows, and the extractor that the run began with.

    Warns where measuring will take long.

    Raises:
        SettingsError: ``samples.prompts`` names what this backbone cannot be told.
        CheckpointError: the frozen backbone was measured with another extractor than there is now.
    """
    _likeness.check(settings, backbone, test, frozen)
    if test is None or not isinstance(test.reference, Reference):
        return
    _warn_of_cost(settings, backbone, test.reference)


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
    return _likeness.client_metrics(settings, backbone, ("denoising_loss",))


def evaluate(settings: Settings, backbone: Backbone, examples: Examples, seed: int) -> Metrics:
    """The denoising loss; and where there are images to compare with, what ``_likeness.likeness`` says of them.

    The frozen, the global and a personal adapter are measured with the same noise.
    """

    def draw(texts: Sequence[str]) -> NDArray[np.uint8]:
        side = cast(Pipeline, backbone.processor).side_for(settings.resolution)
        return generate(backbone, texts, derive(seed, "measured"), settings.samples, side)

    measured = _likeness.likeness(settings, backbone, examples.reference, draw, seed)
    return {**measured, "denoising_loss": denoising_loss(backbone, examples, seed)}
