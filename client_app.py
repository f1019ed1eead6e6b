"""The ClientApp: roll call, train, personalise. Adapters and counts go out; data and personal adapters never do."""

from __future__ import annotations

import time
from importlib.metadata import version

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedgen_app.federation import wire
from fedgen_app.federation.client import Participant, Work, guarded, personal_plan, round_plan
from fedgen_app.learning import adapters, training
from fedgen_app.learning.backbone import load_task, open_backbone
from fedgen_app.learning.export import export_personal
from fedgen_app.learning.task import Metrics
from fedgen_app.runs.progress import step_bar

app = ClientApp(mods=[guarded])


@app.query("roll_call")
def roll_call(message: Message, context: Context) -> Message:
    """Say who is here: id, number of examples, fingerprint of the backbone, versions."""
    me = Participant.from_context(context)
    backbone = open_backbone(me.settings, me.backbone)
    data = load_task(me.settings.task).load_data(me.settings, backbone, me.share)
    facts: dict[str, int | float | str] = {
        "client": str(me.client),
        "num-examples": len(data.train),
        "rank": me.settings.lora.rank,
        "fingerprint": backbone.fingerprint,
        "simulated-clients": me.simulated,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }
    return Message(wire.reply(0, {}, facts=facts), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Start from the received adapter, train it on the client's own data, keep it, answer with what is shared."""
    began = time.monotonic()
    work = Work.begin(message, context)
    settings, order, model = work.me.settings, work.order, work.backbone.model

    adapters.write(model, work.start)
    plan = round_plan(settings, order.number, work.me.client, work.backbone.dtype)
    with step_bar(f"round {order.number}, client {work.me.client}") as on_step:
        learned = training.train(
            model,
            work.task.loss(settings, work.backbone),
            work.data.train,
            plan,
            trains=lambda key: work.method.trains(key, order.round),
            on_step=on_step,
        )
    trained = adapters.read(model)
    adapters.check_finite(trained, f"training diverged in round {order.number}")
    work.store.save(order.number, trained)

    shared = {key: tensor for key, tensor in trained.items() if work.method.shares(key, order.round)}
    metrics = {
        wire.NUM_EXAMPLES: len(work.data.train),
        "train_loss": learned.loss,
        "seconds": time.monotonic() - began,
    }
    return Message(wire.reply(order.number, metrics, shared, settings.wire.codec), reply_to=message)


@app.train("personalise")
def personalise(message: Message, context: Context) -> Message:
    """Fine-tune the final adapter for this client alone, keep it here, answer with metrics on the local hold-out."""
    work = Work.begin(message, context)
    settings, model = work.me.settings, work.backbone.model

    def measure() -> Metrics:
        return work.task.evaluate(settings, work.backbone, work.data.holdout, settings.seed)

    adapters.write(model, work.start)
    with model.disable_adapter():
        measured = {"frozen": measure()}
    measured["global"] = measure()
    if settings.personal.epochs:
        plan = personal_plan(settings, work.me.client, work.backbone.dtype)
        with step_bar(f"personal, client {work.me.client}") as on_step:
            loss = work.task.loss(settings, work.backbone)
            training.train(model, loss, work.data.train, plan, anchor=work.start, on_step=on_step)
    measured["personal"] = measure()
    examples = len(work.data.train)
    if settings.personal.epochs:
        here = settings.model_copy(update={"dataset": work.me.share.folder or settings.dataset})
        personal, usage = adapters.read(model), work.task.usage(here, work.backbone)
        folder, data = work.store.folder, work.me.data_name
        export_personal(folder, work.backbone, personal, data, settings, measured, examples, usage)
        work.task.export(folder, work.backbone, personal)

    metrics: dict[str, int | float] = {wire.NUM_EXAMPLES: examples}
    for state, found in measured.items():
        metrics |= wire.figures(state, found, work.data.classes)
    return Message(wire.reply(work.order.number, metrics), reply_to=message)
