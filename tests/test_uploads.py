"""Replies that a device is still sending, over a real Runtime API and Flower's own grid."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta

import httpx
import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from superlinks import SuperLink

from fedgen_app.federation import uploads
from fedgen_app.federation.exchange import Patience, Replies, collect
from fedgen_app.federation.uploads import Uploads

pytestmark = pytest.mark.slow
SLACK = 2.0  # how much later than its time something may happen on a busy machine


@pytest.fixture
def link() -> Iterator[SuperLink]:
    """Three devices."""
    with SuperLink(3) as running:
        yield running


def reply(question: Message) -> Message:
    """The device's number: no two replies share a part, since a SuperLink names parts by what they hold."""
    node = np.full(9, question.metadata.dst_node_id, dtype=np.uint64)
    return Message(RecordDict({"a": ArrayRecord([node])}), reply_to=question)


def asked(link: SuperLink, answer: Callable[[int, Message], None], patience: Patience) -> tuple[Replies, float]:
    """Ask all devices, each of which answers as soon as the messages are there; how long that took, in seconds."""
    push = link.grid.push_messages

    def push_and_answer(messages: Iterable[Message]) -> Iterable[str]:
        outgoing = list(messages)
        identifiers = push(outgoing)
        for number, message in enumerate(outgoing):
            answer(number, message)
        return identifiers

    link.grid.push_messages = push_and_answer  # type: ignore[method-assign]
    began = time.monotonic()
    questions = [Message(RecordDict(), node, "train", ttl=600.0) for node in link.nodes]
    replies = collect(link.grid, questions, patience)
    return replies, time.monotonic() - began


@pytest.mark.parametrize("parts", [0, 3])
def test_who_stops_in_the_middle_of_a_reply_is_late_and_keeps_nobody_waiting(link: SuperLink, parts: int) -> None:
    def answer(number: int, question: Message) -> None:
        link.announce(reply(question)).send(parts if number == 1 else None)

    replies, seconds = asked(link, answer, Patience(2.0))
    first, second, third = link.nodes
    assert set(replies.messages) == {first, third} and replies.missing == {second} and not replies.unreadable
    assert not any(message.has_error() for message in replies.messages.values())
    assert 1.9 < seconds < 2.0 + SLACK


def test_a_quorum_does_not_wait_for_an_upload(link: SuperLink) -> None:
    def answer(number: int, question: Message) -> None:
        link.announce(reply(question)).send(1 if number == 0 else None)

    replies, seconds = asked(link, answer, Patience(60, 0.6, 0.3))
    assert set(replies.messages) == set(link.nodes[1:]) and seconds < 0.3 + SLACK


def test_a_reply_that_comes_in_pieces_is_taken_once_it_is_whole(link: SuperLink) -> None:
    timers: list[threading.Timer] = []

    def answer(number: int, question: Message) -> None:
        sending = link.announce(reply(question))
        sending.send(number)
        timers.append(threading.Timer(0.3 * number, sending.send))
        timers[-1].start()

    replies, _ = asked(link, answer, Patience(60))
    for timer in timers:
        timer.join()
    assert set(replies.messages) == set(link.nodes) and not replies.missing and not replies.duplicates
    for node, message in replies.messages.items():
        assert message.metadata.src_node_id == node and message.metadata.message_id
        (array,) = message.content.array_records["a"].to_numpy_ndarrays()
        assert array.tolist() == [node] * 9
    kept = link.state.object_store.run_objects_mapping[link.run]
    assert not kept & {
        m.metadata.message_id for m in replies.messages.values()
    }  # the SuperLink was told to forget them


def test_an_upload_that_the_superlink_gives_up_is_an_error(link: SuperLink) -> None:
    def answer(number: int, question: Message) -> None:
        sending = link.announce(reply(question))
        if number == 1:  # 180 s without a part
            link.state._object_push_sessions[sending.session].expires_at -= timedelta(hours=1)
        else:
            sending.send()

    replies, seconds = asked(link, answer, Patience(60))
    assert set(replies.messages) == set(link.nodes) and seconds < SLACK
    errors = {node: m.error.code for node, m in replies.messages.items() if m.has_error()}
    assert errors == {link.nodes[1]: ErrorCode.MESSAGE_UNAVAILABLE}


NO_MESSAGE = [b"ArrayRecord  2\0{}", b"Message  1\0x", b"Message  0\0"]  # as much as a SuperLink lets through


