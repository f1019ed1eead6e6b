"""How many bytes a client and the server send each other in a round, from messages as they would be sent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fedgen_app.federation import wire
from fedgen_app.federation.method import GlobalState, Method, Round, Update, lora_of
from fedgen_app.federation.roster import chosen_count
from fedgen_app.federation.strategy import TRAIN
from fedgen_app.learning.adapters import Layout, fresh
from fedgen_app.settings import Settings

CLIENTS = 10  # of a run, where the settings do not say
ROUNDS = 4  # after so many a method sends as much as ever
NAME = "20260101-000000-language-fedgen-edge-0000"  # as long as a run's name is
METRICS = {wire.NUM_EXAMPLES: 1000, "train_loss": 4.0, "seconds": 10.0}


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client in one round, serialised.

    Attributes:
        down: In the round in which the server sends most.
    """

    up: int
    down_first: int
    down: int


def traffic(settings: Settings, method: Method, layout: Layout) -> Traffic:
    """What travels; the method's own rule is applied to made-up replies, as what it sends may grow over the rounds."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # Flower stamps every message with it
    if method.weights == "model":
        whole = {key: torch.zeros(shape) for key, shape in layout}
        sent = _sent(settings, wire.Parcel(whole))
        return Traffic(_answer(settings, sent, wire.Parcel(whole)), wire.byte_size(sent), wire.byte_size(sent))
    clients = settings.expected_clients or CLIENTS
    state, ups, downs = GlobalState(fresh(layout, settings.seed)), [], []
    for number in range(1, min(ROUNDS, settings.num_server_rounds) + 1):
        round_ = Round(number, lora_of(settings), settings.seed, settings, layout, clients)
        sent = _sent(settings, _parcel(method, state, round_))
        updates = [_update(n, method, round_) for n in range(chosen_count(clients, settings.fraction_train))]
        downs.append(wire.byte_size(sent))
        ups.append(_answer(settings, sent, wire.Parcel(updates[0].adapter, extra=updates[0].extra)))
        if method.has_global or updates[0].adapter:
            state = method.rule(state, updates, round_)
    return Traffic(max(ups), downs[0], max(downs))


def _parcel(method: Method, state: GlobalState, round_: Round) -> wire.Parcel | wire.Offers:
    parcel = wire.Parcel(method.sends(state, round_), state.residual, method.sends_extra(state, round_))
    if round_.settings.clusters.by == "loss":  # a client chooses between all of them
        return wire.Offers(dict.fromkeys(range(round_.settings.clusters.count), parcel))
    return parcel


def _update(client: int, method: Method, round_: Round) -> Update:
    """A made-up reply: other numbers from every client, as equal ones would be of a lower rank together."""
    draw = torch.Generator().manual_seed(client + 1)
    shared = tuple((key, shape) for key, shape in round_.layout if method.shares(key, round_))
    adapter = {key: torch.randn(shape, generator=draw) / 100 for key, shape in shared}
    extra = {key: torch.randn(shape, generator=draw) / 100 for key, shape in method.shares_extra(shared, round_)}
    return Update(client, adapter, round_.lora.rank, 1.0, extra, {"train_loss": 1.0})


def _sent(settings: Settings, parcel: wire.Parcel | wire.Offers) -> Message:
    config: dict[str, int | float | str] = {wire.ROUND: 1, wire.RUN: NAME, wire.STEPS: 0, wire.AVERAGED: 0}
    return Message(wire.instruction(parcel, settings.wire.codec, config), 1, TRAIN)


def _answer(settings: Settings, sent: Message, parcel: wire.Parcel) -> int:
    sent.metadata.__dict__["_message_id"] = "0" * 64  # a reply names what it answers, by a SHA-256
    return wire.byte_size(Message(wire.reply(1, METRICS, parcel, settings.wire.codec), reply_to=sent))
