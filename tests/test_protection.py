"""Rotation and noise: what survives them, that they are what they claim, and what an attacker still reads."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from fedgen_app.errors import SettingsError
from fedgen_app.federation import protection
from fedgen_app.federation.leakage import NEAREST, comparable, ranks, recoveries, turned_back
from fedgen_app.federation.protection import (
    epsilon,
    key_mark,
    noisy,
    read_key,
    rotation,
)
from fedgen_app.settings import Settings, defaults

KEY = b"k" * 32
SETTINGS = Settings.from_run_config(defaults(Path(__file__).resolve().parents[1]))


def directions(count: int, width: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, width))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


@pytest.mark.parametrize("width", [2, 7, 64])
def test_a_rotation_keeps_cosines_and_is_the_keys_alone(width: int) -> None:
    turned, rows = rotation(KEY, width), directions(9, width)
    assert turned @ turned.T == pytest.approx(np.eye(width), abs=1e-12)
    assert (rows @ turned.T) @ (rows @ turned.T).T == pytest.approx(rows @ rows.T, abs=1e-12)
    assert np.array_equal(turned, rotation(KEY, width))
    assert abs(turned - rotation(b"K" * 32, width)).max() > 0.1


def test_rotations_are_uniform() -> None:
    """Of a uniform rotation every entry has mean 0 and variance 1 / width, and so has the trace variance 1."""
    entries = np.stack([rotation(number.to_bytes(32, "big"), 3) for number in range(2000)])
    assert abs(entries.mean(0)).max() < 0.06 and entries.var(0) == pytest.approx(np.full((3, 3), 1 / 3), abs=0.04)
    assert entries.trace(axis1=1, axis2=2).var() == pytest.approx(1, abs=0.15)


EXPECTED = [
    [0.339082854418, 0.936059902259, -0.093886512467],
    [-0.666168850379, 0.168445535091, -0.726529534494],
    [0.664260401216, -0.308897978452, -0.680690941826],
]


def test_a_rotation_is_the_same_on_every_machine() -> None:
    """Devices with other libraries must find this one: it changes only together with all keys in use."""
    assert rotation(KEY, 3) == pytest.approx(np.array(EXPECTED), abs=1e-9)


def test_a_rotation_does_not_depend_on_the_rows_that_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rotation(KEY, 40)
    monkeypatch.setattr(protection, "BLOCK", 7)
    assert rotation(KEY, 40) == pytest.approx(whole, abs=1e-12)


def test_a_rotation_that_would_take_too_much_memory_is_refused() -> None:
    with pytest.raises(SettingsError, match="have 8192 numbers, a rotation at most 4096"):
        rotation(KEY, 8192)


def test_a_mark_tells_keys_apart() -> None:
    assert key_mark(KEY) == key_mark(KEY) != key_mark(b"K" * 32)
    assert KEY.hex() not in key_mark(KEY)


def test_a_key_has_to_be_long(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY + b"\n")
    assert read_key(tmp_path / "key") == KEY
    (tmp_path / "short").write_bytes(b"secret")
    with pytest.raises(SettingsError, match="6 bytes, should be 32"):
        read_key(tmp_path / "short")
    with pytest.raises(SettingsError, match="No such file"):
        read_key(tmp_path / "none")


def spent(eps: float, sigma: float) -> float:
    """Balle and Wang's delta, straight from scipy."""
    a, b = 1 / sigma, eps * sigma / 2  # sensitivity 2
    return float(norm.cdf(a - b) - math.exp(eps) * norm.cdf(-a - b))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0, 8.0, 40.0])
@pytest.mark.parametrize("delta", [1e-6, 1e-3])
def test_epsilon_is_the_smallest_that_holds(sigma: float, delta: float) -> None:
    eps = epsilon(sigma, delta)
    assert spent(eps, sigma) <= delta * (1 + 1e-6)
    assert spent(eps * 0.999, sigma) > delta
    # The classical bound, where it holds at all, is never better.
    classical = 2 * math.sqrt(2 * math.log(1.25 / delta)) / sigma
    assert classical > 1 or eps <= classical


def test_epsilon_of_little_and_much_noise() -> None:
    assert epsilon(0.0, 1e-5) == math.inf
    assert epsilon(1e-3, 1e-5) > 1e5  # finite, though exp of it is not
    assert epsilon(1e9, 1e-5) == 0.0


def test_noise_leaves_a_direction_and_has_the_size_it_claims() -> None:
    vector = directions(1, 400)[0]
    generator = np.random.default_rng(0)
    likeness = []
    for _ in range(200):
        got = noisy(vector, generator.normal(0, 0.05, 400))
        assert np.linalg.norm(got) == pytest.approx(1)
        likeness.append(float(got @ vector))
    assert np.mean(likeness) == pytest.approx(1 / math.sqrt(1 + 400 * 0.05**2), abs=0.01)


def test_ranks_count_who_scores_higher() -> None:
    assert ranks(np.array([[0.6, 1.0, 0.8], [1.0, 0.6, 0.0]]), [0, 0]) == [2, 0]


def test_known_pairs_undo_a_rotation() -> None:
    rows, turned = directions(30, 8), rotation(KEY, 8)
    sent = rows @ turned.T
    assert turned_back(sent, rows[:8], sent[:8]) == pytest.approx(rows, abs=1e-9)


def test_what_the_audit_says_of_each_protection() -> None:
    found = recoveries(directions(200, 32), range(100), [0.02, 0.3, 5.0], SETTINGS)
    by = {(row.protection, row.attacker.split()[-1]): row for row in found}
    assert by["none", "candidates"].top1 == 1 and by["noise 0.02", "candidates"].top1 > 0.95
    assert by["noise 0.3", "candidates"].top1 > by["noise 5", "candidates"].top1
    assert by["noise 5", "candidates"].top1 < 0.1 and by["rotation", "candidates"].top1 < 0.1  # chance is 0.005
    assert by["rotation", "devices"].top1 == 1  # no key, no known prompt: the cosines are enough
    assert by["rotation and noise 0.02", "devices"].top1 > 0.9 and by["rotation and noise 5", "devices"].top1 < 0.1
    assert by["rotation", "vectors"].top1 == 1  # 32 known prompts, and the rotation is none
    assert by["rotation and noise 5", "vectors"].top1 < 0.1
    assert all(row.top1 <= row.top5 for row in found)
    assert by["none", "candidates"].as_json()["epsilon"] is None and by["noise 5", "candidates"].epsilon < 5


def test_the_audit_turns_by_the_key_that_it_is_given() -> None:
    rows = directions(40, 4)
    turned = ranks(rows @ rotation(KEY, 4).T @ rows.T, range(40))
    by = {row.protection: row for row in recoveries(rows, range(40), [], SETTINGS, 0, KEY) if row.attacker == NEAREST}
    assert by["rotation"].top5 == np.mean([rank < 5 for rank in turned])
    other = {row.protection: row for row in recoveries(rows, range(40), [], SETTINGS) if row.attacker == NEAREST}
    assert other["rotation"].top5 != by["rotation"].top5


def test_one_device_has_no_cosine_and_a_long_list_is_not_searched_for_them() -> None:
    found = recoveries(directions(20, 8), [3], [], SETTINGS)
    assert [row.attacker for row in found if "devices" in row.attacker] == []
    assert comparable(10_000, 2) and not comparable(10_001, 2) and not comparable(5, 1)
