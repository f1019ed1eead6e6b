"""The pictures of a sweep: courses over rounds and bytes, final figures along every numeric axis, clients' gains."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgen_app.settings import Value
from fedgen_app.sweeps.markdown import point_name, sections, shared_adapter, words
from fedgen_app.sweeps.plan import Sweep, shown
from fedgen_app.sweeps.records import Row, Spread, spread
from fedgen_app.sweeps.spec import TRAIN_LOSS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = 12  # of one picture; beyond that nobody tells the colours apart, and the rest is left to the table
MARKERS = "osD^vP*Xdph<"
UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("bytes", 1))
BAND = 0.18  # opacity
ALIKE = 1.01  # amounts within this factor are the same
WIDE = 3.0  # an axis whose values span more than this factor is drawn in logarithms


def draw(sweep: Sweep, rows: Sequence[Row], output: Path) -> list[tuple[str, str]]:
    """Draw what there is to draw into ``output``; title and file name of each picture."""
    made = []
    parts = sections(sweep, rows)
    for title, part in parts:
        mark = f"-{_slug(title)}" if len(parts) > 1 else ""
        made += _courses(sweep, title, part, output, mark)
    for axis, values in sweep.axes.items():
        if len(values) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            made += _along(sweep, rows, axis, output)
    made += _losses(sweep, rows, output)
    made += _gains(sweep, rows, output)
    return made


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.").lower()[:60]


def _canvas(panels: int = 1) -> tuple[Any, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 5.5 * panels, 4.6), layout="constrained")
    axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
    return figure, axes


def _save(figure: Any, axes: Axes, file: Path, lines: int) -> None:
    if lines > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize="small")
    figure.savefig(file, dpi=120, format="png")


def _name_steps(axes: Axes, label: str, whole: bool) -> None:
    """What a training proceeds in, few of them named; rounds have no fractions."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=whole))


def _plain(text: str) -> str:
    return text.replace("$", r"\$").removeprefix("_")


