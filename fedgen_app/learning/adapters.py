"""The adapter: a dictionary of LoRA factors under PEFT's own keys, and its way into and out of a model.

An adapter is float32, on the CPU, and sorted by key. A key looks like
``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``; A is (rank, d_in), B is (d_out, rank).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fedgen_app.errors import AdapterError
from fedgen_app.files import write_atomic
from fedgen_app.learning.whole import WholeModel

Adapter = dict[str, Tensor]
Layout = tuple[tuple[str, tuple[int, ...]], ...]

ADAPTER, RESIDUAL = "default", "residual"  # PEFT's names of what learns and of what is added beside it
OWN = f".{ADAPTER}."


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What learns and travels, sorted: LoRA factors under PEFT's keys, or the weights of a whole model.

    The frozen residual (``write``) is not among them.
    """
    if isinstance(model, WholeModel):
        return dict(sorted(model.base.named_parameters()))
    found = {
        name.replace(OWN, "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name and OWN in name
    }
    return dict(sorted(found.items()))


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """Keys and shapes, sorted by key: all that two sides must agree on to exchange one flat array."""
    return tuple((key, tuple(tensors[key].shape)) for key in sorted(tensors))


def digest_of(layout: Layout) -> str:
    """Sixteen hex digits that tell whether two layouts are the same."""
    return hashlib.sha256(json.dumps(layout).encode()).hexdigest()[:16]


def read(model: nn.Module) -> Adapter:
    """A copy of the adapter that is in the model."""
    return {key: p.detach().to("cpu", torch.float32, copy=True) for key, p in parameters(model).items()}


@torch.no_grad()
def write(model: nn.Module, adapter: Mapping[str, Tensor], residual: Mapping[str, Tensor] | None = None) -> None:
    """Put an adapter into the model, whole, and the residual beside it; afterwards nothing else acts.

    Args:
        adapter: Of any rank: the layers take its rank, and alpha / rank (rsLoRA: alpha / sqrt(rank)) as scaling.
        residual: Factors under the same keys and of any one rank, added with scaling 1 and frozen; none: no residual.

    Raises:
        AdapterError: a key differs from the model's, or a shape in more than the rank.
    """
    if isinstance(model, WholeModel):
        _copy(parameters(model), adapter)
        return
    peft = cast(Any, model)
    _set_rank(peft, ADAPTER, rank_of(adapter))
    _copy(parameters(peft), adapter)
    if residual:
        rank = rank_of(residual)
        if RESIDUAL not in peft.peft_config:
            peft.add_adapter(RESIDUAL, replace(peft.peft_config[ADAPTER], r=rank, lora_dropout=0.0))
        peft.peft_config[RESIDUAL].lora_alpha, peft.peft_config[RESIDUAL].use_rslora = rank, False
        _set_rank(peft, RESIDUAL, rank)
        frozen = {n.replace(f".{RESIDUAL}.", "."): p for n, p in peft.named_parameters() if f".{RESIDUAL}." in n}
        _copy(frozen, residual)
        peft.base_model.set_adapter([ADAPTER, RESIDUAL])
        for parameter in frozen.values():
            parameter.requires_grad_(False)
    elif RESIDUAL in peft.peft_config:
        peft.delete_adapter(RESIDUAL)
        peft.base_model.set_adapter(ADAPTER)


def _copy(own: Mapping[str, nn.Parameter], adapter: Mapping[str, Tensor]) -> None:
    if layout_of(own) != layout_of(adapter):
        raise AdapterError(f"adapter does not fit the backbone: {_difference(layout_of(own), layout_of(adapter))}")
    for key, parameter in own.items():
        parameter.copy_(adapter[key])


def _set_rank(model: Any, name: str, rank: int) -> None:
    """Give every layer factors of this rank, whose numbers are yet to be written."""
    config = model.peft_config[name]
    config.r = rank
    scaling = config.lora_alpha / (math.sqrt(rank) if config.use_rslora else rank)
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or name not in layer.lora_A:
            continue
        layer.scaling[name] = scaling
        if layer.r[name] == rank:
            continue
        layer.r[name] = rank
        for factors, axis in ((layer.lora_A, 0), (layer.lora_B, 1)):
            old = cast(Any, factors[name]).weight
            shape = [rank if place == axis else size for place, size in enumerate(old.shape)]
            cast(Any, factors[name]).weight = nn.Parameter(old.new_zeros(shape), requires_grad=old.requires_grad)


def rank_of(adapter: Mapping[str, Tensor], otherwise: int = 1) -> int:
    """The rank of an adapter's factors, or ``otherwise`` where it has none."""
    for key, tensor in adapter.items():
        if ".lora_A" in key and tensor.ndim > 0:
            return tensor.shape[0]
        if ".lora_B" in key and tensor.ndim > 1:
            return tensor.shape[1]
    return otherwise


def merged(adapter: Adapter, residual: Mapping[str, Tensor], scaling: Callable[[int], float]) -> Adapter:
    """Adapter and residual as one adapter of the sum of their ranks: exact, as factors are only put side by side.

    Args:
        scaling: Of an adapter of a given rank.
    """
    if not residual:
        return adapter
    own, beside = rank_of(adapter), rank_of(residual)
    outer = scaling(own + beside)
    whole = {}
    for a, b in pairs(adapter):
        whole[a] = torch.cat([adapter[a], residual[a]], 0)
        whole[b] = torch.cat([adapter[b] * (scaling(own) / outer), residual[b] / outer], 1)
    return dict(sorted(whole.items()))


def at_rank(layout: Layout, rank: int) -> Layout:
    """The same layout with factors of another rank."""
    axes = ((".lora_A", 0), (".lora_B", 1))
    axis_of = {key: next((axis for mark, axis in axes if mark in key), None) for key, _ in layout}
    return tuple(
        (key, tuple(rank if place == axis_of[key] else size for place, size in enumerate(shape)))
        for key, shape in layout
    )


def _difference(own: Layout, other: Layout) -> str:
    missing = sorted(set(dict(own)) - set(dict(other)))
    extra = sorted(set(dict(other)) - set(dict(own)))
    if missing or extra:
        return f"missing keys {missing[:3]}, unexpected keys {extra[:3]}"
    key, shape = next((k, s) for k, s in other if dict(own)[k] != s)
    return f"{key} has shape {shape}, expected {dict(own)[key]}"


def fresh(layout: Layout, seed: int) -> Adapter:
    """A new adapter: A from Kaiming's uniform distribution as in PEFT, B zero, so that it changes nothing yet."""
    adapter = {}
    for key, shape in layout:
        if ".lora_B" in key:
            adapter[key] = torch.zeros(shape)
            continue
        generator = torch.Generator().manual_seed(_key_seed(seed, key))
        # kaiming_uniform_ with a = sqrt(5) draws from +- 1 / sqrt(fan_in).
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        adapter[key] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return adapter


def _key_seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "big") >> 1


