"""Sending and collecting, on a grid whose replies come when the script says so."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest
from flwr.app import Error, Message, RecordDict
from grids import UncalledParts

from fedgen_app.errors import RunError
from fedgen_app.federation.exchange import Patience, Replies, collect

NEVER = 1e9
SLACK = 1.0  # how much later than its time something may happen on a busy machine


class ScriptedGrid(UncalledParts):
    """Answers each node's message so many seconds after it was pushed."""

    def __init__(self, delays: dict[int, float], failing: Iterable[int] = (), repeated: Iterable[int] = ()) -> None:
        self.delays = delays
        self.failing = set(failing)
        self.repeated = set(repeated)
        self.strangers: list[Message] = []
        self.pulled: list[list[str]] = []
        self._due: list[tuple[float, Message]] = []

    def get_node_ids(self) -> Iterable[int]:
        return list(self.delays)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identifiers = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in self.delays:
                identifiers.append("")
                continue
            message.metadata.__dict__["_message_id"] = identifier = f"question-{node}"
            answer = Error(199) if node in self.failing else RecordDict()
            times = 2 if node in self.repeated else 1
            due = time.monotonic() + self.delays[node]
            self._due += [(due, Message(answer, reply_to=message)) for _ in range(times)]
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted, now = list(message_ids), time.monotonic()
        self.pulled.append(wanted)
        ready = [m for due, m in self._due if due <= now and m.metadata.reply_to_message_id in wanted]
        self._due = [(due, m) for due, m in self._due if m not in ready]
        strangers, self.strangers = self.strangers, []
        return strangers + ready


def questions(*nodes: int) -> list[Message]:
    return [Message(RecordDict(), node, "train") for node in nodes]


def timed(grid: ScriptedGrid, nodes: Iterable[int], patience: Patience) -> tuple[Replies, float]:
    began = time.monotonic()
    replies = collect(grid, questions(*nodes), patience)
    return replies, time.monotonic() - began


def test_all_answer_and_nobody_waits_longer() -> None:
    grid = ScriptedGrid({1: 0.0, 2: 0.1, 3: 0.05})
    progress: list[tuple[int, int]] = []
    began = time.monotonic()
    replies = collect(grid, questions(1, 2, 3), Patience(60), lambda done, of: progress.append((done, of)))
    assert time.monotonic() - began < 0.1 + SLACK
    assert set(replies.messages) == {1, 2, 3}
    assert all(m.metadata.src_node_id == node for node, m in replies.messages.items())
    assert not replies.missing and not replies.duplicates
    assert progress[-1] == (3, 3) and progress == sorted(progress)


def test_nothing_to_send_is_nothing_to_wait_for() -> None:
    replies, seconds = timed(ScriptedGrid({}), [], Patience(60))
    assert (replies.messages, replies.missing) == ({}, set()) and seconds < SLACK


def test_the_deadline_ends_the_waiting_for_a_straggler() -> None:
    replies, seconds = timed(ScriptedGrid({1: 0.0, 2: NEVER}), [1, 2], Patience(0.4))
    assert set(replies.messages) == {1} and replies.missing == {2}
    assert 0.35 < seconds < 0.4 + SLACK


def test_without_a_quorum_below_one_the_grace_changes_nothing() -> None:
    replies, seconds = timed(ScriptedGrid({1: 0.0, 2: 0.4}), [1, 2], Patience(60, 1.0, 0.0))
    assert set(replies.messages) == {1, 2} and seconds >= 0.4


def test_after_the_quorum_the_others_have_the_grace() -> None:
    grid = ScriptedGrid({1: 0.0, 2: 0.0, 3: 0.2, 4: NEVER})
    replies, seconds = timed(grid, [1, 2, 3, 4], Patience(60, 0.5, 0.6))
    assert set(replies.messages) == {1, 2, 3} and replies.missing == {4}
    assert 0.5 < seconds < 0.6 + SLACK


def test_without_a_grace_the_quorum_is_the_end() -> None:
    replies, seconds = timed(ScriptedGrid({1: 0.0, 2: 0.1, 3: NEVER}), [1, 2, 3], Patience(60, 0.6, 0.0))
    assert set(replies.messages) == {1, 2} and seconds < 0.1 + SLACK


