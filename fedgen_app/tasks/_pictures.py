"""Images as rows to train on: read once per machine, dealt to clients, encoded once where an autoencoder is in use."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from fedgen_app.data.cache import Arrays, cached
from fedgen_app.data.decoding import Pictures
from fedgen_app.data.local import own_prompts, own_rows
from fedgen_app.data.partition import Partition, partition
from fedgen_app.errors import DataError
from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.task import Examples, LocalData, Share
from fedgen_app.runs.progress import step_bar
from fedgen_app.seeds import derive
from fedgen_app.settings import Settings
from fedgen_app.tasks._facts import Facts
from fedgen_app.tasks._sources import (
    VERSION,
    class_names,
    descriptions,
    identity,
    pictures,
    prompts_of,
    subset,
    tell_skipped,
    training_pictures,
)

if TYPE_CHECKING:  # diffusers is for those who use it
    from fedgen_app.tasks._pipeline import Pipeline

Array = NDArray[Any]

log = logging.getLogger(__name__)
ENCODED = 16  # images per forward pass of an autoencoder, and fewer of those above 128x128:
ENCODED_PIXELS = ENCODED * 128**2  # its activations are many times larger than they are
ASKED = 8  # prompts in which a simulated client says what it wants
LEAST_COMPARED = 4  # images on either side, for FID and KID


@dataclass(frozen=True, eq=False)
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
        own, shared = {name: _rows(array, chosen) for name, array in self.rows.items()}, self.shared
        if "caption" in own:
            distinct, place = torch.unique(own["caption"], return_inverse=True)
            own["caption"] = place + 1
            shared = {name: array[np.append(0, distinct.numpy())] for name, array in shared.items()}
        told = {name: torch.from_numpy(array) for name, array in shared.items()}
        return Examples(own, {"images": len(chosen)}, told, reference)


def _rows(array: Array, chosen: Array) -> torch.Tensor:
    """Rows in contiguous memory, copied at most once; neighbours in an array that is so already not at all."""
    whole = torch.from_numpy(array)
    if len(chosen) and np.array_equal(chosen, np.arange(chosen[0], chosen[0] + len(chosen))):
        return whole[int(chosen[0]) : int(chosen[0]) + len(chosen)].contiguous()
    return whole.index_select(0, torch.from_numpy(np.asarray(chosen, np.int64)))


def _encoded(settings: Settings, backbone: Backbone, found: Pictures) -> Encoded:
    pipeline = cast(Facts, backbone.processor)
    pipeline.side_for(settings.resolution)
    rows: dict[str, Array] = {}
    shared: dict[str, Array] = {}
    if pipeline.has_vae:
        rows["moments"] = _moments(settings, cast("Pipeline", pipeline), backbone, found)
    else:
        rows["pixels"] = _channels_first(found.pixels)
    conditions = descriptions(settings, pipeline, found)
    if pipeline.condition == "class":
        numbers = {label: pipeline.class_of(label) for label in set(conditions)}
        rows["class"] = np.array([numbers[label] for label in conditions], np.int64)
    elif pipeline.condition == "text":
        distinct = sorted(set(conditions))
        numbers = {text: number for number, text in enumerate(distinct, start=1)}
        rows["caption"] = np.array([numbers[text] for text in conditions], np.int64)
        told = cast("Pipeline", pipeline)
        if told.learns_text:
            shared["tokens"] = told.tokens(["", *distinct]).numpy()
        else:
            shared["hidden"] = _embeddings(told, backbone, distinct)
    return Encoded(rows, shared)


def _training(settings: Settings, backbone: Backbone, source: str) -> tuple[Pictures, Encoded]:
    """A source's training images; kept, while its files are the same, for the next client that this process serves."""
    return _training_as_it_is(settings, backbone, source, identity(source, "train"))


@functools.lru_cache(maxsize=1)
def _training_as_it_is(
    settings: Settings, backbone: Backbone, source: str, mark: str | None
) -> tuple[Pictures, Encoded]:
    found = training_pictures(settings, backbone, source)
    tell_skipped(found)
    return found, _encoded(settings, backbone, found)


