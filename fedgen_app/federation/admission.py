"""One check per reply, in one place: what passes becomes an Update, what does not costs that client this round only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from flwr.app import Message

from fedgen_app.errors import PolicyError, meaning
from fedgen_app.federation import wire
from fedgen_app.federation.aggregation import between, change_norm, length, shrink
from fedgen_app.federation.method import ClientId, Lora, Update
from fedgen_app.learning.adapters import Adapter, Layout, at_rank, digest_of
from fedgen_app.settings import AdmissionSettings

# A mean loss per token or pixel beyond this is no measurement: ln(vocabulary) is about 12 for the largest ones.
ABSURD_LOSS = 1e4
# Perplexities can be astronomical; beyond this, sums over clients would overflow.
ABSURD_METRIC = 1e100
# Largest count of examples that is taken for a count at all; what is plausible is capped by admission.max-weight.
LARGEST_COUNT = 2**53
PERSONAL_STATES = ("frozen", "global", "personal")


class Rejected(Exception):
    """A reply that is not used; ``reason`` is one of the words of results.json, the text is for the server's log."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Expected:
    """What a good reply of this round looks like.

    Attributes:
        number: The round.
        layout: Keys and shapes of the shared tensors, at the client's rank.
        extra: Those of the method's own tensors that come with them.
        reference: The server's adapter at the client's rank, under those keys and perhaps more.
        lora: The adapter's shape on the client.
        metrics: Names of the metrics that must be there beside num-examples, and no others.
        prunes: The client may answer with a smaller rank.
    """

    number: int
    layout: Layout
    extra: Layout
    reference: Adapter
    lora: Lora
    codec: str
    metrics: frozenset[str]
    limits: AdmissionSettings
    prunes: bool = False


def check(message: Message, client: ClientId, expected: Expected) -> Update:
    """The update that a reply carries.

    Raises:
        Rejected: with the reason.
    """
    if message.has_error():
        reason = "policy" if message.error.code == PolicyError.code else "error"
        raise Rejected(reason, meaning(message.error.code))
    content = message.content
    if set(content) != {"arrays", "metrics", "reply"}:
        raise Rejected("malformed", f"records {sorted(content)[:5]}")
    try:
        arrays, metrics = content.array_records["arrays"], content.metric_records["metrics"]
        facts = content.config_records["reply"]
    except KeyError as error:
        raise Rejected("malformed", f"record {error} is of another kind") from None
    if facts.get(wire.ROUND) != expected.number:
        raise Rejected("stale", f"answers round {str(facts.get(wire.ROUND))[:80]} in round {expected.number}")
    rank = _rank(facts.get(wire.RANK), expected)
    layout = _joined(at_rank(expected.layout, rank), expected.extra)
    if facts.get(wire.LAYOUT) != digest_of(layout):
        raise Rejected("keys", f"layout {str(facts.get(wire.LAYOUT))[:80]}, expected {digest_of(layout)}")
    try:
        parcel = wire.Parcel.parted(wire.unpack(arrays, layout, expected.codec))
    except wire.WireError as error:
        raise Rejected(error.reason, str(error)) from None
    for key, tensor in parcel.joined().items():
        if not torch.isfinite(tensor).all():
            raise Rejected("non-finite", key)
    num_examples = _weight(metrics.get(wire.NUM_EXAMPLES))
    measured = _metrics(dict(metrics), expected.metrics)
    adapter = _within_norm(parcel.adapter, rank, expected)
    limit = expected.limits.max_update_norm
    if limit and length(parcel.extra) > limit:
        raise Rejected("norm", f"{length(parcel.extra):.4g} of the method's own tensors > {limit:g}")
    return Update(client, adapter, rank, num_examples, parcel.extra, measured)


def _rank(claimed: object, expected: Expected) -> int:
    """The rank of the tensors that came; the client's own where it shares none that have one."""
    largest = expected.lora.rank
    if at_rank(expected.layout, largest + 1) == expected.layout:
        return largest
    least = 1 if expected.prunes else largest
    if isinstance(claimed, bool) or not isinstance(claimed, int) or not least <= claimed <= largest:
        raise Rejected("keys", f"rank {str(claimed)[:80]}, expected {largest}")
    return claimed


def _joined(shared: Layout, extra: Layout) -> Layout:
    return tuple(sorted([*shared, *((f"{wire.EXTRA}{key}", shape) for key, shape in extra)]))


