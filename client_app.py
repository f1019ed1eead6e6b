"""The ClientApp: roll call, train, personalise. Adapters and counts go out; data and personal adapters never do."""

from __future__ import annotations

import time
from importlib.metadata import version

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedgen_app.federation import wire
from fedgen_app.federation.client import (
    Assignment,
    Participant,
    guarded,
    load_method,
    personal_plan,
    round_plan,
    starting_adapter,
    store_of,
)
from fedgen_app.learning import adapters, training
from fedgen_app.learning.backbone import load_task, open_backbone
from fedgen_app.learning.export import export_personal
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
    me = Participant.from_context(context)
    task, method = load_task(me.settings.task), load_method(me.settings.method)
    backbone = open_backbone(me.settings, me.backbone)
    data = task.load_data(me.settings, backbone, me.share)
    order = Assignment.from_message(message, me.settings)
    store = store_of(me, order)

    own = store.before(order.number, backbone.layout)
    adapters.write(backbone.model, starting_adapter(backbone, method, order, own, me.settings.seed))
    plan = round_plan(me.settings, order.number, me.client, backbone.dtype)
    with step_bar(f"round {order.number}, client {me.client}") as on_step:
        learned = training.train(
            backbone.model,
            task.loss,
            data.train,
            plan,
            lambda key: method.trains(key, order.round),
            on_step=on_step,
        )
    trained = adapters.read(backbone.model)
    store.save(order.number, trained)

    shared = {key: tensor for key, tensor in trained.items() if method.shares(key, order.round)}
    metrics = {
        wire.NUM_EXAMPLES: len(data.train),
        "train_loss": learned.loss,
        "seconds": time.monotonic() - began,
    }
    return Message(wire.reply(order.number, metrics, shared, me.settings.wire.codec), reply_to=message)


@app.train("personalise")
def personalise(message: Message, context: Context) -> Message:
    """Fine-tune the final adapter for this client alone, keep it here, answer with metrics on the local hold-out."""
    me = Participant.from_context(context)
    task, method = load_task(me.settings.task), load_method(me.settings.method)
    backbone = open_backbone(me.settings, me.backbone)
    data = task.load_data(me.settings, backbone, me.share)
    order = Assignment.from_message(message, me.settings)
    store = store_of(me, order)

    own = store.before(order.number, backbone.layout)
    start = starting_adapter(backbone, method, order, own, me.settings.seed)
    adapters.write(backbone.model, start)
    seed = me.settings.seed
    with backbone.model.disable_adapter():
        measured = {"frozen": task.evaluate(backbone, data.holdout, seed)}
    measured["global"] = task.evaluate(backbone, data.holdout, seed)
    if me.settings.personal.epochs:
        plan = personal_plan(me.settings, me.client, backbone.dtype)
        with step_bar(f"personal, client {me.client}") as on_step:
            training.train(backbone.model, task.loss, data.train, plan, anchor=start, on_step=on_step)
    measured["personal"] = task.evaluate(backbone, data.holdout, seed)
    export_personal(store.folder, backbone, adapters.read(backbone.model), me.settings, measured, len(data.train))

    metrics: dict[str, int | float] = {wire.NUM_EXAMPLES: len(data.train)}
    metrics |= {f"{state}.{name}": value for state, found in measured.items() for name, value in found.items()}
    return Message(wire.reply(order.number, metrics), reply_to=message)
