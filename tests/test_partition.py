"""Who owns what: complete, repeatable, and as skewed as was asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgen_app.data.local import Corpus
from fedgen_app.data.partition import Partition, plot_partition
from fedgen_app.data.partition import partition as deal
from fedgen_app.errors import DataError

WORDS = {
    "space": "rocket orbit moon launch satellite astronaut",
    "food": "bread butter oven recipe flour sugar",
    "sport": "goal match team league striker coach",
}


def labelled(count: int, kinds: int = 5, seed: int = 0) -> Corpus:
    labels = np.random.default_rng(seed).integers(0, kinds, count)
    return Corpus("toy", tuple(f"text {i}" for i in range(count)), tuple(map(str, labels)), False, 0)


def topical(count: int) -> Corpus:
    """``count`` texts of 6 words, of the three themes in turn."""
    rng, themes = np.random.default_rng(0), list(WORDS.values())
    texts = tuple(" ".join(rng.choice(themes[i % 3].split(), 6)) for i in range(count))
    return Corpus("themes", texts, None, False, 0)


def partition(corpus: Corpus, **asked: Any) -> Partition:
    return deal(corpus.name, corpus.labels, corpus.texts, count=len(corpus.texts), **asked)


def purity(split: Partition) -> float:
    """Share of the examples that have their owner's most frequent label."""
    owned = [[split.labels[example] for example in examples] for examples in split.examples]
    return sum(max(map(labels.count, labels)) for labels in owned if labels) / sum(map(len, owned))


def check_complete(split: Partition, count: int) -> None:
    assert sorted(np.concatenate(split.examples).tolist()) == list(range(count))
    assert all(examples.dtype == np.int64 and (np.diff(examples) > 0).all() for examples in split.examples)


