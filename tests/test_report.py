"""What results.json says of the clients together: each figure over those who have it."""

from __future__ import annotations

from typing import Any

import pytest

from fedgen_app.runs import report

STATES = ("frozen", "global", "personal")


def entry(client: int, examples: int, **measured: Any) -> dict[str, Any]:
    return {"client": client, "examples": examples, **dict.fromkeys(STATES, measured)}


ENTRIES = [
    entry(0, 10, loss=1.0, kid=0.5, kid_by_class={"bag": 0.2, "coat": 0.4}),
    entry(1, 30, loss=2.0, kid=0.1, kid_by_class={"coat": 0.8}),
    entry(2, 2, loss=9.0),  # too few images for KID: its loss counts all the same
]


@pytest.mark.parametrize("state", STATES)
def test_each_metric_is_the_mean_over_the_clients_that_measured_it(state: str) -> None:
    means = report.weighted(ENTRIES, state)
    assert means.pop("kid_by_class") == pytest.approx({"bag": 0.2, "coat": (10 * 0.4 + 30 * 0.8) / 40})
    assert means == pytest.approx({"loss": (10 * 1.0 + 30 * 2.0 + 2 * 9.0) / 42, "kid": (10 * 0.5 + 30 * 0.1) / 40})
    assert report.weighted([], state) == {}


def results(*entries: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"rounds": [], "personal": list(entries), "backbone": {"bytes": 8}, "frozen": None}
    return found | {"final": report.final(found)}


def test_the_results_say_over_how_many_clients_a_mean_is() -> None:
    assert results(*ENTRIES)["final"]["personal_clients"] == {"kid": 2, "kid_by_class": 2, "loss": 3}


def test_the_closing_table_shows_what_every_client_measured() -> None:
    few = [entry(0, 10, denoising_loss=1.0, kid=0.5), entry(1, 10, denoising_loss=3.0)]
    (_, local), rows = report.table(results(*few))
    assert local == "denoising_loss" and {row[2] for row in rows} == {"2"}
    (_, local), _ = report.table(results(few[0]))
    assert local == "kid"


def test_the_basis_of_a_distance_is_told_where_there_is_one() -> None:
    measured = {"fid": 20.5, "samples": 200, "features": "small", "fid_floor": 1.25}
    assert report.basis(measured) == " (n 200, small, floor 1.25)"
    means = results(*ENTRIES)["final"]["metrics"]  # of a method without a global model: over the clients
    assert "kid" in means and report.basis(means) == ""


def test_what_did_not_divide_the_clients_is_said() -> None:
    few = {"event": "undivided", "round": 4, "needed": 5}
    assert "round 4: 2 replies, 5 are needed" in str(report.line(few | {"replies": 2}))
    assert "of those in them 2 are there with a requirement, 5 are needed" in str(
        report.line(few | {"requirements": 2})
    )
