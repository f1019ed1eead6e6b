"""What a client is asked for, what it needs for that, and how long it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from flwr.app import Context, Message

from fedgen_app.federation import wire
from fedgen_app.federation.client import Participant
from fedgen_app.federation.consent import check_plans
from fedgen_app.federation.local import Lesson, fine_tune, plain
from fedgen_app.federation.method import ClientId, Method, Round, load_method, lora_of
from fedgen_app.learning import adapters, training
from fedgen_app.learning.adapters import Adapter
from fedgen_app.learning.backbone import Backbone, load_task
from fedgen_app.learning.choosing import best_suited
from fedgen_app.learning.export import export_personal, usage_of
from fedgen_app.learning.task import LocalData, Metrics, Task
from fedgen_app.learning.training import Plan, round_factor
from fedgen_app.runs.personal import Kept, PersonalStore
from fedgen_app.seeds import derive
from fedgen_app.settings import Settings


@dataclass(frozen=True)
class Assignment:
    """What the server asks for in one message.

    Attributes:
        steps: Optimiser steps to take; 0: as the settings say.
        averaged: The last round in which a reply of this client counted; 0: none.
        offers: Several clusters' tensors, of which the client takes what suits its data best; empty: nothing to choose.
    """

    number: int
    run_name: str
    received: wire.Parcel
    steps: int
    averaged: int
    offers: Mapping[int, wire.Parcel]

    @classmethod
    def from_message(cls, message: Message, settings: Settings) -> Assignment:
        """Read the instruction.

        Raises:
            wire.WireError: it is none.
        """
        config = message.content.config_records["config"]
        received = wire.received(message.content, settings.wire.codec)
        number, steps = int(cast(int, config[wire.ROUND])), int(cast(int, config.get(wire.STEPS, 0)))
        offers = wire.Offers.parted(received.adapter).parcels
        averaged = int(cast(int, config.get(wire.AVERAGED, 0)))
        return cls(number, str(config[wire.RUN]), received, steps, averaged, offers)

    def remembered(self, method: Method) -> int:
        """The last round whose state this client goes on from.

        What belongs to the server's own tensors goes on from what the server has: a reply that was refused or came
        late is not in them.
        """
        return self.averaged if method.tied else self.number - 1


@dataclass(frozen=True)
class Work:
    """All that a client needs to carry out an instruction.

    Attributes:
        round: As the method's functions see it, with the largest adapter's shape.
        kept: What this client left behind the last time, where its method asks for it.
        start: The adapter to start from: what was received, over the client's own private tensors, over the seeded
            start.
        facts: What goes into the answer beside: the cluster that this client chose, where it had the choice.
    """

    me: Participant
    order: Assignment
    task: Task
    method: Method
    backbone: Backbone
    data: LocalData
    store: PersonalStore
    round: Round
    kept: Kept
    start: Adapter
    facts: Mapping[str, int]

    @classmethod
    def begin(cls, message: Message, context: Context) -> Work:
        """Read the instruction, load what it needs.

        Raises:
            FedgenError: something of it is not to be had.
        """
        me = Participant.from_context(context)
        settings, order = me.settings, Assignment.from_message(message, me.settings)
        task, method = load_task(settings.task), load_method(settings.method)
        backbone = me.open_backbone()
        data = task.load_data(settings, backbone, replace(me.share, pooled=order.steps > 0))
        store = PersonalStore(me.folder(order.run_name), settings.keep_checkpoints + 1)
        seed = derive(settings.seed, "round", order.number)
        round_ = Round(order.number, lora_of(settings), seed, settings, backbone.layout, max(1, me.simulated))
        private = {key for key, _ in backbone.layout if not method.shares(key, round_)}
        remembers = private or method.local is not plain or method.personal is not fine_tune
        kept = store.before(order.remembered(method) + 1) if remembers else Kept()
        own = {key: kept.adapter[key] for key in sorted(private & set(kept.adapter))}

        def start_from(received: Adapter) -> Adapter:
            # A client that pruned its rank is sent its own; one that is sent nothing has the rank it can afford.
            rank, fresh = adapters.rank_of(received, otherwise=me.rank_for(backbone)), backbone.fresh(settings.seed)
            if method.fit:
                fresh = method.fit(fresh, round_.lora, round_.lora.at(rank))
            return fresh | own | received

        facts: dict[str, int] = {}
        if order.offers:
            starts = {cluster: (start_from(p.adapter), p.residual) for cluster, p in order.offers.items()}
            chosen = best_suited(starts, backbone, task.loss(settings, backbone), data.train, settings)
            order, facts = replace(order, received=order.offers[chosen]), {wire.CLUSTER: chosen}
        start = start_from(order.received.adapter)
        return cls(me, order, task, method, backbone, data, store, round_, kept, start, facts)

    def lesson(self, plan: Plan, on_step: Callable[[int, int], None]) -> Lesson:
        """What the method's procedures are given; the model holds the start.

        Raises:
            PolicyError: the plan is more than the device allows.
        """
        check_plans(self.me.policy, len(self.data.train), plan)
        adapters.write(self.backbone.model, self.start, self.order.received.residual)
        return Lesson(
            model=self.backbone.model,
            loss=self.task.loss(self.me.settings, self.backbone),
            data=self.data.train,
            plan=plan,
            round=self.round,
            extra=self.order.received.extra,
            own=self.kept.own,
            start=self.start,
            trains=lambda key: self.method.trains(key, self.round),
            train=self.task.train or training.train,
            on_step=on_step,
        )

    def keep_personal(self, adapter: Adapter, measured: Mapping[str, Metrics]) -> None:
        """Export this client's personal adapter, with the residual in it, to its own disk."""
        whole = adapters.merged(adapter, self.order.received.residual, lambda rank: self.round.lora.at(rank).scaling)
        settings, examples = self.me.settings, len(self.data.train)
        here = settings.model_copy(update={"dataset": self.me.share.folder or settings.dataset})
        folder, usage = self.store.folder, usage_of(self.task, here, self.backbone)
        export_personal(folder, self.backbone, whole, self.me.data_name, settings, measured, examples, usage)
        self.task.export(folder, self.backbone, whole)


def round_plan(settings: Settings, number: int, client: ClientId, dtype: torch.dtype, steps: int = 0) -> Plan:
    """How a client trains in a round: as the settings say, or so many steps."""
    factor = round_factor(number, settings.num_server_rounds, settings.warmup_rounds)
    return Plan(
        epochs=steps or settings.local_epochs,  # no more epochs than steps are needed for them
        max_steps=steps or settings.max_steps,
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        learning_rate=settings.learning_rate * factor,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        seed=derive(settings.seed, "train", number, client),
        half_precision=dtype == torch.float16,
    )


def personal_plan(settings: Settings, client: ClientId, dtype: torch.dtype) -> Plan:
    """How a client fine-tunes the final adapter for itself."""
    return Plan(
        epochs=settings.personal.epochs,
        max_steps=settings.personal.max_steps,
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        learning_rate=settings.personal.learning_rate,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        seed=derive(settings.seed, "personalise", client),
        decay=True,
        proximal=settings.personal.proximal,
        half_precision=dtype == torch.float16,
    )
