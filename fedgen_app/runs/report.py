"""What a run says of itself: results.json, one line per event, the table at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedgen_app.learning.backbone import Backbone

SCHEMA = 1


# What the closing table shows of a task's metrics: the first of these that was measured.
HEADLINES = ("word_perplexity", "bits_per_dim", "fid", "kid", "denoising_loss", "sliced_wasserstein")


# Generated images that vary less than this fraction of real ones are worth a warning: the generator may have collapsed.
LEAST_DIVERSITY = 0.25
ALIKE = " (WARNING: the images are nearly alike)"


def opening(task: str, method: str, run: str) -> dict[str, Any]:
    """results.json as it stands before anything is known: a run that fails early leaves this, with the reason."""
    return {
        "schema": SCHEMA,
        "task": task,
        "method": method,
        "run": run,
        "status": "running",
        "frozen": None,
        "rounds": [],
        "final": None,
        "personal": [],
    }


def foundation(backbone: Backbone, rank: int | None, adapter_parameters: int) -> dict[str, Any]:
    """The parts of results.json about what the run stands on; rank None: all weights learn."""
    return {
        "backbone": {
            "name": backbone.name,
            "fingerprint": backbone.fingerprint,
            "parameters": backbone.parameters,
            "bytes": backbone.full_bytes,
        },
        "adapter": {"rank": rank, "parameters": adapter_parameters, "bytes": 4 * adapter_parameters},
    }


def split_line(partition: Mapping[str, Any] | None) -> str:
    """How the data was dealt, in words."""
    if partition is None:
        return "each device has its own"
    dealt = f", Dirichlet alpha {partition['alpha']:g}" if partition["alpha"] is not None else ""
    return f"{partition['by']}{dealt}, {partition['clients']} simulated clients"


def weighted(entries: Sequence[Mapping[str, Any]], state: str) -> dict[str, Any]:
    """Mean of the clients' metrics in one state, weighted by their training examples.

    Each metric, and each class's, over the clients that measured it: one with too few images for KID has a loss.
    """
    return _mean([(entry["examples"], entry[state]) for entry in entries])


def _mean(measured: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    means: dict[str, Any] = {}
    for name in sorted({name for _, found in measured for name in found}):
        there = [(examples, found[name]) for examples, found in measured if name in found]
        if isinstance(there[0][1], Mapping):
            means[name] = _mean(there)
        else:
            means[name] = sum(n * value for n, value in there) / sum(n for n, _ in there)
    return means


def measured_by(entries: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many clients measured each metric."""
    return dict(sorted(Counter(name for entry in entries for name in entry["global"]).items()))


def final(results: Mapping[str, Any]) -> dict[str, Any]:
    """The ``final`` entry: metrics and their source, the personal means and over how many clients, what was sent.

    The metrics are those of the last round that was measured: None where they were not finite there. The uplink per
    client and round is the mean over all admitted replies of the run.
    """
    rounds, personal = results["rounds"], results["personal"]
    last = next((r for r in reversed(rounds) if r["metrics"] is not None or "not_finite" in r), None)
    means = {state: weighted(personal, state) for state in ("frozen", "global", "personal")} if personal else None
    replies = sum(len(r["clients"]) for r in rounds)
    sent = sum(r["admitted_bytes"] for r in rounds)
    uplink = round(sent / replies) if replies else None
    full = results["backbone"]["bytes"]
    return {
        "metrics": last["metrics"] if last else means["global"] if means else None,
        "source": "server" if last else "clients",
        "personal": means,
        "personal_clients": measured_by(personal),
        "uplink_bytes_per_client_round": uplink,
        "full_model_bytes": full,
        "uplink_reduction": 1 - uplink / full if uplink is not None else None,
    }


