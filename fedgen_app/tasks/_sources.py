"""The images of a source, decoded once per machine, and what each is an image of."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fedgen_app.data import styles
from fedgen_app.data.cache import Arrays, cached, source_identity
from fedgen_app.data.decoding import Pictures
from fedgen_app.data.images import BUNDLED, SINGLE_FILES, STYLED, load_images
from fedgen_app.data.local import Split, hub_dataset
from fedgen_app.errors import DataError
from fedgen_app.learning.backbone import Backbone
from fedgen_app.settings import Settings, looks_like_path
from fedgen_app.tasks._facts import Facts

Array = NDArray[Any]

VERSION = 3  # of what the caches hold
SHOWN = 10  # captions or classes that samples show where the user names none
log = logging.getLogger(__name__)


def _read(settings: Settings, pipeline: Facts, source: str, split: Split) -> Pictures | None:
    return load_images(
        source,
        split,
        resolution=settings.resolution or pipeline.resolution,
        channels=pipeline.image_channels,
        text_column=settings.text_column,
        label_column=settings.label_column,
    )


def identity(source: str, split: Split) -> str | None:
    """What the images of a source hang on; None where a data set of the hub has no such split.

    Raises:
        DataError: it cannot be listed.
    """
    if source in BUNDLED:
        return source_identity("bundled", split, "pictures") + (styles.MARK if source == STYLED else "")
    if looks_like_path(source):
        return source_identity(source, split, "pictures")
    return _on_hub(source, split)


@functools.lru_cache(maxsize=4)
def _on_hub(source: str, split: Split) -> str | None:
    found = hub_dataset(source, split, SINGLE_FILES)
    return None if found is None else str(found._fingerprint)


def pictures(settings: Settings, pipeline: Facts, source: str, split: Split) -> Pictures | None:
    """The images of a source, from the machine's cache of decoded images where they are there; None: no such split.

    Raises:
        DataError: there is nothing to read.
    """
    mark = identity(source, split)
    if mark is None:
        return None
    key: dict[str, object] = {
        "source": mark,
        "columns": [settings.text_column, settings.label_column],
        "resolution": settings.resolution or pipeline.resolution,
        "channels": pipeline.image_channels,
        "version": VERSION,
    }

    def build() -> Arrays:
        found = _read(settings, pipeline, source, split)
        return {"absent": np.ones(1, np.uint8)} if found is None else _packed(found)

    arrays = cached("pictures", key, build)
    return None if "absent" in arrays else _unpacked(arrays)


def training_pictures(settings: Settings, backbone: Backbone, source: str) -> Pictures:
    """The images of a source to train on.

    Raises:
        DataError: there are none.
    """
    found = pictures(settings, cast(Facts, backbone.processor), source, "train")
    if found is None:
        raise DataError(f"{source}: no training images")
    return found


def tell_skipped(found: Pictures) -> None:
    """Log how many images could not be read."""
    if found.skipped:
        log.warning("%s: %d images cannot be read and are left out", found.name, found.skipped)


def _packed(found: Pictures) -> Arrays:
    """Arrays of numbers only: texts as UTF-8 bytes and where each begins."""
    arrays: Arrays = {"pixels": found.pixels, "skipped": np.array([found.skipped])}
    texts_of = {
        "name": (found.name,),
        "labels": found.labels,
        "captions": found.captions,
        "classes": found.classes,
        "wishes": found.wishes,
    }
    for name, texts in texts_of.items():
        if texts is not None:
            encoded = [text.encode(errors="surrogatepass") for text in texts]
            arrays[name] = np.frombuffer(b"".join(encoded), np.uint8)
            arrays[f"{name}-starts"] = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return arrays


def _unpacked(arrays: Arrays) -> Pictures:
    def texts(key: str) -> tuple[str, ...] | None:
        if key not in arrays:
            return None
        whole, starts = arrays[key].tobytes(), arrays[f"{key}-starts"].tolist()
        return tuple(whole[a:b].decode(errors="surrogatepass") for a, b in zip(starts[:-1], starts[1:], strict=True))

    (name,), classes = texts("name") or ("",), texts("classes") or ()
    skipped = int(arrays["skipped"][0])
    return Pictures(name, arrays["pixels"], texts("labels"), texts("captions"), classes, skipped, texts("wishes"))


def prompts_of(settings: Settings, found: Pictures) -> tuple[str, ...]:
    """What each image is an image of: its caption, else the setting's wording of its label, else nothing."""
    if found.captions is not None:
        return found.captions
    if found.labels is not None:
        wordings = {label: settings.diffusion.caption.format(label) for label in set(found.labels)}
        return tuple(wordings[label] for label in found.labels)
    return ("",) * len(found)


def descriptions(settings: Settings, pipeline: Facts, found: Pictures) -> tuple[str, ...]:
    """What the denoiser is told of each image: a prompt, a class's name or number, or nothing."""
    if pipeline.condition == "text":
        return prompts_of(settings, found)
    if pipeline.condition == "none":
        return ("",) * len(found)
    if found.labels is None:
        raise DataError(f"{found.name}: a class-conditional backbone needs labels, and there are none")
    if found.classes and not pipeline.classes:  # the data set's own numbering, which it declares
        numbers = {name: str(number) for number, name in enumerate(found.classes)}
        return tuple(numbers.get(label, label) for label in found.labels)
    return found.labels


def class_names(settings: Settings, pipeline: Facts, shared: Pictures | None) -> tuple[str, ...]:
    """Names of classes in an order that server and clients share, so that numbers stand for them on the wire.

    Those of the settings, else of a class-conditional backbone, else of the data set where both have the same
    (``shared``): a device does not see the server's, and nobody sees a device's.
    """
    if settings.metrics.classes:
        return settings.metrics.classes
    if pipeline.condition == "class":
        return pipeline.classes or tuple(map(str, range(pipeline.class_count)))
    return shared.classes or tuple(sorted(set(shared.labels or ()))) if shared else ()


def subset(found: Pictures, chosen: Array) -> Pictures:
    """Some of the images."""
    labels, captions, wishes = (
        None if texts is None else tuple(texts[i] for i in chosen)
        for texts in (found.labels, found.captions, found.wishes)
    )
    return dataclasses.replace(found, pixels=found.pixels[chosen], labels=labels, captions=captions, wishes=wishes)


def prompts(settings: Settings, backbone: Backbone) -> tuple[str, ...]:
    """The prompts of the settings, else one per class or caption of the data on this machine, else nothing.

    A prompt that is generated from nothing is the empty text.
    """
    pipeline = cast(Facts, backbone.processor)
    if settings.samples.prompts or pipeline.condition == "none":
        return settings.samples.prompts or ("",) * SHOWN
    if not settings.dataset:
        return (
            ("",) * SHOWN if pipeline.condition == "text" else tuple(map(str, range(min(SHOWN, pipeline.class_count))))
        )
    found = training_pictures(settings, backbone, settings.dataset)
    return tuple(dict.fromkeys(descriptions(settings, pipeline, found)))[:SHOWN]
