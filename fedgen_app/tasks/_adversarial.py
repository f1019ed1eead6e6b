"""Training two networks against each other: the losses of a GAN, and the loop that gives each half its own steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from fedgen_app.errors import DataError
from fedgen_app.learning import training
from fedgen_app.learning.task import Batch, Examples, Loss
from fedgen_app.learning.training import Plan, Trained

BETAS = (0.5, 0.99)  # of AdamW: DCGAN's first (arXiv 1511.06434), StyleGAN's second (arXiv 1812.04948)


@dataclass(frozen=True)
class Adversarial:
    """The losses of both halves; as a whole their sum, which is 3 log 2 where no half has the better of the other.

    The non-saturating loss (Goodfellow et al., arXiv 1406.2661), with R1, the penalty on the discriminator's gradient
    at real images (Mescheder et al., arXiv 1801.04406, equation 9).

    Attributes:
        latent: Width of the generator's input.
        r1: gamma of R1; 0: without.
    """

    latent: int
    r1: float

    def _drawn(self, model: nn.Module, batch: Batch, noise: torch.Generator) -> Tensor:
        rows = batch["pixels"]
        latents = torch.randn((len(rows), self.latent), generator=noise, device=rows.device)
        images: Tensor = cast(Any, model).generator(latents, batch.get("class"))
        return images

    def discriminator(self, model: nn.Module, batch: Batch, noise: torch.Generator) -> Tensor:
        """Mean loss of telling the batch's images from drawn ones of the same classes."""
        numbers = batch.get("class")
        with torch.no_grad():
            drawn = self._drawn(model, batch, noise)
        real = (batch["pixels"].float() / 127.5 - 1).requires_grad_(self.r1 > 0)
        judge = cast(Any, model).discriminator
        said: Tensor = judge(real, numbers)
        value = softplus(-said).mean() + softplus(judge(drawn, numbers)).mean()
        if self.r1:
            (slope,) = torch.autograd.grad(said.sum(), real, create_graph=True)
            value = value + self.r1 / 2 * slope.square().flatten(1).sum(1).mean()
        return value

    def generator(self, model: nn.Module, batch: Batch, noise: torch.Generator) -> Tensor:
        """Mean loss of drawing images, of the batch's classes, that are taken for real."""
        drawn = self._drawn(model, batch, noise)
        return softplus(-cast(Any, model).discriminator(drawn, batch.get("class"))).mean()

    def __call__(self, model: nn.Module, batch: Batch, noise: torch.Generator) -> Tensor:
        """Both, added; its gradient is for each half that of its own loss alone."""
        told = self.discriminator(model, batch, noise)
        learning = [p for p in cast(Any, model).discriminator.parameters() if p.requires_grad]
        for parameter in learning:
            parameter.requires_grad_(False)
        drawn = self.generator(model, batch, noise)
        for parameter in learning:
            parameter.requires_grad_(True)
        return told + drawn


@dataclass
class Half:
    """One network's part in the contest: what of it learns, its loss, and an optimiser of its own."""

    learning: dict[str, nn.Parameter]
    loss: Loss
    optimiser: torch.optim.AdamW
    pull: list[tuple[nn.Parameter, Tensor]]
    push: list[tuple[nn.Parameter, Tensor]]

    def gather(
        self, model: nn.Module, batches: Sequence[Batch], sizes: Sequence[int], noise: torch.Generator
    ) -> Tensor:
        """Gradients of the loss on several batches, each weighed by its size; the mean loss."""
        total = torch.zeros((), device=noise.device)
        for batch, size in zip(batches, sizes, strict=True):
            value = self.loss(model, batch, noise) * (size / sum(sizes))
            torch.autograd.backward(value, inputs=list(self.learning.values()))  # the other half gets none
            total += value.detach()
        return total

    def step(self, plan: Plan, rate: float) -> None:
        """One step on the gradients as they are, with the proximal term and the drift; then no gradients."""
        for parameter, anchor in self.pull:
            parameter.grad = _plus(parameter.grad, plan.proximal * (parameter.detach() - anchor))
        for parameter, push in self.push:
            parameter.grad = _plus(parameter.grad, push)
        if plan.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.learning.values(), plan.clip_norm)
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


def _plus(gradient: Tensor | None, more: Tensor) -> Tensor:
    return more.clone() if gradient is None else gradient + more


def _halves(
    model: nn.Module,
    loss: Adversarial,
    plan: Plan,
    trains: Callable[[str], bool],
    anchor: Mapping[str, Tensor] | None,
    drift: Mapping[str, Tensor] | None,
) -> list[Half]:
    """The halves that learn, the discriminator first."""
    learning = training.choose(model, trains)
    device = next(iter(learning.values())).device
    halves = []
    for name, objective in (("discriminator", loss.discriminator), ("generator", loss.generator)):
        own = {key: parameter for key, parameter in learning.items() if name in key.split(".")}
        if own:
            pull = [(p, anchor[k].to(device)) for k, p in own.items()] if plan.proximal and anchor else []
            push = [(own[k], tensor.to(device)) for k, tensor in (drift or {}).items() if k in own]
            optimiser = torch.optim.AdamW(
                own.values(), lr=plan.learning_rate, betas=BETAS, weight_decay=plan.weight_decay
            )
            halves.append(Half(own, objective, optimiser, pull, push))
    return halves


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
    """Train the adapters of both halves, in place: a step of the discriminator, one of the generator, and so on.

    A half of which no key trains takes no steps. Both see the same batches, with noise of their own.

    Args:
        loss: An ``Adversarial``.
        trains: Which keys learn; the others stay as they are.
        anchor: Where ``plan.proximal`` pulls to.
        drift: What is added to the gradients, by key.
        on_step: Called with (steps of both done, steps in all).

    Returns:
        The mean over the examples of both losses' sum, before each step.

    Raises:
        DataError: there is nothing to train on.
        AdapterError: nothing is to be trained.
        TypeError: ``loss`` has no halves.
    """
    if not isinstance(loss, Adversarial):
        raise TypeError(f"an adversarial loop needs both halves' losses, not {type(loss).__name__}")
    if len(examples) == 0:
        raise DataError("there is no example to train on")
    halves = _halves(model, loss, plan, trains, anchor, drift)
    device = next(iter(halves[0].learning.values())).device
    rows = {name: tensor.to(device) for name, tensor in examples.rows.items()}
    torch.manual_seed(plan.seed)  # dropout draws from the global generator
    order = torch.Generator().manual_seed(plan.seed)
    noise = torch.Generator(device).manual_seed(plan.seed)
    total, seen, step, steps = torch.zeros((), device=device), 0, 0, training.planned_steps(len(examples), plan)
    model.train()
    for group in training.batches(len(examples), plan, order):
        sizes = [len(indices) for indices in group]
        batches = [{name: tensor[indices.to(device)] for name, tensor in rows.items()} for indices in group]
        rate = plan.learning_rate * (1 - step / steps) if plan.decay else plan.learning_rate
        for half in halves:
            total += half.gather(model, batches, sizes, noise) * sum(sizes)
            half.step(plan, rate)
        step, seen = step + 1, seen + sum(sizes)
        on_step(step, steps)
        if step == steps:
            break
    return Trained(float(total) / seen, step, seen)
