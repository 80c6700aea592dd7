"""Circle: what a peer of a rendezvous knows: of its model, of the epoch under way, of the others.

The state of `rendezvous.py`, and the small questions that both its halves ask of it.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

from atoll.aggregation.allreduce import Plan
from atoll.aggregation.quorum import quorum
from atoll.aggregation.rendezvous_events import PeerAction, Say
from atoll.aggregation.rendezvous_messages import (
    Accept,
    Announce,
    Ballot,
    Commit,
    Failed,
    Goodbye,
    Message,
    Promise,
    Stand,
    Step,
    Value,
)
from atoll.aggregation.seals import Named, Seals, fair, sound
from atoll.aggregation.shares import PIECE

Actions = Iterator[PeerAction]
LEAP = 1 << 20  # by which a ballot may be above the promised one: counts must never run out


@dataclass
class Patience:
    """Seconds and counts of a rendezvous. The defaults are for machines in one building."""

    beat: float = 0.5  # between two announcements, and between two looks at the clock
    silence: float = 2.5  # without a word, after which a peer is taken for lost
    ready: float = 5.0  # that the first ready peer waits for the others
    reply: float = 1.5  # that a proposer waits for a promise
    reduce: float = 10.0  # for one all-reduce
    fetch: float = 5.0  # for a vote, which may need a mean to be fetched
    load: float = 20.0  # for a download of the model
    attempts: int = 4  # all-reduces of one epoch until it is put off
    first: int = 1  # peers, at least, whose work is done before the first mean


@dataclass
class Known:
    """What this peer knows of another."""

    weight: float
    bandwidth: float
    heard: float = -1e9  # when it was heard of last
    stand: Stand = field(default_factory=Stand)
    ready: bool = False
    last: Commit | None = None
    bits: str = ""  # digest of its model, as it says
    claim: Announce | None = None  # of a model that it has not shown to be the run's


@dataclass
class Loading:
    """A download on its way."""

    stand: Stand
    last: Commit | None
    bits: str
    donors: tuple[str, ...]
    since: float


@dataclass
class Lead:
    """A proposal of this peer's on its way."""

    ballot: Ballot
    since: float  # when this phase began
    phase: str = "prepare"  # then "reduce", then "accept"; only the last two after a promise
    promises: dict[str, Promise] = field(default_factory=dict)
    plan: Plan | None = None
    reports: dict[str, str] = field(default_factory=dict)  # peer -> digest it holds
    seals: dict[str, str] = field(default_factory=dict)  # in the same way
    failures: dict[str, Failed] = field(default_factory=dict)
    value: Value | None = None
    votes: set[str] = field(default_factory=set)

    def would_be(self, digest: str) -> Value:
        """What its plan comes to, where its mean has that digest; nobody has sealed it yet."""
        assert self.plan is not None, "nobody reduces yet"
        return Value(self.ballot, self.plan.group, self.plan.weights, digest)


