"""Noise that is kept: asking again, for whatever size, tells no more than the smallest that was sent."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedgen_app.errors import DataError
from fedgen_app.federation.noise import Draws

WIDTH = 4000


def asked(file: Path, what: str, *sigmas: float, width: int = WIDTH) -> list[np.ndarray]:
    """The noise of one run after another."""
    return [Draws.read(file).noise(what, width, sigma) for sigma in sigmas]


def test_the_same_wish_and_size_get_the_same_noise_in_every_run(tmp_path: Path) -> None:
    file = tmp_path / "state" / "noise"
    first, larger, again = asked(file, "one", 0.3, 0.5, 0.3)
    assert np.array_equal(first, again) and abs(larger - first).max() > 0.1
    assert np.array_equal(asked(file, "one", 0.5)[0], larger)


@pytest.mark.parametrize("order", [(0.1, 0.2, 0.4), (0.4, 0.2, 0.1), (0.1, 0.4, 0.2), (0.4, 0.1, 0.2), (0.2, 0.4, 0.1)])
def test_whatever_the_order_more_noise_is_less_noise_and_an_independent_step(
    order: tuple[float, ...], tmp_path: Path
) -> None:
    noise = dict(zip(order, asked(tmp_path / "noise", "one", *order), strict=True))
    steps = [noise[0.1], noise[0.2] - noise[0.1], noise[0.4] - noise[0.2]]
    for step, variance in zip(steps, (0.01, 0.03, 0.12), strict=True):
        assert step.var() == pytest.approx(variance, rel=0.15) and abs(step.mean()) < 0.03
    assert np.corrcoef(steps) == pytest.approx(np.eye(3), abs=0.08)


def test_sizes_that_differ_a_little_cannot_be_averaged_away(tmp_path: Path) -> None:
    found = asked(tmp_path / "noise", "one", *(0.1 + 1e-7 * step for step in (0, 3, -2, 5, 1, -4)), 0.1 + 1e-17)
    assert np.mean(found, axis=0).std() == pytest.approx(0.1, rel=0.05)


def test_two_runs_at_once_draw_one_noise_for_one_wish(tmp_path: Path) -> None:
    file = tmp_path / "state" / "noise"
    begun = Barrier(4)

    def draw(_: int) -> np.ndarray:
        begun.wait()
        with Draws.held(file) as draws:
            return draws.noise("one", WIDTH, 0.3)

    with ThreadPoolExecutor(4) as runs:
        found = list(runs.map(draw, range(4)))
    assert all(np.array_equal(noise, found[0]) for noise in found)


def test_another_wish_has_noise_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "noise"
    one, other = asked(file, "one", 0.3)[0], asked(file, "other", 0.3)[0]
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.08


def test_a_wish_costs_its_smallest_noise_alone(tmp_path: Path) -> None:
    file = tmp_path / "noise"
    assert Draws.read(file).spent_with("one", 0.3) == [0.3]
    asked(file, "one", 0.3, 0.2, 0.5)
    assert Draws.read(file).spent_with("one", 0.4) == [0.2] and Draws.read(file).spent_with("one", 0.1) == [0.1]
    assert sorted(Draws.read(file).spent_with("other", 0.4)) == [0.2, 0.4]
    assert asked(file, "one", 0.0)[0].tolist() == [0.0] * WIDTH
    assert Draws.read(file).spent_with("one", 0.4) == [0.0]  # what was sent as it is stays known


def test_what_would_be_spent_is_told_without_drawing(tmp_path: Path) -> None:
    Draws.read(tmp_path / "noise").spent_with("one", 0.3)
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_draw_of_an_earlier_version_begins_the_path_and_the_others_stay_spent(tmp_path: Path) -> None:
    file, draw = tmp_path / "noise", np.random.default_rng(0)
    old = {name: draw.normal(0, sigma, WIDTH) for name, sigma in (("one@0.5", 0.5), ("one@0.2", 0.2), ("f" * 64, 0.1))}
    save_file(old, file)
    for _ in range(2):
        assert sorted(Draws.read(file).spent_with("one", 0.3)) == pytest.approx([0.1, 0.2, 0.5], rel=0.05)
        same, more = asked(file, "one", 0.2, 0.5)
        assert np.array_equal(same, old["one@0.2"]) and (more - same).var() == pytest.approx(0.21, rel=0.15)
    assert set(load_file(file)) == {"one~0.2", "one~0.5", "one@0.5", "f" * 64}


def test_a_damaged_file_is_no_reason_to_draw_anew(tmp_path: Path) -> None:
    file = tmp_path / "noise"
    asked(file, "one", 0.3)
    with pytest.raises(DataError, match="no noise of 8 finite numbers"):
        asked(file, "one", 0.3, width=8)
    for name in ("one~much", "one@much"):
        save_file({name: np.zeros(WIDTH)}, file)
        with pytest.raises(DataError, match="much"):
            Draws.read(file)
    file.write_bytes(b"damaged")
    with pytest.raises(DataError, match="noise"):
        Draws.read(file)
