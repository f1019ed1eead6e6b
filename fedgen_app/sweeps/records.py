"""What the runs of a sweep measured: one record per run from its results.json, one row per point from its seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgen_app.runs import report
from fedgen_app.settings import Value
from fedgen_app.sweeps.plan import Run, Sweep
from fedgen_app.sweeps.runner import folder_of, status_of
from fedgen_app.sweeps.spec import TRAIN_LOSS, Target

if TYPE_CHECKING:
    from fedgen_app.federation.method import Method

STATES = ("frozen", "global", "personal")
NOT_REACHED = "not reached"
BY_CLASS = "kid_of_"  # in front of a class


@dataclass(frozen=True)
class Curve:
    """The headline metric on the server's test set: rounds, all bytes sent up until then, and the values.

    No bytes where the method is no federation: its clients' data would have been sent.
    """

    metric: str
    rounds: tuple[int, ...]
    uplink: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        figures: By name: ``server_frozen_<metric>``, ``server_<metric>`` (the server's test set alone),
            ``clients_<state>_<metric>``, ``clients_<state>_kid_of_<class>``, ``personal_gain`` (1 - personal / global
            on the clients' hold-outs), ``adjusted_rand`` of clusters, bytes, rounds to the target, ``last_train_loss``,
            seconds. What was not measured is not there.
        heads: The headline metrics of the server's test set and of the clients' hold-outs; "" where there is none.
        losses: The clients' mean training loss, by round; without the rounds in which nobody trained.
        basis: What the server's figure hangs on beside the metric: extractor and number of images.
    """

    run: Run
    status: str
    reason: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    source: str = ""
    heads: tuple[str, str] = ("", "")
    basis: str = ""
    task: str = ""
    reached: bool | None = None
    curve: Curve | None = None
    losses: Mapping[int, float] = field(default_factory=dict)
    clients: tuple[tuple[int, float], ...] = ()
    signs: tuple[str, ...] = ()


def collect(sweep: Sweep, output: Path, failed: Mapping[str, str]) -> list[Record]:
    """A record for every run; those that did not complete have a status and a reason, and no figure."""
    records = []
    for run in sweep.runs:
        folder = folder_of(output, run)
        status = status_of(folder) or "missing"
        if status != "completed":
            status = "failed" if run.name in failed else status
            records.append(Record(run, status, failed.get(run.name, "")))
            continue
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        records.append(read(run, results, sweep.target))
    return records


def read(run: Run, results: Mapping[str, Any], target: Target | None) -> Record:
    """The record of a completed run."""
    final = results["final"]
    by_server = final["source"] == "server"
    server, means = (final["metrics"] or {}) if by_server else {}, final["personal"] or {}
    figures = dict(_named("server_frozen_", results["frozen"])) | dict(_named("server_", server))
    for state in STATES:
        figures |= dict(_named(f"clients_{state}_", means.get(state)))
        figures |= dict(_by_class(f"clients_{state}_", means.get(state)))
    rand = results.get("clustering", {}).get("adjusted_rand")
    if rand is not None:
        figures["adjusted_rand"] = rand
    own = report.headline(means.get("personal") or means.get("global"))
    measure = _ratio_metric(means)
    entries = _gains(results["personal"], measure)
    if measure:
        figures["personal_gain"] = 1 - means["personal"][measure] / means["global"][measure]
    federated = not method_of(run).pooled
    if federated and final["uplink_bytes_per_client_round"] is not None:
        figures["uplink_bytes_per_client_round"] = final["uplink_bytes_per_client_round"]
    if federated:
        for way in ("uplink_bytes", "downlink_bytes"):
            figures[way] = sum(entry[way] for entry in results["rounds"])
    losses = {entry["round"]: entry["train_loss"] for entry in results["rounds"] if entry.get("train_loss") is not None}
    if losses:
        figures["last_train_loss"] = losses[max(losses)]
    figures["seconds"] = sum(entry["seconds"] for entry in results["rounds"])
    curve = _curve(results, federated)
    reached = None
    if target and (curve or target.metric == TRAIN_LOSS):
        arrived = _first(results, target)
        reached = arrived is not None
        if arrived is not None:
            figures["rounds_to_target"] = arrived
    return Record(
        run,
        results["status"],
        figures=figures,
        source=final["source"],
        heads=(report.headline(server) if server else "", own),
        basis=report.basis({k: v for k, v in server.items() if k != "fid_floor"}).strip(" ()"),
        task=results["task"],
        reached=reached,
        curve=curve,
        losses=losses,
        clients=entries,
        signs=tuple(results.get("signs", ())),
    )


