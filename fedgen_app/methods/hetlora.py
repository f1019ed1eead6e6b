"""HetLoRA (Cho et al. 2024, arXiv 2401.06432): factors of any rank, zero-padded and weighted by their products' norms.

In terms of the largest rank's scaling s, a client's factors are sqrt(s_k / s) B_k and sqrt(s_k / s) A_k; their mean is
weighted by ||s_k B_k A_k||. Clients cut back to their own rank, and may give up directions that they do not use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedgen_app.federation.local import Learned, Lesson, plain
from fedgen_app.federation.lowrank import as_pair, product_norm, truncate
from fedgen_app.federation.method import GlobalState, Lora, Method, Round, Update
from fedgen_app.federation.robust import only
from fedgen_app.learning.adapters import Adapter, pairs, parameters, rank_of
from fedgen_app.learning.backbone import load_task
from fedgen_app.learning.task import Batch, Loss
from fedgen_app.settings import Settings


def rule(state: GlobalState, updates: Sequence[Update], round_: Round) -> GlobalState:
    """The weighted mean of the padded factors.

    Rows and columns that no client with a weight has stay as they are: the mean of nothing would be zero in both
    factors, and never learn again.
    """
    scalings = [round_.lora.at(u.rank).scaling for u in updates]
    weights = [s * _norm(u.adapter) for u, s in zip(updates, scalings, strict=True)]
    if not any(weights):
        weights = [u.num_examples for u in updates]
    total = sum(weights)
    reach = max(u.rank for u, weight in zip(updates, weights, strict=True) if weight)
    adapter = dict(state.adapter)
    for key in sorted(updates[0].adapter):
        axis = _axis(key)
        mean = torch.zeros(state.adapter[key].shape, dtype=torch.float64)
        for update, scaling, weight in zip(updates, scalings, weights, strict=True):
            fold = math.sqrt(scaling / round_.lora.scaling)
            mean.narrow(axis, 0, update.rank).add_(update.adapter[key].double(), alpha=fold * weight / total)
        mean.narrow(axis, reach, round_.lora.rank - reach).copy_(
            state.adapter[key].narrow(axis, reach, round_.lora.rank - reach)
        )
        adapter[key] = mean.float()
    return GlobalState(adapter, state.residual, state.extra)


def _norm(adapter: Adapter) -> float:
    """||B A|| over all layers."""
    return math.hypot(*(product_norm(as_pair(adapter, key_a, key_b)) for key_a, key_b in pairs(adapter)))


def fit(adapter: Adapter, lora: Lora, own: Lora) -> Adapter:
    """The first directions, each factor at the root of the client's own scaling."""
    fold = math.sqrt(lora.scaling / own.scaling)
    return truncate(adapter, own.rank, times_b=fold, times_a=fold)


def widen(adapter: Adapter, own: Lora, server: Adapter, lora: Lora) -> Adapter:
    """The way back from ``fit``; directions that the client does not have are the server's."""
    fold, whole = math.sqrt(own.scaling / lora.scaling), {key: tensor.clone() for key, tensor in server.items()}
    for key, tensor in adapter.items():
        whole[key].narrow(_axis(key), 0, own.rank).copy_(fold * tensor)
    return whole


def _axis(key: str) -> int:
    """Which one counts the directions: A's rows, B's columns."""
    return 0 if ".lora_A." in key else 1


def tail(factors: Mapping[str, Tensor], kept: int) -> Tensor:
    """Sum over layers of ||B[:, kept:]|| ||A[kept:]||: how much the last directions are used."""
    sizes = [
        torch.linalg.vector_norm(factors[key_b][:, kept:]) * torch.linalg.vector_norm(factors[key_a][kept:])
        for key_a, key_b in pairs(factors)
    ]
    return torch.stack(sizes).sum()


def penalised(loss: Loss, kept: int, strength: float) -> Loss:
    """The loss with the gradient, but not the value, of strength * ``tail``: losses stay comparable."""

    def with_tail(model: nn.Module, batch: Batch, noise: torch.Generator) -> Tensor:
        size = strength * tail(parameters(model), kept)
        return loss(model, batch, noise) + (size - size.detach())

    return with_tail


def local(lesson: Lesson) -> Learned:
    """Train; then give up the last directions where training made less use of them than there was.

    Of rank r, floor(gamma r) directions stay, at least one. What is left keeps its product.
    """
    settings, rank = lesson.round.settings.hetlora, rank_of(lesson.start)
    kept = max(1, math.floor(settings.gamma * rank + 1e-9))
    if kept == rank:
        return plain(lesson)
    if settings.penalty:
        lesson = replace(lesson, loss=penalised(lesson.loss, kept, settings.penalty))
    learned = plain(lesson)
    if tail(learned.adapter, kept) >= tail(lesson.start, kept):
        return learned
    lora = lesson.round.lora
    return replace(learned, adapter=fit(learned.adapter, lora.at(rank), lora.at(kept)))


def refuses(settings: Settings) -> Iterable[str]:
    """Rules that go by examples; a penalty where the task does not train by one loss."""
    yield from only("norm-bound", "krum", "multi-krum", because="its weights are norms and not examples")(settings)
    if settings.hetlora.penalty and load_task(settings.task).train:
        yield (
            f"hetlora.penalty = {settings.hetlora.penalty:g}: task = {settings.task} trains in a loop of its own, "
            "which takes no other loss; 0 goes without"
        )


METHOD = Method(rule=rule, local=local, fit=fit, widen=widen, refuses=refuses)
