"""Layer by layer: a client counts in each layer as far as its change there agrees with the others'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from fedgen_app.federation.method import GlobalState, Round, Rule, Update
from fedgen_app.federation.robust import gram_of_changes
from fedgen_app.learning.adapters import Adapter


def layers(adapter: Adapter) -> Iterator[list[str]]:
    """The keys of each layer together: both factors of one module, or a tensor that is no factor by itself."""
    found: dict[str, list[str]] = {}
    for key in sorted(adapter):
        found.setdefault(key.replace(".lora_A.", ".lora_.").replace(".lora_B.", ".lora_."), []).append(key)
    yield from found.values()


def layer_wise(rule: Rule) -> Rule:
    """``rule`` on each layer by itself, with weights n_k max(0, cos(dW_k, mean dW)) of that layer.

    A client whose change of a layer points away from what all change there, weighted by examples, does not count in it;
    where none agrees the examples alone count. The paper (arXiv 2511.11585) names layer-wise aggregation as a remedy
    for unstable GANs without a formula: this one is ours.

    Args:
        rule: A mean of factors.
    """

    def by_layer(state: GlobalState, updates: Sequence[Update], round_: Round) -> GlobalState:
        whole: Adapter = {}
        for keys in layers(updates[0].adapter):
            parts = [replace(u, adapter={key: u.adapter[key] for key in keys}) for u in updates]
            weights = agreement(parts, state, round_)
            parts = [replace(part, num_examples=weight) for part, weight in zip(parts, weights, strict=True)]
            own = {key: state.adapter[key] for key in keys}
            whole |= rule(replace(state, adapter=own), parts, round_).adapter
        return replace(state, adapter=state.adapter | whole)

    return by_layer


def agreement(parts: Sequence[Update], state: GlobalState, round_: Round) -> list[float]:
    """n_k max(0, cos(dW_k, sum of p_j dW_j)) of one layer's updates; where all are zero, n_k."""
    examples = torch.tensor([part.num_examples for part in parts], dtype=torch.float64)
    share = examples / examples.sum()
    products = gram_of_changes(parts, [state.adapter] * len(parts), round_.lora)
    towards = products @ share
    lengths = (products.diagonal().clamp(min=0) * (share @ towards).clamp(min=0)).sqrt()
    cosines = torch.where(lengths > 0, towards / lengths.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    weights = examples * cosines.clamp(min=0)
    return [float(w) for w in (weights if float(weights.sum()) > 0 else examples)]
