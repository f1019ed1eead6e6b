"""Who a client is: simulated or a device, what it owns, where its state lies, and what it never tells."""

from __future__ import annotations

import importlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable

from fedgen_app.errors import FedgenError, SettingsError
from fedgen_app.federation import wire
from fedgen_app.federation.method import ClientId, Lora, Method, Round
from fedgen_app.federation.roster import parse_client
from fedgen_app.learning import adapters
from fedgen_app.learning.adapters import Adapter
from fedgen_app.learning.backbone import Backbone, load_task, open_backbone
from fedgen_app.learning.task import LocalData, Share, Task
from fedgen_app.learning.training import Plan, round_factor
from fedgen_app.runs.personal import PersonalStore
from fedgen_app.seeds import derive
from fedgen_app.settings import Settings, shown_source

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,127}")
UNEXPECTED = 199
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


def lora_of(settings: Settings) -> Lora:
    """The adapter's shape that the settings ask for."""
    return Lora(settings.lora.rank, settings.lora.alpha, settings.lora.scaling)


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

    @classmethod
    def from_context(cls, context: Context) -> Participant:
        """Read the node's own configuration.

        Raises:
            SettingsError: the run's settings or the node's are wrong.
        """
        settings, node = Settings.from_run_config(context.run_config), context.node_config
        if "partition-id" in node and "data" not in node:
            index, count = int(node["partition-id"]), int(node["num-partitions"])
            return cls(index, settings, Share(index, count), count, "", None)
        try:
            client = parse_client(str(node["client-id"]))
            data = str(node["data"])
        except (KeyError, ValueError) as error:
            raise SettingsError(f"node config: {error}; a device needs client-id and data") from None
        state = Path(str(node.get("state-dir", "~/.local/state/fedgen"))).expanduser()
        return cls(client, settings, Share(folder=data), 0, str(node.get("backbone", "")), state)

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
    """What the server asks for in one message."""

    number: int
    run_name: str
    received: Adapter
    round: Round

    @classmethod
    def from_message(cls, message: Message, settings: Settings) -> Assignment:
        """Read the instruction.

        Raises:
            wire.WireError: it is none.
        """
        config = message.content.config_records["config"]
        number = int(cast(int, config[wire.ROUND]))
        received = wire.received(message.content, settings.wire.codec)
        lora = lora_of(settings)
        return cls(
            number,
            str(config[wire.RUN]),
            received,
            Round(number, lora, derive(settings.seed, "round", number)),
        )


@dataclass(frozen=True)
class Work:
    """All that a client needs to carry out an instruction.

    Attributes:
        start: The adapter to start from: what was received, over the client's own private tensors, over the seeded
            start.
    """

    me: Participant
    order: Assignment
    task: Task
    method: Method
    backbone: Backbone
    data: LocalData
    store: PersonalStore
    start: Adapter

    @classmethod
    def begin(cls, message: Message, context: Context) -> Work:
        """Read the instruction, load what it needs.

        Raises:
            FedgenError: something of it is not to be had.
        """
        me = Participant.from_context(context)
        settings, order = me.settings, Assignment.from_message(message, me.settings)
        task, method = load_task(settings.task), load_method(settings.method)
        backbone = open_backbone(settings, me.backbone)
        data = task.load_data(settings, backbone, me.share)
        store = PersonalStore(me.folder(order.run_name), settings.keep_checkpoints + 1)
        kept = [key for key, _ in backbone.layout if not method.shares(key, order.round)]
        own = (store.before(order.number, backbone.layout) if kept else None) or {}
        private = {key: own[key] for key in kept if key in own}
        start = adapters.fresh(backbone.layout, settings.seed) | private | order.received
        return cls(me, order, task, method, backbone, data, store, start)


def round_plan(settings: Settings, number: int, client: ClientId, dtype: torch.dtype) -> Plan:
    """How a client trains in a round."""
    factor = round_factor(number, settings.num_server_rounds, settings.warmup_rounds)
    return Plan(
        epochs=settings.local_epochs,
        max_steps=settings.max_steps,
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