@pytest.mark.parametrize("content", NO_MESSAGE)
def test_a_reply_that_cannot_be_read_costs_the_others_nothing(link: SuperLink, content: bytes) -> None:
    def answer(number: int, question: Message) -> None:
        own = reply(question)
        if number == 1:
            identifier = hashlib.sha256(content).hexdigest()
            link.announce_parts(own, ObjectTree(object_id=identifier), {identifier: content}).send()
        else:
            link.announce(own).send()

    replies, seconds = asked(link, answer, Patience(60))
    first, second, third = link.nodes
    assert set(replies.messages) == {first, third} and replies.unreadable == {second} and seconds < SLACK


def test_a_reply_larger_than_any_method_sends_is_not_kept(link: SuperLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MOST_BARE", 2000)
    fetched: list[str] = []
    make = uploads.make_pull_object_fn_protobuf

    def counted(*arguments: object) -> Callable[[str], bytes]:
        fetch = make(*arguments)  # type: ignore[arg-type]

        def one(identifier: str) -> bytes:
            fetched.append(identifier)
            return fetch(identifier)

        return one

    monkeypatch.setattr(uploads, "make_pull_object_fn_protobuf", counted)

    def answer(number: int, question: Message) -> None:
        own = reply(question)
        if number == 1:
            arrays = [np.random.default_rng(n).normal(size=500) for n in range(30)]
            own = Message(RecordDict({"a": ArrayRecord(arrays)}), reply_to=question)
        link.announce(own).send()

    replies, _ = asked(link, answer, Patience(60))
    first, second, third = link.nodes
    assert set(replies.messages) == {first, third} and replies.unreadable == {second}
    assert len(fetched) < 20  # of the thirty arrays none but the first


@pytest.mark.parametrize("most", [1.5, 3.5])
def test_chunks_count_as_often_as_an_array_names_them(
    most: float, link: SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MOST_BARE", most * CHUNK)

    def answer(number: int, question: Message) -> None:
        own = reply(question)
        if number == 1:  # three chunks, all the same: one is sent
            own = Message(RecordDict({"a": ArrayRecord([np.zeros(3 * CHUNK, np.uint8)])}), reply_to=question)
        link.announce(own).send()

    replies, _ = asked(link, answer, Patience(60))
    assert replies.unreadable == ({link.nodes[1]} if most < 3 else set())
    assert set(replies.messages) == set(link.nodes) - replies.unreadable


def test_nobody_answers_for_another(link: SuperLink) -> None:
    questions: list[Message] = []

    def answer(number: int, question: Message) -> None:
        questions.append(question)
        if number != 1:
            link.announce(reply(question)).send()
            return
        # Its header is in order, else the SuperLink would refuse it.
        link.announce_as(reply(question), reply(questions[0])).send()

    replies, _ = asked(link, answer, Patience(60))
    first, second, third = link.nodes
    assert set(replies.messages) == {first, third} and replies.unreadable == {second} and not replies.duplicates


def test_a_superlink_that_is_gone_is_no_devices_fault(link: SuperLink) -> None:
    link.grid._retry_invoker.max_tries = 1  # Flower's grid tries for ever

    def answer(number: int, question: Message) -> None:
        link.server.should_exit = True
        link.thread.join()

    with pytest.raises(httpx.ConnectError):
        asked(link, answer, Patience(60))


def test_a_turn_ends_however_much_there_is_and_the_next_goes_on(
    link: SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "TURN", 0.5)
    questions = [Message(RecordDict(), node, "train", ttl=600.0) for node in link.nodes]
    identifiers = list(link.grid.push_messages(questions))
    for question in questions:
        link.announce(reply(question)).send()
    pulled = Uploads(link.grid, 0)
    fetch, fetched = pulled._fetch, []

    def slowly(identifier: str) -> bytes:
        fetched.append(identifier)
        time.sleep(0.2)
        return fetch(identifier)

    pulled._fetch = slowly
    found: list[Message] = []
    for _ in range(60):
        began = time.monotonic()
        found += pulled.pull(identifiers)[0]
        assert time.monotonic() - began < 0.5 + SLACK
        if len(found) == 3:
            break
    assert {m.metadata.src_node_id for m in found} == set(link.nodes)
    assert len(fetched) == len(set(fetched)) > 9  # no part twice
