"""Images as rows to train on: read once per machine, dealt to clients, encoded once where an autoencoder is in use."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from fedgen_app.data import styles
from fedgen_app.data.cache import Arrays, cached, source_identity
from fedgen_app.data.decoding import Pictures
from fedgen_app.data.images import BUNDLED, load_images
from fedgen_app.data.local import Split, own_prompts, own_rows
from fedgen_app.data.partition import Partition, partition
from fedgen_app.errors import DataError
from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.task import Examples, LocalData, Share
from fedgen_app.runs.progress import step_bar
from fedgen_app.seeds import derive
from fedgen_app.settings import Settings, looks_like_path
from fedgen_app.tasks._pipeline import Pipeline

Array = NDArray[Any]

log = logging.getLogger(__name__)
VERSION = 3  # of what the caches hold
ENCODED = 16  # images per forward pass of an autoencoder, and fewer of those above 128x128:
ENCODED_PIXELS = ENCODED * 128**2  # its activations are many times larger than they are
LEAST_COMPARED = 4  # images on either side, for FID and KID
ASKED = 8  # prompts in which a simulated client says what it wants
SHOWN = 10  # captions or classes that samples show where the user names none


@dataclass(frozen=True)
class Reference:
    """Real images that generated ones are compared with.

    pixels: (n, h, w, channels) uint8; prompts: what each is an image of, n; labels: each one's class, n or none.
    others: n other real images, which give the floor of every distance; fewer where there are no more.
    own: These are a client's own hold-out: only a few numbers of them go to the server.
    """

    pixels: Array
    prompts: tuple[str, ...]
    labels: tuple[str, ...]
    others: Array
    own: bool = False


def _local(source: str) -> bool:
    return source in BUNDLED or looks_like_path(source)


def _read(settings: Settings, pipeline: Pipeline, source: str, split: Split) -> Pictures | None:
    return load_images(
        source,
        split,
        resolution=settings.resolution or pipeline.resolution,
        channels=pipeline.image_channels,
        text_column=settings.text_column,
        label_column=settings.label_column,
    )


def _key(settings: Settings, pipeline: Pipeline, source: str, split: str) -> dict[str, object]:
    return {
        "source": source_identity(source, split, "pictures"),
        "styles": styles.MARK if source == "bundled:styles" else "",
        "columns": [settings.text_column, settings.label_column],
        "resolution": settings.resolution or pipeline.resolution,
        "channels": pipeline.image_channels,
        "version": VERSION,
    }


def pictures(settings: Settings, pipeline: Pipeline, source: str, split: Split) -> Pictures | None:
    """The images of a source; local ones from the machine's cache of decoded images, where they are there.

    Raises:
        DataError: there is nothing to read.
    """
    if not _local(source):
        return _from_hub(settings, pipeline, source, split)

    def build() -> Arrays:
        found = _read(settings, pipeline, source, split)
        return {"absent": np.ones(1, np.uint8)} if found is None else _packed(found)

    arrays = cached("pictures", _key(settings, pipeline, source, split), build)
    return None if "absent" in arrays else _unpacked(arrays)


def _training_pictures(settings: Settings, backbone: Backbone, source: str) -> Pictures:
    found = pictures(settings, cast(Pipeline, backbone.processor), source, "train")
    if found is None:
        raise DataError(f"{source}: no training images")
    return found


@functools.lru_cache(maxsize=2)
def _from_hub(settings: Settings, pipeline: Pipeline, source: str, split: Split) -> Pictures | None:
    return _read(settings, pipeline, source, split)


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


def _conditions(settings: Settings, pipeline: Pipeline, found: Pictures) -> tuple[str, ...]:
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


def _moments(settings: Settings, pipeline: Pipeline, backbone: Backbone, found: Pictures) -> Array:
    """Mean and log-variance of every image's latent, (n, 2 x channels, side, side) float32, computed once per machine.

    They are kept rather than one draw of them, so that every epoch draws anew.
    """

    def build() -> Arrays:
        parts, pixels = [], _channels_first(found.pixels)
        size = max(1, min(ENCODED, ENCODED_PIXELS // (pixels.shape[2] * pixels.shape[3])))
        with step_bar("encoding images") as on_step, torch.inference_mode():
            for start in range(0, len(pixels), size):
                batch = torch.from_numpy(np.ascontiguousarray(pixels[start : start + size]))
                images = batch.to(pipeline.device, pipeline.dtype)
                parts.append(pipeline.vae.encode(images / 127.5 - 1).latent_dist.parameters.float().cpu().numpy())
                on_step(min(start + size, len(pixels)), len(pixels))
        return {"moments": np.concatenate(parts)}

    key = {
        "pixels": _digest(found.pixels),
        "backbone": backbone.fingerprint,  # of the autoencoder's configuration too
        "dtype": str(pipeline.dtype),
        "version": VERSION,
    }
    return cached("moments", key, build)["moments"]


def _embeddings(pipeline: Pipeline, backbone: Backbone, distinct: Sequence[str]) -> Array:
    """Hidden states of the empty prompt and of the distinct captions, (1 + captions, length, width) float32."""
    texts = ["", *distinct]
    key = {
        "texts": hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest(),
        "backbone": backbone.fingerprint,  # of the tokenizer too
        "dtype": str(pipeline.dtype),
        "version": VERSION,
    }
    return cached("prompts", key, lambda: {"hidden": pipeline.embed(texts).numpy()})["hidden"]


def _digest(pixels: Array) -> str:
    sha = hashlib.sha256(repr(pixels.shape).encode())
    sha.update(np.ascontiguousarray(pixels).data)  # not its bytes: they are a copy
    return sha.hexdigest()


def _channels_first(pixels: Array) -> Array:
    """A view: only what a client owns is copied."""
    return pixels.transpose(0, 3, 1, 2)


@dataclass(frozen=True)
class Encoded:
    """A source as the denoiser takes it: one row per image, and what rows point into."""

    rows: dict[str, Array]
    shared: dict[str, Array]

    def take(self, chosen: Array, reference: Reference | None = None) -> Examples:
        """The rows of these images, and only the captions that they have."""
        own, shared = {name: array[chosen] for name, array in self.rows.items()}, self.shared
        if "caption" in own:
            distinct, place = np.unique(own["caption"], return_inverse=True)
            own["caption"] = place + 1
            shared = {name: array[np.append(0, distinct)] for name, array in shared.items()}
        rows = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in own.items()}
        told = {name: torch.from_numpy(array) for name, array in shared.items()}
        return Examples(rows, {"images": len(chosen)}, told, reference)


def _encoded(settings: Settings, backbone: Backbone, found: Pictures) -> Encoded:
    pipeline = cast(Pipeline, backbone.processor)
    pipeline.side_for(settings.resolution)
    rows: dict[str, Array] = {}
    shared: dict[str, Array] = {}
    if pipeline.has_vae:
        rows["moments"] = _moments(settings, pipeline, backbone, found)
    else:
        rows["pixels"] = _channels_first(found.pixels)
    conditions = _conditions(settings, pipeline, found)
    if pipeline.condition == "class":
        numbers = {label: pipeline.class_of(label) for label in set(conditions)}
        rows["class"] = np.array([numbers[label] for label in conditions], np.int64)
    elif pipeline.condition == "text":
        distinct = sorted(set(conditions))
        numbers = {text: number for number, text in enumerate(distinct, start=1)}
        rows["caption"] = np.array([numbers[text] for text in conditions], np.int64)
        if pipeline.learns_text:
            shared["tokens"] = pipeline.tokens(["", *distinct]).numpy()
        else:
            shared["hidden"] = _embeddings(pipeline, backbone, distinct)
    return Encoded(rows, shared)


@functools.lru_cache(maxsize=1)
def _training(settings: Settings, backbone: Backbone, source: str) -> tuple[Pictures, Encoded]:
    """A source's training images; kept for the next client that this process serves."""
    found = _training_pictures(settings, backbone, source)
    if found.skipped:
        log.warning("%s: %d images cannot be read and are left out", found.name, found.skipped)
    return found, _encoded(settings, backbone, found)


