"""The table of a sweep for people: table.md, with the command, the set-up, the spread, the gaps and the signs."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from fedgen_app.files import write_atomic
from fedgen_app.runs import report
from fedgen_app.settings import Value
from fedgen_app.sweeps.plan import Sweep, shown
from fedgen_app.sweeps.records import BY_CLASS, STATES, Row, Spread, spread
from fedgen_app.sweeps.spec import TRAIN_LOSS, VARIANT

SETUP = (
    *("task", "method", "backbone", "dataset", "expected-clients", "partition.by", "partition.alpha"),
    *("num-server-rounds", "fraction-train", "local-epochs", "max-steps", "batch-size", "learning-rate"),
    *("lora.rank", "lora.alpha", "sequence-length", "test-sequences", "holdout-fraction", "metrics.samples"),
    *("personal.epochs", "personal.max-steps", "personal.learning-rate"),
)
NOTHING = "–"


def plus_minus(spread: Spread | None, write: Callable[[float], str] = report.number) -> str:
    """Mean and standard deviation as a reader wants them; one value has no deviation."""
    if spread is None:
        return NOTHING
    if spread.deviation is None or (spread.deviation == 0 and write is report.size):  # the same bytes each time
        return write(spread.mean)
    return f"{write(spread.mean)} ± {write(spread.deviation)}"


def percent(value: float) -> str:
    """A fraction as per cent, one decimal."""
    return f"{value:.1%}"


def best_of(spreads: Mapping[int, Spread]) -> int | None:
    """The row with the lowest mean, where no other one comes within the spread of both; None else.

    Within: the intervals of one standard deviation about the means touch. Fewer than two seeds have no spread, and
    then nothing is best.
    """
    if len(spreads) < 2 or any(spread.deviation is None for spread in spreads.values()):
        return None
    first, *others = sorted(spreads, key=lambda row: spreads[row].mean)
    top = spreads[first].mean + (spreads[first].deviation or 0.0)
    if all(spreads[other].mean - (spreads[other].deviation or 0.0) > top for other in others):
        return first
    return None


def sections(sweep: Sweep, rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows that may share columns, under a heading: one table for each value of the axes that are no rows.

    Rows of different tasks, metrics or extractors never share a table. A row without any completed run, or without a
    figure of the server's own, stands with the others of its task.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        fixed = ", ".join(_titled(axis, row.point[axis]) for axis in sweep.axes if axis not in sweep.rows)
        groups.setdefault((fixed, str(row.records[0].run.settings["task"])), []).append(row)
    found = []
    for (fixed, _), members in groups.items():
        parts: dict[tuple[str, str, str], list[Row]] = {}
        for row in members:
            parts.setdefault(_measures(row), []).append(row)
        whole = [key for key in parts if key[0]]
        for key in [key for key in parts if not key[0]]:  # without a figure of the server's
            if whole:
                parts[whole[0]] += parts.pop(key)
        for (metric, _, basis), part in parts.items():
            part.sort(key=members.index)
            words = [fixed, f"{metric} ({basis})" if len(parts) > 1 or basis else ""]
            found.append((", ".join(word for word in words if word), part))
    return found


def _measures(row: Row) -> tuple[str, str, str]:
    for record in row.done:
        if record.heads[0]:
            return (*record.heads, record.basis)
    return ("", "", "")


def _titled(axis: str, value: Value) -> str:
    return shown(value) if axis in (VARIANT, "method", "task") else f"{axis} {shown(value)}"


def setup(sweep: Sweep) -> list[tuple[str, str]]:
    """What a reader must know, and all that the file itself sets; all values of those that are no axis and differ."""
    told = []
    for key in dict.fromkeys((*SETUP, *sweep.named)):
        values = list(dict.fromkeys(shown(run.settings[key]) for run in sweep.runs))
        if key not in sweep.axes:
            told.append((key, " or ".join(Path(v).name if v.startswith("/") else v or '""' for v in values)))
    told.append(("seeds", ", ".join(dict.fromkeys(str(run.seed) for run in sweep.runs))))
    return told


def columns(part: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Figure, heading and unit of the columns that some row of a table fills."""
    heads = next((record.heads for row in part for record in row.done if record.heads[0]), None)
    heads = heads or next((record.heads for row in part for record in row.done), ("", ""))
    metric, own = heads
    wanted = [(f"server_{metric}", f"{words(metric)}, server's test set", "")] if metric else []
    if own:
        wanted += [(f"clients_{state}_{own}", f"{words(own)}, clients' hold-outs, {state}", "") for state in STATES]
    there = {name for row in part for record in row.done for name in record.figures}
    known = f"clients_global_{BY_CLASS}"
    classes = sorted(name.removeprefix(known) for name in there if name.startswith(known))
    wanted += [(f"{known}{each}", f"KID of {_escaped(each)}, clients' hold-outs, global", "") for each in classes]
    wanted += [
        ("adjusted_rand", "adjusted Rand index of the clusters", "index"),
        ("personal_gain", "personal gain over global", "percent"),
        ("uplink_bytes_per_client_round", "uplink per client and round", "bytes"),
        ("uplink_bytes", "uplink in all", "bytes"),
        ("downlink_bytes", "downlink in all", "bytes"),
    ]
    return [column for column in wanted if column[0] in there]


