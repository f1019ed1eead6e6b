"""What cosines among devices tell behind a rotation, and how noise gets in the way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedgen_app.federation.cosines import mismatches
from fedgen_app.federation.protection import noisy, rotation

KEY = b"k" * 32


def directions(count: int, width: int) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(count, width))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def found_by_cosines(devices: int, sigma: float, trials: int = 1) -> float:
    """The share of devices that cosines alone tell apart behind a rotation, of 120 candidates and width 64."""
    candidates, turned, draw = directions(120, 64), rotation(KEY, 64), np.random.default_rng(0)
    hits: list[bool] = []
    for _ in range(trials):
        truth = draw.permutation(120)[:devices]
        rows = np.stack([noisy(candidates[true], draw.normal(0, sigma, 64)) for true in truth])
        sent = (rows @ turned.T).astype(np.float32).astype(np.float64)
        hits += list(mismatches(sent, candidates, 1 + 64 * sigma**2).argmin(axis=1) == truth)
    return float(np.mean(hits))


@pytest.mark.parametrize("devices", [3, 5, 20, 120])
def test_the_cosines_of_three_devices_tell_what_they_want_behind_a_rotation(devices: int) -> None:
    assert found_by_cosines(devices, 0.0) == 1


def test_the_cosine_of_two_devices_does_not_tell_who_is_who() -> None:
    assert 0.2 < found_by_cosines(2, 0.0, trials=30) < 0.8


def test_noise_hides_few_devices_from_the_cosines_before_many() -> None:
    assert found_by_cosines(20, 0.3) < 0.3 and found_by_cosines(120, 0.3) < 0.1
    assert found_by_cosines(120, 0.02) > 0.9


def test_cosines_find_devices_that_want_the_same() -> None:
    candidates, truth = directions(50, 16), np.array([4, 9, 4, 30])
    assert mismatches(candidates[truth] @ rotation(KEY, 16).T, candidates).argmin(axis=1).tolist() == truth.tolist()


def test_what_cosines_do_not_fit_is_measured_against_all_the_other_devices() -> None:
    candidates, truth = directions(30, 16), [3, 8, 21, 5]
    found = mismatches(candidates[truth], candidates)
    cosine = candidates @ candidates.T
    for device, candidate in ((0, 3), (0, 7), (2, 11)):
        others = [other for place, other in enumerate(truth) if place != device]
        gaps = [cosine[truth[device], other] - cosine[candidate, other] for other in others]
        assert found[device, candidate] == pytest.approx(math.sqrt(np.mean(np.square(gaps))), abs=1e-6)
