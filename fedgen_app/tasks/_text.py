"""Text as rows to train on: documents tokenised once per machine, dealt to clients, packed into full sequences."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from fedgen_app.data.cache import cached, source_identity
from fedgen_app.data.local import Corpus, load_corpus, own_prompts, own_rows
from fedgen_app.data.partition import Partition, partition
from fedgen_app.errors import DataError
from fedgen_app.learning.backbone import Backbone
from fedgen_app.learning.task import Examples, LocalData, Share
from fedgen_app.settings import Settings, looks_like_path

BEGINNINGS, BEGINNING = 32, 200  # documents that speak for a simulated client, and how many characters of each
IGNORED = -100  # torch's cross_entropy leaves these targets out


def _source_identity(source: str, split: str, corpus: Corpus | None) -> str:
    """What a cache of this source hangs on: its files, or of the hub's the texts themselves."""
    if source == "bundled" or looks_like_path(source):
        return source_identity(source, split, "topics")
    assert corpus is not None
    return hashlib.sha256("\x00".join(corpus.texts).encode(errors="surrogatepass")).hexdigest()


@functools.lru_cache(maxsize=2)
def _tokenizer_mark(tokenizer: Any) -> str:
    """A digest of all that a tokenizer does; of a slow one, which cannot be written down whole, of its vocabulary."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    whole = fast.to_str() if fast is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(whole.encode()).hexdigest()


def tokenise(corpus: Corpus, tokenizer: Any) -> dict[str, np.ndarray[Any, Any]]:
    """All documents' tokens in one array, where each begins, and their words and bytes.

    Every line end counts as one word (Mikolov's convention for Penn Treebank, where it is written <eos>), and so does
    the end-of-text token that follows a record.
    """
    end = [] if corpus.running else [tokenizer.eos_token_id]
    encoded = tokenizer(list(corpus.texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    pieces = [np.array([*ids, *end], dtype=np.int32) for ids in encoded]
    return {
        "tokens": np.concatenate(pieces) if pieces else np.zeros(0, np.int32),
        "starts": np.cumsum([0, *(len(p) for p in pieces)], dtype=np.int64),
        "skipped": np.array([corpus.skipped], np.int64),
        "words": np.array([len(t.split()) + t.count("\n") + len(end) for t in corpus.texts], np.int64),
        "bytes": np.array([len(t.encode(errors="surrogatepass")) for t in corpus.texts], np.int64),
    }


def _corpus(settings: Settings, source: str, split: str) -> Corpus | None:
    return load_corpus(
        source,
        cast(Any, split),
        text_column=settings.text_column,
        label_column=settings.label_column,
    )


def _documents(settings: Settings, backbone: Backbone, source: str, split: str) -> dict[str, Any] | None:
    """The tokenised documents of a source, from the machine's cache where they are there; None: no such split."""
    hub = source != "bundled" and not looks_like_path(source)
    corpus = _corpus(settings, source, split) if hub or split == "test" else None
    if split == "test" and corpus is None:
        return None
    tokenizer = backbone.processor
    key = {
        "source": _source_identity(source, split, corpus),
        "columns": [settings.text_column, settings.label_column],
        "tokenizer": _tokenizer_mark(tokenizer),
        "version": 2,
    }
    return cached("tokens", key, lambda: tokenise(_required(corpus or _corpus(settings, source, split)), tokenizer))


def _required(corpus: Corpus | None) -> Corpus:
    if corpus is None:
        raise DataError("the data set has no training split")
    return corpus


def pack(
    documents: Mapping[str, Any], chosen: Sequence[int] | np.ndarray[Any, Any], length: int, start: int
) -> Examples:
    """The chosen documents one after the other, cut into rows of ``length`` targets; every token is a target once.

    The input of a row is its targets shifted by one, with the start token in front. The last row is padded; padding
    is not a target.

    Returns:
        Rows ``input_ids`` and ``labels``, both (n, length) int64, and counts of words, bytes and tokens.
    """
    starts = documents["starts"]
    pieces = [np.asarray(documents["tokens"][starts[i] : starts[i + 1]]) for i in chosen]
    tokens = np.concatenate(pieces).astype(np.int64) if pieces else np.zeros(0, np.int64)
    rows = math.ceil(len(tokens) / length)
    labels = np.full((rows, length), IGNORED, np.int64)
    labels.flat[: len(tokens)] = tokens
    inputs = np.concatenate([np.full((rows, 1), start, np.int64), labels[:, :-1]], axis=1)
    inputs[inputs == IGNORED] = start
    counts = {
        "words": int(np.asarray(documents["words"])[list(chosen)].sum()),
        "bytes": int(np.asarray(documents["bytes"])[list(chosen)].sum()),
        "tokens": len(tokens),
    }
    return Examples({"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}, counts)


def start_token(tokenizer: Any) -> int:
    """What stands before the first token of a row: the start token, or where there is none the end of a text."""
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


def split(settings: Settings, backbone: Backbone, clients: int) -> Partition:
    """Who owns which documents of the training split."""
    corpus = _required(_corpus(settings, settings.dataset, "train"))
    parts = settings.partition
    return partition(
        corpus.name,
        corpus.labels,
        corpus.texts,
        count=len(corpus.texts),
        by=parts.by,
        alpha=parts.alpha,
        clients=clients,
        seed=settings.seed,
        min_examples=parts.min_examples,
    )


def _owned(settings: Settings, backbone: Backbone, clients: int) -> list[np.ndarray[Any, Any]]:
    """Document indices of every simulated client, from the cached partition."""
    hub = not looks_like_path(settings.dataset) and settings.dataset != "bundled"
    corpus = _corpus(settings, settings.dataset, "train") if hub else None
    key = {
        "source": _source_identity(settings.dataset, "train", corpus),
        "columns": [settings.text_column, settings.label_column],
        "partition": settings.partition.model_dump(exclude={"max_examples"}),  # it applies after the hold-out
        "clients": clients,
        "seed": settings.seed,
        "version": 1,
    }

    def build() -> dict[str, np.ndarray[Any, Any]]:
        owned = split(settings, backbone, clients).examples
        return {
            "documents": np.concatenate(owned).astype(np.int64),
            "starts": np.cumsum([0, *(len(o) for o in owned)], dtype=np.int64),
        }

    parts = cached("partition", key, build)
    return np.split(np.asarray(parts["documents"]), parts["starts"][1:-1])


def load_data(settings: Settings, backbone: Backbone, share: Share) -> LocalData:
    """One client's rows: its part of the partition, or all of a device's own folder, less a hold-out of documents.

    Raises:
        DataError: nothing is there.
    """
    source = share.folder or settings.dataset
    if not source:
        raise DataError("dataset = '': this client has no data of its own")
    documents = _documents(settings, backbone, source, "train")
    assert documents is not None
    parts = [np.arange(len(documents["words"]))] if share.folder else _owned(settings, backbone, share.count)
    most = 0 if share.folder else settings.partition.max_examples
    fraction, seed = settings.holdout_fraction, settings.seed
    kept, held = own_rows(parts, share.index, share.pooled, fraction, seed, unit="document", most=most)
    start = start_token(backbone.processor)
    length = settings.sequence_length
    train, held_out = (pack(documents, part, length, start) for part in (kept, held))
    return LocalData(train, held_out, skipped=int(documents["skipped"][0]))


def requirements(settings: Settings, backbone: Backbone, share: Share) -> list[str]:
    """A device's own prompts; in a simulation the beginnings of some of the documents that a client trains on."""
    if share.folder:
        return own_prompts(share.folder, share.prompts)
    corpus = _required(_corpus(settings, settings.dataset, "train"))
    parts = _owned(settings, backbone, share.count)
    kept, _ = own_rows(parts, share.index, False, settings.holdout_fraction, settings.seed, unit="document")
    shown = kept[np.linspace(0, len(kept) - 1, min(BEGINNINGS, len(kept))).astype(int)]
    return [text for i in shown if (text := " ".join(corpus.texts[i].split())[:BEGINNING])]


def load_test(settings: Settings, backbone: Backbone) -> Examples | None:
    """The server's test set; ``test-sequences`` limits it to the first whole documents that fill so many rows."""
    documents = _documents(settings, backbone, settings.dataset, "test") if settings.dataset else None
    if documents is None:
        return None
    chosen = np.arange(len(documents["words"]))
    if settings.test_sequences:
        fits = documents["starts"][1:] <= settings.test_sequences * settings.sequence_length
        chosen = chosen[: max(1, int(fits.sum()))]
    packed = pack(documents, chosen, settings.sequence_length, start_token(backbone.processor))
    return replace(packed, skipped=int(documents["skipped"][0]))
