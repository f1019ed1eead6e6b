"""Who is put where, round after round: by whom and by what a cluster may be formed, and what becomes of the absent."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import ROOT, a_round, random_adapter

from fedgen_app.errors import RunError
from fedgen_app.federation.clustering import Numbers, cosines
from fedgen_app.federation.groups import Groups
from fedgen_app.federation.hierarchy import Hierarchy
from fedgen_app.federation.method import ClientId, GlobalState, Lora, Method, Update
from fedgen_app.federation.placement import Placement, Seen, products_of_b
from fedgen_app.federation.roster import Member, Requirement, Roster
from fedgen_app.federation.strategy import averaged_in
from fedgen_app.federation.summary import clusters_of
from fedgen_app.learning.adapters import Adapter
from fedgen_app.settings import Settings, Value, defaults

OURS, THEIRS = "0123456789abcdef", "fedcba9876543210"
LEFT, RIGHT = [1.0, 0.1, 0.0, 0.0], [0.0, 0.0, 1.0, 0.1]


def member(client: ClientId, numbers: list[float] | None = None, space: str = OURS, examples: int = 10) -> Member:
    """One who answered the roll call, with what it wants."""
    wanted = None if numbers is None else Requirement(np.array(numbers) / np.linalg.norm(numbers), space)
    return Member(client, 100 + int(client), examples, 4, {}, requirement=wanted)


class Where:
    """A placement with the events that it reports."""

    def __init__(
        self,
        by: str,
        members: list[Member],
        truth: dict[ClientId, str] | None = None,
        robust: str = "none",
        **changes: Value,
    ):
        self.events: list[dict[str, Any]] = []
        wanted = {"clusters." + key.replace("_", "-"): value for key, value in changes.items()}
        settings = Settings.from_run_config(
            defaults(ROOT)
            | {"clusters.by": by, "clusters.choose": "count", "clusters.count": 2, "aggregation.robust": robust}
            | wanted
        )
        self.roster = Roster("sha256:ours", 0, 1.0, self.report, 0)
        self.here(*members)
        self.drawn: list[tuple[list[ClientId], list[ClientId]]] = []  # whom the pictures show, and who came later
        self.placement = Placement(settings, Method(), self.roster, lambda: truth or {}, self.report, self.draw)

    def here(self, *members: Member) -> None:
        """Let these be there, and no others."""
        self.roster.members = {each.client: each for each in members}

    def report(self, kind: str, **fields: Any) -> None:
        self.events.append({"event": kind, **fields})

    def draw(
        self, where: Mapping[ClientId, int], clients: Sequence[ClientId], products: Numbers, later: Collection[ClientId]
    ) -> None:
        assert {*later} <= {*where} and products.shape == (len(clients), len(clients))
        self.drawn.append((list(clients), list(later)))

    def told(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind, without that name."""
        return [{k: v for k, v in event.items() if k != "event"} for event in self.events if event["event"] == kind]

    @property
    def unplaced(self) -> dict[ClientId, str]:
        return {event["client"]: event["reason"] for event in self.events if event["event"] == "unplaced"}


def nobody_yet() -> Groups:
    return Groups.single(GlobalState(random_adapter(1, 2)))


FOUR = [member(0, LEFT), member(1, LEFT), member(2, RIGHT), member(3, RIGHT)]


def resumed(groups: Groups) -> Groups:
    """What a checkpoint of them gives back."""
    return Groups.restored(groups.parts(), groups.facts())


def test_a_requirement_of_another_width_costs_its_sender_alone() -> None:
    there = Where("prompts", [*FOUR, member(4, [0.6, 0.8])])
    groups = there.placement.before(1, nobody_yet())
    assert groups.where == {0: 0, 1: 0, 2: 1, 3: 1}
    assert there.unplaced == {4: "its requirement has 2 numbers, those of the others 4"}
    there.here(*FOUR, member(5, [1.0] * 6), member(6, RIGHT))
    assert there.placement.before(2, groups).where == {0: 0, 1: 0, 2: 1, 3: 1, 6: 1}
    assert 5 in there.unplaced and 6 not in there.unplaced