def pairs(keys: Mapping[str, object] | Layout) -> Iterator[tuple[str, str]]:
    """The keys of A and B of every adapted layer whose both factors are there."""
    names = set(keys if isinstance(keys, Mapping) else dict(keys))
    for key in sorted(names):
        partner = key.replace(".lora_A.", ".lora_B.")
        if ".lora_A." in key and partner in names:
            yield key, partner


def byte_size(adapter: Mapping[str, Tensor]) -> int:
    """Bytes of the adapter's numbers."""
    return sum(t.numel() * t.element_size() for t in adapter.values())


def digest(adapter: Mapping[str, Tensor]) -> str:
    """SHA-256 over keys, shapes and bytes: equal digests mean equal adapters, bit for bit."""
    whole = hashlib.sha256()
    for key in sorted(adapter):
        whole.update(f"{key}{tuple(adapter[key].shape)}{adapter[key].dtype}".encode())
        whole.update(adapter[key].contiguous().numpy().tobytes())
    return whole.hexdigest()


def check_finite(adapter: Mapping[str, Tensor], name: str) -> None:
    """Refuse an adapter that holds NaN or infinity.

    Raises:
        AdapterError: names the tensor.
    """
    for key, tensor in adapter.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{name}: {key} holds a number that is not finite")


def save_adapter(adapter: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, whole or not at all."""
    contiguous = {key: adapter[key].contiguous() for key in sorted(adapter)}
    write_atomic(file, save(contiguous, {"format": "pt", **(metadata or {})}))


def load_adapter(file: Path, layout: Layout | None = None) -> Adapter:
    """Read one safetensors file.

    Raises:
        AdapterError: the file is damaged, holds a number that is not finite, or does not have ``layout``.
    """
    try:
        loaded = load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterError(f"{file}: {error}") from None
    adapter = {key: loaded[key].to(torch.float32) for key in sorted(loaded)}
    if layout is not None and layout_of(adapter) != layout:
        raise AdapterError(f"{file} does not fit the backbone: {_difference(layout, layout_of(adapter))}")
    check_finite(adapter, str(file))
    return adapter
