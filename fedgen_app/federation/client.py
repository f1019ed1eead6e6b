"""Who a client is: simulated or a device, what it owns, where its state lies, and what it never tells."""

from __future__ import annotations

import importlib
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable

from fedgen_app.errors import DataError, FedgenError, SettingsError
from fedgen_app.federation import wire
from fedgen_app.federation.consent import check_plans
from fedgen_app.federation.local import Lesson, fine_tune, plain
from fedgen_app.federation.method import ClientId, Lora, Method, Round, weighted_mean, whole_adapter
from fedgen_app.federation.policy import Policy, policy_of
from fedgen_app.federation.robust import FACTOR_RULES
from fedgen_app.federation.roster import parse_client
from fedgen_app.learning import adapters, training
from fedgen_app.learning.adapters import Adapter
from fedgen_app.learning.backbone import Backbone, load_task, open_backbone
from fedgen_app.learning.choosing import best_suited
from fedgen_app.learning.export import export_personal, usage_of
from fedgen_app.learning.task import LocalData, Metrics, Share, Task
from fedgen_app.learning.training import Plan, round_factor
from fedgen_app.runs.personal import Kept, PersonalStore
from fedgen_app.seeds import derive
from fedgen_app.settings import Settings, Value, shown_source

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,127}")
UNEXPECTED = 199
# Settings that a device decides itself, in its node configuration: they change how it computes, not what.
OWN_CHOICES = ("backbone-bits", "threads")
log = logging.getLogger(__name__)


