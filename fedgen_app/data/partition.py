"""Deal the examples of one data set out to simulated clients: evenly, or skewed by label or topic."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedgen_app.data.local import IntArray
from fedgen_app.errors import DataError

TOPICS = 10
TEXTS_PER_TOPIC = 5  # fewer texts than this, times TOPICS, make fewer topics
TOPIC_WORDS = 3
VOCABULARY = 20_000
KMEANS_STARTS = 2
DIRICHLET_SEEDS = 30  # flwr-datasets gives up after 11 draws: too few for many clients and a small alpha

SHOWN_LABELS = 20
SHOWN_CHARACTERS = 40


@dataclass(frozen=True)
class Partition:
    """Who owns what.

    by: "iid", "label", "topic" or "single-label", what auto was resolved to.
    examples: sorted indices of examples, one int64 array per client; disjoint, together all of them.
    labels: one per example, its label or its topic ("topic 0: word, word, word"); () for iid without labels.
    """

    by: str
    examples: tuple[IntArray, ...]
    labels: tuple[str, ...]

    def mostly(self) -> dict[int | str, str]:
        """The most frequent label of each client; of equally frequent ones the first by name."""
        counted = {client: Counter(self.labels[i] for i in owned) for client, owned in enumerate(self.examples)}
        return {client: min(found, key=lambda label: (-found[label], label)) for client, found in counted.items()}


def partition(
    name: str,
    labels: Sequence[str] | None,
    texts: Sequence[str] | None,
    *,
    count: int,
    by: str,
    alpha: float,
    clients: int,
    seed: int,
    min_examples: int,
) -> Partition:
    """Deal each of ``count`` examples to one of ``clients``; the same seed gives the same partition.

    name: what messages call the data; labels, texts: one per example, where there are any. by: "iid"; "label" or
    "topic": how much of each label (topic) a client gets is drawn from Dirichlet(alpha), the smaller the more skewed
    (arXiv 1905.12022); "single-label": a client owns one label alone, or several where there are more of them; "auto":
    label where there are labels, else topic where there are texts, else iid. Topics are k-means clusters of the texts'
    TF-IDF vectors. With ``min_examples`` 0, a client may end up with nothing.

    Raises DataError where there are too few examples, nothing to go by, or no draw gives every client its
    ``min_examples``.
    """
    if by == "auto":
        by = "label" if labels is not None else "topic" if texts is not None else "iid"
    if by not in ("iid", "label", "topic", "single-label"):
        raise DataError(f"partition.by is {by!r}; allowed: auto, iid, label, topic, single-label")
    needed = clients * max(min_examples, 1)
    if count < needed:
        raise DataError(
            f"{name} has {count} examples, but {clients} clients with partition.min-examples {min_examples} need "
            f"{needed}: use fewer clients or lower partition.min-examples"
        )
    if by == "iid":
        return Partition(by, _deal_evenly(count, clients, seed), tuple(labels or ()))
    if by == "topic":
        if texts is None:
            raise DataError(f"partition.by is topic, but {name} has no texts: set partition.by to label or iid")
        labels = _topics(name, texts, seed)
    elif labels is None:
        raise DataError(
            f"partition.by is {by}, but {name} is read without labels: set label-column, or partition.by to topic "
            "or iid"
        )
    if by == "single-label":
        return Partition(by, _deal_whole(labels, clients, seed, min_examples), tuple(labels))
    return Partition(by, _deal_skewed(labels, alpha, clients, seed, min_examples), tuple(labels))


def _deal_evenly(count: int, clients: int, seed: int) -> tuple[IntArray, ...]:
    from datasets import Dataset
    from flwr_datasets.partitioner import IidPartitioner

    # IidPartitioner cuts what it is given into consecutive shards, so the shuffling is ours.
    partitioner = IidPartitioner(clients)
    partitioner.dataset = Dataset.from_dict({"example": np.random.default_rng(seed).permutation(count)})
    return _owned(partitioner, clients)


def _deal_skewed(
    labels: Sequence[str], alpha: float, clients: int, seed: int, min_examples: int
) -> tuple[IntArray, ...]:
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    # Numbers, not the labels themselves: the partitioner compares numpy strings, which drop trailing NULs.
    numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
    dataset = Dataset.from_dict({"example": range(len(labels)), "label": [numbers[label] for label in labels]})
    for own_seed in np.random.SeedSequence(seed).generate_state(DIRICHLET_SEEDS):
        partitioner = DirichletPartitioner(
            clients,
            "label",
            float(alpha),
            min_partition_size=min_examples,
            self_balancing=True,
            shuffle=False,
            seed=int(own_seed),
        )
        partitioner.dataset = dataset
        try:
            # It warns at each draw that it repeats, and divides 0 by 0 where a tiny alpha underflows (the
            # last client then gets that label).
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _owned(partitioner, clients)
        except ValueError as error:
            if "max number of attempts" not in str(error):
                raise
    raise DataError(
        f"partition.alpha {alpha} over {clients} clients leaves someone with fewer than "
        f"partition.min-examples {min_examples} of {len(labels)} examples in every draw: raise "
        "partition.alpha, lower partition.min-examples, or use fewer clients"
    )


def _deal_whole(labels: Sequence[str], clients: int, seed: int, min_examples: int) -> tuple[IntArray, ...]:
    """Labels in turn to clients, and each label's examples evenly to those who have it."""
    names, order = sorted(set(labels)), np.random.default_rng(seed)
    owned: list[list[int]] = [[] for _ in range(clients)]
    for number, name in enumerate(names):
        owners = [c for c in range(clients) if c % len(names) == number] or [number % clients]
        examples = order.permutation([i for i, label in enumerate(labels) if label == name])
        for owner, share in zip(owners, np.array_split(examples, len(owners)), strict=True):
            owned[owner] += share.tolist()
    fewest = min(map(len, owned))
    if fewest < min_examples:
        raise DataError(
            f"partition.by single-label over {clients} clients leaves someone with {fewest} examples, fewer than "
            f"partition.min-examples {min_examples}: use fewer clients"
        )
    return tuple(np.sort(np.array(own, np.int64)) for own in owned)