def split(settings: Settings, backbone: Backbone, clients: int) -> Partition:
    """Who owns which images of the training split."""
    return _split(settings, training_pictures(settings, backbone, settings.dataset), clients)


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
def _owners(settings: Settings, found: Pictures, clients: int) -> tuple[Array, ...]:
    key = {
        "labels": hashlib.sha256(repr((found.labels, found.captions, len(found))).encode()).hexdigest(),
        "partition": settings.partition.model_dump(exclude={"max_examples"}),  # it applies after the hold-out
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
    parts = (np.arange(len(found)),) if share.folder else _owners(settings, found, share.count)
    most = 0 if share.folder else settings.partition.max_examples
    fraction, seed = settings.holdout_fraction, settings.seed
    kept, held = own_rows(parts, share.index, share.pooled, fraction, seed, unit="image", most=most)
    wanted, reference = settings.metrics.personal_samples, None
    if wanted:  # of the hold-out, as all of a client's figures: an adapter has seen the others
        order = np.random.default_rng(derive(settings.seed, "reference", share.index)).permutation(held)
        reference = _reference(settings, backbone, found, order[:wanted], order[:0], own=True)
    classes = class_names(settings, cast(Facts, backbone.processor), None if share.folder else found)
    return LocalData(encoded.take(kept), encoded.take(held, reference), classes, found.skipped)


def requirements(settings: Settings, backbone: Backbone, share: Share) -> list[str]:
    """A device's own prompts; in a simulation what a few of a client's images are of."""
    if share.folder:
        return own_prompts(share.folder, share.prompts)
    found, _ = _training(settings, backbone, settings.dataset)
    parts, wanted = _owners(settings, found, share.count), found.wishes or prompts_of(settings, found)
    kept, _ = own_rows(parts, share.index, False, settings.holdout_fraction, settings.seed, unit="image")
    order = np.random.default_rng(derive(settings.seed, "requirements", share.index)).permutation(kept)
    return [text for text in dict.fromkeys(wanted[i] for i in order) if text][:ASKED]


def _reference(
    settings: Settings, backbone: Backbone, found: Pictures, chosen: Array, others: Array, own: bool = False
) -> Reference:
    pipeline = cast(Facts, backbone.processor)
    conditions = descriptions(settings, pipeline, found)
    labels = tuple(found.labels[i] for i in chosen) if found.labels is not None else ()
    told = tuple(conditions[i] for i in chosen)
    if own and pipeline.condition == "class" and not settings.metrics.classes:  # under the names of ``class_names``
        names = class_names(settings, pipeline, None)
        labels = tuple(names[pipeline.class_of(label)] for label in told)
    return Reference(found.pixels[chosen], told, labels, found.pixels[others], own)


def load_test(settings: Settings, backbone: Backbone) -> Examples | None:
    """The server's test images, at most ``test-sequences``, and the real ones that generated ones are compared with."""
    pipeline = cast(Facts, backbone.processor)
    found = pictures(settings, pipeline, settings.dataset, "test") if settings.dataset else None
    if found is None:
        return None
    tell_skipped(found)
    order = np.random.default_rng(derive(settings.seed, "test")).permutation(len(found))
    wanted, reference = min(settings.metrics.samples, len(order)), None
    if wanted >= LEAST_COMPARED:
        reference = _reference(settings, backbone, found, order[:wanted], order[wanted : 2 * wanted])
    elif wanted:
        log.warning("FID and KID are left out: %d test images or metrics.samples; they need %d", wanted, LEAST_COMPARED)
    rows = np.sort(order[: settings.test_sequences] if settings.test_sequences else order)
    tested = subset(found, rows)  # so that no image is encoded that is not measured
    examples = _encoded(settings, backbone, tested).take(np.arange(len(tested)), reference)
    return dataclasses.replace(examples, skipped=found.skipped)
