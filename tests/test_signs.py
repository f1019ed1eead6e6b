"""The paper's signs of failure, on figures of real runs made small, and on ones that only look alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from fedgen_app.runs import report
from fedgen_app.runs.signs import signs

Figures = Sequence[float]


def results(
    rounds: Figures = (), clients: Sequence[tuple[int, float, float]] = (), diversity: Figures = (), metric: str = "fid"
) -> dict[str, Any]:
    """results.json with metrics per round, (examples, global, personal) per client, diversity before and after."""
    measured = [{metric: value, "diversity": diversity[1]} if diversity else {metric: value} for value in rounds]
    return {
        "frozen": {metric: 76.85, "diversity": diversity[0]} if diversity else {metric: 76.85},
        "rounds": [{"round": n + 1, "metrics": m} for n, m in enumerate(measured)],
        "personal": [
            {"examples": n, "frozen": {metric: 90.0}, "global": {metric: g}, "personal": {metric: p}}
            for n, g, p in clients
        ],
        "final": {"metrics": measured[-1] if measured else None, "source": "server"},
    }


# `make run`, and Penn Treebank with 20 clients: both converge, the second with a step back of 1 %.
STEADY = [(3650.0, 3182.0, 2965.0, 2835.0, 2784.0), (105.2, 92.0, 92.9, 86.1, 83.9), (76.85, 14.66)]


@pytest.mark.parametrize("values", STEADY)
def test_a_run_that_converges_is_steady(values: Figures) -> None:
    assert signs(results(rounds=values)) == []


def test_a_run_that_diverged_says_so_and_shows_no_figure_of_before() -> None:
    found = results(rounds=(3650.0, 3182.0, 2965.0), metric="word_perplexity")
    found["rounds"].append({"round": 4, "metrics": None, "not_finite": ["word_perplexity"]})
    more = {"clients": [0], "admitted_bytes": 8}
    found |= {"rounds": [entry | more for entry in found["rounds"]], "backbone": {"bytes": 80}}
    found["final"] = report.final(found)
    assert found["final"]["source"] == "server" and found["final"]["metrics"] is None
    (line,) = signs(found)
    assert line.startswith("divergence: not a finite number after round 4: word perplexity;")
    assert report.table(found)[1][1][1] == "-"


def test_a_metric_that_swings_is_unstable() -> None:
    (line,) = signs(results(rounds=(3650.0, 3182.0, 3690.0, 2965.0, 3500.0), metric="word_perplexity"))
    assert line.startswith("unstable aggregation: word perplexity got worse in 2 of 4 steps")
    assert "by up to 18%" in line and "fraction-train" in line


def test_two_measured_rounds_have_no_variance() -> None:
    assert signs(results(rounds=(50.0, 80.0))) == []
    assert len(signs(results(rounds=(50.0, 50.0, 80.0)))) == 1


def test_rounds_without_a_measurement_are_passed_over() -> None:
    found = results(rounds=(100.0, 150.0, 90.0, 140.0))
    found["rounds"].insert(1, {"round": 9, "metrics": None})
    assert "2 of 3 steps" in signs(found)[0]


def test_a_personal_adapter_that_is_better_is_no_sign() -> None:
    assert signs(results(clients=[(878, 3210.0, 3007.0), (571, 3000.0, 3005.0)])) == []


def test_personal_adapters_of_clients_with_little_data_are_worse() -> None:
    (line,) = signs(results(clients=[(12, 3210.0, 3400.0), (40, 3000.0, 3100.0), (800, 3000.0, 2990.0)], metric="fid"))
    assert line.startswith("personal worse than global:") and "worse on 2 of 3 clients (12 to 40 examples)" in line
    assert "personal.proximal" in line


def test_the_mean_counts_by_examples() -> None:
    # One client of three is worse, and it holds nearly all the data.
    (line,) = signs(results(clients=[(1000, 100.0, 120.0), (10, 100.0, 90.0), (10, 100.0, 90.0)]))
    assert "119.4 against 100" in line and "worse on 1 of 3 clients (1000 examples)" in line


def test_rounding_is_not_worse() -> None:
    assert signs(results(clients=[(10, 100.0, 100.4), (10, 100.0, 100.1)])) == []


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (0.95, 0.9, False),
        (0.95, 0.2, True),
        (0.95, 0.45, True),
        (0.4, 0.3, False),
        (0.2, 0.24, True),
        (25.0, 2.4, False),
    ],
)
def test_diversity_that_collapses(before: float, after: float, told: bool) -> None:
    found = signs(results(rounds=(20.0,), diversity=(before, after)))
    assert bool(found) == told
    if told:
        assert found[0].startswith(f"collapse of diversity: the samples vary {after:.2f} times")


def test_a_run_without_a_server_figure_or_clients() -> None:
    found = results()
    found["final"] = {"metrics": None, "source": "clients"}
    assert signs(found) == []


def test_clients_that_cannot_measure_the_headline_are_passed_over() -> None:
    found = results(clients=[(800, 0.02, 0.01), (700, 0.03, 0.02)], metric="kid")
    loss = {"denoising_loss": 0.1}
    for entry in found["personal"]:
        entry["global"], entry["personal"] = loss | entry["global"], loss | entry["personal"]
    few = {"client": 2, "examples": 8, "frozen": loss, "global": loss, "personal": {"denoising_loss": 0.2}}
    found["personal"].insert(0, few)
    assert signs(found) == []  # by KID, which two of three have
    found["personal"] += [few, few]
    (line,) = signs(found)
    assert "denoising loss" in line and "worse on 3 of 5 clients (8 examples)" in line


def test_figures_by_class_alone_are_no_headline() -> None:
    found = results(clients=[(8, 1.0, 1.0)])
    for state in ("frozen", "global", "personal"):
        found["personal"][0][state] = {"kid_by_class": {"bag": 0.1}}
    assert signs(found) == []


def test_a_negative_kid_that_does_not_change_is_not_worse() -> None:
    assert signs(results(clients=[(10, -0.002, -0.002), (10, -0.002, -0.003)], metric="kid")) == []
    assert len(signs(results(clients=[(10, -0.002, 0.001)], metric="kid"))) == 1
