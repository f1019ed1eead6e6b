"""FedProx (Li et al. 2020, arXiv 1812.06127): the loss has a term mu/2 ||w - w_received||^2 that limits the drift."""

from __future__ import annotations

from dataclasses import replace

from fedgen_app.federation.local import Learned, Lesson, plain
from fedgen_app.federation.method import Method


def local(lesson: Lesson) -> Learned:
    """FedAvg's client with the proximal term; the distance is that of the factors."""
    mu = lesson.round.settings.fedprox.mu
    return plain(replace(lesson, plan=replace(lesson.plan, proximal=mu)))


METHOD = Method(local=local)
