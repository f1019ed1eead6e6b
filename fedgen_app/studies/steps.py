"""Preparation steps of the studies: each makes a folder with a backbone. All take the folder first."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedgen_app.data.local import Corpus, load_corpus
from fedgen_app.errors import DataError
from fedgen_app.learning.backbone import find, load_task
from fedgen_app.learning.task import Held
from fedgen_app.seeds import derive
from fedgen_app.settings import PACKAGE, Settings, defaults
from fedgen_app.tasks._pretraining import Recipe, pretrain_vae, read_rows, save, side_of
from fedgen_app.tasks._text import pack, start_token, tokenise


def perturb(folder: Path, *, strength: float, backbone: str = "bundled", task: str = "language", seed: int = 0) -> None:
    """A copy of a backbone whose matrices are off by Gaussian noise: ``strength`` times each matrix's own deviation.

    Vectors (biases, scales of normalisation) stay as they are.
    """
    source = find(backbone, "", load_task(task))
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for file in sorted(folder.rglob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in sorted(tensors.items()):
            if tensor.is_floating_point() and tensor.ndim > 1:
                noise = torch.Generator().manual_seed(derive(seed, "perturb", str(file.relative_to(folder)), name))
                drawn = torch.randn(tensor.shape, generator=noise)
                exact = tensor.float()
                tensors[name] = (exact + strength * exact.std() * drawn).to(tensor.dtype)
        save_file(tensors, file, {"format": "pt"})


def drift(
    folder: Path,
    *,
    steps: int,
    label: str,
    backbone: str = "bundled",
    dataset: str = "bundled",
    label_column: str = "topic",
    learning_rate: float = 1e-3,
    batch_size: int = 8,
    sequence_length: int = 128,
    seed: int = 0,
) -> None:
    """A language model that went on training, with all its weights, on the texts of one label alone.

    It gets better at those and worse at the others: a backbone that moved away from what the clients hold.

    Raises:
        DataError: no text has the label.
    """
    settings = _settings(task="language", backbone=backbone)
    task = load_task("language")
    loaded = task.load_backbone(find(backbone, "", task), Held(torch.float32, torch.device("cpu")), settings.lora)
    corpus = load_corpus(dataset, "train", label_column=label_column)
    rows = _rows_of(corpus, label, loaded.processor, sequence_length)
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=learning_rate, weight_decay=0.0)
    loss_of, draw = task.loss(settings, cast(Any, None)), np.random.default_rng(seed)
    noise = torch.Generator().manual_seed(seed)
    loaded.model.train()
    for step in range(steps):
        chosen = torch.from_numpy(draw.integers(0, len(rows["labels"]), batch_size))
        loss = loss_of(loaded.model, {name: values[chosen] for name, values in rows.items()}, noise)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(loaded.model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step + 1} of {steps}: loss {float(loss.detach()):.3f}", flush=True)
    cast(Any, loaded.model).save_pretrained(folder)
    loaded.processor.save_pretrained(folder)


def _rows_of(corpus: Corpus | None, label: str, tokenizer: Any, length: int) -> dict[str, Tensor]:
    labels = corpus.labels or () if corpus else ()
    chosen = [number for number, one in enumerate(labels) if one == label]
    if not chosen or corpus is None:
        raise DataError(f"label = {label!r}: no text has it; there are {', '.join(sorted(set(labels))) or 'no labels'}")
    return dict(pack(tokenise(corpus, tokenizer), chosen, length, start_token(tokenizer)).rows)


def _settings(**changes: str) -> Settings:
    return Settings.from_run_config(defaults(PACKAGE.parent) | changes)


def vae(
    folder: Path,
    *,
    classes: Sequence[str],
    spare: Sequence[str],
    steps: int,
    dataset: str = "bundled",
    latent: int = 32,
    encoder: Sequence[int] = (32, 64, 96),
    decoder: Sequence[int] = (96, 64, 32, 16),
    batch_size: int = 64,
    seed: int = 1,
) -> None:
    """A small variational autoencoder, trained from nothing on the images of ``classes``.

    The classes of ``spare`` get a place and no image: they are what a federation can add.

    Raises:
        DataError: the data set has no image of a class.
    """
    rows = read_rows(dataset, side_of(encoder), classes)
    recipe = Recipe(steps=steps, batch_size=batch_size, seed=seed)
    say = functools.partial(print, flush=True)
    model, training = pretrain_vae(rows, [*classes, *spare], recipe, encoder, decoder, latent, say=say)
    save(folder, model, training, {"classes": list(classes), "spare": list(spare)})
