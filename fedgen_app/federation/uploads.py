"""Replies from a SuperLink, taken as far as they have come: who stops in the middle of one keeps nobody waiting.

A SuperLink hands out a reply's header, once, before the device has sent the rest. Flower's ``HttpGrid.pull_messages``
then waits for the rest: until 180 s have passed without any, 7200 s in all, and the other replies of that answer wait
with it. Here the rest is asked for in turns, and whoever waits looks at the clock between them.

Calls Flower's internals; they hold for Flower 1.41, which the package pins.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import Array, Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_children_ids_from_object_content,
    get_object_type_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.superlink.grid.http_grid import HttpGrid

MOST_BARE = 16 * 1024**2  # bytes of a reply, whatever the message that it answers
MOST_TIMES = 8  # that message's size: methods send back an adapter, some with as much of their own beside it
TURN = 1.0  # seconds after which a turn ends, however much there is to fetch
log = logging.getLogger(__name__)


@dataclass
class Upload:
    """A reply under way.

    Attributes:
        question: The id of the message that it answers.
        identifier: Its own.
        missing: Ids of its parts that have not been fetched, the last one first.
        parts: The others.
        size: Bytes of those.
    """

    question: str
    identifier: str
    missing: list[str]
    parts: dict[str, bytes] = field(default_factory=dict)
    size: int = 0


class Uploads:
    """The replies to one batch of messages.

    Args:
        asked: Bytes of the largest of these. A reply may have ``MOST_TIMES`` as many, and ``MOST_BARE`` more: what
            else a device sends would be the memory of the ServerApp, and the end of the run.
    """

    def __init__(self, grid: HttpGrid, asked: int) -> None:
        self._most = MOST_BARE + MOST_TIMES * asked
        self._client, self._node, self._run = grid._runtime_client, grid.node, grid.run.run_id
        self._fetch = make_pull_object_fn_protobuf(self._client.PullObject, self._node, self._run)
        self._confirm = make_confirm_message_received_fn_protobuf(
            self._client.ConfirmMessageReceived, self._node, self._run
        )
        self._under_way: deque[Upload] = deque()

    def pull(self, identifiers: Iterable[str]) -> tuple[list[Message], list[str]]:
        """One turn: the replies that are whole by now, and the ids of those that cannot be put together.

        A reply whose upload was given up is an error, as from Flower's own grid.

        Raises:
            httpx.HTTPError: the SuperLink is gone, or refuses.
        """
        self._ask(identifiers)
        whole: list[Message] = []
        broken: list[str] = []
        end = time.monotonic() + TURN
        for _ in range(len(self._under_way)):  # the next turn begins where this one ends
            upload = self._under_way.popleft()
            try:
                complete = self._advance(upload, end)
            except ObjectPullError:
                whole.append(self._given_up(upload))
                continue
            if not complete:
                self._under_way.append(upload)
            elif (message := self._put_together(upload)) is not None:
                whole.append(message)
            else:
                broken.append(upload.question)
            if time.monotonic() > end:
                break
        return whole, broken

    def _ask(self, identifiers: Iterable[str]) -> None:
        """Note the replies that have begun, each once: what a SuperLink has given out it denies the next time."""
        noted = {upload.question for upload in self._under_way}
        if not (wanted := [identifier for identifier in identifiers if identifier not in noted]):
            return
        given = self._client.PullMessages(PullAppMessagesRequest(message_ids=wanted))
        for header, tree in zip(given.messages_list, given.message_object_trees, strict=True):
            parts = dict.fromkeys(node.object_id for node in iterate_object_tree(tree))
            metadata = header.metadata
            self._under_way.append(Upload(metadata.reply_to_message_id, metadata.message_id, list(parts)[::-1]))

    def _advance(self, upload: Upload, end: float) -> bool:
        """Fetch its parts until one is not there yet or the turn is over; whether it is complete.

        Raises:
            ObjectPullError: the SuperLink has given it up.
        """
        while upload.missing and time.monotonic() < end:
            try:
                part = self._fetch(upload.missing[-1])
            except ObjectUnavailableError:
                return False
            upload.parts[upload.missing.pop()] = part
            upload.size += len(part)
            if upload.size > self._most:
                upload.parts.clear()
                return True
        return not upload.missing

    def _put_together(self, upload: Upload) -> Message | None:
        """The reply; None: it is too large, its bytes are none, or it says that it answers another message."""
        self._confirm(upload.identifier)
        try:
            if max(upload.size, _unfolded(upload.parts)) > self._most:
                log.warning("a reply has more than %d bytes", self._most)
                return None
            message = inflate_object_from_contents(upload.identifier, upload.parts)
        except Exception as error:  # whatever a hostile reply's bytes provoke
            log.warning("a reply cannot be read: %s", type(error).__name__)
            return None
        if not isinstance(message, Message) or message.metadata.reply_to_message_id != upload.question:
            log.warning("a reply is no answer to what was asked")
            return None
        message.metadata.__dict__["_message_id"] = upload.identifier
        return message

    def _given_up(self, upload: Upload) -> Message:
        metadata = Metadata(
            run_id=self._run,
            message_id="",
            src_node_id=self._node.node_id,
            dst_node_id=self._node.node_id,
            reply_to_message_id=upload.question,
            group_id="",
            created_at=time.time(),
            ttl=0,
            message_type=SYSTEM_MESSAGE_TYPE,
        )
        return make_message(metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE))


def _unfolded(parts: Mapping[str, bytes]) -> int:
    """Bytes of the arrays that are made of these parts: an array may name the same chunk any number of times."""
    total = 0
    for content in parts.values():
        if get_object_type_from_object_content(content) == Array.__qualname__:
            chunks = get_object_children_ids_from_object_content(content)
            total += sum(len(parts[chunks[i]]) for i in json.loads(get_object_body(content, Array))["arraychunk_ids"])
    return total