def words(metric: str) -> str:
    """A metric's name as people write it."""
    return {"fid": "FID", "kid": "KID"}.get(metric, metric.replace("_", " "))


def frozen_groups(part: Sequence[Row]) -> list[tuple[dict[int, dict[str, float]], list[Row]]]:
    """Rows that stand on the same frozen backbone: by seed its figures on the server's test set, and those rows.

    Where the rows of a group also share the clients' frozen figures, those are there too.
    """
    groups: list[tuple[dict[int, dict[str, float]], list[Row]]] = []
    for row in part:
        found = {r.run.seed: _only(r.figures, "server_frozen_") for r in row.done}
        if not any(found.values()):
            continue
        for figures, rows in groups:
            shared = figures.keys() & found.keys()
            if shared and all(_close(figures[seed], found[seed]) for seed in shared):
                figures |= {seed: known for seed, known in found.items() if seed not in figures}
                rows.append(row)
                break
        else:
            groups.append((found, [row]))
    for figures, rows in groups:
        own = [(r.run.seed, _only(r.figures, "clients_frozen_")) for row in rows for r in row.done]
        first = {seed: known for seed, known in reversed(own)}
        if all(_close(first[seed], known) for seed, known in own):
            for seed, known in first.items():
                figures[seed] = figures[seed] | known
    return groups


def _only(figures: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name: value for name, value in figures.items() if name.startswith(prefix)}


def _close(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return one.keys() == other.keys() and all(abs(one[k] - other[k]) <= 1e-4 * abs(one[k]) for k in one)


def _frozen_line(figures: Mapping[int, Mapping[str, float]], wanted: Sequence[str]) -> list[str]:
    line = []
    for name in wanted:
        key = name if name.startswith("clients_frozen_") else name.replace("server_", "server_frozen_", 1)
        values = [known[key] for known in figures.values() if key in known]
        at_home = name.startswith(("clients_frozen_", "server_"))
        line.append(plus_minus(spread(values)) if values and at_home else NOTHING)
    return line


WRITERS: dict[str, Callable[[float], str]] = {
    "": report.number,
    "index": "{:.2f}".format,
    "percent": percent,
    "bytes": report.size,
}


def table_of(sweep: Sweep, part: Sequence[Row]) -> list[str]:
    """One table in Markdown: a row per point, and one for every frozen backbone above the rows that stand on it."""
    wanted = columns(part)
    head = [*(_heading(axis) for axis in sweep.rows), *(title for _, title, _ in wanted)]
    head += [f"rounds to {words(sweep.target.metric)} {sweep.target.value:g}"] if sweep.target else []
    head += ["seconds", "seeds"]
    best = {name: _best(part, name) for name, _, unit in wanted if not unit and "_frozen_" not in name}
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(sweep.rows) + "---:|" * (len(head) - len(sweep.rows))]
    groups = frozen_groups(part)
    above = {id(rows[0]): (figures, rows) for figures, rows in groups}
    for row in part:
        if id(row) in above:
            figures, rows = above[id(row)]
            of = (
                "frozen backbone"
                if len(groups) == 1
                else f"frozen backbone of {_listed([point_name(sweep, r) for r in rows])}"
            )
            cells = [of, *[""] * (len(sweep.rows) - 1), *_frozen_line(figures, [name for name, _, _ in wanted])]
            cells += [NOTHING] * (bool(sweep.target) + 1) + [str(len(figures))]
            lines.append("| " + " | ".join(cells) + " |")
        cells = [_escaped(shown(row.point[axis])) for axis in sweep.rows]
        for name, _, unit in wanted:
            found = row.spread(name)
            cell = plus_minus(found, WRITERS[unit])
            if found and found.count < len(row.done):  # the others diverged, say: a mean of those that did not
                cell += f" ({found.count} of {len(row.done)} seeds)"
            cells.append(f"**{cell}**" if best.get(name) == id(row) else cell)
        if sweep.target:
            said, reached = row.target()
            cells.append(said or plus_minus(reached))
        count = f"{len(row.done)} of {len(row.records)}" if len(row.done) < len(row.records) else str(len(row.done))
        lines.append("| " + " | ".join([*cells, plus_minus(row.spread("seconds")), count]) + " |")
    return lines


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} others"


def _best(part: Sequence[Row], name: str) -> int | None:
    local = name.startswith("clients_global_")  # without a global model, what stands there is each client's own
    racing = {
        id(row): row.spread(name) for row in part if not row.method.pooled and (row.method.has_global or not local)
    }
    done = {id(row): len(row.done) for row in part}
    return best_of({row: found for row, found in racing.items() if found and found.count == done[row]})


