"""Ditto (Li et al. 2021, arXiv 2012.04221): beside the shared adapter a second one that stays, pulled to what came.

Every round a client trains the shared adapter w as in FedAvg, and its own v with mu/2 ||v - w_received||^2. Twice the
work, the same traffic.
"""

from __future__ import annotations

from dataclasses import replace

from fedgen_app.federation.local import Lesson, beside, plain
from fedgen_app.federation.method import Method
from fedgen_app.learning import adapters
from fedgen_app.learning.adapters import Adapter
from fedgen_app.seeds import derive


def train_own(lesson: Lesson) -> Adapter:
    """Go on with the client's own adapter, which starts where the shared one does."""
    adapters.write(lesson.model, lesson.own or lesson.start)
    mu, seed = lesson.round.settings.ditto.mu, derive(lesson.plan.seed, "ditto")
    plain(replace(lesson, plan=replace(lesson.plan, proximal=mu, seed=seed)))
    return adapters.read(lesson.model)


def personal(lesson: Lesson) -> Adapter:
    """The client's own adapter; one that was never chosen trains it now."""
    return lesson.own or train_own(lesson)


METHOD = Method(local=beside(train_own), personal=personal)
