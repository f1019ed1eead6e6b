"""Who a client is: simulated or a device, what it owns, where its state lies, and what it never tells."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable

from fedgen_app.errors import DataError, FedgenError, SettingsError
from fedgen_app.federation.method import ClientId, load_method
from fedgen_app.federation.policy import Policy, policy_of
from fedgen_app.federation.roster import parse_client
from fedgen_app.learning import adapters
from fedgen_app.learning.backbone import Backbone, open_backbone
from fedgen_app.learning.task import Share
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


def own_choices(node: Mapping[str, Value]) -> dict[str, Value]:
    """The settings that a device's node configuration decides."""
    return {key: node[key] for key in OWN_CHOICES if key in node}


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