@pytest.mark.parametrize("every", [0, 1])
def test_later_comers_of_another_space_do_not_take_the_clusters_over(every: int) -> None:
    groups = Where("prompts", FOUR).placement.before(1, nobody_yet())
    strangers = [member(client, RIGHT if client % 2 else LEFT, THEIRS) for client in range(10, 16)]
    there = Where("prompts", [*FOUR, *strangers], every=every)  # of a run that was resumed
    found = there.placement.before(2, resumed(groups))
    assert found.where == groups.where and found.space == OURS
    assert set(there.unplaced) == set(range(10, 16))
    there.here(*strangers)
    assert there.placement.before(3, found).where == groups.where


def test_who_has_a_place_is_not_told_to_have_none() -> None:
    groups = Where("prompts", FOUR).placement.before(1, nobody_yet())
    there = Where("prompts", [*FOUR[:3], member(3, RIGHT, THEIRS)], every=1)
    assert there.placement.before(2, groups).where == groups.where and there.unplaced == {}


def test_without_any_requirement_there_are_no_clusters() -> None:
    there = Where("prompts", [member(0), member(1)])
    there.roster.simulated = 2
    with pytest.raises(RunError, match="no client sent an encoded requirement"):
        there.placement.before(1, nobody_yet())


def test_devices_without_any_requirement_wait_for_others() -> None:
    there = Where("prompts", [member(8), member(9)], noise=0.1)
    groups = there.placement.before(1, nobody_yet())
    assert not groups.clustered and not there.placement.takes_part(groups, 8)
    assert set(there.unplaced) == {8, 9} and "prompts.txt" in there.unplaced[8] and not there.told("noise")
    there.here(member(8), *FOUR)
    assert there.placement.before(1, groups).where == {0: 0, 1: 0, 2: 1, 3: 1}


def test_who_came_to_a_place_is_not_left_among_those_without() -> None:
    there = Where("prompts", FOUR)
    groups = there.placement.before(1, nobody_yet())
    aside = [{"client": 1, "reason": "late"}, {"client": 9, "reason": "other"}]
    assert clusters_of(groups, [], there.placement.settings, aside, {})["clustering"]["unplaced"] == aside[1:]


def test_a_reply_that_placed_a_newcomer_alone_does_not_count_as_averaged() -> None:
    parts = [{"cluster": 0, "clients": [0, 1]}, {"cluster": 1, "clients": [2], "skipped": "too few"}]
    assert averaged_in({"clients": [0, 1, 2, 7], "clusters": parts}) == [0, 1]
    assert averaged_in({"clients": [0, 1]}) == [0, 1]


def seen(clients: list[ClientId], rows: list[list[float]]) -> Seen:
    vectors = np.array(rows)
    return Seen(tuple(clients), vectors @ vectors.T)


def test_a_cluster_that_is_away_keeps_state_weight_and_centroid() -> None:
    groups = Where("prompts", FOUR).placement.before(1, nobody_yet())
    there = Where("prompts", [*FOUR[:2], member(7, [0.9, 0.3, 0.0, 0.0], examples=30)], every=1, choose="threshold")
    found = there.placement.before(2, resumed(groups))  # 2 and 3 did not come back yet
    assert found.where == {0: 0, 1: 0, 2: 1, 3: 1, 7: 0} and sorted(found.states) == [0, 1]
    assert found.examples == {0: 50.0, 1: 20.0}
    assert found.centroids[1] == pytest.approx(groups.centroids[1]) and set(found.kinship) == set(groups.kinship)
    there.here(*FOUR)
    assert there.placement.before(3, found).where == found.where


def test_newcomers_are_drawn_among_those_who_formed_the_clusters() -> None:
    there = Where("prompts", [*FOUR, member(9)])
    groups = there.placement.before(1, nobody_yet())
    there.placement.before(2, groups)
    assert there.drawn == [([0, 1, 2, 3], [])]
    late = Where("prompts", [*FOUR[1:], member(4, LEFT)], every=3)  # of a run that was resumed
    groups = late.placement.before(2, resumed(groups))
    late.here(*FOUR, member(4, LEFT), member(5, RIGHT))
    groups = late.placement.before(3, resumed(groups))
    late.placement.before(4, groups)
    assert late.drawn == [([1, 2, 3, 4], [4]), ([0, 1, 2, 3, 4, 5], [4, 5]), ([0, 1, 2, 3, 4, 5], [])]


