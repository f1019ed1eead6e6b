"""Several adapters over one backbone at once: the exact sum of clusters' adapters, another one for each sample.

The sum of w_i s_i B_i A_i is itself one product, of the factors put side by side: a mixture is an adapter of the sum of
the ranks. A mean of the factors would be another function, with cross terms B_i A_j. PEFT chooses the adapter of each
row of a batch (its ``adapter_names``), so that samples that want different mixtures share one forward pass.

    with active(model, {0: sea, 2: law}, mixtures) as rows:  # one mixture per sample
        with rows([3, 4, 3, 4]):  # of which sample each row of the next batches is
            model(inputs)
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from fedgen_app.errors import AdapterError, SettingsError
from fedgen_app.learning.adapters import ADAPTER, Adapter, at_rank, layout_of, pairs, rank_of
from fedgen_app.learning.whole import WholeModel

Rows = Callable[[Sequence[int]], AbstractContextManager[None]]


def unmixed(samples: Sequence[int]) -> AbstractContextManager[None]:
    """The ``Rows`` of a model that is used as it is, whatever the sample."""
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Mixture:
    """How much of each cluster's adapter acts.

    Attributes:
        weights: Cluster and weight, by cluster; above 0, of sum 1. Equal mixtures are equal keys.
    """

    weights: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, weights: Mapping[int, float]) -> Mixture:
        """Normalised to sum 1, and without what weighs nothing.

        Raises:
            SettingsError: a weight is negative or not finite, or none is above 0.
        """
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights.values()):
            raise SettingsError("weights of a mixture should be finite and 0 or more")
        most = max(weights.values(), default=0.0)
        if not most:
            raise SettingsError("one weight of a mixture at least should be above 0")
        scaled = {cluster: weight / most for cluster, weight in weights.items()}  # whose sum is finite
        total = math.fsum(scaled.values())
        shares = {cluster: scaled[cluster] / total for cluster in sorted(scaled)}
        return cls(tuple((cluster, share) for cluster, share in shares.items() if share))

    def __str__(self) -> str:
        return ", ".join(f"{weight:.3g} of cluster {cluster}" for cluster, weight in self.weights)


def combined(mixture: Mixture, parts: Mapping[int, Adapter], scaling: Callable[[int], float]) -> Adapter:
    """One adapter whose s B A is the mixture's sum of w_i s_i B_i A_i: exact, as factors are only put side by side.

    Of one part alone it is that part, bit for bit.

    Args:
        parts: The clusters' adapters, each of a rank of its own; a residual is folded in (``adapters.merged``).
        scaling: Of an adapter of a given rank.

    Returns:
        An adapter of the sum of the ranks.

    Raises:
        AdapterError: an adapter is missing, has something else than pairs of factors, or does not fit the others.
    """
    missing = [cluster for cluster, _ in mixture.weights if cluster not in parts]
    if missing:
        raise AdapterError(f"no adapter of cluster {missing[0]}; there are {sorted(parts)}")
    terms = [(weight, parts[cluster]) for cluster, weight in mixture.weights]
    first = terms[0][1]
    layout = at_rank(layout_of(first), 1)
    factors = list(pairs(first))
    if {key for pair in factors for key in pair} != set(first):
        raise AdapterError("only adapters of pairs of factors can be mixed")
    if any(at_rank(layout_of(adapter), 1) != layout for _, adapter in terms):
        raise AdapterError("the adapters of a mixture are not of the same layers")
    outer = scaling(sum(rank_of(adapter) for _, adapter in terms))
    whole = {}
    for a, b in factors:
        whole[a] = torch.cat([adapter[a] for _, adapter in terms], 0)
        whole[b] = torch.cat([adapter[b] * (w * scaling(rank_of(adapter)) / outer) for w, adapter in terms], 1)
    return dict(sorted(whole.items()))


@contextlib.contextmanager
def active(model: nn.Module, parts: Mapping[int, Adapter], mixtures: Sequence[Mixture]) -> Iterator[Rows]:
    """The mixtures stand in the model, one adapter per distinct one, while this lasts; nothing of them is left.

    Yields:
        A context manager: given of which sample each row of a batch is, it makes that sample's mixture act on that row,
        and nothing else, in every forward pass inside it. Layers have to keep rows first; where all rows have one
        mixture they may do what they want. Outside of it the model is what it was before.

    Args:
        parts: Every cluster's adapter, see ``combined``; scaled as the model's own.
        mixtures: One per sample.

    Raises:
        AdapterError: all weights of the model learned, its adapters are switched off, or an adapter does not fit; in a
            forward pass: a layer does not keep rows first, and they have different mixtures.
    """
    if isinstance(model, WholeModel):
        raise AdapterError("all weights learned: there are no adapters to mix")
    if any(layer.disable_adapters for layer in model.modules() if isinstance(layer, LoraLayer)):
        raise AdapterError("the model's adapters are switched off: no mixture would act")
    peft = cast(Any, model)
    own = peft.peft_config[ADAPTER]

    def scaling(rank: int) -> float:
        return float(own.lora_alpha / (math.sqrt(rank) if own.use_rslora else rank))

    made = {mixture: combined(mixture, parts, scaling) for mixture in mixtures}
    free = (name for number in itertools.count() if (name := f"mixture-{number}") not in peft.peft_config)
    names = {mixture: next(free) for mixture in made}
    with _as_before(peft, list(names.values())):
        for mixture, adapter in made.items():
            _add(peft, names[mixture], adapter)

        def rows(samples: Sequence[int]) -> AbstractContextManager[None]:
            return _chosen(peft, [names[mixtures[sample]] for sample in samples])

        yield rows


@contextlib.contextmanager
def _as_before(peft: Any, names: Sequence[str]) -> Iterator[None]:
    """Afterwards the adapters are gone, and PEFT's notes of what acts and what learns are those of before."""
    learns = [(parameter, parameter.requires_grad) for parameter in peft.parameters()]
    tuner = peft.base_model
    acting = (peft.active_adapter, tuner.active_adapter)
    layers = [(layer, layer._active_adapter) for layer in peft.modules() if isinstance(layer, LoraLayer)]
    try:
        yield
    finally:
        for name in names:
            if name in peft.peft_config:
                peft.delete_adapter(name)
        peft.active_adapter, tuner.active_adapter = acting
        for layer, was in layers:
            layer._active_adapter = was
        for parameter, was in learns:
            parameter.requires_grad_(was)