def _heading(axis: str) -> str:
    return {VARIANT: "variant", "expected-clients": "clients"}.get(axis, axis)


def point_name(sweep: Sweep, row: Row, axes: Sequence[str] | None = None) -> str:
    """A row by its values on all axes, or on some: "fedprox, lora.rank 4"."""
    named = ", ".join(_titled(axis, row.point[axis]) for axis in (sweep.axes if axes is None else axes))
    return _escaped(named) or sweep.title


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def write(
    file: Path,
    sweep: Sweep,
    rows: Sequence[Row],
    *,
    command: str,
    plots: Sequence[tuple[str, str]],
    jobs: int,
    threads: int,
) -> None:
    """table.md.

    Args:
        command: What was typed.
        plots: Title and file name of each picture beside it.
    """
    lines = [f"# {sweep.title}", "", "```", command, "```", ""]
    lines += ["Set-up: " + "; ".join(f"{key} {value}" for key, value in setup(sweep)) + ".", ""]
    lines += [f"Machine: {machine(jobs, threads)}.", ""]
    for title, part in sections(sweep, rows):
        lines += [f"## {title}", ""] if title else []
        lines += [*table_of(sweep, part), ""]
    lines += [*notes(sweep, rows), ""]
    if gaps := [record for row in rows for record in row.records if record.status != "completed"]:
        lines += ["## Missing", ""]
        lines += [f"- {r.run.name}: {r.status}{': ' if r.reason else ''}{r.reason}" for r in gaps]
        lines += [""]
    lines += ["## Signs of failure", "", *signs(sweep, rows), ""]
    for title, name in plots:
        lines += [f"![{title}]({name})", ""]
    write_atomic(file, "\n".join(lines).rstrip().encode() + b"\n")


def machine(jobs: int, threads: int) -> str:
    """What the runs ran on, as far as seconds depend on it."""
    parts = [
        platform.system(),
        platform.machine(),
        f"{os.cpu_count()} cores{processor()}",
        *([torch.cuda.get_device_name()] if torch.cuda.is_available() else []),
        f"{jobs} run{'s' * (jobs > 1)} at a time",
    ]
    return ", ".join([*parts, f"{threads} thread{'s' * (threads > 1)} each", f"torch {version('torch')}"])


def processor() -> str:
    """The processor's name in brackets, where the system tells it."""
    names = Path("/proc/cpuinfo")
    lines = names.read_text(encoding="utf-8").splitlines() if names.exists() else []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    name = found or platform.processor()
    return f" ({name})" if name else ""


def _clustered(sweep: Sweep) -> bool:
    return any(run.settings["clusters.by"] != "none" for run in sweep.runs)


def shared_adapter(sweep: Sweep) -> str:
    """What a client's personal adapter is compared with."""
    return "the global or its cluster's adapter" if _clustered(sweep) else "global"


def notes(sweep: Sweep, rows: Sequence[Row]) -> list[str]:
    """How to read the table, as far as this one needs it."""
    said = [
        "- Mean ± standard deviation (n - 1) over the seeds; a seed changes the split of the data, who is chosen, the "
        "adapter's start and what is drawn. One seed has no deviation.",
        "- Bold: the lowest mean of a column, where no other row comes within one standard deviation of both. "
        "`centralized` is a bound and does not compete.",
        "- Uplink counts every reply that arrived, downlink all that clients were sent in the rounds; what centralised "
        "training would have to send, the data, is not known. Seconds are those of the rounds, without what is "
        "measured around them.",
    ]
    if sweep.target:
        where = "on the server's test set"
        if sweep.target.metric == TRAIN_LOSS:
            where = "by what clients had while they trained, each from the adapter that it was sent"
        said.append(
            f"- Rounds to the target: the first measured round that is as good, {where}; a number only where every "
            "seed got there."
        )
    if _clustered(sweep):
        said.append(
            "- With clusters, `global` of the clients' columns is each client's cluster's adapter; on the server's "
            "test set it is the mean of the clusters. The Rand index compares the clusters with what the clients own: "
            "1 is the truth, 0 is chance."
        )
    own = [row for row in rows if row.done and not row.method.has_global]
    if own:
        names = ", ".join(dict.fromkeys(point_name(sweep, row) for row in own))
        said.append(
            f"- No global model on the server's test set: {names}. Their figures stand in the clients' columns alone, "
            "and `global` there is each client's own model before the last fine-tuning: no competitor of the others'."
        )
    return said


def signs(sweep: Sweep, rows: Sequence[Row]) -> list[str]:
    """The signs of each point: one line for each kind, with the words of its first run."""
    lines = []
    for row in rows:
        seen: dict[str, list[str]] = {}
        for sign in (sign for record in row.done for sign in record.signs):
            seen.setdefault(sign.partition(":")[0], []).append(sign)
        for found in seen.values():
            often = f" (in {len(found)} of {len(row.done)} runs)" if len(row.done) > 1 else ""
            lines.append(f"- {point_name(sweep, row)}{often}: {_escaped(found[0])}")
    return lines or ["None."]
