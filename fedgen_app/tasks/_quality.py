"""How far generated images lie from real ones: FID and KID through torch-fidelity, and what an average hides.

FID: Heusel et al., arXiv 1706.08500; KID: Binkowski et al., arXiv 1801.01401. Numbers of different extractors, or FIDs
of different numbers of images, do not compare: FID is biased upwards at small n, KID is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch_fidelity import metric_fid, metric_kid

from fedgen_app.data.cache import cached
from fedgen_app.errors import MetricError
from fedgen_app.tasks._features import Extractor, FloatArray, key_of, reference

VERSION = 1  # of the cached statistics and floors
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000  # the field's usual size, where there are images enough
MIN_PER_CLASS = 20


@dataclass(frozen=True, eq=False)
class Real:
    """What is known of the real images beforehand.

    features: (n, d). mean, covariance: theirs, float64, for FID. floor: FID and KID of other real images against them;
    empty where there are not as many others.
    """

    features: FloatArray
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    floor: dict[str, float]


def real_side(extractor: Extractor, images: NDArray[np.uint8], others: NDArray[np.uint8], seed: int) -> Real:
    """All about real images that no generated one is needed for, computed once per machine.

    Raises MetricError where there are fewer than four images.
    """
    features, key = reference(extractor, images), key_of(extractor, images) | {"version": VERSION}
    known = cached("statistics", key, lambda: _statistics(features))
    real = Real(features, known["mean"], known["covariance"], {})
    if len(others) != len(images):
        return real
    key |= {"others": key_of(extractor, others)["pixels"], "seed": seed, "subsets": [KID_SUBSETS, KID_SUBSET_SIZE]}

    def build() -> dict[str, NDArray[Any]]:
        return {name: np.array([value]) for name, value in compare(reference(extractor, others), real, seed).items()}

    floor = {name: float(value[0]) for name, value in cached("floor", key, build).items()}
    return replace(real, floor=floor)


def compare(generated: FloatArray, real: Real, seed: int) -> dict[str, float]:
    """FID and KID of features (n, d) against real ones (m, d).

    Returns "fid", computed in float64, and what ``kid`` returns.

    seed: of KID's subsets. Raises MetricError where a side has fewer than four images, or the widths differ.
    """
    _check(generated, real.features)
    theirs = _statistics(generated)
    found: dict[str, float] = metric_fid.fid_statistics_to_metric(
        {"mu": theirs["mean"], "sigma": theirs["covariance"]},
        {"mu": np.array(real.mean), "sigma": np.array(real.covariance)},
        verbose=False,
    )
    return {"fid": found[metric_fid.KEY_METRIC_FID], **kid(generated, real.features, seed)}


def _statistics(features: FloatArray) -> dict[str, NDArray[Any]]:
    _check(features, features)
    found = metric_fid.fid_features_to_statistics(torch.from_numpy(np.array(features, np.float64)))
    return {"mean": found["mu"], "covariance": found["sigma"]}


def subset_size(generated: int, real: int) -> int:
    """Images in each of KID's subsets, for so many images on either side."""
    return min(KID_SUBSET_SIZE, generated // 2, real // 2)


def kid(generated: FloatArray, real: FloatArray, seed: int) -> dict[str, float]:
    """KID of features (n, d) against features (m, d).

    Returns "kid", the mean over 100 pairs of random subsets; and "kid_std", their standard deviation. A subset has
    half as many images as the smaller set, at most 1000: were it the whole set, every subset would be the same and the
    spread nothing. KID is unbiased, so its mean does not depend on that size; its spread does, and as the subsets
    overlap it is no confidence interval. Raises MetricError as ``compare``.
    """
    _check(generated, real)
    found: dict[str, float] = metric_kid.kid_features_to_metric(
        torch.from_numpy(np.array(generated, np.float32)),
        torch.from_numpy(np.array(real, np.float32)),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=subset_size(len(generated), len(real)),
        rng_seed=seed % 2**32,
        verbose=False,
    )
    return {"kid": found[metric_kid.KEY_METRIC_KID_MEAN], "kid_std": found[metric_kid.KEY_METRIC_KID_STD]}


def _check(generated: NDArray[Any], real: NDArray[Any]) -> None:
    if min(len(generated), len(real)) < 4:
        raise MetricError(f"FID and KID need four images on each side; there are {len(generated)} and {len(real)}")
    if generated.shape[1] != real.shape[1]:
        raise MetricError(f"features of different extractors: widths {generated.shape[1]} and {real.shape[1]}")


def per_class(
    generated: FloatArray,
    generated_labels: Sequence[str],
    real: FloatArray,
    real_labels: Sequence[str],
    seed: int,
) -> dict[str, float]:
    """KID of each class that has 20 images or more on both sides, in the order of the names.

    Features (n, d) and (m, d), with one label for each; an average over all classes hides one that failed.
    """
    theirs, ours = np.asarray(generated_labels, dtype=str), np.asarray(real_labels, dtype=str)
    found = {}
    for name in sorted(set(generated_labels) & set(real_labels)):
        left, right = generated[theirs == name], real[ours == name]
        if min(len(left), len(right)) >= MIN_PER_CLASS:
            found[name] = kid(left, right, seed)["kid"]
    return found


def diversity(generated: FloatArray, real: FloatArray) -> float:
    """How varied the generated images are: the variance of their features, summed, over that of the real ones.

    Features (n, d) and (m, d). 0: all equal; 1: as varied as the real ones. Far below 1 says mode collapse, or images
    of nothing that the extractor knows: it finds pure noise all alike. A few images over and over can be as varied as
    the real ones. Raises MetricError where a side has fewer than two images or the real ones are all equal.
    """
    if min(len(generated), len(real)) < 2:
        raise MetricError(f"variety needs two images on each side; there are {len(generated)} and {len(real)}")
    ours = float(np.var(real, axis=0, ddof=1, dtype=np.float64).sum())
    if ours == 0:
        raise MetricError("the real images are all equal: nothing to measure variety by")
    return float(np.var(generated, axis=0, ddof=1, dtype=np.float64).sum()) / ours
