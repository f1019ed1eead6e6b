"""Who is put where, round after round: by whom and by what a cluster may be formed, and what becomes of the absent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import ROOT, random_adapter

from fedgen_app.errors import RunError
from fedgen_app.federation.clustering import cosines
from fedgen_app.federation.groups import Groups
from fedgen_app.federation.hierarchy import Hierarchy
from fedgen_app.federation.method import ClientId, GlobalState, Lora, Method, Update
from fedgen_app.federation.placement import Placement, Seen, products_of_b
from fedgen_app.federation.roster import Member, Requirement, Roster
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

    def __init__(self, by: str, members: list[Member], truth: dict[ClientId, str] | None = None, **changes: Value):
        self.events: list[dict[str, Any]] = []
        wanted = {"clusters." + key.replace("_", "-"): value for key, value in changes.items()}
        settings = Settings.from_run_config(
            defaults(ROOT) | {"clusters.by": by, "clusters.choose": "count", "clusters.count": 2, **wanted}
        )
        self.roster = Roster("sha256:ours", 0, 1.0, self.report, 0)
        self.here(*members)
        self.placement = Placement(settings, Method(), self.roster, lambda: truth or {}, self.report, lambda *_: None)

    def here(self, *members: Member) -> None:
        """Let these be there, and no others."""
        self.roster.members = {each.client: each for each in members}

    def report(self, kind: str, **fields: Any) -> None:
        self.events.append({"event": kind, **fields})

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
    with pytest.raises(RunError, match="no client sent an encoded requirement"):
        Where("prompts", [member(0), member(1)]).placement.before(1, nobody_yet())


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


def test_replies_that_are_late_drop_no_cluster() -> None:
    there = Where("updates", FOUR)
    groups = there.placement.divide(1, nobody_yet(), seen([0, 1, 2, 3], [LEFT, LEFT, RIGHT, RIGHT]))
    later = there.placement.divide(2, groups, seen([0, 1], [LEFT, RIGHT]))
    assert {1, later.where[2], later.where[3]} == {1} and later.states[1] is groups.states[1]
    assert later.where[0] != later.where[1]
    assert later.kinship[1, 0] == groups.kinship[1, 0]


def test_a_cluster_that_its_members_were_seen_to_leave_is_dropped() -> None:
    there = Where("updates", FOUR, count=1)
    groups = nobody_yet()
    groups = replace(groups, states={0: groups.shared, 1: groups.shared}, clustered=True, free=2)
    groups = replace(groups, where={0: 0, 1: 0, 2: 1, 3: 1})
    later = there.placement.divide(2, groups, seen([0, 1, 2], [LEFT, LEFT, LEFT]))
    assert later.where == {0: 0, 1: 0, 2: 0} and sorted(later.states) == [0]  # 3 is a newcomer when it is back


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
