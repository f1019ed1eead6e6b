"""The training loop on one model's adapter. Knows no network and no task: rows in, a trained adapter in the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedgen_app.errors import AdapterError, DataError
from fedgen_app.learning import attention
from fedgen_app.learning.adapters import parameters
from fedgen_app.learning.task import Examples, Loss


@dataclass(frozen=True)
class Plan:
    """How long and how fast one client learns in one round; the optimiser starts fresh every time.

    Attributes:
        max_steps: Optimiser steps at most; 0: as many as the epochs give.
        accumulate: Batches per optimiser step.
        decay: Learning rate falls linearly to zero over the steps (personalisation), else it is constant.
        proximal: mu of the term mu/2 ||w - anchor||^2.
    """

    epochs: int
    max_steps: int
    batch_size: int
    accumulate: int
    learning_rate: float
    weight_decay: float
    clip_norm: float
    seed: int
    decay: bool = False
    proximal: float = 0.0
    half_precision: bool = False


@dataclass(frozen=True)
class Trained:
    """What the loop measured: mean loss over the examples it saw, and how much it did."""

    loss: float
    steps: int
    examples: int


def round_factor(number: int, rounds: int, warmup: int) -> float:
    """The learning rate's factor in a round: linear warm-up, then a cosine that stays above zero.

    With W = min(warmup, rounds - 1) the factor is number / (W + 1) up to round W, then 1 in round W + 1, falling.
    """
    warm = min(warmup, rounds - 1)
    if number <= warm:
        return number / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (number - warm - 1) / (rounds - warm)))


def planned_steps(examples: int, plan: Plan) -> int:
    """Optimiser steps that a plan takes on so many examples."""
    batches = math.ceil(examples / plan.batch_size)
    steps = math.ceil(batches / plan.accumulate) * plan.epochs
    return min(steps, plan.max_steps) if plan.max_steps else steps


def batches(count: int, plan: Plan, generator: torch.Generator) -> Iterator[list[Tensor]]:
    """Per optimiser step a list of index tensors, one per batch; every example once per epoch."""
    for _ in range(plan.epochs):
        order = torch.split(torch.randperm(count, generator=generator), plan.batch_size)
        for start in range(0, len(order), plan.accumulate):
            yield list(order[start : start + plan.accumulate])


def choose(model: nn.Module, trains: Callable[[str], bool]) -> dict[str, nn.Parameter]:
    """The tensors that learn, without gradients yet; the others, a frozen residual's too, need none.

    What a client left behind whose training failed half-way must not reach the next one's first step.

    Raises:
        AdapterError: nothing is to be trained.
    """
    model.requires_grad_(False)
    learning = {}
    for key, parameter in parameters(model).items():
        parameter.requires_grad_(trains(key))
        parameter.grad = None
        if parameter.requires_grad:
            learning[key] = parameter
    if not learning:
        raise AdapterError("no tensor of the adapter is to be trained")
    return learning


def train(
    model: nn.Module,
    loss: Loss,
    examples: Examples,
    plan: Plan,
    trains: Callable[[str], bool] = lambda key: True,
    anchor: Mapping[str, Tensor] | None = None,
    drift: Mapping[str, Tensor] | None = None,
    on_step: Callable[[int, int], None] = lambda step, of: None,
) -> Trained:
    """Train the adapter that is in the model, in place.

    Args:
        trains: Which keys learn; the others stay as they are.
        anchor: Where ``plan.proximal`` pulls to.
        drift: What is added to the gradient of each key before clipping (SCAFFOLD's c - c_i).
        on_step: Called with (steps done, steps in all).

    Raises:
        DataError: there is nothing to train on.
        AdapterError: nothing is to be trained.
    """
    if len(examples) == 0:
        raise DataError("there is no example to train on")
    learning = choose(model, trains)
    device = next(iter(learning.values())).device
    rows = {name: tensor.to(device) for name, tensor in examples.rows.items()}
    shared = {name: tensor.to(device) for name, tensor in examples.shared.items()}
    pull = [(p, anchor[k].to(device)) for k, p in learning.items()] if plan.proximal and anchor else []
    corrections = [(p, drift[k].to(device)) for k, p in learning.items()] if drift else []
    optimiser = torch.optim.AdamW(learning.values(), lr=plan.learning_rate, weight_decay=plan.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=plan.half_precision)
    torch.manual_seed(plan.seed)  # dropout draws from the global generator
    order = torch.Generator().manual_seed(plan.seed)
    noise = torch.Generator(device).manual_seed(plan.seed)
    total, seen, step, steps = torch.zeros((), device=device), 0, 0, planned_steps(len(examples), plan)
    model.train()
    for group in batches(len(examples), plan, order):
        size = sum(len(indices) for indices in group)
        for indices in group:
            batch = shared | {name: tensor[indices.to(device)] for name, tensor in rows.items()}
            with attention.suited_to(device):  # the backward pass too: gradient checkpointing computes anew in it
                value = loss(model, batch, noise)
                torch.autograd.backward(scaler.scale(value * (len(indices) / size)))
            total += value.detach() * len(indices)
        if pull or corrections:
            penalty = plan.proximal / 2 * sum((((p - w) ** 2).sum() for p, w in pull), torch.zeros((), device=device))
            penalty = sum(((p * c).sum() for p, c in corrections), penalty)  # its gradient is c
            torch.autograd.backward(scaler.scale(penalty))
        if plan.decay:
            optimiser.param_groups[0]["lr"] = plan.learning_rate * (1 - step / steps)
        _update(optimiser, scaler, plan.clip_norm)
        step, seen = step + 1, seen + size
        on_step(step, steps)
        if step == steps:
            break
    return Trained(float(total) / seen, step, seen)


def _update(optimiser: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_norm: float) -> None:
    """One optimiser step on the gradients as they are, clipped; then no gradients."""
    scaler.unscale_(optimiser)
    if clip_norm:
        torch.nn.utils.clip_grad_norm_(optimiser.param_groups[0]["params"], clip_norm)
    scaler.step(optimiser)
    scaler.update()
    optimiser.zero_grad(set_to_none=True)