def split(settings: Settings, backbone: Backbone, clients: int) -> Partition:
    """Who owns which images of the training split."""
    return _split(settings, _training_pictures(settings, backbone, settings.dataset), clients)


def _split(settings: Settings, found: Pictures, clients: int) -> Partition:
    parts = settings.partition
    return partition(
        found.name,
        found.labels,
        found.captions,
        count=len(found),
        by=parts.by,
        alpha=parts.alpha,
        clients=clients,
        seed=settings.seed,
        min_examples=parts.min_examples,
    )


@functools.lru_cache(maxsize=1)
def _owners(settings: Settings, backbone: Backbone, clients: int) -> tuple[Array, ...]:
    found, _ = _training(settings, backbone, settings.dataset)
    key = {
        "labels": hashlib.sha256(repr((found.labels, found.captions, len(found))).encode()).hexdigest(),
        "partition": settings.partition.model_dump(),
        "clients": clients,
        "seed": settings.seed,
        "version": VERSION,
    }

    def build() -> Arrays:
        owned = _split(settings, found, clients).examples
        return {"examples": np.concatenate(owned), "starts": np.cumsum([0, *map(len, owned)], dtype=np.int64)}

    parts = cached("partition", key, build)
    return tuple(np.split(parts["examples"], parts["starts"][1:-1]))


