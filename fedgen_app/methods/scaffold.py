"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378): control variates take the clients' drift out of their steps.

Option I: a client's variate c_i is the gradient of its whole loss at the adapter that it received (option II would
read it off the steps, and that holds for plain SGD alone). The correction c - c_i is added to every gradient before
the local optimiser, AdamW, sees it. c += sum of (c_i' - c_i) / N over a round's clients. Both ways the bytes double.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedgen_app.federation.local import Learned, Lesson, plain
from fedgen_app.federation.method import EPOCH, GlobalState, Method, Round, Update, weighted_mean
from fedgen_app.federation.robust import only
from fedgen_app.learning import adapters
from fedgen_app.learning.adapters import Adapter, Layout
from fedgen_app.learning.training import choose

CONTROL = "control."
# In half precision small gradients would vanish: the loss is scaled up before the backward pass and the result down.
HALF_PRECISION_SCALE = 1024.0


def rule(state: GlobalState, updates: Sequence[Update], round_: Round) -> GlobalState:
    """The weighted mean, and the server's control variate: c + sum of dc_i / N, every client counting once."""
    mean = weighted_mean(state, updates, round_)
    extra = dict(state.extra)
    for key in sorted(updates[0].extra):
        total = sum((u.extra[key].double() for u in updates), torch.zeros((), dtype=torch.float64))
        extra[key] = (extra.get(key, torch.zeros(())).double() + total / round_.clients).float()
    return GlobalState(mean.adapter, mean.residual, extra)


def controls(state: GlobalState, round_: Round) -> Adapter:
    """The server's control variate; nothing before the first aggregation, when it is zero."""
    return state.extra


def change_layout(shared: Layout, round_: Round) -> Layout:
    """A control variate for every shared tensor."""
    return tuple((CONTROL + key, shape) for key, shape in shared)


def gradient(lesson: Lesson) -> Adapter:
    """The gradient of the mean loss over all local examples at the adapter that is in the model, without dropout."""
    model, data, plan = lesson.model, lesson.data, lesson.plan
    learning = choose(model, lesson.trains)
    device = next(iter(learning.values())).device
    shared = {name: tensor.to(device) for name, tensor in data.shared.items()}
    noise = torch.Generator(device).manual_seed(plan.seed)
    scale = HALF_PRECISION_SCALE if plan.half_precision else 1.0
    model.eval()
    for indices in torch.split(torch.arange(len(data)), plan.batch_size):
        batch = shared | {name: tensor[indices].to(device) for name, tensor in data.rows.items()}
        torch.autograd.backward(lesson.loss(model, batch, noise) * (scale * len(indices) / len(data)))
    found = {}
    for key, parameter in learning.items():
        slope = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[key] = (slope.detach() / scale).to("cpu", torch.float32)
        parameter.grad = None
    adapters.check_finite(found, "control variate")
    return found


def _epoch(variates: Adapter) -> list[float]:
    return [float(x) for x in variates[EPOCH]] if EPOCH in variates else []


def local(lesson: Lesson) -> Learned:
    """Train with the corrected gradients; c_i' is measured first, at the received adapter.

    Where the server's variate began anew, because clusters mixed or this client moved, so does the client's.
    """
    measured = gradient(lesson)
    kept = lesson.own if _epoch(lesson.own) == _epoch(lesson.extra) else {}
    before = {key: kept.get(CONTROL + key, torch.zeros_like(x)) for key, x in measured.items()}
    drift = {key: lesson.extra.get(CONTROL + key, torch.zeros_like(x)) - x for key, x in before.items()}
    learned = plain(lesson, drift)
    changes = {CONTROL + key: measured[key] - before[key] for key in measured}
    own = {CONTROL + key: x for key, x in measured.items()}
    own |= {key: x for key, x in lesson.extra.items() if key == EPOCH}
    return replace(learned, extra=changes, own=own)


METHOD = Method(
    rule=rule,
    sends_extra=controls,
    shares_extra=change_layout,
    local=local,
    tied=True,
    refuses=only(because="the control variates would pass unchecked"),
)
