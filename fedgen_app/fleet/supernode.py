"""``fedgen-supernode``: Flower's SuperNode, mended where a device would be lost to its fleet.

- On an answer that it does not know, such as a 500 where the SuperLink's database was locked, Flower's SuperNode ends
  but for the thread that speaks to the worker. Its process would stay, lost to the SuperLink, and nobody would start it
  anew. Where that was the answer to a heartbeat, no more would be sent: here the next one is.
- Where a run ends while one of its messages is received, Flower keeps the task. A minute later it answers that itself,
  and takes the answer for the next message's, whose own it takes for that of the one after it, and so on.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import httpx
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import fleet_http_connection as connection
from flwr.supernode import start_client_internal as loop
from flwr.supernode.cli import flower_supernode

_receive = loop._pull_and_store_message


def receive(
    *,
    state: Any,
    object_store: Any,
    pull_object: Callable[..., bytes],
    confirm_message_received: Callable[..., None],
    **others: Any,
) -> int | None:
    """As Flower's, but a message whose run has ended is given up like one that is lost on its way, task and all."""
    run: int | None = _receive(
        state=state,
        object_store=object_store,
        pull_object=_losing(pull_object),
        confirm_message_received=_losing(confirm_message_received),
        **others,
    )
    if run is None:  # no message is under way: what lies here answers one that is gone
        for reply in state.get_messages_legacy(is_reply=True):
            state.delete_messages(message_ids=[reply.metadata.message_id, reply.metadata.reply_to_message_id])
            object_store.delete(reply.metadata.message_id)
    return run


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