@dataclass
class Circle:
    """One peer. `members` made the model `stand` that it starts with. One without a model gives the
    founders, who made the first."""

    me: str
    size: int  # elements of the vector that is averaged
    members: tuple[str, ...] = ()  # who made the last commit: they decide the next
    stand: Stand = field(default_factory=Stand)
    patience: Patience = field(default_factory=Patience)
    root: Stand = field(default_factory=Stand)  # the run's first model, which the founders have
    roster: dict[str, Known] = field(default_factory=dict)
    last: Commit | None = None
    history: tuple[Step, ...] = ()  # to `stand`, as `seals.worth_keeping`
    recent: tuple[Step, ...] = ()  # the last of them, one after the other: their means lie here
    bits: str = ""  # digest of this peer's model; empty: not known yet
    most: float = math.inf  # weight of a whole share: by the run's rule nobody has more
    piece: int = PIECE  # elements of a part, at least, where a share is cut
    replay: int = 2  # means that are fetched rather than the model, at most: they are no longer
    # of the epoch under way
    ready: bool = False
    length: float = 0.0  # L2, of this peer's work
    promised: Ballot = (0, "")
    promised_at: float = -1e9
    lost: Ballot = (0, "")  # attempts up to here ended when this peer was started anew
    accepted: tuple[Ballot, Value] | None = None
    reducing: Ballot | None = None
    plan: Plan | None = None  # of `reducing`
    # "count proposer" -> digest, seal
    made: dict[str, tuple[str, str]] = field(default_factory=dict)
    failed: dict[str, Failed] = field(default_factory=dict)  # in the same way
    held: set[str] = field(default_factory=set)  # digests of means that lie here
    asked: Accept | None = None  # to vote when its mean has come
    owed: Value | None = None  # decided, its mean not here yet
    getting: str = ""  # digest of the mean that is being fetched
    unheld: set[str] = field(default_factory=set)  # of those that nobody had
    # "peer chain" -> when that peer was asked for the means that lead there; -inf: it has answered
    ways: dict[str, float] = field(default_factory=dict)
    lead: Lead | None = None
    tries: int = 0
    blamed: set[tuple[str, str]] = field(default_factory=set)  # (who says so, whose is not finite)
    spoiled: set[str] = field(default_factory=set)  # weight 0 in this epoch: by `blamed`
    apart: set[tuple[str, str]] = field(default_factory=set)  # could not reach each other in it
    ripe: float | None = None  # when the first peer was ready
    pause: float = -1e9  # until when this peer proposes nothing
    # beyond it
    farewells: dict[str, Goodbye] = field(default_factory=dict)
    loading: Loading | None = None
    doubted: dict[str, float] = field(default_factory=dict)  # donors that failed, and until when
    up: bool = False  # since `Started`
    loads_from: float = 0.0  # when it has had the time to hear of all donors
    left: bool = False
    parted: bool = False  # with a goodbye: never again under this name
    proved: dict[str, tuple[Step, ...]] = field(default_factory=dict)  # chain -> its history

    def __post_init__(self) -> None:
        self.seals: Seals = Named(self.me)  # the driver's affair, and no state

    @abstractmethod
    def _message(self, peer: str, message: Message, now: float) -> Actions:
        """What to do about a message; a proposer's own words are among them."""

    def _weight(self, peer: str) -> float:
        """By the roster's rule; 0 for whose work on this model is not done, or was not finite."""
        known = self.roster[peer]
        done = self.ready if peer == self.me else known.ready
        return known.weight if done and peer not in self.spoiled else 0.0

    def gone(self, here: bool = False) -> list[str]:
        """Who left at this model, or (not `here`) before it: they will never vote for its next.

        Of one who left after it nobody knows what it voted for here: it still counts.
        """
        mine = self.stand.rank
        ranks = {peer: goodbye.stand.rank for peer, goodbye in self.farewells.items()}
        return sorted(p for p, r in ranks.items() if r == mine or (r < mine and not here))

    def _forget_gone(self) -> None:
        """Goodbyes that count no more, else there were more of them at each promise, for ever.

        One is kept while the roster has its peer, to which nothing need be said; while that is a
        member, and not counted; and at the model where it left, for it may be in the group that
        makes the next. To forget one is safe: its peer counts again, as for who never heard it.
        """
        here, known = self.stand.rank, {*self.roster, *self.members}
        for peer, goodbye in sorted(self.farewells.items()):
            if peer not in known and goodbye.stand.rank != here:
                del self.farewells[peer]

    def _may_propose(self, peer: str, ballot: Ballot) -> bool:
        """Only members do, in their own name; who is a member all at one model know alike."""
        return ballot[1] == peer and peer in self.members and self._counts(ballot)

    def _counts(self, ballot: Ballot) -> bool:
        """A count that no other could be above would end all proposals."""
        return ballot[0] <= self.promised[0] + LEAP

    def _sound(self, value: Value) -> bool:
        """Whether enough of this model's members have made it: nobody has voted for any other."""
        fits = fair(value, self.most)
        return fits and sound(value, self.stand.next(value), self.members, self.seals)

    def _near(self, now: float) -> list[str]:
        """Others that were heard of lately, sorted."""
        since = now - self.patience.silence
        return sorted(p for p, k in self.roster.items() if k.heard > since and p != self.me)

    def missing(self, now: float) -> list[str]:
        """Those of whom some must be heard of before anything can be decided; [] where enough are
        near."""
        near, gone = [*self._near(now), self.me], self.gone()
        if quorum(near, self.members, gone):
            return []
        return sorted(set(self.members) - {*near, *gone})

    def _here_too(self, now: float) -> list[str]:
        """Those at the same model, this one among them, sorted."""
        chain = self.stand.chain
        here = [p for p in self._near(now) if self.roster[p].stand.chain == chain]
        return sorted([*here, self.me])

    def _here(self) -> Announce:
        return Announce(self.stand, self.ready, self.last, self.bits)

    def _sides(self, peers: list[str]) -> dict[str, float]:
        """Digests that those of `peers` say who are at one model, with the weight behind each."""
        sides: dict[str, float] = {}
        for peer in peers:
            bits = self.bits if peer == self.me else self.roster[peer].bits
            weight = self.roster[peer].weight if peer in self.roster else 0.0
            if bits:
                sides[bits] = sides.get(bits, 0.0) + weight
        return sides

    def _announce(self) -> Actions:
        yield from self._all(self._here())

    def _all(self, message: Message) -> Actions:
        for peer in sorted(self.roster):
            if peer != self.me and peer not in self.farewells:
                yield Say(peer, message)

    def _say(self, peer: str, message: Message, now: float) -> Actions:
        if peer == self.me:
            yield from self._message(peer, message, now)
        else:
            yield Say(peer, message)