def test_few_who_come_back_do_not_part_and_newcomers_find_a_place() -> None:
    ten = [member(client, LEFT if client < 2 else RIGHT) for client in range(10)]
    groups = Where("prompts", ten).placement.before(1, nobody_yet())
    away = [member(client) for client in range(4, 10)]  # six of ten are there, and no longer say what they want
    changed = [member(0, LEFT), member(1, [1.0, 0.2, 0.0, 0.0]), *ten[2:4]]
    there = Where("prompts", [*changed, *away, member(10, RIGHT)], every=1, choose="threshold", threshold=1e-9)
    found = there.placement.before(2, resumed(groups))
    assert found.where == groups.where | {10: groups.where[9]}
    assert there.told("undivided") == [{"round": 2, "requirements": 4, "needed": 5}]
    there.here(*changed, *ten[4:6])
    found = there.placement.before(3, found)
    assert found.where[0] != found.where[1] and len(there.told("undivided")) == 1


def test_replies_that_are_late_drop_no_cluster() -> None:
    there = Where("updates", FOUR)
    groups = there.placement.divide(1, nobody_yet(), seen([0, 1, 2, 3], [LEFT, LEFT, RIGHT, RIGHT]))
    later = there.placement.divide(2, groups, seen([0, 1], [LEFT, RIGHT]))
    assert later.where == groups.where  # of the two clusters one is away, so that there is room for one
    assert later.states[1] is groups.states[1] and later.kinship[1, 0] == groups.kinship[1, 0]


def test_those_who_are_there_part_as_far_as_the_number_of_clusters_allows() -> None:
    six = [*FOUR, member(4, RIGHT), member(5, RIGHT)]
    there = Where("updates", six, count=3)
    groups = there.placement.divide(1, nobody_yet(), seen(list(range(6)), [LEFT, LEFT, RIGHT, RIGHT, RIGHT, RIGHT]))
    groups = replace(groups, where={0: 0, 1: 0, 2: 1, 3: 1, 4: 1, 5: 1}, states={0: groups.shared, 1: groups.shared})
    later = there.placement.divide(2, groups, seen([0, 1], [LEFT, RIGHT]))
    assert later.where[0] != later.where[1] and len(later.states) == 3
    again = there.placement.divide(3, later, seen([2, 3], [LEFT, RIGHT]))
    assert len(again.states) == 3 and {4, 5} <= set(again.where)


@pytest.mark.parametrize("choose", ["count", "silhouette"])
def test_a_cluster_of_which_few_were_seen_stays(choose: str) -> None:
    there = Where("updates", [member(client) for client in range(8)], choose=choose)
    groups = nobody_yet()
    groups = replace(groups, states={0: groups.shared, 1: groups.shared}, clustered=True, free=2)
    groups = replace(groups, where={0: 0, 1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1, 7: 1})
    later = there.placement.divide(2, groups, seen([0, 1, 2, 4], [LEFT, LEFT, LEFT, LEFT]))
    assert later.where == groups.where | {4: 0} and later.states[1] is groups.states[1]


def test_a_cluster_that_its_members_were_seen_to_leave_is_dropped() -> None:
    there = Where("updates", FOUR, count=1)
    groups = nobody_yet()
    groups = replace(groups, states={0: groups.shared, 1: groups.shared}, clustered=True, free=2)
    groups = replace(groups, where={0: 0, 1: 0, 2: 1, 3: 1})
    later = there.placement.divide(2, groups, seen([0, 1, 2], [LEFT, LEFT, LEFT]))
    assert later.where == {0: 0, 1: 0, 2: 0} and sorted(later.states) == [0]  # 3 is a newcomer when it is back


def test_whoever_happens_to_answer_does_not_divide_the_clients() -> None:
    there = Where("updates", [member(client) for client in range(10)])
    placement = there.placement
    assert [placement.divides(1, nobody_yet(), replies) for replies in (2, 4, 5, 10)] == [False, False, True, True]
    assert there.told("undivided") == [{"round": 1, "replies": replies, "needed": 5} for replies in (2, 4)]
    there.here(*FOUR)
    assert placement.enough() == 3
    there.here(*FOUR[:2])
    assert placement.enough() == 2


def test_clusters_that_are_too_small_for_the_robust_rule_are_named() -> None:
    many = [member(client, LEFT) for client in range(5)] + [member(5, RIGHT), member(6, RIGHT)]
    there = Where("prompts", many, robust="krum")
    assert there.placement.before(1, nobody_yet()).clustered
    (told,) = there.told("too-few")
    assert told["cluster"] == 1 and "needs 2f + 3 = 5" in told["reason"] and "there are 2" in told["reason"]