@settings(max_examples=40, deadline=None)
@given(
    by=st.sampled_from(["iid", "label"]),
    count=st.integers(1, 60),
    kinds=st.integers(1, 60),
    clients=st.integers(1, 8),
    alpha=st.sampled_from([1e-4, 0.01, 0.3, 1.0, 100.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_example_has_one_owner(by: str, count: int, kinds: int, clients: int, alpha: float, seed: int) -> None:
    clients = min(clients, count)
    split = partition(labelled(count, kinds), by=by, alpha=alpha, clients=clients, seed=seed, min_examples=0)
    assert len(split.examples) == clients
    check_complete(split, count)


def test_iid_is_even_and_shuffled() -> None:
    split = partition(labelled(103), by="iid", alpha=1.0, clients=5, seed=0, min_examples=20)
    assert sorted(map(len, split.examples)) == [20, 20, 21, 21, 21]
    check_complete(split, 103)
    assert max(split.examples[0]) > 50, "the first client got the first examples"
    assert split.labels == labelled(103).labels
    assert partition(topical(9), by="iid", alpha=1.0, clients=3, seed=0, min_examples=1).labels == ()


def test_alpha_sets_the_skew() -> None:
    means = [
        np.mean(
            [
                purity(partition(labelled(500), by="label", alpha=alpha, clients=5, seed=seed, min_examples=1))
                for seed in range(4)
            ]
        )
        for alpha in (0.05, 1.0, 100.0)
    ]
    assert means[0] > means[1] + 0.2 and means[1] > means[2] + 0.1
    assert means[2] < 0.35  # five labels, nearly even


def test_min_examples_hold_for_a_hundred_clients() -> None:
    split = partition(labelled(2000, 10), by="label", alpha=0.3, clients=100, seed=0, min_examples=4)
    check_complete(split, 2000)
    assert min(map(len, split.examples)) >= 4


def test_a_small_alpha_is_drawn_until_everyone_has_enough() -> None:
    for seed in range(4):
        split = partition(labelled(600, 10), by="label", alpha=0.1, clients=40, seed=seed, min_examples=2)
        assert min(map(len, split.examples)) >= 2


def test_a_client_may_own_nothing_where_that_is_allowed() -> None:
    split = partition(labelled(20, 2), by="label", alpha=0.01, clients=10, seed=0, min_examples=0)
    check_complete(split, 20)
    assert min(map(len, split.examples)) == 0


def test_labels_that_differ_by_a_nul_alone() -> None:
    corpus = Corpus("nul", ("a", "b", "c", "d"), ("x", "x\0", "", "x\0"), False, 0)
    check_complete(partition(corpus, by="label", alpha=1.0, clients=2, seed=0, min_examples=0), 4)


def test_topics_are_found_and_named() -> None:
    corpus = topical(150)
    split = partition(corpus, by="auto", alpha=0.05, clients=3, seed=1, min_examples=5)
    assert split.by == "topic"
    check_complete(split, 150)
    for text, label in zip(corpus.texts, split.labels, strict=True):
        number, words = label.removeprefix("topic ").split(": ")
        theme = next(theme.split() for theme in WORDS.values() if text.split()[0] in theme)
        assert 0 <= int(number) < 10 and len(words.split(", ")) == 3
        assert set(words.split(", ")) & set(theme), f"{text!r} is in {label!r}"
    even = partition(corpus, by="topic", alpha=100.0, clients=3, seed=1, min_examples=5)
    assert even.labels == split.labels and purity(split) > purity(even) + 0.15


def test_auto_prefers_labels() -> None:
    assert partition(labelled(9), by="auto", alpha=1.0, clients=1, seed=0, min_examples=1).by == "label"


def test_images_are_dealt_by_label_then_by_caption_then_evenly() -> None:
    """Images have no texts of their own: captions stand in for them where there are any."""
    asked: dict[str, Any] = {"count": 60, "alpha": 0.1, "clients": 3, "seed": 0, "min_examples": 2}
    captions, labels = topical(60).texts, labelled(60).labels
    by_label = deal("pictures", labels, captions, by="auto", **asked)
    assert (by_label.by, by_label.labels) == ("label", labels)
    assert deal("pictures", labels, None, by="auto", **asked).by == "label"
    assert deal("pictures", None, captions, by="auto", **asked).by == "topic"
    bare = deal("pictures", None, None, by="auto", **asked)
    assert (bare.by, bare.labels, sorted(map(len, bare.examples))) == ("iid", (), [20, 20, 20])
    with pytest.raises(DataError, match="pictures has no texts: set partition.by to label or iid"):
        deal("pictures", labels, None, by="topic", **asked)
    with pytest.raises(DataError, match="pictures is read without labels"):
        deal("pictures", None, None, by="label", **asked)


@pytest.mark.parametrize("by", ["iid", "label", "topic"])
def test_one_example_and_one_client(by: str) -> None:
    corpus = Corpus("one", ("a single\0 text",), ("x",), False, 0)
    split = partition(corpus, by=by, alpha=0.5, clients=1, seed=0, min_examples=1)
    assert [examples.tolist() for examples in split.examples] == [[0]]


def test_the_seed_decides_in_any_process() -> None:
    code = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from test_partition import labelled, partition, topical
for corpus, by in ((labelled(200), "iid"), (labelled(200), "label"), (topical(200), "topic")):
    for seed in (3, 4):
        split = partition(corpus, by=by, alpha=0.5, clients=4, seed=seed, min_examples=2)
        told = repr([examples.tolist() for examples in split.examples]) + repr(split.labels)
        print(by, seed, hashlib.sha256(told.encode()).hexdigest())
"""
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": salt})
        for salt in ("1", "2")
    )
    assert first.stdout == second.stdout
    assert len({line.split()[2] for line in first.stdout.splitlines()}) == 6, "seeds make no difference"


@pytest.mark.parametrize(
    ("corpus", "changed", "message"),
    [
        (labelled(9), {"clients": 5, "min_examples": 2}, "toy has 9 examples, but 5 clients .* 2 need 10"),
        (labelled(3), {"clients": 4, "min_examples": 0}, "toy has 3 examples, but 4 clients"),
        (
            labelled(60, 1),
            {"clients": 30, "alpha": 0.01},
            "partition.alpha 0.01 over 30 clients .*-examples 2",
        ),
        (topical(9), {"by": "label"}, "themes is read without labels: set label-column"),
        (topical(9), {"by": "size"}, "'size'; allowed: auto, iid, label, topic"),
        (
            Corpus("the", ("the", "\0"), None, True, 0),
            {"clients": 1, "by": "topic"},
            "texts of the have no words to go by",
        ),
    ],
)
def test_what_cannot_be_dealt_is_explained(corpus: Corpus, changed: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"by": "auto", "alpha": 0.5, "clients": 2, "seed": 0, "min_examples": 2}
    with pytest.raises(DataError, match=message):
        partition(corpus, **{**asked, **changed})


def test_the_plot_is_a_png_and_leaves_pyplot_alone(tmp_path: Path) -> None:
    import matplotlib

    backend = matplotlib.rcParams._get_backend_or_none()  # type: ignore[attr-defined]
    texts = tuple(map(str, range(40)))
    labels = tuple(["_hidden", "$x^", "nul\0", "long " * 20, ""][i % 5] + str(i // 5) * (i > 4) for i in range(40))
    split = partition(Corpus("odd", texts, labels, False, 0), by="iid", alpha=1, clients=4, seed=0, min_examples=1)
    plot_partition(split, tmp_path / "odd.png")
    plot_partition(Partition("iid", (np.arange(3), np.arange(0)), ()), tmp_path / "plain.png")
    for name in ("odd.png", "plain.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "odd.png").read_bytes() != (tmp_path / "plain.png").read_bytes()
    assert matplotlib.rcParams._get_backend_or_none() == backend  # type: ignore[attr-defined]
