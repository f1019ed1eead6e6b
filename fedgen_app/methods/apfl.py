"""APFL (Deng et al. 2020, arXiv 2003.13461): the personal product a dW_v + (1 - a) dW_w, and every client learns its a.

w is the shared adapter and is trained as in FedAvg. v is the client's own and is trained inside the mixture, with w as
it was received: that is the w which the final mixture has. Mixed are products and not factors. Twice the work, the
same traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedgen_app.errors import SettingsError
from fedgen_app.federation.local import Lesson, beside, plain
from fedgen_app.federation.method import Method
from fedgen_app.learning import adapters
from fedgen_app.learning.adapters import ADAPTER, RESIDUAL, Adapter, merged, rank_of
from fedgen_app.learning.backbone import load_task
from fedgen_app.learning.task import Batch
from fedgen_app.seeds import derive
from fedgen_app.settings import Settings

MIX = "mix"


@dataclass
class Mixture:
    """The model that holds v as its adapter and w as its residual, with a in front of one and 1 - a of the other.

    Attributes:
        mix: a, a number that gets gradients.
        seen: What the gradients of a step were scaled by, batch by batch.
    """

    lesson: Lesson
    mix: Tensor
    seen: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        layers = [m for m in self.lesson.model.modules() if isinstance(m, LoraLayer) and RESIDUAL in m.scaling]
        self.usual = [(cast(Any, layer).scaling, dict(layer.scaling)) for layer in layers]

    def loss(self, model: nn.Module, batch: Batch, noise: torch.Generator) -> Tensor:
        """The loss of the mixture."""
        for scaling, usual in self.usual:
            scaling[ADAPTER], scaling[RESIDUAL] = usual[ADAPTER] * self.mix, usual[RESIDUAL] * (1 - self.mix)
        value = self.lesson.loss(model, batch, noise)
        cast(Any, value).register_hook(lambda slope: self.seen.append(slope.detach()))
        return value

    def step(self, done: int, of: int) -> None:
        """One step of gradient descent on a, kept within 0 and 1.

        The training loop may scale its losses for half precision; what arrived at them says by how much. A step whose
        gradients overflowed does not count, as for the adapter.
        """
        if self.mix.grad is None:
            raise SettingsError("method = apfl: this task does not train by its loss alone, so the mixture cannot act")
        slope = self.mix.grad / torch.stack(self.seen).sum()
        if slope.isfinite():
            rate = self.lesson.round.settings.apfl.mix_learning_rate
            with torch.no_grad():
                self.mix.sub_(rate * slope).clamp_(0, 1)
        self.mix.grad = None
        self.seen.clear()
        self.lesson.on_step(done, of)

    def restore(self) -> None:
        """PEFT's own scalings."""
        for scaling, usual in self.usual:
            scaling.update(usual)


def scaling_of(lesson: Lesson) -> Callable[[int], float]:
    """The scaling of an adapter of a given rank."""
    return lambda rank: lesson.round.lora.at(rank).scaling


def weighted(adapter: Adapter, times: float) -> Adapter:
    """An adapter whose product is so many times that of ``adapter``."""
    return {key: tensor * times if ".lora_B." in key else tensor for key, tensor in adapter.items()}


def train_own(lesson: Lesson) -> Adapter:
    """Go on with v and a; at first v is w, and a ``apfl.mix``."""
    own = {key: lesson.own.get(key, tensor) for key, tensor in lesson.start.items()}
    shared = weighted(lesson.start, scaling_of(lesson)(rank_of(lesson.start)))  # a residual has scaling 1
    adapters.write(lesson.model, own, shared)
    device = next(lesson.model.parameters()).device
    begin = float(lesson.own.get(MIX, torch.tensor(lesson.round.settings.apfl.mix)))
    mixture = Mixture(lesson, torch.tensor(begin, device=device, requires_grad=True))
    plan = replace(lesson.plan, seed=derive(lesson.plan.seed, "apfl"))
    try:
        plain(replace(lesson, loss=mixture.loss, plan=plan, on_step=mixture.step))
    finally:
        mixture.restore()
    return adapters.read(lesson.model) | {MIX: mixture.mix.detach().cpu()}


def personal(lesson: Lesson) -> Adapter:
    """The mixture of v with the final w as one adapter of twice the rank; who was never chosen trains v and a now."""
    own = lesson.own or train_own(lesson)
    mix, scaling = float(own[MIX]), scaling_of(lesson)
    v = weighted({key: own[key] for key in lesson.start}, mix)
    return merged(v, weighted(lesson.start, (1 - mix) * scaling(rank_of(lesson.start))), scaling)


def refuses(settings: Settings) -> Iterable[str]:
    """A task whose training is more than a loss: the mixture acts through the loss."""
    if load_task(settings.task).train:
        yield f"method = 'apfl': task = {settings.task} trains in a loop of its own, in which the mixture cannot act"


METHOD = Method(local=beside(train_own), personal=personal, refuses=refuses)
