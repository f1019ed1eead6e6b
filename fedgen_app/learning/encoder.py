"""What a client wants, as one direction: prompts through a frozen text encoder, centred, normalised, averaged."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

import fedgen_assets
from fedgen_app.data.cache import source_identity
from fedgen_app.errors import BackboneError, DataError
from fedgen_app.learning.backbone import Backbone, fingerprint, pick_device
from fedgen_app.learning.task import Task
from fedgen_app.settings import Settings, looks_like_path

Numbers = NDArray[np.float64]
OWN = "backbone"  # the value of clusters.encoder for the encoder that the backbone has
MOST_TOKENS = 256
BATCH = 32
FILES = ("*.json", "*.safetensors", "*.model", "*.txt")
# Encoders put all texts into a narrow cone (Ethayarajh 2019, arXiv 1909.00512), where all cosines are near 1. The mean
# of a few texts about nothing in common is taken off, which is the same on every device and tells nothing of any.
NEUTRAL = (
    "",
    "The",
    "A text.",
    "A picture.",
    "This is an example of a sentence.",
    "Something happened there yesterday.",
    "What is it, and where does it come from?",
    "one two three four five",
    "He said that she would come later.",
    "There are many of them, and they are not all alike.",
)


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder of texts.

    Attributes:
        mark: A digest of its weights and configuration: only vectors of one encoder can be compared.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    mark: str

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Numbers:
        """Mean of the last hidden states over a text's tokens, (texts, width)."""
        rows = []
        for start in range(0, len(texts), BATCH):
            batch = list(texts[start : start + BATCH])
            # A text without a token has no mean: the padding stands for it.
            inputs = self.tokenizer(
                batch, padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
            ).to(self.device)
            hidden = self.model(**inputs).last_hidden_state.double()
            rows.append(mean_of_tokens(hidden, inputs["attention_mask"]))
        return torch.cat(rows).cpu().numpy()

    @property
    def _longest(self) -> int:
        places = getattr(self.model.config, "max_position_embeddings", MOST_TOKENS)  # of CLIP 77
        return min(MOST_TOKENS, int(self.tokenizer.model_max_length), places)


def mean_of_tokens(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that the mask (n, length) has 1 for; of a text without any over all places."""
    counted = torch.where(mask.sum(1, keepdim=True) > 0, mask, torch.ones_like(mask)).to(hidden.dtype)
    return (hidden * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)


def open_encoder(source: str, device: str) -> Encoder:
    """A text encoder from a folder or the hub, or the bundled language model; safetensors alone, no code from there.

    From the process's memory where it is there already.

    Raises:
        BackboneError: it cannot be had, or is none.
    """
    try:  # a folder's content may be replaced while we have the old one open
        files = source_identity(source, "", "") if looks_like_path(source) else ""
    except DataError as error:
        raise BackboneError(f"clusters.encoder = {source!r}: {error}") from None
    return _open(source, files, device)


@functools.lru_cache(maxsize=1)
def _open(source: str, files: str, device: str) -> Encoder:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    cast(Any, transformers_logging).disable_progress_bar()
    if source == "bundled":
        folder = fedgen_assets.path("language")
    else:
        folder = Path(source).expanduser() if looks_like_path(source) else _fetched(source)
    place = pick_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = cast(Any, AutoModel).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, dtype=torch.float32
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        tokenizer.padding_side = "right"  # or positions that are counted from the left would depend on the batch
        mark = fingerprint(folder, sorted(folder.glob("*.safetensors")))
        encoder = Encoder(_text_part(model).requires_grad_(False).eval().to(place), tokenizer, place, mark)
        encoder.embed(["a text"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        # Whatever a model says that takes no texts: its forward wants other inputs, or gives no hidden states.
        first = (str(error).strip().splitlines() or [""])[0][:300]
        raise BackboneError(f"clusters.encoder = {source!r}: not a text encoder: {first}") from None
    return encoder


def _text_part(model: Any) -> Any:
    """What reads texts: of an encoder-decoder (T5, BART) the encoder, of texts and images (CLIP, SigLIP) one half."""
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    return getattr(model, "text_model", model)


def _fetched(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=list(FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise BackboneError(
            f"clusters.encoder = {source!r}: the model hub does not give it ({type(error).__name__}); download it "
            "where there is a net, and name the folder"
        ) from None


def encode(settings: Settings, task: Task, backbone: Backbone, texts: Sequence[str], source: str = "") -> Numbers:
    """One direction of length 1 per text, (texts, width).

    Args:
        source: A device's own place of the encoder that ``clusters.encoder`` names.

    Raises:
        BackboneError: the encoder cannot be had.
        SettingsError: the backbone has none.
        DataError: there is no text, or one cannot be told from a text about nothing.
    """
    if not texts:
        raise DataError("there is no prompt to encode")
    name = source or settings.clusters.encoder
    both = [*NEUTRAL, *texts]
    if name == OWN:
        found = task.embed(backbone, both).double().cpu().numpy()
    else:
        found = open_encoder(name, settings.device).embed(both)
    centred = found[len(NEUTRAL) :] - found[: len(NEUTRAL)].mean(axis=0)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and (lengths > 1e-9).all()):
        raise DataError("a prompt has no direction under this encoder")
    return np.asarray(centred / lengths, np.float64)


def direction(rows: Numbers) -> Numbers:
    """The direction of the mean of directions, (width,).

    Raises:
        DataError: they cancel.
    """
    mean = rows.mean(axis=0)
    length = float(np.linalg.norm(mean))
    if length < 1e-6:
        raise DataError("the prompts' directions cancel each other")
    return np.asarray(mean / length, np.float64)


def mark_of(settings: Settings, backbone: Backbone, source: str = "") -> str:
    """What tells one encoder from another."""
    name = source or settings.clusters.encoder
    known = backbone.fingerprint if name == OWN else open_encoder(name, settings.device).mark
    return hashlib.sha256(repr((name == OWN, known, NEUTRAL)).encode()).hexdigest()
