"""Who is put where, round after round: by whom and by what a cluster may be formed, and what becomes of the absent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from synthetic import ROOT, random_adapter

from fedgen_app.errors import RunError
from fedgen_app.federation.groups import Groups
from fedgen_app.federation.method import ClientId, GlobalState, Method
from fedgen_app.federation.placement import Placement
from fedgen_app.federation.roster import Member, Requirement, Roster
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