def _owned(partitioner: Any, clients: int) -> tuple[IntArray, ...]:
    return tuple(
        np.sort(np.asarray(partitioner.load_partition(client)["example"][:], np.int64)) for client in range(clients)
    )


def _topics(name: str, texts: Sequence[str], seed: int) -> tuple[str, ...]:
    """Give each text the name of its topic: its number and its strongest words."""
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer
    from threadpoolctl import threadpool_limits

    vectorizer = TfidfVectorizer(sublinear_tf=True, stop_words="english", max_features=VOCABULARY, dtype=np.float32)
    try:
        vectors = vectorizer.fit_transform(texts)
    except ValueError as error:
        raise DataError(
            f"partition.by is topic, but the texts of {name} have no words to go by ({error}): set it to iid"
        ) from error
    count = min(TOPICS, max(1, len(texts) // TEXTS_PER_TOPIC))
    kmeans = KMeans(count, n_init=KMEANS_STARTS, random_state=seed)
    # One thread: several add up a centre in the order in which they finish, which is not the same twice.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct texts than topics leave a topic empty
        topics = kmeans.fit_predict(vectors)
    words = vectorizer.get_feature_names_out()
    strongest = np.argsort(-kmeans.cluster_centers_, axis=1, kind="stable")[:, :TOPIC_WORDS]
    names = [f"topic {topic}: {', '.join(words[best])}" for topic, best in enumerate(strongest)]
    return tuple(names[topic] for topic in topics)


def plot_partition(split: Partition, file: Path) -> None:
    """Draw each client's examples, stacked by label, into the PNG ``file``."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    clients = len(split.examples)
    names, counts = _count(split)
    figure = Figure(figsize=(10, max(3.0, 1.5 + (0.32 if clients <= 30 else 0.14) * clients)), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["tab10" if len(names) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    left = np.zeros(clients)
    for number, (name, widths) in enumerate(zip(names, counts, strict=True)):
        colour = "#333333" if number >= SHOWN_LABELS else colours[number]
        axes.barh(range(clients), widths, left=left, height=0.85, color=colour, label=name)
        left += widths
    step = 1 if clients <= 30 else 5
    axes.set_yticks(range(0, clients, step))
    axes.set_ylim(clients - 0.4, -0.6)  # client 0 on top
    axes.set_xlim(0, max(1.0, 1.02 * left.max()))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("examples")
    axes.set_ylabel("client")
    axes.set_title(f"{int(left.sum())} examples of {clients} clients, dealt by {split.by}")
    axes.spines[["top", "right"]].set_visible(False)
    if split.labels:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize="small")
    figure.savefig(file, dpi=120, format="png")


def _count(split: Partition) -> tuple[list[str], IntArray]:
    """Names of the labels to show, and the examples of each by client, shape (labels, clients).

    The rarest of too many labels are counted together, at the end.
    """
    labels = split.labels or ("examples",) * sum(map(len, split.examples))
    common = [label for label, _ in Counter(labels).most_common(SHOWN_LABELS)]
    rows = {label: row for row, label in enumerate(sorted(common, key=_as_counted))}
    names = [_shown(label) for label in rows]
    others = len(set(labels)) - len(rows)
    if others:
        names.append(f"{others} other labels")
    counts = np.zeros((len(names), len(split.examples)), np.int64)
    for client, examples in enumerate(split.examples):
        for example in examples:
            counts[rows.get(labels[example], len(rows)), client] += 1
    return names, counts


def _as_counted(label: str) -> list[str | int]:
    """Sort "class 2" before "class 10"."""
    return [int(part) if odd % 2 else part for odd, part in enumerate(re.split(r"(\d+)", label))]


def _shown(label: str) -> str:
    """Make a label fit for a legend, where $ starts a formula and a leading _ hides the entry."""
    printable = "".join(character if character.isprintable() else "?" for character in label)
    if len(printable) > SHOWN_CHARACTERS:
        printable = printable[: SHOWN_CHARACTERS - 1] + "…"
    return printable.replace("$", r"\$").removeprefix("_") or "(empty)"
