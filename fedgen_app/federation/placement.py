"""Which client belongs to which cluster, and when that is looked at again (``clusters.by``)."""

from __future__ import annotations

import importlib.util
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedgen_app.errors import RunError, SettingsError
from fedgen_app.federation import clustering
from fedgen_app.federation.admission import capped
from fedgen_app.federation.clustering import Numbers
from fedgen_app.federation.groups import Groups, regrouped
from fedgen_app.federation.method import ClientId, Lora, Method, Update
from fedgen_app.federation.protection import epsilon
from fedgen_app.federation.robust import gram_of_changes, objection
from fedgen_app.federation.roster import Roster, chosen_count, in_order
from fedgen_app.learning.adapters import Adapter
from fedgen_app.seeds import derive
from fedgen_app.settings import Settings

BY_REPLIES = ("updates", "adapters")
FEWEST = 3  # replies that clients are divided by, where there are so many: two are alike or not by chance
Draw = Callable[[Mapping[ClientId, int], Sequence[ClientId], Numbers, Collection[ClientId]], None]


def needs_packages() -> None:
    """Raise SettingsError where scikit-learn or SciPy is missing on the server."""
    missing = [name for name in ("sklearn", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(f"clusters.by needs {' and '.join(missing)}: pip install 'fedgen-edge[sim]'")


@dataclass(frozen=True)
class Seen:
    """What the replies of one round tell of the likeness of their senders: inner products (n, n), in their order."""

    clients: tuple[ClientId, ...]
    products: Numbers


class Placement:
    """Decides who is where; see ``docs/clusters.md``.

    Args:
        truth: What each simulated client's data mostly is, for ``clusters.by = oracle``.
        draw: Called with the places, and where they come from vectors with those clients, their inner products and
            who of them came after the clusters were formed.
    """

    def __init__(
        self,
        settings: Settings,
        method: Method,
        roster: Roster,
        truth: Callable[[], Mapping[ClientId, str]],
        report: Callable[..., None],
        draw: Draw,
    ) -> None:
        self.settings = settings
        self.method = method
        self.roster = roster
        self._truth = truth
        self._report = report
        self._draw = draw
        self._told: set[ClientId] = set()
        if settings.clusters.by != "none":
            needs_packages()

    @property
    def _by(self) -> str:
        return self.settings.clusters.by

    def takes_part(self, groups: Groups, client: ClientId) -> bool:
        """Whether a client trains: by prompts and by truth only one that has a cluster does."""
        return self._by not in ("prompts", "oracle") or client in groups.where

    def asks_everyone(self, number: int, groups: Groups) -> bool:
        """Whether all clients are wanted, as their replies are to be compared."""
        warmup, every = self.settings.clusters.warmup, self.settings.clusters.every
        later = bool(every and number > warmup and (number - warmup) % every == 0)
        return self._by in BY_REPLIES and (later or (number >= warmup and not groups.clustered))

    def before(self, number: int, groups: Groups) -> Groups:
        """Look at who is there before a round: the first clusters, newcomers, and from time to time all anew."""
        every = self.settings.clusters.every
        again = bool(every and number > 1 and (number - 1) % every == 0)
        if self._by == "prompts":
            return self._by_prompts(number, groups, again)
        if self._by == "oracle":
            return self._by_truth(number, groups)
        if self._by == "loss" and not groups.clustered:
            return self._dealt(number, groups)
        return groups

    def _by_prompts(self, number: int, groups: Groups, again: bool) -> Groups:
        (vectors, space), wanted = self._vectors(groups), self.settings.clusters
        if not vectors and not groups.clustered:
            return groups
        if not groups.clustered and wanted.noise:
            spent = epsilon(wanted.noise, wanted.delta)
            self._report("noise", sigma=wanted.noise, epsilon=spent, delta=wanted.delta)
        if not groups.clustered or (again and self._enough_known(number, groups, vectors)):
            divided = self.divide(number, groups, _likeness(vectors))
            return replace(self._centred(divided, vectors), space=space)
        fresh = [client for client in in_order(vectors) if client not in groups.where]
        if not fresh:
            return groups
        where = dict(groups.where)
        where |= {client: clustering.nearest(vectors[client], groups.centroids) for client in fresh}
        moved = replace(self._moved(number, groups, where), joined=(*groups.joined, *fresh))
        seen = _likeness(vectors)
        self._draw(moved.where, seen.clients, seen.products, moved.joined)
        return moved

    def _enough_known(self, number: int, groups: Groups, vectors: Mapping[ClientId, Numbers]) -> bool:
        """Whether enough of those who have a place are there to divide them anew, as after a resume they may not be.

        Two of a large cluster, alone, may look as unlike as two clusters do.
        """
        known, needed = sum(client in vectors for client in groups.where), enough_of(len(groups.where))
        if known < needed:
            self._report("undivided", round=number, requirements=known, needed=needed)
        return known >= needed

    def _vectors(self, groups: Groups) -> tuple[dict[ClientId, Numbers], str]:
        """The encoded requirements that can be compared, and the mark of their space.

        It is that of the centroids, whoever comes later; before there are any, the one in which most clients are. A
        mark should tell the width as well (``requirement.space_of``), but it is the client that says so.

        Raises:
            RunError: in a simulation nobody sent one, and there are no clusters yet; of devices others may come.
        """
        members = self.roster.members
        sent = {client: m.requirement for client, m in members.items() if m.requirement is not None}
        if not sent and not groups.space:
            if self.roster.simulated:
                raise RunError("clusters.by = 'prompts': no client sent an encoded requirement")
            for client in in_order(members):
                self._leave_aside(client, f"{members[client].unplaced} (prompts.txt, or prompts in its node config)")
            return {}, ""
        found = {client: (requirement.space, len(requirement.vector)) for client, requirement in sent.items()}
        if groups.space:
            space, width = groups.space, len(next(iter(groups.centroids.values())))
        else:
            counts = Counter(found.values())
            space, width = max(sorted(counts), key=lambda each: counts[each])
        for client in in_order(client for client in members if client not in groups.where):
            if client not in sent:
                self._leave_aside(client, members[client].unplaced)
            elif found[client][0] != space:
                self._leave_aside(client, "another encoder or key than the clusters are formed with")
            elif found[client][1] != width:
                self._leave_aside(
                    client, f"its requirement has {found[client][1]} numbers, those of the others {width}"
                )
        return {client: sent[client].vector for client in sent if found[client] == (space, width)}, space

    def _leave_aside(self, client: ClientId, reason: str) -> None:
        if client not in self._told:
            self._told.add(client)
            self._report("unplaced", client=client, reason=reason)

    def _centred(self, groups: Groups, vectors: Mapping[ClientId, Numbers]) -> Groups:
        known = {cluster: centre for cluster, centre in groups.centroids.items() if cluster in groups.states}
        centres = known | clustering.centroids(vectors, groups.where)  # of those who are away as they were
        kinship = {(a, b): float(centres[a] @ centres[b]) for a in centres for b in centres}
        return replace(groups, centroids=centres, kinship=kinship)

    def _by_truth(self, number: int, groups: Groups) -> Groups:
        if groups.clustered and all(client in groups.where for client in self.roster.members):
            return groups
        truth, clients = self._truth(), in_order({*self.roster.members, *groups.where})
        kinds = sorted({truth[client] for client in clients})
        now = {client: kinds.index(truth[client]) for client in clients}
        names = clustering.matched(groups.where, now, groups.free if groups.clustered else 0)
        return self._moved(number, groups, {client: names[label] for client, label in now.items()})

    def _dealt(self, number: int, groups: Groups) -> Groups:
        """IFCA's start: its clusters have to differ, and all adapters begin as the same function; so chance deals."""
        clients = in_order(self.roster.members)
        order = random.Random(derive(self.settings.seed, "clusters")).sample(clients, len(clients))
        count = min(self.settings.clusters.count, len(clients))
        return self._moved(number, groups, {client: place % count for place, client in enumerate(order)})

    def measure(
        self, groups: Groups, updates: Sequence[Update], received: Sequence[Adapter], lora: Lora
    ) -> Seen | None:
        """What a round's replies tell of who is alike: of the change of s B A, or by adapters of the factors B.

        Factors are compared as long as all began alike. Those of different clusters have different bases: a client
        would be most like whoever started where it did, and a newcomer like nobody. Changes of products have none.

        Args:
            received: What each of them started from, at its rank.

        Returns:
            None where too few replies changed anything: of one or two it may be chance, of newcomers nobody's fault;
            or too few can be compared.

        Raises:
            RunError: nothing that the method sends tells it.
        """
        factors = self._by == "adapters" and not groups.clustered
        if factors:  # a method may let a client answer at a smaller rank, whose factors are of another size
            updates = [update for update in updates if update.rank == lora.rank]
            if len(updates) < self.enough():
                return None
        clients = tuple(update.client for update in updates)
        seen = products_of_b(updates) if factors else gram_of_changes(updates, received, lora).numpy()
        if not seen.any():
            if groups.clustered or len(updates) < self.enough():
                return None
            raise RunError(
                f"clusters.by = {self._by!r}: what clients send with method = {self.settings.method} does not tell "
                "them apart (round clusters.warmup sends no factor B)"
            )
        return Seen(clients, seen)

    def enough(self) -> int:
        """How many replies clients are divided by at least.

        A division by whoever happened to answer would be final, as ``clusters.every`` is 0 by default.
        """
        return enough_of(len(self.roster.members))

    def divides(self, number: int, groups: Groups, replies: int) -> bool:
        """Whether a round's replies divide the clients (anew); too few do not, and that is said."""
        if not self.asks_everyone(number, groups):
            return False
        if replies < self.enough():
            self._report("undivided", round=number, replies=replies, needed=self.enough())
            return False
        return True

    def divide(self, number: int, groups: Groups, seen: Seen) -> Groups:
        """Cluster anew by what was seen; those who were not stay where they were.

        A cluster of which less than half was seen stays too: it has not vanished, its members are late or away. Beside
        those there are at most so many clusters that all are no more than ``clusters.count``, but always one.

        Raises:
            RunError: there is nobody to tell apart.
        """
        wanted = self.settings.clusters
        cosine, away = clustering.cosines(seen.products), self._away(groups, seen.clients)
        room = max(1, wanted.count - len(away))
        labels = clustering.agglomerate(cosine, wanted.choose, room, wanted.threshold)
        now = dict(zip(seen.clients, labels, strict=True))
        names = clustering.matched(groups.where, now, groups.free if groups.clustered else 0)
        places = {client: names[label] for client, label in now.items()}
        kinship = {(names[a], names[b]): value for (a, b), value in clustering.similarity(cosine, labels).items()}
        remain = {c: place for c, place in groups.where.items() if c not in places}
        # Whose cluster the others were seen to leave would keep it alive alone: better anew, among those who are there.
        left = {groups.where[client] for client in places if client in groups.where}
        gone = left - set(places.values()) - away
        remain = {c: place for c, place in remain.items() if place not in gone}
        where = {client: (places | remain)[client] for client in in_order([*places, *remain])}
        self._draw(where, seen.clients, cosine, ())
        moved = self._moved(number, groups, where)
        known = {pair: value for pair, value in groups.kinship.items() if {*pair} <= {*moved.states}}
        return replace(moved, kinship=known | kinship, joined=())

    def _away(self, groups: Groups, seen: Sequence[ClientId]) -> set[int]:
        """The clusters of which less than half of the members were seen."""
        if not groups.clustered:
            return set()
        count = Counter(groups.where[client] for client in seen if client in groups.where)
        return {cluster for cluster in groups.states if 2 * count[cluster] < len(groups.members(cluster))}

    def join(self, number: int, groups: Groups, seen: Seen) -> Groups:
        """Clients without a place get that of the replies which theirs is most like, on average.

        They started from the global adapter; what they sent serves this alone. One that changed nothing is like nobody
        yet, and stays without.
        """
        cosine, where = clustering.cosines(seen.products), dict(groups.where)
        for row, client in enumerate(seen.clients):
            if client in groups.where or not seen.products[row, row]:
                continue
            likeness: dict[int, list[float]] = {}
            for column, other in enumerate(seen.clients):
                if other in groups.where:
                    likeness.setdefault(groups.where[other], []).append(float(cosine[row, column]))
            if likeness:
                where[client] = max(sorted(likeness), key=lambda place: float(np.mean(likeness[place])))
        return groups if where == groups.where else self._moved(number, groups, where)

    def follow(self, number: int, groups: Groups, chosen: Mapping[ClientId, int]) -> Groups:
        """IFCA: clients are where they chose to be."""
        where = dict(groups.where) | dict(chosen)
        if where == groups.where:
            return groups
        counts = self._counts(groups, where)
        examples = self._weights(counts)
        counted = {c: float(sum(examples[m] for m, p in where.items() if p == c)) for c in groups.states}
        return replace(groups, where={c: where[c] for c in in_order(where)}, examples=counted, counts=counts)

    def _moved(self, number: int, groups: Groups, where: Mapping[ClientId, int]) -> Groups:
        counts = self._counts(groups, where)
        moved = replace(regrouped(groups, where, self._weights(counts), self.method, number), counts=counts)
        self._report("clusters", round=number, clusters={str(c): moved.members(c) for c in sorted(moved.states)})
        self._check_sizes(number, moved)
        return moved

    def _check_sizes(self, number: int, groups: Groups) -> None:
        """Say of which clusters the robust rule needs more members than they have.

        Raises:
            RunError: of all, so that nothing would ever be trained.
        """
        most = chosen_count(len(groups.where), self.settings.fraction_train)
        reasons: dict[int, str] = {}
        for cluster in sorted(groups.states):
            count = min(len(groups.members(cluster)), most)
            found = [objection(self.settings.aggregation, replies) for replies in range(1, count + 1)]
            if found and all(found):  # fewer replies mean fewer attackers: it may need all counts to know
                reasons[cluster] = found[-1] or ""
        for cluster, reason in reasons.items():
            self._report("too-few", round=number, cluster=cluster, reason=reason)
        if reasons and len(reasons) == len(groups.states):
            raise RunError(f"no cluster has enough members: {reasons[min(reasons)]}; fewer clusters, or another rule")

    def _counts(self, groups: Groups, clients: Iterable[ClientId]) -> dict[ClientId, float]:
        """Examples of each client as the roll call told them; of one that is away as it did before, else 0."""
        members = self.roster.members
        return {
            client: float(members[client].num_examples) if client in members else groups.counts.get(client, 0.0)
            for client in in_order(clients)
        }

    def _weights(self, counts: Mapping[ClientId, float]) -> dict[ClientId, float]:
        """Counts of examples, capped as weights of replies are; those that nobody knows stay 0."""
        known = {client: count for client, count in counts.items() if count}
        most = self.settings.admission.max_weight
        return {**counts, **dict(zip(known, capped(list(known.values()), most), strict=True))}


def _likeness(vectors: Mapping[ClientId, Numbers]) -> Seen:
    clients = tuple(in_order(vectors))
    rows = np.stack([vectors[client] for client in clients])
    return Seen(clients, rows @ rows.T)


def enough_of(clients: int) -> int:
    """How many of the clients have to be seen to divide them: half, and three where there are so many."""
    return min(clients, max(FEWEST, math.ceil(clients / 2)))


def products_of_b(updates: Sequence[Update]) -> Numbers:
    """Mean over the layers of the cosines of the factors B, as FedLEASE compares clients that began alike.

    Wang et al. 2025 (arXiv 2509.15087). Tensors that are no factor count as layers too.
    """
    keys = [key for key in sorted(updates[0].adapter) if ".lora_A." not in key]
    total = np.zeros((len(updates), len(updates)))
    for key in keys:
        rows = torch.stack([update.adapter[key].double().flatten() for update in updates]).numpy()
        total += clustering.cosines(rows @ rows.T)
    return np.asarray(total / max(1, len(keys)), np.float64)