@torch.no_grad()
def _add(peft: Any, name: str, adapter: Adapter) -> None:
    config = replace(peft.peft_config[ADAPTER], r=rank_of(adapter), lora_dropout=0.0, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):  # PEFT draws numbers that are overwritten
        peft.add_adapter(name, config)
    found = {key.replace(f".{name}.", "."): p for key, p in peft.named_parameters() if f".{name}." in key}
    if layout_of(found) != layout_of(adapter):
        raise AdapterError("the adapters of a mixture do not fit the backbone")
    for key, parameter in found.items():
        parameter.copy_(adapter[key])
        parameter.requires_grad_(False)


@contextlib.contextmanager
def _chosen(peft: Any, names: Sequence[str]) -> Iterator[None]:
    """Every adapted layer gets PEFT's ``adapter_names``.

    Not through ``PeftModel.forward``: parts of a model are called on their own here, and that one leaves its hooks
    behind where a forward pass fails.
    """

    def choose(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        each = list(names) if len(set(names)) > 1 else [names[0]] * len(inputs[0])
        if len(each) != len(inputs[0]):
            raise AdapterError(
                f"{len(each)} samples with different mixtures cannot share a pass: a layer of this backbone has "
                f"{len(inputs[0])} rows for them; generate one at a time"
            )
        return inputs, {**named, "adapter_names": each}

    with contextlib.ExitStack() as hooks:
        for layer in peft.modules():
            if isinstance(layer, LoraLayer):
                handle = cast(nn.Module, layer).register_forward_pre_hook(choose, with_kwargs=True)
                hooks.callback(handle.remove)
        yield