def _named(prefix: str, metrics: Mapping[str, Any] | None) -> Iterator[tuple[str, float]]:
    for name in report.HEADLINES:
        if isinstance((metrics or {}).get(name), int | float):
            assert metrics is not None
            yield prefix + name, metrics[name]


def _by_class(prefix: str, metrics: Mapping[str, Any] | None) -> Iterator[tuple[str, float]]:
    for name, value in (metrics or {}).get("kid_by_class", {}).items():
        yield f"{prefix}{BY_CLASS}{name}", value


def _ratio_metric(means: Mapping[str, Any]) -> str:
    """The metric that gains are told in; not KID, which is an estimate around 0 and has no ratio."""
    both = set(means.get("global") or {}) & set(means.get("personal") or {})
    return next((name for name in report.HEADLINES if name in both and name != "kid"), "")


def _gains(entries: Sequence[Mapping[str, Any]], metric: str) -> tuple[tuple[int, float], ...]:
    """Each client's examples and what its personal adapter gains over the global one, as a fraction."""
    both = [entry for entry in entries if metric in (entry.get("global") or {}) and metric in entry["personal"]]
    return tuple((int(e["examples"]), 1 - e["personal"][metric] / e["global"][metric]) for e in both)


def method_of(run: Run) -> Method:
    """The method that a run is made with."""
    from fedgen_app.federation.method import load_method

    return load_method(str(run.settings["method"]))


def _curve(results: Mapping[str, Any], federated: bool) -> Curve | None:
    measured = [entry for entry in results["rounds"] if entry["metrics"]]
    if not measured:
        return None
    metric = report.headline(measured[-1]["metrics"])
    sent, uplink = 0, {}
    for entry in results["rounds"]:
        sent += entry["uplink_bytes"]
        uplink[entry["round"]] = sent
    kept = [entry for entry in measured if metric in entry["metrics"]]
    numbers = tuple(entry["round"] for entry in kept)
    sums = tuple(uplink[n] for n in numbers) if federated else ()
    return Curve(metric, numbers, sums, tuple(entry["metrics"][metric] for entry in kept))


def _first(results: Mapping[str, Any], target: Target) -> int | None:
    """The first measured round that is as good as the target; lower is better for every headline metric."""
    for entry in results["rounds"]:
        measured = entry if target.metric == TRAIN_LOSS else entry["metrics"] or {}
        value = measured.get(target.metric)
        if value is not None and value <= target.value:
            return int(entry["round"])
    return None


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1; None for one value) of n values."""

    mean: float
    deviation: float | None
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Row:
    """A point of the sweep: its runs over the seeds."""

    point: dict[str, Value]
    records: tuple[Record, ...]

    @property
    def method(self) -> Method:
        """What its runs are made with."""
        return method_of(self.records[0].run)

    @property
    def done(self) -> list[Record]:
        """The runs that completed."""
        return [record for record in self.records if record.status == "completed"]

    def spread(self, name: str) -> Spread | None:
        """A figure over the seeds; None where no run measured it."""
        values = [record.figures[name] for record in self.done if name in record.figures]
        return spread(values) if values else None

    def target(self) -> tuple[str, Spread | None]:
        """Rounds to the target: a number only where every seed reached it."""
        asked = [record.reached for record in self.done if record.reached is not None]
        if not asked:
            return "not measured", None
        if all(asked):
            return "", self.spread("rounds_to_target")
        return f"{NOT_REACHED} by {asked.count(False)} of {len(asked)}" if any(asked) else NOT_REACHED, None


def rows_of(records: Sequence[Record]) -> list[Row]:
    """One row per point, in the order of the runs."""
    points: dict[str, list[Record]] = {}
    for record in records:
        points.setdefault(json.dumps(record.run.point), []).append(record)
    return [Row(group[0].run.point, tuple(group)) for group in points.values()]
