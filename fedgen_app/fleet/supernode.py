"""``fedgen-supernode``: Flower's SuperNode, mended where a device would be lost to its fleet.

- On an answer that it does not know, such as a 500 where the SuperLink's database was locked, Flower's SuperNode ends
  but for the thread that speaks to the worker. Its process would stay, lost to the SuperLink, and nobody would start it
  anew. Where that was the answer to a heartbeat, no more would be sent: here the next one is.
- Where a run ends while one of its messages is received, Flower keeps the task. A minute later it answers that itself,
  and takes the answer for the next message's, whose own it takes for that of the one after it, and so on.
- Where a process dies while it hands over an answer, Flower waits for ever for the rest; where it dies before it has
  fetched the message, for any answer. Where it dies just after it answered, its worker answers for it once more, and
  the second answer would be taken for the next message's.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import httpx
from flwr.app import Message
from flwr.common.constant import Status
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import fleet_http_connection as connection
from flwr.supernode import start_client_internal as loop
from flwr.supernode.cli import flower_supernode
from flwr.supernode.nodestate.in_memory_nodestate import CLIENT_APP_CRASHED_ERROR

UNFINISHED = (Status.PENDING, Status.STARTING, Status.RUNNING)
WAIT = 0.1  # seconds between two looks whether an answer is all there
_receive = loop._pull_and_store_message
_send = loop._push_messages
log = logging.getLogger(__name__)


class Loop:
    """The two halves of Flower's loop, receiving a message and sending its answer, and what the one tells the other.

    Attributes:
        message: The id of the message under way.
        run: Whose it is.
    """

    message = ""
    run = 0

    def receive(
        self,
        *,
        state: Any,
        object_store: Any,
        receive: Callable[[], tuple[Message, Any] | None],
        pull_object: Callable[..., bytes],
        confirm_message_received: Callable[..., None],
        **others: Any,
    ) -> int | None:
        """As Flower's, but a message whose run has ended is given up like one that is lost on its way, task and all."""

        def noted() -> tuple[Message, Any] | None:
            if found := receive():
                self.message, self.run = found[0].metadata.message_id, found[0].metadata.run_id
            return found

        self.message = ""
        run: int | None = _receive(
            state=state,
            object_store=object_store,
            receive=noted,
            pull_object=_losing(pull_object),
            confirm_message_received=_losing(confirm_message_received),
            **others,
        )
        if run is None:  # no message is under way: what lies here answers one that is gone
            for reply in state.get_messages_legacy(is_reply=True):
                state.delete_messages(message_ids=[reply.metadata.message_id, reply.metadata.reply_to_message_id])
                object_store.delete(reply.metadata.message_id)
        return run

    def send(self, *, state: Any, object_store: Any, **others: Any) -> None:
        """As Flower's, but it sends the one whole answer to the message under way, or that there is none."""
        seen: Any = _Answers(state, object_store, self.message, self.run)
        _send(state=seen, object_store=object_store, **others)


class _Answers:
    """A SuperNode's state, as Flower's loop that sends answers sees it."""

    def __init__(self, state: Any, object_store: Any, message: str, run: int) -> None:
        self._state, self._objects, self._message, self._run = state, object_store, message, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def get_messages_legacy(self, *, is_reply: bool) -> list[Message]:
        """The answer to the message under way; none: it is not there yet, or was half a one, and an error will come."""
        found: list[Message] = []
        waiting = self._at_work()
        for reply in self._state.get_messages_legacy(is_reply=is_reply):
            if reply.metadata.reply_to_message_id == self._message and not found and self._arrives(reply):
                found.append(reply)
            else:
                self._lose(reply)
        if not found and not waiting:  # whoever had the task is gone without an answer, or without the message even
            self._state.get_messages_legacy(run_ids=[self._run], is_reply=False)
            self._state._store_error_replies({self._run}, CLIENT_APP_CRASHED_ERROR)
        return found

    def _at_work(self) -> bool:
        """Whether somebody may yet answer; asked before one looks for an answer, for the task ends after that."""
        return bool(self._state.get_tasks(run_ids=[self._run], statuses=UNFINISHED))

    def _arrives(self, reply: Message) -> bool:
        """Wait for its parts, for as long as somebody may bring them."""
        tree = self._objects.get_object_tree(reply.metadata.message_id)
        while True:
            waiting = self._at_work()
            if all(self._objects.get(part.object_id) for part in iterate_object_tree(tree)):
                return True
            if not waiting:
                return False
            time.sleep(WAIT)

    def _lose(self, reply: Message) -> None:
        log.error("an answer of run %d is dropped: half a one, a second one, or too late", reply.metadata.run_id)
        self._objects.delete(reply.metadata.message_id)
        self._state.delete_messages(message_ids=[reply.metadata.message_id])


def heart(beat: Callable[[], bool]) -> HeartbeatSender:
    """As Flower's, but an error of the server is a beat that failed, and the next one may not."""

    def patient() -> bool:
        try:
            return beat()
        except httpx.HTTPStatusError as error:
            if error.response.status_code < 500:
                raise
            return False

    return HeartbeatSender(patient)


def _losing(request: Callable[..., Any]) -> Callable[..., Any]:
    def asked(*arguments: Any) -> Any:
        try:
            return request(*arguments)
        except RunNotRunningException:  # no Exception, so that Flower's own clean-up does not see it
            raise RuntimeError("its run has ended") from None

    return asked


def main() -> None:
    """Run it with its own options; exit status 1 where it, or a thread of it, ends by an error."""
    sys.argv[0] = "flower-supernode"  # as its messages say
    threading.excepthook = _end
    mended = Loop()
    vars(loop)[_receive.__name__], vars(loop)[_send.__name__] = mended.receive, mended.send
    vars(connection)[HeartbeatSender.__name__] = heart
    try:
        flower_supernode()
    except SystemExit:  # it has ended its threads
        raise
    except BaseException:  # whatever it ended by: what matters is that the process ends too
        traceback.print_exc()
    _leave()


def _end(what: threading.ExceptHookArgs) -> None:
    threading.__excepthook__(what)
    _leave()


def _leave() -> None:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
