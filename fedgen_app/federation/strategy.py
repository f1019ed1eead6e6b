"""FedLora: one round is choose, send, admit, aggregate, save, evaluate; no client can spoil it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedgen_app.errors import RunError
from fedgen_app.federation import admission, wire
from fedgen_app.federation.exchange import TTL_MARGIN, Patience, Replies, collect
from fedgen_app.federation.groups import Groups
from fedgen_app.federation.hierarchy import Hierarchy
from fedgen_app.federation.method import ClientId, GlobalState, Lora, Method, Round, Update
from fedgen_app.federation.robust import objection
from fedgen_app.federation.roster import Roster, chosen_count, in_order
from fedgen_app.federation.work import round_plan
from fedgen_app.learning.adapters import Layout, at_rank
from fedgen_app.learning.training import planned_steps
from fedgen_app.seeds import derive
from fedgen_app.settings import Settings

TRAIN = MessageType.TRAIN
PERSONALISE = f"{MessageType.TRAIN}.personalise"
TRAIN_METRICS = frozenset({"train_loss", "seconds"})
# So many rounds in a row without one usable reply are no bad luck any more.
FUTILE_ROUNDS = 3
UNREADABLE = ("malformed", "it cannot be read at all")

# As Flower has it, less MetricRecord: that holds no names and no numbers by class.
Evaluate = Callable[[int, ArrayRecord], Mapping[str, Any] | None]
Save = Callable[[int, Groups, list[dict[str, Any]]], None]


def averaged_in(entry: Mapping[str, Any]) -> list[ClientId]:
    """Whose replies a round's entry says to be in the server's tensors: not those that only placed a newcomer."""
    if "clusters" not in entry:
        return list(entry["clients"])
    return [client for part in entry["clusters"] if "skipped" not in part for client in part["clients"]]


@dataclass
class Outcome:
    """What became of the clients chosen in one exchange.

    Attributes:
        chosen: Which cluster's adapter each client chose, where it had the choice.
        facts: Further fields of the round's entry in results.json.
    """

    updates: list[Update] = field(default_factory=list)
    chosen: dict[ClientId, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    duplicates: list[ClientId] = field(default_factory=list)
    uplink_bytes: int = 0
    admitted_bytes: int = 0
    downlink_bytes: int = 0


class FedLora(Strategy):
    """Federated averaging of adapters (or another method's rule) with bounded waiting, admission and checkpoints.

    Args:
        hierarchy: The state, or with clusters their states, and what becomes of replies.
        history: The entries of ``rounds`` in results.json so far; a resumed run goes on after them.
        layout: Of the largest adapter.
        save: Called with (round, state, history) after every aggregation.
        report: Called with (event, fields) whenever something is worth a line.
    """

    def __init__(
        self,
        settings: Settings,
        method: Method,
        lora: Lora,
        roster: Roster,
        hierarchy: Hierarchy,
        history: list[dict[str, Any]],
        layout: Layout,
        run_name: str,
        save: Save,
        report: Callable[..., None],
    ) -> None:
        self.settings = settings
        self.method = method
        self.lora = lora
        self.roster = roster
        self.hierarchy = hierarchy
        self.history = history
        self.layout = layout
        self.run_name = run_name
        self.save = save
        self.report = report
        self._nodes: dict[int, ClientId] = {}
        self._deadline = settings.round.deadline

    @property
    def state(self) -> GlobalState:
        """The global state; with clusters their mean, which newcomers get and nobody else learns from."""
        return self.hierarchy.groups.shared

    def summary(self) -> None:
        """Say what is about to happen."""
        s = self.settings
        self.report(
            "start",
            task=s.task,
            method=s.method,
            rounds=s.num_server_rounds,
            done=len(self.history),
            clients=len(self.roster.members),
            rank=self.lora.rank if self.method.weights == "adapter" else None,
            held=self.roster.held(),
        )
        for text in self.hierarchy.cautions():
            self.report("warning", text=text)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 0,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Evaluate | None = None,
    ) -> Result:
        """Run the rounds that are still to be done, up to ``num_rounds`` (0: as the settings say).

        The state is the strategy's own (``state``), not ``initial_arrays``; ``round.deadline`` bounds the waiting.

        Raises:
            RunError: no client is left, or nothing usable came back for several rounds.
        """
        self.summary()
        self._check_fleet()
        if self.history and self.history[-1]["metrics"] is None:  # ended between saving and measuring
            self._evaluate(self.history[-1], evaluate_fn)
        for number in range(len(self.history) + 1, (num_rounds or self.settings.num_server_rounds) + 1):
            began = time.monotonic()
            self.roster.ask_newcomers(grid, self.settings.round.roll_call)
            self.hierarchy.prepare(number)
            messages = list(self.configure_train(number, ArrayRecord(), train_config or ConfigRecord(), grid))
            replies = collect(grid, messages, self._patience(), self._progress(f"round {number}"))
            outcome = self._admit(number, replies)
            self._aggregate(number, outcome)
            entry = self._entry(number, outcome)
            entry["seconds"] = round(time.monotonic() - began, 3)
            self.history.append(entry)
            self.save(number, self.hierarchy.groups, self.history)
            self._evaluate(entry, evaluate_fn)
            self.report("round", of=self.settings.num_server_rounds, **entry)
            self._stop_if_futile(number, replies, grid)
        result = Result()
        result.arrays = wire.pack(self.state.adapter, "fp32")
        return result

    def _evaluate(self, entry: dict[str, Any], evaluate_fn: Evaluate | None) -> None:
        if evaluate_fn and self._evaluates(entry["round"]):
            measured = evaluate_fn(entry["round"], wire.pack(self.state.adapter, "fp32"))
            if measured is None:
                return
            wrong = [name for name, value in measured.items() if isinstance(value, float) and not math.isfinite(value)]
            if wrong:
                entry["not_finite"] = sorted(wrong)  # else the figures of the round before would stand for the run
                self.report("not-finite", round=entry["round"], metrics=sorted(wrong))
            else:
                entry["metrics"] = dict(measured)

    def _evaluates(self, number: int) -> bool:
        every = self.settings.evaluate_every
        return number == self.settings.num_server_rounds or bool(every and number % every == 0)

    def _patience(self) -> Patience:
        waiting = self.settings.round
        return Patience(self._deadline, waiting.quorum, waiting.grace)

    def _progress(self, what: str) -> Callable[[int, int], None]:
        return lambda done, of: self.report("reply", what=what, done=done, of=of)

    def _round(self, number: int) -> Round:
        seed = derive(self.settings.seed, "round", number)
        return Round(number, self.lora, seed, self.settings, self.layout, len(self.roster.members))

    def rank(self, client: ClientId) -> int:
        """Of a client's adapter: what it last answered with, else what it settled on in the roll call."""
        for entry in reversed(self.history):
            if client in entry["clients"] and "ranks" in entry:
                return int(entry["ranks"][entry["clients"].index(client)])
        return min(self.roster.members[client].rank, self.lora.rank)

    def _check_fleet(self) -> None:
        """Refuse clients that the method cannot work with, before anyone has trained.

        Raises:
            RunError: with what to do.
        """
        if self.method.pooled and not self.roster.simulated:
            raise RunError(f"method = {self.settings.method}: for simulations only; no device gives its data away")
        if reason := objection(self.settings.aggregation, self._chosen()):
            raise RunError(reason)

    def _chosen(self) -> int:
        return chosen_count(len(self.roster.members), self.settings.fraction_train)

    def _parcel(self, number: int, client: ClientId) -> wire.Parcel | wire.Offers:
        """What goes down to a client: its cluster's tensors, or those of all from which it chooses."""
        round_, rank = self._round(number), self.rank(client)

        def parcel(state: GlobalState) -> wire.Parcel:
            """The adapter at the client's rank, the residual, the method's own tensors."""
            adapter = self.hierarchy.cut(self.method.sends(state, round_), rank)
            return wire.Parcel(adapter, state.residual, self.method.sends_extra(state, round_))

        if offers := self.hierarchy.offers(number, client):
            return wire.Offers({cluster: parcel(state) for cluster, state in offers.items()})
        return parcel(self.hierarchy.groups.state_of(client))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose clients and address each its own message.

        Raises:
            RunError: no client is connected, or none that belongs to a cluster.
        """
        s, placement = self.settings, self.hierarchy.placement
        present = self._wait_for_clients(grid, server_round, to_train=True)
        everyone = placement.asks_everyone(server_round, self.hierarchy.groups)
        fraction = 1.0 if everyone else s.fraction_train
        chosen = self.roster.choose(present, fraction, s.seed, server_round, s.selection)
        deadline = self._time_for_all(len(present)) if everyone else s.round.deadline
        if self.method.pooled:
            return self.address(server_round, chosen[:1], TRAIN, deadline * len(chosen), self._steps(chosen))
        return self.address(server_round, chosen, TRAIN, deadline)

    def _steps(self, clients: Iterable[ClientId]) -> int:
        """Optimiser steps that these clients would take in a round, together."""
        plan = round_plan(self.settings, 1, 0, torch.float32)
        return sum(planned_steps(self.roster.members[client].num_examples, plan) for client in clients)

    def _wait_for_clients(self, grid: Grid, number: int, to_train: bool = False) -> list[ClientId]:
        """The clients that are there, or will be within ``round.roll-call`` seconds.

        Args:
            to_train: Only those that train: by prompts and by truth they need a cluster.

        Raises:
            RunError: nobody is.
        """
        end = time.monotonic() + self.settings.round.roll_call
        while not (present := self._present(grid, to_train)):
            if time.monotonic() >= end:
                lacking = "is connected" if not self.roster.present(grid) else "that is connected belongs to a cluster"
                waited = f"(waited {self.settings.round.roll_call:g} s)"
                raise RunError(f"no client {lacking} in round {number} {waited}")
            time.sleep(0.5)
            known = {member.node for member in self.roster.members.values()}
            self.roster.ask_newcomers(grid, self.settings.round.roll_call)
            if to_train and {member.node for member in self.roster.members.values()} != known:
                self.hierarchy.prepare(number)
        return present

    def _present(self, grid: Grid, to_train: bool) -> list[ClientId]:
        groups, takes_part = self.hierarchy.groups, self.hierarchy.placement.takes_part
        return [client for client in self.roster.present(grid) if not to_train or takes_part(groups, client)]

    def address(
        self, number: int, clients: list[ClientId], kind: str, deadline: float, steps: int = 0
    ) -> list[Message]:
        """One message per client with a record of its own."""
        config: dict[str, int | float | str] = {wire.ROUND: number, wire.RUN: self.run_name, wire.STEPS: steps}
        self._nodes = {self.roster.members[client].node: client for client in clients}
        averaged = {client: entry["round"] for entry in self.history for client in averaged_in(entry)}  # the last wins
        messages = [
            Message(
                wire.instruction(
                    self._parcel(number, client),
                    self.settings.wire.codec,
                    config | {wire.AVERAGED: averaged.get(client, 0)},
                ),
                node,
                kind,
                ttl=deadline + TTL_MARGIN,
            )
            for node, client in self._nodes.items()
        ]
        self._deadline = deadline
        return messages

    def _admit(self, number: int, replies: Replies) -> Outcome:
        """Sort the replies into updates and rejections, both in client order."""
        outcome = Outcome(downlink_bytes=replies.sent_bytes)
        by_client = {client: node for node, client in self._nodes.items()}
        for client in in_order(by_client):
            if by_client[client] in replies.unreadable:
                self._reject(outcome, number, client, admission.Rejected(*UNREADABLE))
                continue
            message = replies.messages.get(by_client[client])
            if message is None:
                self._reject(outcome, number, client, admission.Rejected("timeout"))
                continue
            size = wire.byte_size(message)
            outcome.uplink_bytes += size
            try:
                cluster = self._choice(message, number, client)
                outcome.updates.append(admission.check(message, client, self._expected(number, client, cluster)))
                outcome.admitted_bytes += size
                if cluster is not None:
                    outcome.chosen[client] = cluster
            except admission.Rejected as rejection:
                self._reject(outcome, number, client, rejection)
        for node in sorted(replies.duplicates):
            outcome.duplicates.append(self._nodes[node])
            self.report("duplicate", round=number, client=self._nodes[node])
        return outcome

    def _choice(self, message: Message, number: int, client: ClientId) -> int | None:
        """Which of the clusters that it was offered a client's reply is for; None where it was offered none."""
        offers = self.hierarchy.offers(number, client)
        return admission.chosen_cluster(message, offers) if offers else None

    def _expected(self, number: int, client: ClientId, cluster: int | None = None) -> admission.Expected:
        round_, rank = self._round(number), self.rank(client)
        shared = tuple((key, shape) for key, shape in at_rank(self.layout, rank) if self.method.shares(key, round_))
        return admission.Expected(
            number,
            shared,
            self.method.shares_extra(shared, round_),
            self.hierarchy.adapter_for(client, rank, cluster),
            self.lora.at(rank),
            self.settings.wire.codec,
            TRAIN_METRICS,
            self.settings.admission,
            prunes=self.method.fit is not None,
        )

    def _reject(self, outcome: Outcome, number: int, client: ClientId, rejection: admission.Rejected) -> None:
        outcome.rejected.append({"client": client, "reason": rejection.reason})
        self.report("rejected", round=number, client=client, reason=rejection.reason, detail=str(rejection))

    def _aggregate(self, number: int, outcome: Outcome) -> None:
        taken = self.hierarchy.take(outcome.updates, outcome.chosen, self._round(number))
        clustered = self.hierarchy.groups.clustered
        for cluster, reason in taken.stays.items():
            self.report("skipped", round=number, reason=f"cluster {cluster}: {reason}" if clustered else reason)
        outcome.updates, outcome.facts = taken.updates, taken.facts
        if taken.clusters:
            outcome.facts |= {"clusters": taken.clusters}

    def _entry(self, number: int, outcome: Outcome) -> dict[str, Any]:
        total = sum(u.num_examples for u in outcome.updates)
        loss = sum(u.num_examples * u.metrics["train_loss"] for u in outcome.updates) / total if total else None
        return {
            "round": number,
            "clients": [u.client for u in outcome.updates],
            "rejected": outcome.rejected,
            "train_loss": loss,
            "metrics": None,
            "duplicates": outcome.duplicates,
            "uplink_bytes": outcome.uplink_bytes,
            "admitted_bytes": outcome.admitted_bytes,
            "downlink_bytes": outcome.downlink_bytes,
            **({"ranks": [u.rank for u in outcome.updates]} if self.method.fit else {}),
            **outcome.facts,
        }

    def _stop_if_futile(self, number: int, replies: Replies, grid: Grid) -> None:
        if not replies.messages and set(self._nodes) >= set(grid.get_node_ids()):
            raise RunError(
                f"no client answered in round {number} within {self.settings.round.deadline:g} s (round.deadline)"
            )
        recent = self.history[-FUTILE_ROUNDS:]
        if len(recent) < FUTILE_ROUNDS:
            return
        if not any(entry["clients"] for entry in recent):
            reasons = sorted({r["reason"] for entry in recent for r in entry["rejected"]})
            raise RunError(
                f"no usable reply in {FUTILE_ROUNDS} rounds in a row, reasons: {', '.join(reasons)}; the clients' own "
                "logs say why"
            )
        stayed = [[part.get("skipped") for part in entry.get("clusters", ())] for entry in recent]
        if all(reasons and all(reasons) for reasons in stayed):
            why = "; ".join(sorted({reason for reasons in stayed for reason in reasons}))
            raise RunError(f"every cluster stayed as it was in {FUTILE_ROUNDS} rounds in a row, reasons: {why}")

    def _time_for_all(self, present: int) -> float:
        """Seconds to wait where all clients are asked: more than in a round queue for the same machines."""
        per_round = chosen_count(present, self.settings.fraction_train)
        return self.settings.round.deadline * math.ceil(present / per_round)

    def personalise(
        self, grid: Grid, metrics: Mapping[str, tuple[str, ...]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Every client that is there fine-tunes the final adapter and measures it; only metrics come back.

        Args:
            metrics: What a client may send, and the places in its entry (``Task.client_metrics``).

        Returns:
            The entries of ``personal`` in results.json, in client order, and the clients that could not be used.
        """
        number = self.settings.num_server_rounds + 1
        present = self._wait_for_clients(grid, number)
        deadline = self._time_for_all(len(present))
        messages = self.address(number, present, PERSONALISE, deadline)
        names = dict(self._nodes)
        replies = collect(grid, messages, Patience(deadline), self._progress("personalisation"))
        found = {names[node]: message for node, message in replies.messages.items()}
        entries: list[dict[str, Any]] = []
        outcome = Outcome()
        for client in in_order(names.values()):
            try:
                if self.roster.members[client].node in replies.unreadable:
                    raise admission.Rejected(*UNREADABLE)
                entries.append({"client": client, **admission.personal_metrics(found.get(client), number, metrics)})
            except admission.Rejected as rejection:
                self._reject(outcome, number, client, rejection)
        return admission.cap_examples(entries, self.settings.admission.max_weight), outcome.rejected

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Admit the replies to ``configure_train``'s messages and apply the method's rule."""
        answered = Replies({m.metadata.src_node_id: m for m in replies})
        outcome = self._admit(server_round, answered)
        self._aggregate(server_round, outcome)
        if not outcome.updates:
            return None, None
        metrics = MetricRecord({"train_loss": self._entry(server_round, outcome)["train_loss"]})
        return wire.pack(self.state.adapter, "fp32"), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No messages: local evaluation rides on the training reply, one message per client and round."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing to add up."""
        return None
