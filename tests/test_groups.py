"""Several states on the server: who starts from what, level 1 in each, and where a new one comes from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic import a_round, random_adapter, updates_of

from fedgen_app.federation.groups import Groups, anew, regrouped, rule_in_each
from fedgen_app.federation.method import EPOCH, GlobalState, Lora, Method, load_method, weighted_mean
from fedgen_app.learning.adapters import Adapter
from fedgen_app.runs.folder import Checkpoint, RunFolder, load_checkpoint

LORA = Lora(3, 6.0)
EXAMPLES = {"a": 10.0, "b": 30.0, "c": 5.0, "d": 1.0}


def state(seed: int) -> GlobalState:
    return GlobalState(random_adapter(seed, 3), extra={"momentum": torch.full((2,), float(seed))})


def two() -> Groups:
    """Cluster 0 with a, b; cluster 2 with c, d."""
    where = {"a": 0, "b": 0, "c": 2, "d": 2}
    kinship = {(0, 0): 1.0, (0, 2): 0.25, (2, 0): 0.25, (2, 2): 1.0}
    centres = {0: np.array([1.0, 0.0]), 2: np.array([0.0, 1.0])}
    return Groups({0: state(1), 2: state(2)}, state(9), where, {0: 40.0, 2: 6.0}, kinship, centres, True, 3)


def same(one: Adapter, other: Adapter) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def test_everybody_starts_from_their_cluster_and_others_from_the_global_state() -> None:
    groups = two()
    assert groups.state_of("c") is groups.states[2] and groups.state_of("stranger") is groups.shared
    single = Groups.single(state(1))
    assert single.state_of("anyone") is single.shared is single.states[0]
    assert groups.members(0) == ["a", "b"]


def test_a_checkpoint_holds_all_of_it(tmp_path: object) -> None:
    from pathlib import Path

    groups = replace(two(), space="0123456789abcdef", counts=EXAMPLES, joined=(2,))
    with RunFolder(Path(str(tmp_path)) / "run", 2) as folder:
        folder.save_checkpoint(4, groups.parts(), groups.facts())
        found = load_checkpoint(folder.path)
    assert isinstance(found, Checkpoint)
    back = Groups.restored(found.parts, found.facts)
    assert (back.where, back.examples, back.kinship) == (groups.where, groups.examples, groups.kinship)
    assert back.counts == EXAMPLES and back.joined == (2,)
    assert back.clustered and back.free == 3 and back.space == groups.space and sorted(back.states) == [0, 2]
    for cluster in (0, 2):
        assert same(back.states[cluster].adapter, groups.states[cluster].adapter)
        assert same(back.states[cluster].extra, groups.states[cluster].extra)
        assert back.centroids[cluster] == pytest.approx(groups.centroids[cluster])
    assert same(back.shared.adapter, groups.shared.adapter)


def test_a_checkpoint_of_before_counts_were_kept_is_read() -> None:
    facts = two().facts()
    del facts["clusters"]["counts"]
    back = Groups.restored(two().parts(), facts)
    assert back.where == two().where and back.counts == {}


def test_without_clusters_a_checkpoint_is_what_it_was() -> None:
    single = Groups.single(state(1))
    assert single.parts() == single.shared.tensors and single.facts() == {}
    back = Groups.restored(single.parts(), {})
    assert not back.clustered and same(back.shared.adapter, single.shared.adapter)


def test_the_rule_runs_in_each_cluster_by_itself() -> None:
    updates = updates_of([3, 3, 3], [1.0, 3.0, 2.0])
    home = {0: 0, 1: 0, 2: -1}
    after, stays = rule_in_each(two(), updates, home, weighted_mean, a_round(LORA), lambda count: None)
    wanted = weighted_mean(state(1), updates[:2], a_round(LORA))
    assert same(after.states[0].adapter, wanted.adapter)
    assert same(after.states[2].adapter, state(2).adapter) and stays == {2: "no usable reply"}


def test_a_cluster_with_too_few_replies_stays() -> None:
    updates = updates_of([3, 3, 3], [1.0, 1.0, 1.0])
    home = {0: 0, 1: 0, 2: 2}
    objection = "needs two"
    after, stays = rule_in_each(
        two(), updates, home, weighted_mean, a_round(LORA), lambda n: objection if n < 2 else None
    )
    assert stays == {2: objection} and same(after.states[2].adapter, state(2).adapter)
    assert not same(after.states[0].adapter, state(1).adapter)


def test_a_rule_is_told_how_many_clients_its_cluster_has() -> None:
    counts = []

    def rule(old: GlobalState, updates: object, round_: object) -> GlobalState:
        counts.append(round_.clients)  # type: ignore[attr-defined]
        return old

    rule_in_each(two(), updates_of([3], [1.0]), {0: 2}, rule, a_round(LORA, clients=50), lambda count: None)
    rule_in_each(
        Groups.single(state(1)), updates_of([3], [1.0]), {0: 0}, rule, a_round(LORA, clients=50), lambda n: None
    )
    assert counts == [2, 50]


def test_states_follow_their_clusters_and_new_ones_copy_where_most_examples_come_from() -> None:
    moved = regrouped(two(), {"a": 0, "b": 3, "c": 3, "d": 2}, EXAMPLES, Method(), 5)
    assert same(moved.states[0].adapter, state(1).adapter) and same(moved.states[2].adapter, state(2).adapter)
    assert same(moved.states[3].adapter, state(1).adapter)  # b has 30 examples, c has 5
    assert moved.examples == {0: 10.0, 2: 1.0, 3: 35.0} and moved.free == 4


def test_a_vanished_cluster_is_dropped_and_its_number_is_not_used_again() -> None:
    moved = regrouped(two(), dict.fromkeys("abcd", 0), EXAMPLES, Method(), 5)
    assert sorted(moved.states) == [0] and moved.free == 3


def test_a_cluster_of_newcomers_alone_starts_from_the_global_state() -> None:
    moved = regrouped(two(), {"a": 0, "b": 0, "c": 2, "d": 2, "new": 3}, EXAMPLES, Method(), 5)
    assert same(moved.states[3].adapter, state(9).adapter)


def test_what_clients_have_a_counterpart_of_begins_anew_where_members_change() -> None:
    moved = regrouped(two(), {"a": 0, "b": 0, "c": 2, "d": 0}, EXAMPLES, load_method("scaffold"), 5)
    assert moved.states[0].extra[EPOCH].tolist() == [0, 5] and set(moved.states[0].extra) == {EPOCH}
    moved = regrouped(two(), two().where, EXAMPLES, load_method("scaffold"), 5)
    assert set(moved.states[0].extra) == {"momentum"}
    moved = regrouped(two(), {"a": 0, "b": 2, "c": 2, "d": 2}, EXAMPLES, load_method("fedavgm"), 5)
    assert moved.states[0].extra["momentum"].tolist() == [1, 1]


def test_moments_begin_anew_where_the_basis_changed() -> None:
    assert anew(state(1), load_method("fedavgm"), 0, 5).extra == {}
    assert set(anew(state(1), load_method("scaffold"), 4, 5).extra) == {EPOCH}


def test_one_cluster_of_all_begins_nothing_anew() -> None:
    single = replace(Groups.single(state(1)), clustered=False)
    moved = regrouped(single, dict.fromkeys("abcd", 0), EXAMPLES, load_method("scaffold"), 1)
    assert set(moved.states[0].extra) == {"momentum"}
