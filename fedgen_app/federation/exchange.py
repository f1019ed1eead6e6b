"""Send messages and collect the replies, never waiting without a bound.

Flower's own ``send_and_receive`` polls every 3 s and waits for all; a fleet needs a quorum, a grace and a deadline.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.superlink.grid.http_grid import HttpGrid

from fedgen_app.errors import RunError
from fedgen_app.federation.uploads import Uploads
from fedgen_app.federation.wire import byte_size

# A message stays valid a little longer than anyone waits for it, and then it is gone from the SuperLink too.
TTL_MARGIN = 60.0
POLL_SECONDS = (0.02, 0.5)


@dataclass(frozen=True)
class Patience:
    """How long to wait, in seconds, and for which fraction of the messages.

    ``grace``: once the quorum is there, how long the others may still take. Irrelevant at quorum 1.
    """

    deadline: float
    quorum: float = 1.0
    grace: float = 0.0


@dataclass
class Replies:
    """What came back: at most one message per node; nodes that sent more, nothing, or what cannot be read.

    Attributes:
        sent_bytes: Of all messages that were to be answered.
    """

    messages: dict[int, Message] = field(default_factory=dict)
    duplicates: set[int] = field(default_factory=set)
    missing: set[int] = field(default_factory=set)
    unreadable: set[int] = field(default_factory=set)
    sent_bytes: int = 0


def collect(
    grid: Grid,
    messages: Iterable[Message],
    patience: Patience,
    on_reply: Callable[[int, int], None] = lambda done, of: None,
) -> Replies:
    """Push the messages and pull replies until the quorum (plus grace), the deadline, or all have answered.

    Args:
        messages: One per node.
        on_reply: Called with (replies so far, messages sent) whenever something arrived.

    Raises:
        RunError: the SuperLink refuses the messages.
        httpx.HTTPError: it is gone.
    """
    outgoing = list(messages)
    sizes = [byte_size(message) for message in outgoing]
    waiting: dict[str, int] = {}
    result = Replies(missing={m.metadata.dst_node_id for m in outgoing}, sent_bytes=sum(sizes))
    identifiers = list(grid.push_messages(outgoing))
    if len(identifiers) != len(outgoing):
        raise RunError(f"the SuperLink did not take {len(outgoing)} messages: they are larger than it allows")
    for message, identifier in zip(outgoing, identifiers, strict=True):
        if identifier:  # empty: the SuperLink knows that node no longer
            waiting[identifier] = message.metadata.dst_node_id
    # A little less: 0.55 * 100 is 55.00000000000001.
    needed = max(1, math.ceil(patience.quorum * len(outgoing) - 1e-9))
    pull = _puller(grid, max(sizes, default=0))
    # A grid that runs the clients itself, one after the other, stops its clock while they work.
    now = getattr(grid, "clock", time.monotonic)
    end = now() + patience.deadline
    pause, quorum_reached = POLL_SECONDS[0], False
    while waiting and now() < end:
        arrived, broken = pull(list(waiting))
        for identifier in broken:
            result.unreadable.add(waiting.pop(identifier))
        for message in arrived:
            _take(message, waiting, result)
        if arrived:
            on_reply(len(result.messages), len(outgoing))
            pause = POLL_SECONDS[0]
        good = sum(not m.has_error() for m in result.messages.values())
        if patience.quorum < 1 and good >= needed and not quorum_reached:
            quorum_reached, end = True, min(end, now() + patience.grace)
        if waiting and not arrived:
            time.sleep(min(pause, max(0.0, end - now())))
            pause = min(pause * 1.5, POLL_SECONDS[1])
    return result


def _puller(grid: Grid, largest: int) -> Callable[[list[str]], tuple[list[Message], list[str]]]:
    """How the replies to some ids are pulled: those that are there, and the ids of those that cannot be put together.

    A SuperLink hands out replies that a device is still sending; the other grids have whole ones alone.

    Args:
        largest: Bytes of the largest message that is answered.
    """
    if isinstance(grid, HttpGrid):
        return Uploads(grid, largest).pull
    return lambda wanted: (list(grid.pull_messages(wanted)), [])


def _take(message: Message, waiting: dict[str, int], result: Replies) -> None:
    node = waiting.pop(message.metadata.reply_to_message_id, None)
    if node is not None:
        result.messages[node] = message
        result.missing.discard(node)
    elif message.metadata.src_node_id in result.messages:
        result.duplicates.add(message.metadata.src_node_id)
