"""What a client does with what it received: the plain procedure, which most methods use, and what theirs are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import nn

from fedgen_app.learning import adapters
from fedgen_app.learning.adapters import Adapter
from fedgen_app.learning.task import Examples, Loss
from fedgen_app.learning.training import Plan, Trained

if TYPE_CHECKING:
    from fedgen_app.federation.method import Round


@dataclass(frozen=True)
class Lesson:
    """All that a method's client procedure is given.

    Attributes:
        model: Holds ``start`` already, and the residual where there is one.
        extra: The method's own tensors as the server sent them.
        own: The method's own tensors as this client left them the last time; empty at first.
        start: The adapter to start from: what came, over the client's own private tensors, over the seeded start.
        trains: Which keys learn.
        train: The training loop: ``training.train``, or the task's own with the same arguments.
    """

    model: nn.Module
    loss: Loss
    data: Examples
    plan: Plan
    round: Round
    extra: Adapter
    own: Adapter
    start: Adapter
    trains: Callable[[str], bool]
    train: Callable[..., Trained]
    on_step: Callable[[int, int], None] = lambda step, of: None


@dataclass(frozen=True)
class Learned:
    """What a procedure made: the adapter, what goes up with it, and what stays on this client."""

    loss: float
    adapter: Adapter
    extra: Adapter = field(default_factory=dict)
    own: Adapter = field(default_factory=dict)


def plain(lesson: Lesson, drift: Adapter | None = None) -> Learned:
    """Train the adapter on the client's own data; FedAvg's client. ``drift`` is added to every gradient."""
    trained = lesson.train(
        lesson.model,
        lesson.loss,
        lesson.data,
        lesson.plan,
        trains=lesson.trains,
        anchor=lesson.start,
        drift=drift,
        on_step=lesson.on_step,
    )
    return Learned(trained.loss, adapters.read(lesson.model))


def beside(train_own: Callable[[Lesson], Adapter]) -> Callable[[Lesson], Learned]:
    """A client that trains the shared adapter and then a model of its own, which stays with it."""

    def local(lesson: Lesson) -> Learned:
        learned = plain(lesson)
        own = train_own(lesson)
        adapters.write(lesson.model, learned.adapter)  # the model holds the shared adapter again in the end
        return replace(learned, own=own)

    return local


def fine_tune(lesson: Lesson) -> Adapter:
    """Go on from the final adapter on the client's own data, as FedGen-Edge does."""
    return plain(lesson).adapter