def test_where_every_cluster_is_too_small_for_the_robust_rule_nothing_starts() -> None:
    there = Where("prompts", FOUR, robust="krum")
    with pytest.raises(RunError, match="no cluster has enough members: aggregation.robust = 'krum'"):
        there.placement.before(1, nobody_yet())
    assert [event["cluster"] for event in there.told("too-few")] == [0, 1]


def test_who_chose_and_went_away_still_weighs() -> None:
    there = Where("loss", FOUR)
    groups = there.placement.follow(2, there.placement.before(1, nobody_yet()), {0: 0, 1: 0, 2: 1, 3: 1})
    there.here(*FOUR[:2])
    later = there.placement.follow(3, resumed(groups), {0: 1})
    assert later.examples == {0: 10.0, 1: 30.0}


def test_the_truth_keeps_the_absent_and_takes_newcomers_to_them() -> None:
    truth: dict[ClientId, str] = {0: "sea", 1: "sea", 2: "law", 3: "law", 4: "law"}
    groups = Where("oracle", FOUR, truth).placement.before(1, nobody_yet())
    there = Where("oracle", [*FOUR[:2], member(4)], truth)
    assert there.placement.before(2, groups).where == groups.where | {4: groups.where[2]}


def trained(start: Adapter, towards: Adapter, client: int) -> Update:
    """A reply: the start and a step."""
    return Update(client, {key: start[key] + 0.01 * towards[key] for key in start}, 2, 10.0)


def test_by_adapters_factors_are_compared_only_until_there_are_clusters() -> None:
    there, lora = Where("adapters", FOUR).placement, Lora(2, 4.0)
    begun, one, other = (random_adapter(seed, 2) for seed in range(3))
    updates = [trained(begun, towards, client) for client, towards in enumerate((one, one, other, other))]
    first = there.measure(nobody_yet(), updates, [begun] * 4, lora)
    assert first.products == pytest.approx(products_of_b(updates))
    # A reply of a smaller rank cannot be compared, and half of them would be too few to divide by.
    small = [replace(update, adapter=random_adapter(5, 1), rank=1) for update in updates]
    some = there.measure(nobody_yet(), [*updates[:3], small[3]], [begun] * 4, lora)
    assert some and some.clients == (0, 1, 2)
    assert there.measure(nobody_yet(), [*updates[:2], *small[2:]], [begun] * 4, lora) is None
    # Two clusters later with bases of their own; client 1 has come to want what those of the other cluster do.
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(9)))[0]
    starts = [begun, begun, turned(begun, turn), turned(begun, turn)]
    wishes = [one, other, turned(other, turn), turned(other, turn)]
    updates = [trained(start, wish, client) for client, (start, wish) in enumerate(zip(starts, wishes, strict=True))]
    groups = replace(nobody_yet(), where={0: 0, 1: 0, 2: 1, 3: 1}, clustered=True)
    cosine = cosines(there.measure(groups, updates, starts, lora).products)
    assert cosine[1, 2] == pytest.approx(1, abs=1e-4) and cosine[1, 0] < 0.5
    assert cosines(products_of_b(updates))[1, 0] > 0.99  # what B would say


def turned(adapter: Adapter, turn: torch.Tensor) -> Adapter:
    """The same products B A in another basis."""
    return {
        key: torch.einsum("or...,rs->os...", x, turn) if ".lora_B." in key else torch.einsum("rs,r...->s...", turn, x)
        for key, x in adapter.items()
    }


def test_by_loss_a_client_chooses_in_rounds_and_not_again_in_the_end() -> None:
    there = Where("loss", FOUR, warmup=1)
    settings = there.placement.settings
    hierarchy = Hierarchy(settings, Method(), Lora(2, 4.0), nobody_yet(), there.placement)
    hierarchy.prepare(1)
    last = settings.num_server_rounds
    assert [sorted(hierarchy.offers(number, 0)) for number in (1, 2, last, last + 1)] == [[], [0, 1], [0, 1], []]
    assert sorted(hierarchy.offers(last + 1, "stranger")) == [0, 1]