def test_the_grace_never_passes_the_deadline() -> None:
    _, seconds = timed(ScriptedGrid({1: 0.0, 2: NEVER}), [1, 2], Patience(0.4, 0.5, 60))
    assert seconds < 0.4 + SLACK


def test_an_error_is_an_answer_but_does_not_count_for_the_quorum() -> None:
    grid = ScriptedGrid({1: 0.0, 2: 0.0, 3: 0.3}, failing=[1, 2])
    replies, seconds = timed(grid, [1, 2, 3], Patience(60, 0.3, 0.0))
    assert set(replies.messages) == {1, 2, 3} and seconds >= 0.3
    assert [node for node, m in replies.messages.items() if m.has_error()] == [1, 2]


def test_a_quorum_is_not_raised_by_rounding() -> None:
    # 0.55 * 100 is 55.00000000000001 in floating point.
    grid = ScriptedGrid({node: 0.0 if node <= 55 else NEVER for node in range(1, 101)})
    replies, seconds = timed(grid, range(1, 101), Patience(1.5, 0.55, 0.0))
    assert len(replies.messages) == 55 and seconds < 1.2


def test_a_second_reply_is_noted_and_ignored() -> None:
    grid = ScriptedGrid({1: 0.0, 2: 0.1}, repeated=[1])
    replies, _ = timed(grid, [1, 2], Patience(60))
    assert set(replies.messages) == {1, 2} and replies.duplicates == {1}


def test_the_first_of_two_replies_is_the_one_that_counts() -> None:
    grid = ScriptedGrid({1: 0.0, 2: 0.2})
    asked = questions(1, 2)
    stranger = Message(RecordDict(), reply_to=asked[0])
    stranger.metadata.__dict__["_reply_to_message_id"] = "question-1"
    grid.strangers = [stranger]
    replies = collect(grid, asked, Patience(60))
    assert replies.messages[1] is stranger and replies.duplicates == {1}


def test_an_answer_to_no_question_is_ignored() -> None:
    grid = ScriptedGrid({1: 0.1})
    old = questions(1)[0]
    old.metadata.__dict__["_message_id"] = "question-of-an-earlier-round"
    grid.strangers = [Message(Error(7), reply_to=old)]
    replies, _ = timed(grid, [1], Patience(60))
    assert not replies.messages[1].has_error() and not replies.duplicates and not replies.missing


def test_a_node_that_the_superlink_forgot_is_missing_and_not_waited_for() -> None:
    grid = ScriptedGrid({1: 0.0})
    replies, seconds = timed(grid, [1, 2], Patience(60))
    assert set(replies.messages) == {1} and replies.missing == {2} and seconds < SLACK
    assert all("" not in asked for asked in grid.pulled)


def test_only_those_who_have_not_answered_are_asked_for_again() -> None:
    grid = ScriptedGrid({1: 0.0, 2: 0.2})
    timed(grid, [1, 2], Patience(60))
    assert grid.pulled[0] == ["question-1", "question-2"] and grid.pulled[-1] == ["question-2"]
    assert len(grid.pulled) < 30  # it sleeps between the pulls


def test_messages_that_the_superlink_refuses_end_the_run() -> None:
    class Full(ScriptedGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            return []

    with pytest.raises(RunError, match="did not take 2 messages"):
        collect(Full({1: 0.0, 2: 0.0}), questions(1, 2), Patience(1))


class ClockedGrid(ScriptedGrid):
    """Has a clock of its own, so many times as fast as everyone's."""

    speed = 1.0

    def clock(self) -> float:
        return time.monotonic() * self.speed


def test_a_grids_own_clock_says_when_the_deadline_is_there() -> None:
    slow, fast = ClockedGrid({1: 0.0, 2: 0.4}), ClockedGrid({1: 0.0, 2: NEVER})
    slow.speed, fast.speed = 1e-3, 1e3
    assert set(timed(slow, [1, 2], Patience(0.1))[0].messages) == {1, 2}
    replies, seconds = timed(fast, [1, 2], Patience(200))
    assert replies.missing == {2} and seconds < 0.2 + SLACK