def line(event: Mapping[str, Any]) -> str | None:
    """One clear line for an event of events.jsonl; None for those that only move a bar."""
    match event["event"]:
        case "start":
            done = f", {event['done']} already done" if event["done"] else ""
            what = "all weights" if event["rank"] is None else f"rank {event['rank']}"
            return (
                f"{event['task']}, {event['method']}, {what}: {event['rounds']} rounds{done}, "
                f"{event['clients']} clients"
            )
        case "frozen":
            return f"frozen backbone: {_metrics(event['metrics'])}"
        case "round":
            return _round_line(event)
        case "rejected":
            return f"  client {event['client']} not used in round {event['round']}: {event['detail']}"
        case "left-out":
            who = f"node {event['node']}" if event["client"] is None else f"client {event['client']}"
            return f"  {who} left out ({event['reason']}): {event['detail']}"
        case "clusters":
            sizes = ", ".join(f"{cluster}: {len(clients)}" for cluster, clients in event["clusters"].items())
            return f"  {len(event['clusters'])} clusters in round {event['round']} (clients in each: {sizes})"
        case "too-few":
            return f"  cluster {event['cluster']} cannot be trained: {event['reason']}"
        case "undivided" if "requirements" in event:
            return (
                f"  clusters stay as they are in round {event['round']}: of those in them {event['requirements']} are "
                f"there with a requirement, {event['needed']} are needed"
            )
        case "undivided":
            return (
                f"  clients are not told apart in round {event['round']}: {event['replies']} replies, "
                f"{event['needed']} are needed"
            )
        case "warning":
            return f"  WARNING: {event['text']}"
        case "unplaced":
            return f"  client {event['client']} is in no cluster and does not train: {event['reason']}"
        case "noise":
            return (
                f"  requirements carry noise {event['sigma']:g}: (epsilon, delta) = ({event['epsilon']:.3g}, "
                f"{event['delta']:g}) for each client's vector, drawn once"
            )
        case "silent":
            return f"  node {event['node']} does not answer the roll call"
        case "not-finite":
            return f"  round {event['round']}: the metrics are not finite ({', '.join(event['metrics'])})"
        case "skipped":
            return f"  round {event['round']} skipped: {event['reason']}"
        case "duplicate":
            return f"  client {event['client']} answered round {event['round']} twice: the second reply is ignored"
        case "roll-call-timeout":
            return f"  only {event['clients']} of {event['expected']} clients came in time; going on with them"
        case "personal":
            return f"personal adapters: {event['clients']} clients"
    return None


def _round_line(event: Mapping[str, Any]) -> str:
    chosen = len(event["clients"]) + len(event["rejected"])
    loss = "no loss" if event["train_loss"] is None else f"train loss {event['train_loss']:.3f}"
    measured = f", {_metrics(event['metrics'])}" if event["metrics"] else ""
    return (
        f"round {event['round']}/{event['of']}: {len(event['clients'])}/{chosen} clients, {loss}{measured}, "
        f"up {size(event['uplink_bytes'])}, {event['seconds']:.1f} s"
    )


def _metrics(metrics: Mapping[str, Any] | None) -> str:
    if not metrics:
        return "no test data on the server"
    name = headline(metrics)
    alike = ALIKE if metrics.get("diversity", 1.0) < LEAST_DIVERSITY else ""
    return f"{name.replace('_', ' ')} {number(metrics[name])}{basis(metrics)}{alike}"


def basis(metrics: Mapping[str, Any]) -> str:
    """What a distance between images is worth: the extractor, n, and what real images have among themselves."""
    if headline(metrics) not in ("fid", "kid") or "samples" not in metrics:  # means over clients have no one basis
        return ""
    floor = f", floor {number(metrics['fid_floor'])}" if "fid_floor" in metrics else ""
    return f" (n {metrics['samples']}, {metrics['features']}{floor})"


def number(value: object) -> str:
    """Four significant figures; a dash where nothing was measured."""
    if not isinstance(value, int | float):
        return "-"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def size(count: float) -> str:
    """Bytes with a unit, decimal."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def headline(metrics: Mapping[str, Any] | None) -> str:
    """The metric that the closing table shows of these."""
    found = metrics or {}
    return next((name for name in HEADLINES if name in found), next(iter(found), ""))


def table(results: Mapping[str, Any]) -> tuple[tuple[str, str], list[tuple[str, str, str]]]:
    """The closing table: the metrics of the server's test set and of the clients' hold-outs; rows with both."""
    done = results["final"] or {}
    means = done.get("personal") or {}
    by_server = done.get("source") == "server"
    metric = headline((done.get("metrics") if by_server else None) or results["frozen"])
    # What every client measured comes before what few of them did.
    clients = done.get("personal_clients") or {}
    most = max(clients.values(), default=0)
    local = headline({name: v for name, v in means.get("global", {}).items() if clients.get(name, most) == most})
    server = {
        "frozen": (results["frozen"] or {}).get(metric),
        "global": (done.get("metrics") or {}).get(metric) if by_server else None,
        "personal": None,
    }
    own = {state: means.get(state, {}).get(local) for state in server}
    return (metric, local), [(state, number(server[state]), number(own[state])) for state in server]
