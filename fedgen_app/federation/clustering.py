"""Who belongs together: agglomerative clusters of directions, their identity over time, a map of them.

Knows numbers and names only. Vectors are directions (n, width) of length 1, products their inner products (n, n). What
needs scikit-learn or SciPy runs on the server and imports them when it is first needed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Name = TypeVar("Name", bound=Hashable)


def unit(vectors: Numbers) -> Numbers:
    """Each row divided by its length; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1.0), np.float64)


def cosines(products: Numbers) -> Numbers:
    """Cosines from inner products; what has no length has cosine 0 with all else."""
    lengths = np.sqrt(np.clip(products.diagonal(), 0, None))
    scale = np.outer(lengths, lengths)
    found = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    np.fill_diagonal(found, 1.0)
    return np.asarray(np.clip(found, -1, 1), np.float64)


def agglomerate(cosine: Numbers, choose: str, count: int, threshold: float) -> list[int]:
    """Labels of agglomerative clusters with average linkage on the distance 1 - cosine, numbered as they appear.

    Args:
        choose: ``count``: that many (one each where there are fewer things); ``threshold``: as many as are further
            apart than ``threshold``, which may be one; ``silhouette``: the number from 2 to ``count`` with the best
            mean silhouette (Rousseeuw 1987), one only where ``count`` is; of fewer than three things it makes one each.
    """
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    things = len(cosine)
    distance = np.clip(1 - cosine, 0, 2)
    np.fill_diagonal(distance, 0)
    if things == 1 or choose == "silhouette" and count == 1:
        return [0] * things

    def cut(number: int | None) -> list[int]:
        found = AgglomerativeClustering(
            n_clusters=number,
            metric="precomputed",
            linkage="average",
            distance_threshold=threshold if number is None else None,
        )
        return _as_they_appear(found.fit_predict(distance).tolist())

    if choose == "threshold":
        return cut(None)
    if choose == "count" or things < 3:
        return cut(min(count, things))
    each = {number: cut(number) for number in range(2, max(2, min(count, things - 1)) + 1)}
    best = max(each, key=lambda k: (round(float(silhouette_score(distance, each[k], metric="precomputed")), 9), -k))
    return each[best]


def _as_they_appear(labels: Sequence[int]) -> list[int]:
    numbers: dict[int, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels]


def matched(before: Mapping[Name, int], now: Mapping[Name, int], free: int) -> dict[int, int]:
    """Which cluster each new label is: the assignment under which the most members stay where they were.

    The Hungarian method (Kuhn 1955) on the numbers of common members. A label that shares nobody with the cluster that
    is left for it is a new cluster.

    Args:
        free: The first number that no cluster ever had.

    Returns:
        The cluster's number for every label of ``now``.
    """
    from scipy.optimize import linear_sum_assignment

    labels, clusters = sorted(set(now.values())), sorted(set(before.values()))
    common = np.zeros((len(labels), len(clusters)))
    for name, label in now.items():
        if name in before:
            common[labels.index(label), clusters.index(before[name])] += 1
    kept = {labels[i]: clusters[j] for i, j in zip(*linear_sum_assignment(-common), strict=True) if common[i, j]}
    for label in labels:
        if label not in kept:
            kept[label], free = free, free + 1
    return kept


def centroids(vectors: Mapping[Name, Numbers], where: Mapping[Name, int]) -> dict[int, Numbers]:
    """The direction of the mean of each cluster's members that have a vector."""
    found: dict[int, list[Numbers]] = {}
    for name, cluster in where.items():
        if name in vectors:
            found.setdefault(cluster, []).append(vectors[name])
    return {cluster: unit(np.mean(found[cluster], axis=0)) for cluster in sorted(found)}


def nearest(vector: Numbers, centres: Mapping[int, Numbers]) -> int:
    """The cluster whose centroid is most similar; of equals the first."""
    return max(sorted(centres), key=lambda cluster: float(vector @ centres[cluster]))


def similarity(cosine: Numbers, labels: Sequence[int]) -> dict[tuple[int, int], float]:
    """Mean cosine between the members of every two clusters."""
    of, found = np.array(labels), {}
    for one in sorted(set(labels)):
        for other in sorted(set(labels)):
            found[one, other] = float(cosine[np.ix_(of == one, of == other)].mean())
    return found


def attention(kinship: Mapping[int, float], temperature: float) -> dict[int, float]:
    """Softmax of similarity / temperature over the other clusters: how much each of them is listened to."""
    most = max(kinship.values())
    raised = {cluster: math.exp((value - most) / temperature) for cluster, value in kinship.items()}
    total = sum(raised.values())
    return {cluster: value / total for cluster, value in raised.items()}


def adjusted_rand(one: Sequence[object], other: Sequence[object]) -> float:
    """How far two partitions of the same things agree: 1 the same, 0 as much as by chance (Hubert and Arabie 1985)."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score([str(label) for label in one], [str(label) for label in other]))


def plane(products: Numbers) -> Numbers:
    """Principal components of vectors from their inner products: (n, 2) coordinates, largest spread first."""
    count = len(products)
    centring = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(centring @ products @ centring)
    shown = vectors[:, ::-1][:, :2] * np.sqrt(np.clip(values[::-1][:2], 0, None))
    shown = np.pad(shown, ((0, 0), (0, 2 - shown.shape[1])))
    signs = np.sign(shown[np.abs(shown).argmax(0), range(2)])
    return np.asarray(shown * np.where(signs == 0, 1, signs), np.float64)


def draw_map(
    names: Sequence[object],
    clusters: Sequence[int],
    points: Numbers,
    title: str,
    file: Path,
    later: Collection[object] = (),
) -> None:
    """The clients in a plane, coloured by cluster, as a PNG; triangles are those of ``names`` that came ``later``."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes: Any = figure.add_subplot()
    colours = colormaps["tab10" if len(set(clusters)) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    late, of = np.array([name in later for name in names]), np.array(clusters)
    for number, cluster in enumerate(sorted(set(clusters))):
        colour = colours[number % len(colours)]
        axes.scatter(*points[(of == cluster) & ~late].T, color=colour, label=f"cluster {cluster}", s=45)
        axes.scatter(*points[(of == cluster) & late].T, color=colour, marker="^", s=80)
    if late.any():
        axes.scatter([], [], color="grey", marker="^", label="came later", s=80)
    for name, point in zip(names, points, strict=True):
        axes.annotate(str(name)[:12], point, textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(xlabel="first principal component", ylabel="second", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=120, format="png")
