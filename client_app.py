"""The ClientApp: roll call, train, personalise. Adapters and counts go out; data and personal adapters never do."""

from __future__ import annotations

import time
from importlib.metadata import version

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedgen_app.federation import requirement, wire
from fedgen_app.federation.alone import alone
from fedgen_app.federation.client import Participant, guarded
from fedgen_app.federation.consent import check_plans, policed
from fedgen_app.federation.work import Work, personal_plan, round_plan
from fedgen_app.learning import adapters
from fedgen_app.learning.backbone import load_task
from fedgen_app.learning.task import Metrics
from fedgen_app.runs.personal import Kept
from fedgen_app.runs.progress import step_bar

app = ClientApp(mods=[guarded, policed, alone])


@app.query("roll_call")
def roll_call(message: Message, context: Context) -> Message:
    """Say who is here: id, number of examples, fingerprint of the backbone, versions; where asked what it wants."""
    me = Participant.from_context(context)
    backbone, task = me.open_backbone(), load_task(me.settings.task)
    data = task.load_data(me.settings, backbone, me.share)
    plans = round_plan(me.settings, 1, me.client, backbone.dtype), personal_plan(me.settings, me.client, backbone.dtype)
    check_plans(me.policy, len(data.train), *plans)
    facts: dict[str, int | float | str | list[float]] = {
        "client": str(me.client),
        "num-examples": len(data.train),
        "rank": me.rank_for(backbone),
        "fingerprint": backbone.fingerprint,
        "simulated-clients": me.simulated,
        "skipped": data.skipped,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "bits": backbone.bits,
        **{name: version(name) for name in ("torch", "transformers", "peft")},
        **requirement.facts_of(me, task, backbone),
    }
    return Message(wire.reply(0, {}, facts=facts), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Start from the received adapter, train it on the client's own data, keep it, answer with what is shared."""
    began = time.monotonic()
    work = Work.begin(message, context)
    settings, order = work.me.settings, work.order

    plan = round_plan(settings, order.number, work.me.client, work.backbone.dtype, order.steps)
    with step_bar(f"round {order.number}, client {work.me.client}") as on_step:
        learned = work.method.local(work.lesson(plan, on_step))
    for made in (learned.adapter, learned.own, learned.extra):  # apart: a method's own tensors may have the same keys
        adapters.check_finite(made, f"training diverged in round {order.number}")
    work.store.save(order.number, Kept(learned.adapter, learned.own), order.averaged)

    shared = {key: tensor for key, tensor in learned.adapter.items() if work.method.shares(key, work.round)}
    metrics = {
        wire.NUM_EXAMPLES: len(work.data.train),
        "train_loss": learned.loss,
        "seconds": time.monotonic() - began,
    }
    parcel = wire.Parcel(shared, extra=learned.extra)
    return Message(wire.reply(order.number, metrics, parcel, settings.wire.codec, work.facts), reply_to=message)


@app.train("personalise")
def personalise(message: Message, context: Context) -> Message:
    """Fine-tune the final adapter for this client alone, keep it here, answer with metrics on the local hold-out."""
    work = Work.begin(message, context)
    settings, model = work.me.settings, work.backbone.model

    def measure() -> Metrics:
        return work.task.evaluate(settings, work.backbone, work.data.holdout, settings.seed)

    plan = personal_plan(settings, work.me.client, work.backbone.dtype)
    with step_bar(f"personal, client {work.me.client}") as on_step:
        lesson = work.lesson(plan, on_step)
        with model.disable_adapter():
            measured = {"frozen": measure()}
        measured["global"] = measure()
        own = work.method.personal(lesson) if settings.personal.epochs else work.start
    adapters.write(model, own, work.order.received.residual)
    measured["personal"] = measure()
    if settings.personal.epochs:
        work.keep_personal(own, measured)

    metrics: dict[str, int | float] = {wire.NUM_EXAMPLES: len(work.data.train)}
    for state, found in measured.items():
        metrics |= wire.figures(state, found, work.data.classes)
    return Message(wire.reply(work.order.number, metrics), reply_to=message)
