"""``fedgen-supernode``: Flower's SuperNode, mended where a device would be lost to its fleet.

- On an answer that it does not know, such as a 500 where the SuperLink's database was locked, Flower's SuperNode ends
  but for the thread that speaks to the worker. Its process would stay, lost to the SuperLink, and nobody would start it
  anew. Where that was the answer to a heartbeat, no more would be sent: here the next one is.
- Where a run ends while one of its messages is received, Flower keeps the task. A minute later it answers that itself,
  and takes the answer for the next message's, whose own it takes for that of the one after it, and so on.
- Where a process dies while it hands over an answer, Flower waits for ever for the rest. Where it dies just after that,
  its worker answers for it once more, and the second answer would be taken for the next message's.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
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

WAIT = 0.1  # seconds between two looks whether an answer is all there
_receive = loop._pull_and_store_message
_send = loop._push_messages
log = logging.getLogger(__name__)


def receive(
    *,
    state: Any,
    object_store: Any,
    pull_object: Callable[..., bytes],
    confirm_message_received: Callable[..., None],
    **others: Any,
) -> int | None:
    """As Flower's, but a message whose run has ended is given up like one that is lost on its way, task and all.

    An answer that lies here before a message comes, or where none came, is that of one which is gone.
    """
    _drop(state, object_store, state.get_messages_legacy(is_reply=True))
    run: int | None = _receive(
        state=state,
        object_store=object_store,
        pull_object=_losing(pull_object),
        confirm_message_received=_losing(confirm_message_received),
        **others,
    )
    if run is None:
        _drop(state, object_store, state.get_messages_legacy(is_reply=True))
    return run


def _drop(state: Any, object_store: Any, replies: Sequence[Message]) -> None:
    """Forget answers and what they answered."""
    for reply in replies:
        state.delete_messages(message_ids=[reply.metadata.message_id, reply.metadata.reply_to_message_id])
        object_store.delete(reply.metadata.message_id)


def send(*, state: Any, object_store: Any, **others: Any) -> None:
    """As Flower's, but an answer is sent once it is all there, and one of two is; of half a one, that it got lost."""
    seen: Any = _WholeReplies(state, object_store)
    _send(state=seen, object_store=object_store, **others)


class _WholeReplies:
    """A SuperNode's state, as Flower's loop that sends answers sees it."""

    def __init__(self, state: Any, object_store: Any) -> None:
        self._state, self._objects = state, object_store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def get_messages_legacy(self, *, is_reply: bool) -> list[Message]:
        """The answers that are there and have not been given out yet, one of each message.

        Where only half a one is there, none: what stands in its place comes with the next call.
        """
        found: dict[str, Message] = {}
        runs = {task.run_id for task in self._state.get_tasks()}
        waiting = self._at_work(runs)
        for reply in self._state.get_messages_legacy(is_reply=is_reply):
            answered = reply.metadata.reply_to_message_id
            if answered not in found and self._arrives(reply):
                found[answered] = reply
            else:
                self._lose(reply)
        if not found and not waiting:  # who said that it had answered had not
            self._state._store_error_replies(runs, CLIENT_APP_CRASHED_ERROR)
        return list(found.values())

    def _at_work(self, runs: Collection[int]) -> bool:
        """Whether somebody may yet answer; asked before one looks for an answer, for the task ends after that."""
        return any(task.status.status != Status.FINISHED for task in self._state.get_tasks(run_ids=runs))

    def _arrives(self, reply: Message) -> bool:
        """Wait for its parts, for as long as somebody may bring them."""
        tree = self._objects.get_object_tree(reply.metadata.message_id)
        while True:
            waiting = self._at_work([reply.metadata.run_id])
            if all(self._objects.get(part.object_id) for part in iterate_object_tree(tree)):
                return True
            if not waiting:
                return False
            time.sleep(WAIT)

    def _lose(self, reply: Message) -> None:
        """Forget it; its message gets the error of a crash, unless something else answers that."""
        log.error("an answer of run %d is dropped: it is not whole, or a second one", reply.metadata.run_id)
        self._objects.delete(reply.metadata.message_id)
        self._state.delete_messages(message_ids=[reply.metadata.message_id])
        self._state._store_error_replies({reply.metadata.run_id}, CLIENT_APP_CRASHED_ERROR)


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
    vars(loop)[_receive.__name__] = receive
    vars(loop)[_send.__name__] = send
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
