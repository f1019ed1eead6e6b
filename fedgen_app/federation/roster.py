"""Who takes part: the roll call, and the clients that it admits."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import floor

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedgen_app.errors import PolicyError, RunError, meaning
from fedgen_app.federation.exchange import TTL_MARGIN, Patience, Replies, collect
from fedgen_app.federation.method import ClientId
from fedgen_app.seeds import derive

CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
# In an answer to the roll call: a direction, and a digest of what it was encoded with.
REQUIREMENT, SPACE = "requirement", "space"
SPACE_MARK = re.compile(r"[0-9a-f]{16}")
WIDEST = 8192
UNIT_TOLERANCE = 1e-3
ROLL_CALL = f"{MessageType.QUERY}.roll_call"
LARGEST_COUNT = 2**53  # of records that is taken for a count at all
Report = Callable[..., None]


class _LeftOut(Exception):
    """A node that does not take part."""

    def __init__(self, reason: str, detail: str, client: ClientId | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.client = client


@dataclass(frozen=True)
class Requirement:
    """What a client wants, encoded on it: a direction, and a mark of the encoder and key that it can be compared under.

    Attributes:
        vector: (width,), of length 1.
    """

    vector: NDArray[np.float64]
    space: str


@dataclass(frozen=True)
class Member:
    """One client as it presented itself.

    Attributes:
        skipped: Records that it could not read; in a simulation those of the one data set that all share.
        requirement: None where it sent none that can be used.
        unplaced: Why it has none.
    """

    client: ClientId
    node: int
    num_examples: int
    rank: int
    facts: dict[str, str]
    skipped: int = 0
    requirement: Requirement | None = None
    unplaced: str = "it sent no encoded requirement"


def parse_client(text: str) -> ClientId:
    """A client's id: a number where it is written as one, else a plain name that is safe as a folder's name.

    Raises:
        ValueError: it is neither.
    """
    if not CLIENT_NAME.fullmatch(text):
        raise ValueError(f"client id {text[:80]!r}: should be up to 64 letters, digits, '.', '_' or '-'")
    return int(text) if text.isdecimal() and (text == "0" or not text.startswith("0")) else text


def parse_requirement(facts: Mapping[str, object]) -> Requirement | None:
    """The encoded requirement in an answer to the roll call; None where it holds none.

    Raises:
        ValueError: it is not a list of 2 to 8192 finite numbers of length 1, or its mark is none.
    """
    numbers, space = facts.get(REQUIREMENT), facts.get(SPACE)
    if numbers is None:
        return None
    if not isinstance(numbers, list) or not 2 <= len(numbers) <= WIDEST:
        raise ValueError(f"its requirement is no list of 2 to {WIDEST} numbers")
    if not all(isinstance(n, float) and abs(n) <= 1 + UNIT_TOLERANCE for n in numbers):
        raise ValueError("its requirement holds what is no number from -1 to 1")
    vector = np.array(numbers, np.float64)
    if abs(float(np.linalg.norm(vector)) - 1) > UNIT_TOLERANCE:
        raise ValueError(f"its requirement has length {float(np.linalg.norm(vector)):.4g}, not 1")
    if not isinstance(space, str) or not SPACE_MARK.fullmatch(space):
        raise ValueError("its requirement has no mark of its encoder")
    return Requirement(vector / np.linalg.norm(vector), space)


def in_order(clients: Iterable[ClientId]) -> list[ClientId]:
    """Numbers first and by value, then names: the one order in which clients are drawn and added up."""
    return sorted(clients, key=lambda c: (isinstance(c, str), c if isinstance(c, int) else 0, str(c)))


def chosen_count(clients: int, fraction: float) -> int:
    """How many of so many clients a round takes: the nearest number, at least one."""
    return min(clients, max(1, floor(fraction * clients + 0.5)))


@dataclass
class Roster:
    """The clients of a run, by id; asks every node that it has not asked yet.

    Attributes:
        fingerprint: Of the server's backbone; a node with another one is left out.
        expected: Wait for so many clients; 0: in a simulation for all of them, else for the first.
        rank: The one that all adapters have to have; a node that affords less is left out; 0: ranks may differ.
        left_out: Nodes that do not take part, and why. One that answered with an error is asked again.
        silent: How often each node did not answer the roll call, or with an error.
        simulated: How many clients the simulation has, as its nodes say; 0: real devices.
    """

    fingerprint: str
    expected: int
    deadline: float
    report: Report
    rank: int = 0
    members: dict[ClientId, Member] = field(default_factory=dict)
    left_out: dict[int, str] = field(default_factory=dict)
    simulated: int = 0
    silent: dict[int, int] = field(default_factory=dict)
    _calls: int = 0

    def held(self) -> dict[str, int]:
        """How many members hold the backbone in which way: the type of what they compute in, and bits below it."""
        facts = [member.facts for member in self.members.values() if "dtype" in member.facts]
        few = [f"{fact['bits']} bits, " if fact.get("bits", "0") != "0" else "" for fact in facts]
        return dict(sorted(Counter(mark + fact["dtype"] for mark, fact in zip(few, facts, strict=True)).items()))

    def call(self, grid: Grid) -> None:
        """Ask all nodes and wait, at most ``deadline`` seconds, until the expected clients are there.

        Raises:
            RunError: nobody can take part.
        """
        end = time.monotonic() + self.deadline
        while True:
            simulated = self.ask_newcomers(grid, max(1.0, end - time.monotonic()))
            expected = self.expected or simulated or max(1, len(self.members))
            complete = len(self.members) + len(self.left_out) >= expected
            if complete and self.members:
                return
            if time.monotonic() >= end or (complete and self.expected):
                break
            time.sleep(0.2)
        if not self.members:
            reasons = ", ".join(sorted(set(self.left_out.values()))) or "nobody answered"
            raise RunError(f"no client can take part ({reasons}); the clients' own logs say why")
        self.report("roll-call-timeout", clients=len(self.members), expected=expected)

    def ask_newcomers(self, grid: Grid, deadline: float) -> int:
        """Ask the nodes that are new; returns how many clients a simulation says it has, else 0."""
        nodes = set(grid.get_node_ids())
        settled = {node for node, reason in self.left_out.items() if reason != "error"}
        known = {m.node for m in self.members.values()} | settled
        self._calls += 1
        # A node that stays silent is asked ever more rarely, or it would delay every round.
        fresh = sorted(n for n in nodes - known if self._calls % 2 ** self.silent.get(n, 0) == 0)
        if not fresh:
            return self.simulated
        replies = self._ask(grid, fresh, deadline)
        for node in sorted(replies.missing | replies.unreadable):
            self.silent[node] = self.silent.get(node, 0) + 1
            self.report("silent", node=node)
        claims: dict[ClientId, list[Member]] = {}
        for node, message in sorted(replies.messages.items()):
            try:
                member = self._read(node, message)
            except _LeftOut as out:
                self._leave_out(node, out.reason, str(out), out.client)
            else:
                claims.setdefault(member.client, []).append(member)
        present = self._still_there(grid, {m.node for c in claims if (m := self.members.get(c))} & nodes, deadline)
        for client in in_order(claims):
            self._settle(client, claims[client], present)
        return self.simulated

    def _ask(self, grid: Grid, nodes: Iterable[int], deadline: float) -> Replies:
        ttl = deadline + TTL_MARGIN
        return collect(
            grid,
            [Message(RecordDict({"config": ConfigRecord({})}), node, ROLL_CALL, ttl=ttl) for node in nodes],
            Patience(deadline),
        )

    def _still_there(self, grid: Grid, nodes: set[int], deadline: float) -> set[int]:
        """Of members whose id a newcomer claims, the nodes that answer: what was killed is listed for a while."""
        if not nodes:
            return set()
        replies = self._ask(grid, sorted(nodes), deadline)
        return {node for node, message in replies.messages.items() if not message.has_error()}

    def _read(self, node: int, message: Message) -> Member:
        if message.has_error():
            reason = "policy" if message.error.code == PolicyError.code else "error"
            raise _LeftOut(reason, f"answered with {meaning(message.error.code)}")
        try:
            facts = message.content.config_records["reply"]
            client = parse_client(str(facts["client"]))
            examples, rank = facts["num-examples"], facts["rank"]
            fingerprint, simulated = str(facts["fingerprint"]), facts["simulated-clients"]
            skipped = facts["skipped"]
        except (KeyError, ValueError) as error:
            raise _LeftOut("malformed", f"{type(error).__name__} in its answer") from None
        if not (isinstance(examples, int) and examples > 0 and isinstance(rank, int) and rank > 0):
            raise _LeftOut("weight", f"num-examples = {examples!r}, rank = {rank!r}", client)
        if isinstance(skipped, bool) or not isinstance(skipped, int) or not 0 <= skipped <= LARGEST_COUNT:
            raise _LeftOut("malformed", f"skipped = {str(skipped)[:80]}", client)
        if fingerprint != self.fingerprint:
            detail = f"its backbone is {fingerprint[:80]}, the server's is {self.fingerprint}"
            raise _LeftOut("fingerprint", detail, client)
        if self.rank and rank != self.rank:
            detail = f"its adapter has rank {rank}, and this method needs {self.rank} of all; others take mixed ranks"
            raise _LeftOut("rank", detail, client)
        if isinstance(simulated, int) and simulated > 0:
            self.simulated = simulated
        versions = {key: str(facts[key]) for key in ("torch", "transformers", "peft", "dtype", "bits") if key in facts}
        try:
            return Member(client, node, examples, rank, versions, skipped, parse_requirement(facts))
        except ValueError as error:  # it can train all the same, but nobody knows with whom
            return Member(client, node, examples, rank, versions, skipped, unplaced=str(error))

    def _settle(self, client: ClientId, claims: list[Member], present: set[int]) -> None:
        before = self.members.get(client)
        if before is not None and before.node in present:  # someone else takes its name
            claims.append(before)
        if len(claims) > 1:
            self.members.pop(client, None)
            for member in claims:
                self._leave_out(member.node, "duplicate", f"{len(claims)} nodes claim this id", client)
            return
        self.members[client] = claims[0]
        if self.left_out.pop(claims[0].node, None):
            self.report("back", node=claims[0].node, client=client)

    def _leave_out(self, node: int, reason: str, detail: str, client: ClientId | None = None) -> None:
        if reason == "error":
            self.silent[node] = self.silent.get(node, 0) + 1
        if self.left_out.get(node) == reason:  # told already
            return
        self.left_out[node] = reason
        self.report("left-out", node=node, client=client, reason=reason, detail=detail)

    def present(self, grid: Grid) -> list[ClientId]:
        """The clients whose nodes are connected now, in order."""
        nodes = set(grid.get_node_ids())
        return in_order(c for c, m in self.members.items() if m.node in nodes)

    def choose(
        self, present: list[ClientId], fraction: float, seed: int, number: int, by: str = "uniform"
    ) -> list[ClientId]:
        """A seeded draw over client ids (node ids are random in every run), without replacement, at least one.

        Args:
            by: ``uniform``, or ``examples``: a client is drawn in proportion to its number of examples (the keys of
                Efraimidis and Spirakis 2006).
        """
        size, draw = chosen_count(len(present), fraction), random.Random(derive(seed, "choose", number))
        if by == "uniform":
            return in_order(draw.sample(present, size))
        keys = {client: draw.random() ** (1 / self.members[client].num_examples) for client in in_order(present)}
        return in_order(sorted(present, key=lambda client: keys[client])[-size:])