def replies(start: Adapter, *towards: Adapter | None) -> list[Update]:
    """One reply each, of clients in turn; None: the start itself."""
    return [
        Update(client, start, 2, 10.0, metrics={"train_loss": 1.0}) if step is None else trained(start, step, client)
        for client, step in enumerate(towards)
    ]


def trained_metrics(updates: list[Update]) -> list[Update]:
    return [replace(update, metrics={"train_loss": 1.0}) for update in updates]


def hierarchy_of(there: Where, groups: Groups) -> Hierarchy:
    return Hierarchy(there.placement.settings, Method(), Lora(2, 4.0), groups, there.placement)


def test_a_newcomer_that_changed_nothing_stays_without_a_place() -> None:
    there, lora = Where("updates", [*FOUR, member(4)]), Lora(2, 4.0)
    groups = replace(nobody_yet(), where={0: 0, 1: 0, 2: 1, 3: 1}, clustered=True, examples={0: 20.0, 1: 20.0})
    groups = replace(groups, states={0: groups.shared, 1: groups.shared}, free=2)
    begun = groups.shared.adapter
    alone = Update(4, begun, 2, 10.0, metrics={"train_loss": 1.0})
    hierarchy = hierarchy_of(there, groups)
    taken = hierarchy.take([alone], {}, a_round(lora, 2))
    assert taken.stays == dict.fromkeys((0, 1), "no usable reply") and 4 not in hierarchy.groups.where
    assert [entry["skipped"] for entry in taken.clusters] == ["no usable reply"] * 2
    again = replace(alone, adapter=hierarchy.groups.shared.adapter)
    beside = trained_metrics(replies(hierarchy.groups.states[0].adapter, random_adapter(1, 2), random_adapter(2, 2)))
    hierarchy.take([*beside, again], {}, a_round(lora, 3))
    assert 4 not in hierarchy.groups.where


def test_few_replies_that_say_nothing_do_not_end_a_run_and_enough_of_them_do() -> None:
    there, begun, lora = Where("updates", FOUR), nobody_yet().shared.adapter, Lora(2, 4.0)
    hierarchy = hierarchy_of(there, nobody_yet())
    hierarchy.take(replies(begun, None, None), {}, a_round(lora))
    assert not hierarchy.groups.clustered
    with pytest.raises(RunError, match="does not tell them apart"):
        hierarchy.take(replies(begun, None, None, None), {}, a_round(lora))


def test_a_round_with_few_replies_divides_nobody_and_the_next_one_is_asked_again() -> None:
    there, begun, lora = Where("updates", FOUR), nobody_yet().shared.adapter, Lora(2, 4.0)
    one, other = random_adapter(1, 2), random_adapter(2, 2)
    hierarchy = hierarchy_of(there, nobody_yet())
    hierarchy.take(trained_metrics(replies(begun, one, other)), {}, a_round(lora))
    assert not hierarchy.groups.clustered and there.placement.asks_everyone(2, hierarchy.groups)
    begun = hierarchy.groups.shared.adapter
    hierarchy.take(trained_metrics(replies(begun, one, one, other)), {}, a_round(lora, 2))
    assert hierarchy.groups.where == {0: 0, 1: 0, 2: 1}


def test_devices_that_come_first_are_warned_of() -> None:
    there = Where("prompts", FOUR)
    (told,) = hierarchy_of(there, nobody_yet()).cautions()
    assert told.startswith("expected-clients = 0: whoever answers first forms the clusters")
    there.roster.expected = 4
    assert hierarchy_of(there, nobody_yet()).cautions() == []
    there.roster.expected, there.roster.simulated = 0, 4
    assert hierarchy_of(there, nobody_yet()).cautions() == []


@pytest.mark.parametrize("method", ["fedavgm", "fedadam", "fedyogi", "scaffold", "ditto"])
def test_methods_that_mixing_disturbs_are_warned_of(method: str) -> None:
    there = Where("updates", FOUR, interact_every=3)
    hierarchy = hierarchy_of(there, nobody_yet())
    hierarchy.settings = there.placement.settings.model_copy(update={"method": method})
    (told,) = hierarchy.cautions()
    assert told.startswith("clusters.interact-every = 3: ") and method in told
    for changes in ({"interact_every": 0}, {"strength": 0.0}):
        there = Where("updates", FOUR, **changes)
        hierarchy.settings = there.placement.settings.model_copy(update={"method": method})
        assert hierarchy.cautions() == []
