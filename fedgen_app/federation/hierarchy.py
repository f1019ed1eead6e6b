"""The two levels of a clustered run as the rounds see them: who starts from what, and what becomes of the replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedgen_app.federation.admission import cap_weights
from fedgen_app.federation.groups import Groups, anew, rule_in_each
from fedgen_app.federation.layerwise import layer_wise
from fedgen_app.federation.method import ClientId, GlobalState, Lora, Method, Round, Update
from fedgen_app.federation.mixing import interact, with_global
from fedgen_app.federation.placement import BY_REPLIES, Placement
from fedgen_app.federation.robust import objection, robust
from fedgen_app.learning.adapters import Adapter
from fedgen_app.settings import Settings

# What becomes of methods that go on from more than the adapter, as mixing gives it another basis.
DISTURBED = {
    "fedavgm": "the momentum of fedavgm starts anew",
    "fedadam": "the moments of fedadam start anew",
    "fedyogi": "the moments of fedyogi start anew",
    "scaffold": "the control variates of scaffold start anew",
    "ditto": "the clients' own adapters of ditto are pulled to factors in another basis",
}


@dataclass
class Taken:
    """What a round's replies did.

    Attributes:
        updates: With their weights capped, each within its cluster.
        stays: Why a cluster's state stays as it was.
        clusters: One entry per cluster for the round's in results.json; empty without clusters.
        facts: Further fields of the round's entry.
    """

    updates: list[Update]
    stays: dict[int, str]
    clusters: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


class Hierarchy:
    """Level 1 in each cluster, level 2 between them, a global adapter above; of one group the method and no more."""

    def __init__(self, settings: Settings, method: Method, lora: Lora, groups: Groups, placement: Placement) -> None:
        self.settings = settings
        self.method = method
        self.lora = lora
        self.groups = groups
        self.placement = placement
        rule = layer_wise(method.rule) if settings.aggregation.layer_wise else method.rule
        self._rule = robust(rule, method.fit, method.widen)

    def cautions(self) -> list[str]:
        """What the settings let happen that their user may not expect, one sentence each."""
        wanted, roster, found = self.settings.clusters, self.placement.roster, []
        if wanted.by == "prompts" and not (roster.simulated or roster.expected or self.groups.clustered):
            found.append(
                "expected-clients = 0: whoever answers first forms the clusters, and settles their encoder and key"
            )
        mixes = wanted.by != "none" and wanted.strength and wanted.interact_every
        if mixes and self.settings.method in DISTURBED:
            found.append(
                f"clusters.interact-every = {wanted.interact_every}: whenever clusters mix, "
                f"{DISTURBED[self.settings.method]}"
            )
        return found

    def prepare(self, number: int) -> None:
        """Place whoever can be placed before a round."""
        self.groups = self.placement.before(number, self.groups)

    def adapter_for(self, client: ClientId, rank: int, cluster: int | None = None) -> Adapter:
        """The server's adapter for a client at its rank: of its own cluster, or of another one."""
        state = self.groups.state_of(client) if cluster is None else self.groups.states[cluster]
        return self.cut(state.adapter, rank)

    def cut(self, adapter: Adapter, rank: int) -> Adapter:
        """An adapter at a client's rank."""
        if self.method.fit and rank != self.lora.rank:
            return self.method.fit(adapter, self.lora, self.lora.at(rank))
        return adapter

    def offers(self, number: int, client: ClientId) -> dict[int, GlobalState]:
        """The clusters that a client chooses from by its loss (IFCA); empty where it is told where it is.

        After the last round it stays where it trained, and its figures are that cluster's.
        """
        by_loss = self.settings.clusters.by == "loss" and len(self.groups.states) > 1
        chooses = self.settings.clusters.warmup < number <= self.settings.num_server_rounds
        if not by_loss or (not chooses and client in self.groups.where):
            return {}
        return dict(self.groups.states)

    def take(self, updates: Sequence[Update], chosen: Mapping[ClientId, int], round_: Round) -> Taken:
        """Aggregate a round's admitted replies.

        Args:
            chosen: Which cluster each client chose, where it had the choice.
        """
        number, before = round_.number, self.groups
        home: dict[ClientId, int] = {}
        for update in updates:
            home[update.client] = chosen.get(update.client, before.where.get(update.client, -1))
        if not before.clustered:
            home = dict.fromkeys(home, 0)
        seen = None
        compared = self.placement.asks_everyone(number, before) or (before.clustered and -1 in home.values())
        if self.settings.clusters.by in BY_REPLIES and compared and updates:
            received = [self.adapter_for(update.client, update.rank) for update in updates]
            seen = self.placement.measure(before, updates, received, self.lora)
        divides = self.placement.divides(number, before, len(updates))
        if seen and divides and not before.clustered:  # all started from one state: they can go on in several
            self.groups = self.placement.divide(number, before, seen)
            home = {client: self.groups.where[client] for client in home}
        taken = self._levels(updates, home, round_, parted=self.groups is not before)
        if seen and before.clustered:
            regroup = self.placement.divide if divides else self.placement.join
            self.groups = regroup(number, self.groups, seen)
        if chosen:
            self.groups = self.placement.follow(number, self.groups, chosen)
        if self.groups.clustered:
            self.groups, lost = with_global(self.groups, self.method, round_)
            taken.facts |= {"global_discarded_energy": lost}
        return taken

    def _levels(self, updates: Sequence[Update], home: Mapping[ClientId, int], round_: Round, parted: bool) -> Taken:
        """Level 1, and level 2 where it is its turn."""
        groups, wanted, most = self.groups, self.settings.clusters, self.settings.admission.max_weight
        limited: dict[ClientId, Update] = {}
        for cluster in set(home.values()):
            own = [update for update in updates if home[update.client] == cluster]
            limited |= {update.client: update for update in cap_weights(own, most)}
        capped = [limited[update.client] for update in updates]
        groups, stays = rule_in_each(groups, capped, home, self._rule, round_, self._objection)
        if parted and self.method.tied and len(groups.states) > 1:  # variates of before do not fit the clusters
            states = {c: anew(state, self.method, c, round_.number) for c, state in groups.states.items()}
            groups = replace(groups, states=states)
        facts = {cluster: dict(state.facts) for cluster, state in groups.states.items()}
        if wanted.interact_every and round_.number % wanted.interact_every == 0 and groups.clustered:
            groups, lost = interact(groups, self.method, round_)
            for cluster, share in lost.items():
                facts[cluster]["interaction_discarded_energy"] = share
        self.groups = groups
        if not groups.clustered:
            self.groups = replace(groups, shared=groups.states[0])
            return Taken(capped, stays, facts=facts[0])
        skipped = {cluster: {"skipped": reason} for cluster, reason in stays.items()}
        entries = [self._entry(c, capped, home, {**facts[c], **skipped.get(c, {})}) for c in sorted(groups.states)]
        return Taken(capped, stays, entries)

    def _objection(self, count: int) -> str | None:
        return objection(self.settings.aggregation, count)

    def _entry(
        self, cluster: int, updates: Sequence[Update], home: Mapping[ClientId, int], facts: Mapping[str, Any]
    ) -> dict[str, Any]:
        own = [update for update in updates if home[update.client] == cluster]
        total = sum(update.num_examples for update in own)
        loss = sum(update.num_examples * update.metrics["train_loss"] for update in own) / total if own else None
        clients = [update.client for update in own]
        return {"cluster": cluster, "clients": clients, "train_loss": loss, **facts}
