"""Clusters of directions: found where they are, as many as asked for, and the same ones when looked at anew."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgen_app.federation import clustering
from fedgen_app.federation.clustering import (
    adjusted_rand,
    agglomerate,
    attention,
    centroids,
    cosines,
    matched,
    nearest,
    plane,
    similarity,
    unit,
)


def blobs(sizes: list[int], spread: float, width: int = 24, seed: int = 0) -> tuple[np.ndarray, list[int]]:
    """Directions around orthogonal ones, and which one each is around."""
    draw = np.random.default_rng(seed)
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    draw.shuffle(labels)
    return unit(np.eye(width)[labels] + spread * draw.normal(size=(len(labels), width))), labels


@pytest.mark.parametrize(("choose", "count", "threshold"), [("count", 3, 0.1), ("threshold", 99, 0.5)])
def test_clusters_are_recovered(choose: str, count: int, threshold: float) -> None:
    vectors, labels = blobs([5, 9, 2], 0.08)
    assert adjusted_rand(labels, agglomerate(cosines(vectors @ vectors.T), choose, count, threshold)) == 1


@pytest.mark.parametrize("kinds", [2, 4, 6])
def test_silhouette_finds_the_number(kinds: int) -> None:
    vectors, labels = blobs([4] * kinds, 0.08, seed=kinds)
    found = agglomerate(vectors @ vectors.T, "silhouette", 8, 0.5)
    assert len(set(found)) == kinds and adjusted_rand(labels, found) == 1


def test_a_threshold_can_find_one_cluster_and_silhouette_cannot() -> None:
    vectors, _ = blobs([7], 0.05)
    assert set(agglomerate(vectors @ vectors.T, "threshold", 8, 0.5)) == {0}
    assert len(set(agglomerate(vectors @ vectors.T, "silhouette", 8, 0.5))) > 1
    assert set(agglomerate(vectors @ vectors.T, "silhouette", 1, 0.5)) == {0}  # where no more than one is wanted


@pytest.mark.parametrize("choose", ["count", "threshold", "silhouette"])
@pytest.mark.parametrize("things", [1, 2, 3])
def test_few_things_have_clusters_too(choose: str, things: int) -> None:
    found = agglomerate(np.eye(things), choose, 8, 0.5)
    assert len(found) == things and found[0] == 0


def test_labels_are_numbered_as_they_appear() -> None:
    vectors = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert agglomerate(vectors @ vectors.T, "count", 2, 0.5) == [0, 1, 0]


def test_average_linkage_joins_as_defined() -> None:
    """Four things by hand: 0-1 at 0.1, then 2 is 0.5 from their average and 0.45 from 3."""
    distance = np.array([[0, 0.1, 0.4, 0.9], [0.1, 0, 0.6, 0.9], [0.4, 0.6, 0, 0.45], [0.9, 0.9, 0.45, 0]])
    assert agglomerate(1 - distance, "threshold", 9, 0.44) == [0, 0, 1, 2]
    assert agglomerate(1 - distance, "threshold", 9, 0.49) == [0, 0, 1, 1]
    # (0.4 + 0.6 + 0.9 + 0.9) / 4 = 0.7 between the two pairs
    assert agglomerate(1 - distance, "threshold", 9, 0.69) == [0, 0, 1, 1]
    assert agglomerate(1 - distance, "threshold", 9, 0.71) == [0, 0, 0, 0]


def test_cosines_of_products() -> None:
    rows = np.array([[3.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    got = cosines(rows @ rows.T)
    assert got == pytest.approx(np.array([[1, 0.5**0.5, 0], [0.5**0.5, 1, 0], [0, 0, 1]]))


def test_identities_are_kept() -> None:
    before = {"a": 4, "b": 4, "c": 7, "d": 7, "e": 7}
    now = {"a": 0, "b": 0, "c": 1, "d": 1, "e": 0}
    assert matched(before, now, 9) == {0: 4, 1: 7}


def test_a_label_that_shares_nobody_is_new_and_a_split_keeps_one_identity() -> None:
    assert matched({"a": 4, "b": 4, "c": 4}, {"a": 0, "b": 0, "c": 1, "d": 2}, 9) == {0: 4, 1: 9, 2: 10}
    assert matched({}, {"a": 0, "b": 1}, 0) == {0: 0, 1: 1}


def test_the_assignment_is_the_best_of_all_not_greedy() -> None:
    # Label 0 shares 3 with cluster 0 and 2 with 1; label 1 shares 2 with cluster 0 and none with 1.
    before = dict.fromkeys("abc", 0) | dict.fromkeys("de", 1) | dict.fromkeys("fg", 0)
    now = dict.fromkeys("abcde", 0) | dict.fromkeys("fg", 1)
    assert matched(before, now, 5) == {0: 1, 1: 0}


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.lists(st.integers(0, 4), min_size=12, max_size=12))
def test_as_many_stay_as_can(old: list[int], new: list[int]) -> None:
    before, now = dict(enumerate(old)), dict(enumerate(new[: len(old)]))
    names = matched(before, now, 100)
    assert len(set(names.values())) == len(names)

    def staying(names: dict[int, int]) -> int:
        return sum(names[now[c]] == before[c] for c in before)

    labels = sorted(set(new[: len(old)]))
    every = itertools.permutations([*sorted(set(old)), *range(100, 100 + len(labels))], len(labels))
    assert staying(names) == max(staying(dict(zip(labels, each, strict=True))) for each in every)


def test_a_newcomer_joins_the_nearest_centroid() -> None:
    vectors = {0: np.array([1.0, 0.0]), 1: np.array([0.8, 0.6]), 2: np.array([0.0, 1.0])}
    centres = centroids(vectors, {0: 3, 1: 3, 2: 5, 9: 5})
    assert centres[3] == pytest.approx(np.array([1.8, 0.6]) / np.hypot(1.8, 0.6)) and centres[5].tolist() == [0, 1]
    assert nearest(np.array([0.9, 0.4]), centres) == 3 and nearest(np.array([0.1, 1.0]), centres) == 5


def test_similarity_is_the_mean_between_two_clusters() -> None:
    cosine = np.array([[1.0, 0.2, 0.4], [0.2, 1.0, 0.6], [0.4, 0.6, 1.0]])
    assert similarity(cosine, [0, 0, 1])[0, 1] == pytest.approx(0.5)


def test_attention_is_a_softmax() -> None:
    got = attention({1: 0.5, 2: 0.1}, 0.2)
    assert got[1] / got[2] == pytest.approx(np.exp(0.4 / 0.2)) and sum(got.values()) == pytest.approx(1)
    assert attention({1: 1.0, 2: -1.0}, 1e-4) == {1: 1.0, 2: 0.0}


def test_the_plane_shows_the_distances_that_two_dimensions_hold() -> None:
    rows = (
        np.random.default_rng(1).normal(size=(8, 2)) @ np.linalg.qr(np.random.default_rng(2).normal(size=(5, 5)))[0][:2]
    )
    shown = plane(rows @ rows.T)
    assert np.linalg.norm(shown[:, None] - shown, axis=-1) == pytest.approx(
        np.linalg.norm(rows[:, None] - rows, axis=-1)
    )
    assert shown[:, 0].std() >= shown[:, 1].std()


def test_the_map_is_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    for count in (1, 2, 25):
        points = plane(np.eye(count))
        clustering.draw_map(range(count), [c % 3 for c in range(count)], points, "by prompts", tmp_path / "map.png")
        assert Image.open(tmp_path / "map.png").size[0] > 400
        before = (tmp_path / "map.png").read_bytes()
        clustering.draw_map(
            range(count), [c % 3 for c in range(count)], points, "by prompts", tmp_path / "map.png", [0, 99]
        )
        assert (tmp_path / "map.png").read_bytes() != before
