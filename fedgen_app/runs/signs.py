"""Signs of failure: divergence, and those that the FedGen-Edge paper names (arXiv 2511.11585); one line each.

They are read from results.json.

Each line says what was seen and what to do about it, as "<sign>: <what>; <what to do>".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedgen_app.runs import report

# Root mean square of the relative steps for the worse. A run that converges makes steps for the better, which count as
# 0; the noise of a small test set, or of FID at some hundred images, moves a figure by 1-3 %; at 5 % it swings.
UNSTEADY = 0.05
LEAST_MEASURED = 3  # measured rounds: with fewer there is one step, which is no variance
# A personal adapter is worse where its figure is more than this fraction above the global one's: they are measured on
# the same hold-out under the same noise, so that what is left is rounding and the last optimiser step.
WORSE = 0.005
# Diversity relative to real images; half of what the frozen backbone had is a loss that the federation itself caused.
HALF = 0.5


def signs(results: Mapping[str, Any]) -> list[str]:
    """All signs of failure in a finished run, the paper's in its order; [] where there is none."""
    return [*diverged(results), *unstable(results), *personal_worse(results), *collapsed(results)]


def diverged(results: Mapping[str, Any]) -> list[str]:
    """What was measured on the server's test set was no finite number."""
    wrong = [entry for entry in results["rounds"] if entry.get("not_finite")]
    if not wrong:
        return []
    names = ", ".join(_words(name) for name in wrong[-1]["not_finite"])
    rounds = ", ".join(str(entry["round"]) for entry in wrong)
    return [
        f"divergence: not a finite number after round {rounds}: {names}; a smaller learning-rate or clip-norm, from a "
        "checkpoint before it"
    ]


def unstable(results: Mapping[str, Any]) -> list[str]:
    """The headline metric on the server's test set rises and falls from round to round."""
    measured = [entry["metrics"] for entry in results["rounds"] if entry["metrics"]]
    metric = report.headline(measured[-1] if measured else None)
    values = [float(metrics[metric]) for metrics in measured if math.isfinite(metrics.get(metric, math.nan))]
    if len(values) < LEAST_MEASURED or min(values) <= 0:
        return []
    steps = [after / before - 1 for before, after in zip(values, values[1:], strict=False)]
    worse = [step for step in steps if step > 0]
    if math.sqrt(sum(step**2 for step in worse) / len(steps)) <= UNSTEADY:
        return []
    return [
        f"unstable aggregation: {_words(metric)} got worse in {len(worse)} of {len(steps)} steps between measured "
        f"rounds, by up to {max(worse):.0%}; a larger fraction-train, fewer local-epochs or a smaller learning-rate "
        "calm it"
    ]


def personal_worse(results: Mapping[str, Any]) -> list[str]:
    """Personal adapters are worse than the global one, in the weighted mean or on most of the clients."""
    entries = results["personal"]
    metric = _common(entries)
    both = [entry for entry in entries if metric in entry["global"]]
    worse = [entry for entry in both if _is_worse(entry["personal"][metric], entry["global"][metric])]
    means = {state: report.weighted(both, state).get(metric, 0.0) for state in ("global", "personal")}
    if not _is_worse(means["personal"], means["global"]) and 2 * len(worse) <= len(both):
        return []
    return [
        f"personal worse than global: {_words(metric)} {report.number(means['personal'])} against "
        f"{report.number(means['global'])}, worse on {len(worse)} of {len(both)} clients ({_examples(worse)}), "
        "usual with little local data; fewer personal.epochs, a smaller personal.learning-rate or a personal.proximal "
        "help"
    ]


def _common(entries: Sequence[Mapping[str, Any]]) -> str:
    """The headline of the numbers that at least half of the clients measured: not every client can measure KID."""
    counts = Counter(name for entry in entries for name, v in entry["global"].items() if isinstance(v, int | float))
    return report.headline({name: count for name, count in sorted(counts.items()) if 2 * count >= len(entries)})


def _is_worse(personal: float, shared: float) -> bool:
    return personal - shared > WORSE * abs(shared)  # an unbiased KID may be negative


def _examples(entries: Sequence[Mapping[str, Any]]) -> str:
    counts = [int(entry["examples"]) for entry in entries]
    if not counts:
        return "none clearly"
    return f"{min(counts)} to {max(counts)} examples" if min(counts) != max(counts) else f"{counts[0]} examples"


def collapsed(results: Mapping[str, Any]) -> list[str]:
    """What is generated varies far less than real examples do, or less than half as much as before the federation."""
    final = results["final"]
    if not final or final["source"] != "server":
        return []
    after, before = (final["metrics"] or {}).get("diversity"), (results["frozen"] or {}).get("diversity")
    # What varies more than real images may well fall: that is no collapse.
    if after is None or not (after < report.LEAST_DIVERSITY or (before and after < min(1, HALF * before))):
        return []
    was = f", {before:.2f} with the frozen backbone" if before is not None else ""
    return [
        f"collapse of diversity: the samples vary {after:.2f} times as much as real ones{was}; a smaller learning-rate "
        "or lora.rank, less samples.guidance, and look at the figures by class"
    ]


def _words(metric: str) -> str:
    return metric.replace("_", " ")
