"""The whole federation in one process: the same ServerApp and ClientApp over a Grid that hands messages across.

No Ray and no sockets: for tests, debugging and experiments on one GPU.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedgen_app.settings import RunConfig

RUN_ID = 1
log = logging.getLogger(__name__)


class InProcessGrid(Grid):
    """Runs a client when its reply is pulled, one client at a time, and keeps one Context per node."""

    def __init__(self, app: ClientApp, run_config: RunConfig, clients: int) -> None:
        self.app = app
        self.contexts = {
            node: Context(
                run_id=RUN_ID,
                node_id=node,
                state=RecordDict(),
                run_config=dict(run_config),
                node_config={"partition-id": node - 1, "num-partitions": clients},
            )
            for node in range(1, clients + 1)
        }
        self._pending: dict[str, Message] = {}
        self._numbers = itertools.count(1)
        self._worked = 0.0

    def clock(self) -> float:
        """Seconds, without those in which clients worked: queueing for one process is no client's lateness."""
        return time.monotonic() - self._worked

    def set_run(self, run: Run) -> None:
        """Nothing to set: there is one run."""

    @property
    def run(self) -> Run:
        """An empty description of the one run."""
        return Run.create_empty(RUN_ID)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """As ``Message(...)`` does it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes, numbered from 1."""
        return list(self.contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The same, as Flower describes a node."""
        return [NodeInfo(node_id=node) for node in self.contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages until their replies are asked for."""
        identifiers = []
        for message in messages:
            # As long as Flower's own, a SHA-256: replies name it, and their size must not depend on a counter.
            identifier = f"{next(self._numbers):064x}"
            message.metadata.__dict__["_message_id"] = identifier
            if message.metadata.dst_node_id in self.contexts:
                self._pending[identifier] = message
                identifiers.append(identifier)
            else:
                identifiers.append("")
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the next client of those asked for, and return its reply."""
        for identifier in message_ids:
            if identifier in self._pending:
                message = self._pending.pop(identifier)
                began = time.monotonic()
                try:
                    return [self.deliver(message)]
                finally:
                    self._worked += time.monotonic() - began
        return []

    def deliver(self, message: Message) -> Message:
        """Let the ClientApp answer; what it raises becomes an error reply, as a real node makes one."""
        context = self.contexts[message.metadata.dst_node_id]
        try:
            return self.app(message, context)
        except Exception:  # as Flower's own worker: whatever an app raises must not end the federation
            log.exception("client of node %d failed", context.node_id)
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION), reply_to=message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push and pull all at once."""
        identifiers = [i for i in self.push_messages(messages) if i]
        return [reply for identifier in identifiers for reply in self.pull_messages([identifier])]


def load_apps(app_dir: Path) -> tuple[ServerApp, ClientApp]:
    """The apps of a folder that holds ``server_app.py`` and ``client_app.py``."""
    if str(app_dir) not in sys.path:
        sys.path.insert(0, str(app_dir))
    server = cast(ServerApp, importlib.import_module("server_app").app)
    client = cast(ClientApp, importlib.import_module("client_app").app)
    return server, client


def run(app_dir: Path, run_config: RunConfig, clients: int, grid: Grid | None = None) -> None:
    """Run the app to its end; what the ServerApp raises goes through.

    Args:
        grid: Another grid than the plain one (a test's, which lets clients misbehave).
    """
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = RUN_ID
    server, client = load_apps(app_dir)
    context = Context(run_id=RUN_ID, node_id=0, state=RecordDict(), run_config=dict(run_config), node_config={})
    server(grid or InProcessGrid(client, run_config, clients), context)
