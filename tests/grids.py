"""A base for the tests' own grids: the parts of Flower's Grid that the federation never calls."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run


class UncalledParts(Grid):
    """What is left to write: get_node_ids, push_messages, pull_messages."""

    def set_run(self, run: Run) -> None:
        raise AssertionError("set_run is not for the federation to call")

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        raise AssertionError("create_message is not for the federation to call")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("send_and_receive waits without a quorum: it is not for the federation to call")
