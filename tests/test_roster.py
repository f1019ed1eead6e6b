"""The roll call: who takes part, who does not, and why."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from grids import UncalledParts

from fedgen_app.errors import PolicyError, RunError
from fedgen_app.federation.roster import ROLL_CALL, Member, Roster, in_order, parse_client

OURS, THEIRS = "sha256:ours", "sha256:theirs"
Answer = RecordDict | Error | None


class Fleet(UncalledParts):
    """Nodes and what each of them answers; None: nothing."""

    def __init__(self, answers: dict[int, Answer]) -> None:
        self.answers = answers
        self.asked: list[int] = []
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.answers)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identifiers = []
        for message in messages:
            node = message.metadata.dst_node_id
            assert message.metadata.message_type == ROLL_CALL
            self.asked.append(node)
            identifier = f"{node}-{len(self.asked)}"
            message.metadata.__dict__["_message_id"] = identifier
            identifiers.append(identifier)
            if (answer := self.answers[node]) is not None:
                self._replies[identifier] = Message(answer, reply_to=message)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]


def here(client: object, /, **changes: Any) -> RecordDict:
    facts = {
        "client": str(client),
        "num-examples": 10,
        "rank": 8,
        "fingerprint": OURS,
        "simulated-clients": 0,
        "skipped": 0,
        "torch": "2",
    }
    kept = {key: value for key, value in (facts | changes).items() if value is not None}
    return RecordDict({"reply": ConfigRecord(kept)})


def roster(expected: int = 0, deadline: float = 5.0) -> tuple[Roster, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    return Roster(OURS, expected, deadline, lambda kind, **fields: events.append({"event": kind, **fields})), events


def changed(client: object, /, **changes: Any) -> RecordDict:
    return here(client, **{key.replace("_", "-"): value for key, value in changes.items()})


def test_numbers_come_before_names_and_by_value() -> None:
    ordered = [0, 2, 10, "10a", "a", "b"]
    for _ in range(20):
        mixed = random.sample(ordered, len(ordered))
        assert in_order(mixed) == ordered


@pytest.mark.parametrize(
    ("text", "client"), [("0", 0), ("17", 17), ("007", "007"), ("jetson-1.lab", "jetson-1.lab"), ("a" * 64, "a" * 64)]
)
def test_a_client_id_is_a_number_or_a_plain_name(text: str, client: int | str) -> None:
    assert parse_client(text) == client and type(parse_client(text)) is type(client)


@pytest.mark.parametrize(
    "text", ["", "..", ".", "../x", "a/b", "a\\b", "/etc", "-a", ".hidden", "a b", "a\n", "a\0", "é", "²", "a" * 65]
)
def test_what_could_leave_its_folder_is_no_client_id(text: str) -> None:
    with pytest.raises(ValueError, match="client id"):
        parse_client(text)


def test_the_roll_call_takes_everyone_who_fits() -> None:
    called, events = roster()
    called.call(Fleet({71: here(1), 72: here("jetson", rank=4), 73: here(0, **{"num-examples": 99})}))
    assert in_order(called.members) == [0, 1, "jetson"]
    assert (called.members[0].node, called.members[0].num_examples) == (73, 99)
    assert (called.members["jetson"].rank, called.members["jetson"].facts) == (4, {"torch": "2"})
    assert not events and not called.left_out


def test_two_nodes_with_one_id_are_both_left_out() -> None:
    called, events = roster()
    called.call(Fleet({71: here(1), 72: here(1), 73: here(2)}))
    assert list(called.members) == [2]
    assert called.left_out == {71: "duplicate", 72: "duplicate"}
    assert [(e["node"], e["client"]) for e in events] == [(71, 1), (72, 1)]


def test_a_newcomer_with_a_members_id_costs_both_their_place() -> None:
    called, _ = roster()
    fleet = Fleet({71: here(1), 73: here(2)})
    called.call(fleet)
    fleet.answers[72] = here(1)
    called.ask_newcomers(fleet, 1)
    assert list(called.members) == [2] and set(called.left_out) == {71, 72}


def test_a_node_that_was_killed_and_is_still_listed_is_no_duplicate() -> None:
    called, events = roster()
    fleet = Fleet({71: here(1), 73: here(2)})
    called.call(fleet)
    for answer in (None, Error(5)):  # it stays silent, or the SuperLink says that it is gone
        old = called.members[1].node
        fleet.answers[old], fleet.answers[old + 10] = answer, here(1)
        called.ask_newcomers(fleet, 0.05)
        assert called.members[1].node == old + 10 and not called.left_out
    assert {event["event"] for event in events} == {"silent"}


def test_a_node_that_errs_is_asked_again_ever_more_rarely_and_comes_back() -> None:
    called, events = roster()
    fleet = Fleet({71: Error(8), 72: here(2)})
    called.call(fleet)
    for _ in range(8):
        called.ask_newcomers(fleet, 0.05)
    assert fleet.asked.count(71) == 4 and fleet.asked.count(72) == 1 and called.left_out == {71: "error"}
    assert [e["event"] for e in events] == ["left-out"]
    fleet.answers[71] = here(1)
    for _ in range(16):
        called.ask_newcomers(fleet, 0.05)
    assert in_order(called.members) == [1, 2] and not called.left_out
    assert events[1:] == [{"event": "back", "node": 71, "client": 1}]


def test_another_backbone_is_left_out_and_both_fingerprints_are_shown() -> None:
    called, events = roster()
    called.call(Fleet({71: changed(1, fingerprint=THEIRS), 72: here(2)}))
    assert list(called.members) == [2] and called.left_out == {71: "fingerprint"}
    (event,) = events
    assert event["client"] == 1 and OURS in event["detail"] and THEIRS in event["detail"]


@pytest.mark.parametrize(
    ("reason", "answer"),
    [
        ("error", Error(199, "secret")),
        ("policy", Error(PolicyError.code)),
        ("malformed", RecordDict()),
        ("malformed", RecordDict({"reply": MetricRecord({})})),
        ("malformed", changed("../../etc")),
        ("malformed", changed(1, client=None)),
        ("malformed", changed(1, rank=None)),
        ("malformed", changed(1, fingerprint=None)),
        ("malformed", changed(1, skipped=None)),
        ("malformed", changed(1, skipped=-1)),
        ("malformed", changed(1, skipped=2**60)),
        ("malformed", changed(1, skipped="a few")),
        ("weight", changed(1, num_examples=0)),
        ("weight", changed(1, num_examples=-1)),
        ("weight", changed(1, num_examples=1.5)),
        ("weight", changed(1, num_examples="many")),
        ("weight", changed(1, rank=0)),
        ("weight", changed(1, rank=[8])),
        ("fingerprint", changed(1, fingerprint=5)),
    ],
)
def test_an_answer_that_is_none_leaves_its_node_out_with_the_reason(reason: str, answer: Answer) -> None:
    called, events = roster()
    called.call(Fleet({71: answer, 72: here(2)}))
    assert list(called.members) == [2] and called.left_out == {71: reason}
    assert [e["reason"] for e in events] == [reason] and "secret" not in str(events)


def test_newcomers_join_and_nobody_is_asked_twice() -> None:
    called, _ = roster()
    fleet = Fleet({71: here(1), 72: changed(2, fingerprint=THEIRS)})
    called.call(fleet)
    fleet.answers[73] = here(3)
    called.ask_newcomers(fleet, 1)
    called.ask_newcomers(fleet, 1)
    assert in_order(called.members) == [1, 3] and sorted(fleet.asked) == [71, 72, 73]


def test_a_restarted_node_takes_its_clients_id_back() -> None:
    called, events = roster()
    fleet = Fleet({71: here(1), 72: here(2)})
    called.call(fleet)
    del fleet.answers[71]
    assert called.present(fleet) == [2]
    fleet.answers[99] = here(1)
    called.ask_newcomers(fleet, 1)
    assert called.members[1].node == 99 and called.present(fleet) == [1, 2] and not events


def test_the_call_waits_for_the_expected_clients_until_its_deadline() -> None:
    called, events = roster(expected=3, deadline=1.2)
    began = time.monotonic()
    called.call(Fleet({71: here(1), 72: here(2)}))
    assert 1.0 < time.monotonic() - began < 5
    assert events == [{"event": "roll-call-timeout", "clients": 2, "expected": 3}]


def test_a_simulation_says_how_many_clients_to_wait_for() -> None:
    class Slow(Fleet):
        def get_node_ids(self) -> Iterable[int]:
            if len(self.asked) >= 1:
                self.answers[72] = changed(1, simulated_clients=2)
            return super().get_node_ids()

    called, events = roster()
    called.call(Slow({71: changed(0, simulated_clients=2)}))
    assert list(called.members) == [0, 1] and not events and called.simulated == 2


def test_nobody_there_is_a_run_error_in_bounded_time() -> None:
    called, _ = roster(deadline=0.5)
    began = time.monotonic()
    with pytest.raises(RunError, match="nobody answered"):
        called.call(Fleet({}))
    assert time.monotonic() - began < 5
    called, _ = roster(expected=1)
    with pytest.raises(RunError, match="fingerprint"):
        called.call(Fleet({71: changed(1, fingerprint=THEIRS)}))


def test_the_draw_hangs_on_seed_round_and_ids_and_not_on_nodes() -> None:
    def drawn(nodes: list[int], seed: int, number: int) -> list[int | str]:
        called, _ = roster()
        fleet = Fleet({node: here(client) for client, node in enumerate(nodes)})
        called.call(fleet)
        return called.choose(called.present(fleet), 0.5, seed, number)

    nodes = list(range(100, 120))
    first = drawn(nodes, 1, 1)
    assert len(set(first)) == 10 and first == sorted(first, key=int)
    assert drawn(nodes[::-1], 1, 1) == first
    assert drawn(random.sample(range(10**6), 20), 1, 1) == first
    assert drawn(nodes, 2, 1) != first and drawn(nodes, 1, 2) != first


def test_every_client_is_drawn_some_time() -> None:
    called, _ = roster()
    present: list[int | str] = list(range(10))
    drawn = [c for number in range(200) for c in called.choose(present, 0.3, 0, number)]
    assert all(30 < drawn.count(c) < 90 for c in present)


@pytest.mark.parametrize(
    ("fraction", "count", "size"),
    [(1.0, 7, 7), (0.1, 100, 10), (0.1, 3, 1), (0.5, 5, 3), (0.25, 5, 1), (0.5, 3, 2), (1e-9, 9, 1), (0.35, 10, 4)],
)
def test_a_fraction_is_rounded_to_the_nearest_and_is_never_nobody(fraction: float, count: int, size: int) -> None:
    called, _ = roster()
    assert len(called.choose(list(range(count)), fraction, 0, 1)) == size


def test_a_silent_node_is_asked_ever_more_rarely() -> None:
    called, events = roster(deadline=0.05)
    fleet = Fleet({71: here(1), 72: None})
    asked = []
    for number in range(1, 17):
        before = fleet.asked.count(72)
        called.ask_newcomers(fleet, 0.05)
        if fleet.asked.count(72) > before:
            asked.append(number)
    assert asked == [1, 2, 4, 8, 16]
    assert events == [{"event": "silent", "node": 72}] * 5 and called.silent == {72: 5}
    assert list(called.members) == [1] and not called.left_out


def test_a_silent_node_that_answers_at_last_takes_part_and_keeps_no_newcomer_waiting() -> None:
    called, _ = roster()
    fleet = Fleet({72: None})
    called.ask_newcomers(fleet, 0.05)
    called.ask_newcomers(fleet, 0.05)
    fleet.answers |= {71: here(1), 72: here(2)}
    called.ask_newcomers(fleet, 0.05)
    assert list(called.members) == [1]
    called.ask_newcomers(fleet, 0.05)
    assert in_order(called.members) == [1, 2]


def test_clients_are_drawn_in_proportion_to_their_examples() -> None:
    called, _ = roster()
    for client, examples in enumerate((10, 10, 80)):
        called.members[client] = Member(client, client, examples, 4, {})
    draws = [called.choose([0, 1, 2], 0.3, 0, number, "examples") for number in range(600)]
    assert all(len(draw) == 1 for draw in draws)
    counts = [sum(draw == [client] for draw in draws) for client in range(3)]
    assert 40 < counts[0] < 85 and 40 < counts[1] < 85 and 440 < counts[2] < 520  # six standard deviations
    assert draws == [called.choose([2, 0, 1], 0.3, 0, number, "examples") for number in range(600)]
    assert called.choose([0, 1, 2], 1.0, 0, 1, "examples") == [0, 1, 2]


def test_a_node_of_another_rank_is_left_out_where_all_need_one() -> None:
    for rank, members in ((0, [1, 2, 3]), (4, [1, 3])):
        called, events = roster(expected=3)
        called.rank = rank
        called.call(Fleet({71: changed(1, rank=4), 72: changed(2, rank=2), 73: changed(3, rank=4)}))
        assert in_order(called.members) == members
        told = [event for event in events if event["event"] == "left-out"]
        assert [(event["client"], event["reason"]) for event in told] == ([(2, "rank")] if rank else [])
        assert all("rank 2" in event["detail"] for event in told)