def _weight(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST_COUNT:
        raise Rejected("weight", f"num-examples = {value!r}")
    return float(value)


def _metrics(metrics: dict[str, object], names: frozenset[str]) -> dict[str, float]:
    metrics.pop(wire.NUM_EXAMPLES, None)
    if set(metrics) != names:
        raise Rejected("metrics", f"{sorted(metrics)[:5]}, expected {sorted(names)}")
    measured = {}
    for name, value in metrics.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise Rejected("metrics", f"{name} = {value!r}")
        if name.endswith("loss") and not 0 <= value < ABSURD_LOSS:
            raise Rejected("metrics", f"{name} = {value!r}")
        measured[name] = float(value)
    return measured


def _within_norm(adapter: Adapter, rank: int, expected: Expected) -> Adapter:
    """The adapter, if its change is within the limit or may be clipped to it.

    Both the product and the factors have to be: where B = 0 a product says nothing of A, and a mean of factors would
    take over an A of any size.
    """
    limit = expected.limits.max_update_norm
    if not limit:
        return adapter
    # With the factors that were not shared: the change of B alone is B' A - B A.
    old, new = expected.reference, expected.reference | adapter
    same = rank == expected.lora.rank
    product = change_norm(new, old, expected.lora.at(rank).scaling, expected.lora.scaling)
    factors = length({key: tensor - old[key] if same else tensor for key, tensor in adapter.items()})
    norm = max(product, factors)
    if norm <= limit:
        return adapter
    # Between factors of different ranks there is no line to go back on.
    if expected.limits.norm_action == "clip" and math.isfinite(norm) and same:
        nearer = between(old, new, min(1.0, limit / factors)) if factors > limit else new
        clipped = shrink(nearer, old, expected.lora.scaling, limit)
        return {key: clipped[key] for key in adapter}
    raise Rejected("norm", f"{norm:.4g} > admission.max-update-norm = {limit:g}")


def cap_weights(updates: Sequence[Update], most: float) -> list[Update]:
    """No weight above ``most`` times the median of the round's weights, so that no one can outvote all; 0: no cap."""
    if not most or not updates:
        return list(updates)
    limit = most * statistics.median_low(u.num_examples for u in updates)
    return [replace(u, num_examples=min(u.num_examples, limit)) for u in updates]


def personal_metrics(message: Message | None, number: int, names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A client's entry of ``personal``: examples and its metrics with the frozen, global and personal adapter.

    The metrics arrive as ``frozen.<name>``, ``global.<name>``, ``personal.<name>``.

    Args:
        names: What a client may send and its place in the entry: ``{"kid_by_class_3": ("kid_by_class", "bag")}``.

    Raises:
        Rejected: with the reason.
    """
    if message is None:
        raise Rejected("timeout")
    if message.has_error():
        raise Rejected("policy" if message.error.code == PolicyError.code else "error", meaning(message.error.code))
    try:
        metrics = dict(message.content.metric_records["metrics"])
        facts = message.content.config_records["reply"]
    except KeyError as error:
        raise Rejected("malformed", f"no record {error}") from None
    if facts.get(wire.ROUND) != number:
        raise Rejected("stale", f"answers round {facts.get(wire.ROUND)!r}")
    entry: dict[str, Any] = {"examples": int(_weight(metrics.pop(wire.NUM_EXAMPLES, None)))}
    measured: dict[str, set[str]] = {state: set() for state in PERSONAL_STATES}
    for name, value in sorted(metrics.items()):
        state, _, metric = name.partition(".")
        if state not in PERSONAL_STATES or metric not in names:
            raise Rejected("metrics", f"unexpected metric {name[:80]!r}")
        if not isinstance(value, int | float) or not abs(value) <= ABSURD_METRIC:
            raise Rejected("metrics", f"{name} = {str(value)[:80]}")
        measured[state].add(metric)
        place = entry.setdefault(state, {})
        for part in names[metric][:-1]:
            place = place.setdefault(part, {})
        place[names[metric][-1]] = float(value)
    if len(set(map(frozenset, measured.values()))) != 1 or not measured["global"]:
        raise Rejected("metrics", "frozen, global and personal do not have the same metrics")
    return entry


def cap_examples(entries: Sequence[dict[str, Any]], most: float) -> list[dict[str, Any]]:
    """Personal entries whose ``examples`` are capped as weights are (``cap_weights``): no client owns the mean."""
    if not most or not entries:
        return list(entries)
    limit = max(1, int(most * statistics.median_low(entry["examples"] for entry in entries)))
    return [{**entry, "examples": min(entry["examples"], limit)} for entry in entries]