def guarded(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower mod: an error's text stays on the device, which logs it; the server gets a code only."""
    try:
        return call_next(message, context)
    except FedgenError as error:
        log.error("%s failed: %s", message.metadata.message_type, error)
        return Message(Error(error.code), reply_to=message)
    except Exception:  # whatever it says may name a file or quote a text: none of it may reach the wire
        log.exception("%s failed", message.metadata.message_type)
        return Message(Error(UNEXPECTED), reply_to=message)


def load_method(name: str) -> Method:
    """The method of a settings value: ``methods/<name>.py`` ends in ``METHOD``."""
    return cast(Method, importlib.import_module(f"fedgen_app.methods.{name.replace('-', '_')}").METHOD)


def own_choices(node: Mapping[str, Value]) -> dict[str, Value]:
    """The settings that a device's node configuration decides."""
    return {key: node[key] for key in OWN_CHOICES if key in node}


def check_method(settings: Settings) -> Method:
    """The method of these settings, after it said whether it works with them.

    Raises:
        SettingsError: names every setting that it refuses, and why.
    """
    method = load_method(settings.method)
    objections = [*method.refuses(settings), *_cluster_objections(settings, method)]
    if settings.backbone_bits and method.weights == "model":
        objections.append(
            f"backbone-bits = {settings.backbone_bits}: method = {settings.method} trains the weights, which so few "
            "bits cannot follow; use 0"
        )
    if settings.aggregation.layer_wise and method.rule is not weighted_mean:
        objections.append(
            f"aggregation.layer-wise = true: method = {settings.method} is no plain mean of factors, which alone can "
            "be taken layer by layer"
        )
    if settings.aggregation.layer_wise and settings.aggregation.robust in FACTOR_RULES:
        objections.append(
            f"aggregation.layer-wise = true: aggregation.robust = {settings.aggregation.robust!r} leaves one update, "
            "which agrees with itself; take one of the two"
        )
    if not settings.personal.epochs and method.personal is not fine_tune:
        objections.append(
            f"personal.epochs = 0: method = {settings.method} trains a personal adapter in every round, which nobody "
            "would measure or keep; use 1 or more"
        )
    if settings.lora.init and (method.sends is not whole_adapter or method.weights == "model"):
        objections.append(
            f"lora.init = {settings.lora.init!r}: with method = {settings.method} clients do not start from an adapter "
            "that the server sends whole; what is not sent they draw from the seed"
        )
    if settings.lora.ranks and method.fit is None and set(settings.lora.ranks) != {settings.lora.rank}:
        objections.append(
            f"lora.ranks = {','.join(map(str, settings.lora.ranks))!r}: method = {settings.method} needs one rank for "
            "all; flexlora, flora and hetlora take mixed ones"
        )
    if objections:
        raise SettingsError("\n".join(objections))
    return method


def _cluster_objections(settings: Settings, method: Method) -> list[str]:
    """Why there can be no clusters with these settings, one line each."""
    by, ranks = settings.clusters.by, settings.lora.ranks
    told = f"clusters.by = {by!r}: method = {settings.method}"
    if by == "none":
        return []
    if method.pooled:
        return [f"{told} trains on one client, which owns all data"]
    if settings.method == "local-only":
        return [f"{told} shares nothing, so that there is nothing to average in a cluster"]
    if by == "loss" and method.tied:
        return [
            f"{told} has clients keep what belongs to one cluster's tensors, and by loss they may go to another in "
            "every round; take another way, or another method"
        ]
    if by in ("updates", "adapters") and settings.method == "fedsa-lora":
        return [f"{told} sends no factor B, which is what tells clients apart; take 'prompts' or 'loss'"]
    if by == "adapters" and settings.method == "rolora":
        return [f"{told} sends no factor B, which is what is compared, in every second round; take 'updates'"]
    if by == "adapters" and ranks and set(ranks) != {settings.lora.rank}:
        return ["clusters.by = 'adapters': compares factors of one rank, and lora.ranks has several; take 'updates'"]
    warmup, rounds = settings.clusters.warmup, settings.num_server_rounds
    late = f"clusters.warmup = {warmup}: with num-server-rounds = {rounds}"
    if by in ("updates", "adapters") and warmup > rounds:
        return [f"{late} no round is left whose replies would be compared; use {rounds} or less"]
    if by == "loss" and warmup >= rounds:
        return [f"{late} clients would stay where chance dealt them in all of them; use less"]
    return []


def lora_of(settings: Settings) -> Lora:
    """The adapter's shape that the settings ask for."""
    return Lora(settings.lora.rank, settings.lora.alpha, settings.lora.rslora)


def affordable_rank(memory: int, held: int, per_rank: int, largest: int) -> int:
    """The rank that a device of ``memory`` bytes can train, at most ``largest``.

    The frozen backbone takes ``held`` bytes; half of what is left is for activations; of the other half every number of
    the adapter takes 16 bytes: itself, its gradient and AdamW's two moments, float32.

    Args:
        per_rank: Numbers of an adapter of rank 1.

    Raises:
        DataError: not even rank 1 fits.
    """
    rank = (memory - held) // 2 // (16 * per_rank)
    if rank < 1:
        raise DataError(f"memory = {memory}: too little for this backbone ({held} bytes) and an adapter of rank 1")
    return min(rank, largest)


def run_folder(settings: Settings, run_name: str) -> Path:
    """Where a run on this machine lies.

    ``resume-from``, else ``output-dir``, else ``runs/<time>-<task>-<method>`` in the current folder.

    A run's name is that folder's name with a few random digits behind it, so that devices keep runs apart.
    """
    return Path(settings.resume_from or settings.output_dir or Path.cwd() / "runs" / run_name.rpartition("-")[0])


@dataclass(frozen=True)
class Participant:
    """One client in one message's context."""

    client: ClientId
    settings: Settings
    share: Share
    simulated: int
    backbone: str
    state: Path | None
    rank: int = 0
    memory: int = 0
    encoder: str = ""
    key: Path | None = None
    noise: float = 0.0
    policy: Policy = Policy()

    @classmethod
    def from_context(cls, context: Context) -> Participant:
        """Read the node's own configuration.

        Raises:
            SettingsError: the run's settings or the node's are wrong.
            PolicyError: the node's policy cannot be read.
        """
        node = context.node_config
        settings = Settings.from_run_config({**context.run_config, **own_choices(node)})
        if "partition-id" in node and "data" not in node:
            index, count = int(node["partition-id"]), int(node["num-partitions"])
            ranks = settings.lora.ranks or (settings.lora.rank,)
            key = Path(settings.clusters.key) if settings.clusters.key else None
            return cls(index, settings, Share(index, count), count, "", None, ranks[index % len(ranks)], key=key)
        try:
            client = parse_client(str(node["client-id"]))
            data, rank, memory = str(node["data"]), int(node.get("rank", 0)), int(node.get("memory", 0))
            noise = float(node.get("cluster-noise", 0.0))
            if not 0 <= noise < math.inf:
                raise ValueError(f"cluster-noise = {noise}")
        except (KeyError, ValueError) as error:
            raise SettingsError(f"node config: {error}; a device needs client-id and data") from None
        state = Path(str(node.get("state-dir", "~/.local/state/fedgen"))).expanduser()
        backbone, encoder = str(node.get("backbone", "")), str(node.get("cluster-encoder", ""))
        key = Path(str(node["cluster-key"])) if "cluster-key" in node else None  # never the server's own setting
        share = Share(folder=data, prompts=str(node.get("prompts", "")))
        policy = policy_of(node)
        return cls(client, settings, share, 0, backbone, state, rank, memory, encoder, key, noise, policy)

    def open_backbone(self) -> Backbone:
        """The backbone that this client trains on.

        Raises:
            PolicyError: it is not one that the device allows.
        """
        self.policy.check_source(self.backbone, self.settings.backbone)
        settings = self.settings
        if self.backbone and self.policy.backbones is not None:  # of an own hub id, too, the server chooses nothing
            settings = settings.model_copy(update={"backbone_revision": ""})
        backbone = open_backbone(settings, self.backbone, load_method(self.settings.method).weights)
        self.policy.check_backbone(backbone.fingerprint)
        return backbone

    def rank_for(self, backbone: Backbone) -> int:
        """Of this client's adapter: what its node config says, or what its memory carries; at most ``lora.rank``.

        Raises:
            DataError: its memory is too small.
        """
        largest = self.settings.lora.rank
        if not any(".lora_" in key for key, _ in backbone.layout):  # all weights learn
            return largest
        if self.rank or not self.memory:
            return min(self.rank or largest, largest)
        per_rank = sum(math.prod(shape) for _, shape in adapters.at_rank(backbone.layout, 1))
        return affordable_rank(self.memory, backbone.held_bytes, per_rank, largest)

    @property
    def data_name(self) -> str:
        """How a model card names the data."""
        return "the device's own" if self.share.folder else shown_source(self.settings.dataset)

    def folder(self, run_name: str) -> Path:
        """Where this client's adapters lie: in the run folder in a simulation, else in the device's own state.

        Raises:
            SettingsError: the server sent a run name that is no plain name.
        """
        if not RUN_NAME.fullmatch(run_name):
            raise SettingsError(f"run name {run_name[:80]!r} is not a plain name")
        if self.state is not None:
            return self.state / run_name / str(self.client)
        return run_folder(self.settings, run_name) / "clients" / str(self.client)


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