def load_data(settings: Settings, backbone: Backbone, share: Share) -> LocalData:
    """One client's rows: its part of the partition, or all of a device's own folder, less a hold-out.

    Raises:
        DataError: nothing is there.
    """
    source = share.folder or settings.dataset
    if not source:
        raise DataError("dataset = '': this client has no data of its own")
    found, encoded = _training(settings, backbone, source)
    parts = (np.arange(len(found)),) if share.folder else _owners(settings, backbone, share.count)
    kept, held = own_rows(parts, share.index, share.pooled, settings.holdout_fraction, settings.seed, unit="image")
    wanted, reference = settings.metrics.personal_samples, None
    if wanted:  # of the hold-out, as all of a client's figures: an adapter has seen the others
        order = np.random.default_rng(derive(settings.seed, "reference", share.index)).permutation(held)
        reference = _reference(settings, backbone, found, order[:wanted], order[:0], own=True)
    classes = class_names(settings, backbone, shared=not share.folder)
    return LocalData(encoded.take(kept), encoded.take(held, reference), classes)


def requirements(settings: Settings, backbone: Backbone, share: Share) -> list[str]:
    """A device's own prompts; in a simulation what a few of a client's images are of."""
    if share.folder:
        return own_prompts(share.folder, share.prompts)
    found, _ = _training(settings, backbone, settings.dataset)
    parts = _owners(settings, backbone, share.count)
    kept, _ = own_rows(parts, share.index, False, settings.holdout_fraction, settings.seed, unit="image")
    wanted = found.wishes or prompts_of(settings, found)
    order = np.random.default_rng(derive(settings.seed, "requirements", share.index)).permutation(kept)
    return [text for text in dict.fromkeys(wanted[i] for i in order) if text][:ASKED]


def class_names(settings: Settings, backbone: Backbone, shared: bool = True) -> tuple[str, ...]:
    """Names of classes in an order that server and clients share, so that numbers stand for them on the wire.

    Those of the settings, else of a class-conditional backbone, else of the data set's labels where both have the same
    (``shared``): a device does not see the server's, and nobody sees a device's.
    """
    pipeline = cast(Pipeline, backbone.processor)
    if settings.metrics.classes:
        return settings.metrics.classes
    if pipeline.condition == "class":
        return pipeline.classes or tuple(map(str, range(pipeline.class_count)))
    if not shared or not settings.dataset:
        return ()
    found = _training_pictures(settings, backbone, settings.dataset)
    return found.classes or tuple(sorted(set(found.labels or ())))


def _reference(
    settings: Settings, backbone: Backbone, found: Pictures, chosen: Array, others: Array, own: bool = False
) -> Reference:
    pipeline = cast(Pipeline, backbone.processor)
    conditions = _conditions(settings, pipeline, found)
    labels = tuple(found.labels[i] for i in chosen) if found.labels is not None else ()
    told = tuple(conditions[i] for i in chosen)
    if own and pipeline.condition == "class" and not settings.metrics.classes:  # under the names of ``class_names``
        names = class_names(settings, backbone)
        labels = tuple(names[pipeline.class_of(label)] for label in told)
    return Reference(found.pixels[chosen], told, labels, found.pixels[others], own)


def load_test(settings: Settings, backbone: Backbone) -> Examples | None:
    """The server's test images, at most ``test-sequences``, and the real ones that generated ones are compared with."""
    pipeline = cast(Pipeline, backbone.processor)
    found = pictures(settings, pipeline, settings.dataset, "test") if settings.dataset else None
    if found is None:
        return None
    order = np.random.default_rng(derive(settings.seed, "test")).permutation(len(found))
    wanted, reference = min(settings.metrics.samples, len(order)), None
    if wanted >= LEAST_COMPARED:
        reference = _reference(settings, backbone, found, order[:wanted], order[wanted : 2 * wanted])
    elif wanted:
        log.warning("FID and KID are left out: %d test images or metrics.samples; they need %d", wanted, LEAST_COMPARED)
    rows = np.sort(order[: settings.test_sequences] if settings.test_sequences else order)
    tested = _subset(found, rows)  # so that no image is encoded that is not measured
    return _encoded(settings, backbone, tested).take(np.arange(len(tested)), reference)


def _subset(found: Pictures, chosen: Array) -> Pictures:
    labels, captions = (
        None if texts is None else tuple(texts[i] for i in chosen) for texts in (found.labels, found.captions)
    )
    return dataclasses.replace(found, pixels=found.pixels[chosen], labels=labels, captions=captions)


def prompts(settings: Settings, backbone: Backbone) -> tuple[str, ...]:
    """The prompts of the settings, else one per class or caption of the data on this machine, else nothing.

    A prompt that is generated from nothing is the empty text.
    """
    pipeline = cast(Pipeline, backbone.processor)
    if settings.samples.prompts or pipeline.condition == "none":
        return settings.samples.prompts or ("",) * SHOWN
    if not settings.dataset:
        return (
            ("",) * SHOWN if pipeline.condition == "text" else tuple(map(str, range(min(SHOWN, pipeline.class_count))))
        )
    found = _training_pictures(settings, backbone, settings.dataset)
    return tuple(dict.fromkeys(_conditions(settings, pipeline, found)))[:SHOWN]