def _colour(number: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20" if number >= 10 else "tab10"](number % 20)


def _courses(sweep: Sweep, title: str, part: Sequence[Row], output: Path, mark: str) -> list[tuple[str, str]]:
    """The metric on the server's test set after each measured round, with a band of one deviation over the seeds."""
    shown_rows = [row for row in part if any(record.curve for record in row.done)][:LINES]
    if not shown_rows:
        return []
    metric = next(record.curve.metric for row in shown_rows for record in row.done if record.curve)
    made = []
    most = max((n for row in shown_rows for r in row.done if r.curve for n in r.curve.uplink[-1:]), default=0)
    unit, factor = next((unit for unit in UNITS if most >= unit[1]), UNITS[-1])  # nothing is sent up by some methods
    longest = max(len(record.curve.rounds) for row in shown_rows for record in row.done if record.curve)
    for against, label in (("rounds", "round"), ("bytes", f"{unit} sent up in all")):
        if longest == 1 and (against == "rounds" or not _differ(shown_rows)):  # measured once, in the end: no course
            continue
        figure, (axes,) = _canvas()
        for number, row in enumerate(shown_rows):
            if against == "bytes" and row.method.pooled:
                continue
            _course(axes, row, metric, 0 if against == "rounds" else factor, number, point_name(sweep, row, sweep.rows))
        frozen = [r.figures[f"server_frozen_{metric}"] for row in part for r in row.done if r.source == "server"]
        if frozen and max(frozen) <= 1.001 * min(frozen):
            axes.axhline(frozen[0], color="#555555", linestyle=":", label="frozen backbone")
        _name_steps(axes, label, whole=against == "rounds")
        axes.set_ylabel(f"{words(metric)}, server's test set")
        axes.set_title(_plain(title or sweep.title), fontsize="medium")
        name = f"against-{against}{mark}.png"
        _save(figure, axes, output / name, 2)
        made.append((f"{words(metric)} against {against}{f', {title}' if title else ''}", name))
    return made


def _differ(rows: Sequence[Row]) -> bool:
    """Whether rows send unlike amounts; else their points lie above each other, and bytes say nothing."""
    sent = [n for row in rows for r in row.done if r.curve and not row.method.pooled for n in r.curve.uplink[-1:]]
    return max(sent, default=0) > ALIKE * min(sent, default=0)


def _course(axes: Axes, row: Row, metric: str, factor: int, number: int, label: str) -> None:
    """One row's line; against so many bytes as ``factor`` says, or where that is 0 against rounds."""
    curves = [record.curve for record in row.done if record.curve and record.curve.metric == metric]
    rounds = sorted(set.intersection(*(set(curve.rounds) for curve in curves))) if curves else []
    if not rounds:
        return
    at = [[curve.rounds.index(n) for n in rounds] for curve in curves]
    found = [spread([c.values[p[i]] for c, p in zip(curves, at, strict=True)]) for i in range(len(rounds))]
    x = [float(n) for n in rounds]
    if factor:
        sent = [spread([float(c.uplink[p[i]]) for c, p in zip(curves, at, strict=True)]) for i in range(len(rounds))]
        x = [one.mean / factor for one in sent]
    _line(axes, x, found, number, label)


def _line(axes: Axes, x: Sequence[float], found: Sequence[Spread], number: int, label: str) -> None:
    """Means, with a band of one deviation; of one point a bar."""
    y, wide = [one.mean for one in found], [one.deviation or 0.0 for one in found]
    colour = _colour(number)
    axes.plot(x, y, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=4, label=_plain(label))
    if len(x) == 1:
        axes.errorbar(x, y, yerr=wide, color=colour, capsize=3)
    low, high = [a - b for a, b in zip(y, wide, strict=True)], [a + b for a, b in zip(y, wide, strict=True)]
    axes.fill_between(x, low, high, color=colour, alpha=BAND, linewidth=0)


def _losses(sweep: Sweep, rows: Sequence[Row], output: Path) -> list[tuple[str, str]]:
    """The clients' training loss after each round, where that is what the rounds are counted by."""
    there = [row for row in rows if any(record.losses for record in row.done)]
    left_out, there = len(there[LINES:]), there[:LINES]
    if sweep.target is None or sweep.target.metric != TRAIN_LOSS or not there:
        return []
    figure, (axes,) = _canvas()
    for number, row in enumerate(there):
        known = [record.losses for record in row.done if record.losses]
        rounds = sorted(set.intersection(*(set(losses) for losses in known)))
        found = [spread([losses[n] for losses in known]) for n in rounds]
        _line(axes, [float(n) for n in rounds], found, number, point_name(sweep, row))
    axes.axhline(sweep.target.value, color="#555555", linestyle=":", label="target")
    _name_steps(axes, "round", whole=True)
    axes.set_ylabel(f"{words(TRAIN_LOSS)}, mean over the clients")
    axes.set_title(_plain(sweep.title), fontsize="medium")
    _save(figure, axes, output / "train-loss.png", 2)
    return [(f"{words(TRAIN_LOSS)} against rounds" + _without(left_out), "train-loss.png")]


def _along(sweep: Sweep, rows: Sequence[Row], axis: str, output: Path) -> list[tuple[str, str]]:
    """The final figures along a numeric axis with error bars, a line for each combination of the other axes' values."""
    made = []
    by_measure: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        for record in row.done[:1]:
            by_measure.setdefault((record.task, *record.heads), []).append(row)
    for (task, metric, own), part in by_measure.items():
        panels = [(f"server_{metric}", f"{words(metric)}, server's test set")] if metric else []
        panels += [(f"clients_personal_{own}", f"{words(own)}, clients' hold-outs, personal")] if own else []
        panels += [("personal_gain", f"personal gain over {shared_adapter(sweep)}, %")] if own else []
        panels = [(name, label) for name, label in panels if any(row.spread(name) for row in part)]
        if not panels:
            continue
        figure, canvases = _canvas(len(panels))
        for axes, (name, label) in zip(canvases, panels, strict=True):
            _panel(axes, sweep, part, axis, name)
            axes.set_ylabel(label)
        mark = f"-{_slug(f'{task} {metric or own}')}" if len(by_measure) > 1 else ""
        file = f"along-{_slug(axis)}{mark}.png"
        _save(figure, canvases[-1], output / file, len(_lines(sweep, part, axis)))
        made.append((f"final figures along {axis}{f', {task}' if mark else ''}", file))
    return made


def _lines(sweep: Sweep, part: Sequence[Row], axis: str) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in part:
        lines.setdefault(json.dumps({k: v for k, v in row.point.items() if k != axis}), []).append(row)
    return lines


def _panel(axes: Axes, sweep: Sweep, part: Sequence[Row], axis: str, name: str) -> None:
    scale = 100.0 if name == "personal_gain" else 1.0
    values = sorted({_number(row.point[axis]) for row in part})
    for number, line in enumerate(list(_lines(sweep, part, axis).values())[:LINES]):
        points = [(_number(row.point[axis]), row.spread(name)) for row in line]
        there = sorted(((x, found) for x, found in points if found), key=lambda one: one[0])
        axes.errorbar(
            [x for x, _ in there],
            [scale * found.mean for _, found in there],
            yerr=[scale * (found.deviation or 0.0) for _, found in there],
            color=_colour(number),
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            capsize=3,
            label=_plain(point_name(sweep, line[0], [other for other in sweep.axes if other != axis])),
        )
    if values[0] > 0 and values[-1] / values[0] > WIDE:
        axes.set_xscale("log")
    axes.set_xticks(values, [shown(value) for value in values])
    axes.minorticks_off()
    axes.set_xlabel(axis)


def _number(value: Value) -> float:
    assert not isinstance(value, str)
    return float(value)


def _gains(sweep: Sweep, rows: Sequence[Row], output: Path) -> list[tuple[str, str]]:
    """What each client's personal adapter gains over the one it shares, against the examples that it trains on."""
    there = [row for row in rows if any(record.clients for record in row.done)]
    left_out, there = len(there[LINES:]), there[:LINES]
    if not there:
        return []
    figure, (axes,) = _canvas()
    counts = [count for row in there for record in row.done for count, _ in record.clients]
    alike = max(counts) <= ALIKE * min(counts)  # then the examples tell nothing apart, and rows stand side by side
    for number, row in enumerate(there):
        dots = [(number if alike else count, gain) for record in row.done for count, gain in record.clients]
        x, y = [count for count, _ in dots], [100 * gain for _, gain in dots]
        look = {"color": _colour(number), "marker": MARKERS[number % len(MARKERS)], "alpha": 0.7, "s": 22}
        axes.scatter(x, y, label=_plain(point_name(sweep, row)), **look)
    axes.axhline(0.0, color="#555555", linewidth=1)
    if alike:
        axes.set_xticks([])
        axes.set_xlabel(f"clients, each with {counts[0]} training examples (of texts: rows)")
    else:
        axes.set_xlabel("training examples of a client (of texts: rows)")
    if max(counts) > WIDE * min(counts):
        axes.set_xscale("log")
    axes.set_ylabel(f"personal gain over {shared_adapter(sweep)}, %")
    _save(figure, axes, output / "personal-gain.png", len(there))
    title = "gain of each client's personal adapter" + ("" if alike else " against its training examples")
    return [(title + _without(left_out), "personal-gain.png")]


def _without(left_out: int) -> str:
    return f", without the last {left_out} rows" if left_out else ""
