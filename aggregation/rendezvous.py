"""Rendezvous: how peers without a server meet for a mean, agree on it, and never fork. A machine.

Each epoch is decided once, by Paxos (Lamport 2001, "Paxos made simple") among those who made the
last one: the lowest of them that is near proposes a group of all who are there, the group reduces
(`allreduce.py`), and the mean is applied by nobody before a quorum holds it and has voted for it.
So a death at any point costs an attempt and never a fork; whoever missed the end fetches that mean
or downloads the model. A promise and a vote bind a peer for an epoch: one that comes back without
its state comes back under another name.

Time is the caller's `now`, in seconds. The network may lose, delay, double and reorder messages.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from atoll.aggregation.allreduce import Part, Plan
from atoll.aggregation.quorum import quorum
from atoll.aggregation.rendezvous_events import (
    Abort,
    Accept,
    Accepted,
    Admitted,
    Announce,
    Apply,
    Ballot,
    BeatDue,
    Begin,
    Commit,
    Download,
    Downloaded,
    Drop,
    Failed,
    Get,
    Goodbye,
    Heard,
    Leaving,
    MeanFailed,
    MeanMade,
    Message,
    NotDownloaded,
    PeerAction,
    PeerEvent,
    Prepare,
    Promise,
    Reduce,
    Reduced,
    Refuse,
    Removed,
    Say,
    Stand,
    Started,
    StepsDone,
    TrainOn,
    Value,
    Wake,
)
from atoll.aggregation.shares import shares, split

Actions = Iterator[PeerAction]


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


@dataclass
class Known:
    """What this peer knows of another."""

    weight: float
    bandwidth: float
    heard: float = -1e9  # when it was heard of last
    stand: Stand = field(default_factory=Stand)
    ready: bool = False


@dataclass
class Lead:
    """A proposal of this peer's on its way."""

    ballot: Ballot
    since: float  # when this phase began
    phase: str = "prepare"  # then "reduce", then "accept"; only the last two after a promise
    promises: dict[str, Promise] = field(default_factory=dict)
    plan: Plan | None = None
    reports: dict[str, str] = field(default_factory=dict)  # peer -> digest it holds
    failures: dict[str, Failed] = field(default_factory=dict)
    value: Value | None = None
    votes: set[str] = field(default_factory=set)


@dataclass
class Rendezvous:
    """One peer. `members` and `stand` are those of the model it starts with; empty: it has none."""

    me: str
    size: int  # elements of the vector that is averaged
    members: tuple[str, ...] = ()  # who made the last commit: they decide the next
    stand: Stand = field(default_factory=Stand)
    patience: Patience = field(default_factory=Patience)
    roster: dict[str, Known] = field(default_factory=dict)
    last: Commit | None = None
    # of the epoch under way
    ready: bool = False
    promised: Ballot = (0, "")
    promised_at: float = -1e9
    accepted: tuple[Ballot, Value] | None = None
    reducing: Ballot | None = None
    made: dict[str, str] = field(default_factory=dict)  # "count proposer" -> digest, of attempts
    held: set[str] = field(default_factory=set)  # digests of means that lie here
    asked: Accept | None = None  # to vote when its mean has come
    owed: Value | None = None  # decided, its mean not here yet
    getting: str = ""  # digest of the mean that is being fetched
    lead: Lead | None = None
    tries: int = 0
    spoiled: set[str] = field(default_factory=set)  # weight 0 in this epoch
    shunned: set[str] = field(default_factory=set)  # not in the group in this epoch
    ripe: float | None = None  # when the first peer was ready
    pause: float = -1e9  # until when this peer proposes nothing
    # beyond it
    farewells: dict[str, Goodbye] = field(default_factory=dict)
    loading: str = ""  # donor
    loading_at: float = 0.0
    doubted: dict[str, float] = field(default_factory=dict)  # donors that failed, and until when
    up: bool = False  # since `Started`
    left: bool = False

    def handle(self, event: PeerEvent, now: float) -> list[PeerAction]:
        """What to do about `event` at `now`, seconds, never decreasing."""
        if self.left:
            return []
        return [*self._hear(event, now), *self._proceed(now)]

    # ---- what happened -----------------------------------------------------------------------

    def _hear(self, event: PeerEvent, now: float) -> Actions:
        match event:
            case Started():
                self.up = True
                for known in self.roster.values():
                    known.heard = now  # nobody has had the time to be silent
                yield Wake(now + self.patience.beat)
                yield from self._announce()
                if self.stand.epoch >= 0:
                    yield TrainOn(self.stand)
            case Admitted(peer, weight, bandwidth):
                known = self.roster.setdefault(peer, Known(weight, bandwidth))
                known.weight, known.bandwidth = weight, bandwidth
            case Removed(peer):
                self.roster.pop(peer, None)
                self.left = self.left or peer == self.me
            case Heard(peer, message):
                if peer in self.roster and peer != self.me:
                    self.roster[peer].heard = now
                    yield from self._message(peer, message, now)
            case StepsDone(chain):
                if chain == self.stand.chain and not self.ready:
                    self.ready = True
                    yield from self._announce()
            case MeanMade(chain, digest, ballot):
                if chain == self.stand.chain:
                    yield from self._mean_made(digest, ballot, now)
            case MeanFailed(chain):
                if chain == self.stand.chain:
                    yield from self._mean_failed(event, now)
            case Downloaded(donor, stand, members, last):
                if donor == self.loading:
                    self.loading = ""
                    if stand.rank > self.stand.rank:
                        yield from self._stand_at(stand, members, last)
            case NotDownloaded(donor):
                if donor == self.loading:
                    self._doubt(donor, now)
            case BeatDue():
                yield Wake(now + self.patience.beat)
                if self.loading and now >= self.loading_at + self.patience.load:
                    self._doubt(self.loading, now)
                yield from self._announce()
                yield from self._say_again(now)
            case Leaving():  # pragma: no branch
                yield from self._all(Goodbye(self.stand, self.accepted))
                if self.reducing is not None:
                    yield Drop(self.stand.chain, self.reducing)
                self.left = True

    def _message(self, peer: str, message: Message, now: float) -> Actions:
        """From another peer, or from this one to itself where it proposes."""
        match message:
            case Announce(stand, ready, last):
                known = self.roster[peer]
                if stand.rank >= known.stand.rank:  # messages overtake each other
                    known.ready = ready or (known.ready and stand == known.stand)
                    known.stand = stand
                if stand.rank > self.stand.rank and self.doubted.get(peer, now) <= now:
                    yield from self._behind(peer, last, now)
            case Commit(base, value):
                if base == self.stand.chain:
                    yield from self._owe(value, peer)
            case Goodbye():
                self.farewells[peer] = message
                self.roster[peer].heard = -1e9
            case _ if message.chain != self.stand.chain:
                if not isinstance(message, Promise | Refuse | Reduced | Failed | Accepted):
                    yield Say(peer, self._here())  # too late, or too early: this is where I stand
            case Prepare(_, ballot):
                yield from self._prepare(peer, ballot, now)
            case Begin(_, ballot, plan):
                yield from self._begin(peer, ballot, plan, now)
            case Accept():
                yield from self._accept(peer, message, now)
            case Refuse(_, ballot):
                self.promised = max(self.promised, ballot)
                if self.lead is not None and ballot > self.lead.ballot:
                    self._give_way(now)
            case Promise() | Reduced() | Failed() | Accepted():  # pragma: no branch
                self._answered(peer, message)

    def _answered(self, peer: str, message: Promise | Reduced | Failed | Accepted) -> None:
        """To a proposal of this peer's."""
        lead = self.lead
        if lead is None or message.ballot != lead.ballot:
            return
        match message:
            case Promise():
                lead.promises[peer] = message
            case Reduced(_, _, digest):
                lead.reports[peer] = digest
            case Failed():
                lead.failures[peer] = message
            case Accepted():  # pragma: no branch
                lead.votes.add(peer)

    # ---- taking part ---------------------------------------------------------------------------

    def _prepare(self, peer: str, ballot: Ballot, now: float) -> Actions:
        if ballot < self.promised:
            yield from self._say(peer, Refuse(self.stand.chain, self.promised), now)
            return
        yield from self._promise(ballot, now)
        said = Promise(self.stand.chain, ballot, self.ready, self.accepted)
        yield from self._say(peer, said, now)

    def _promise(self, ballot: Ballot, now: float) -> Actions:
        if ballot > self.promised:
            self.promised, self.promised_at = ballot, now
            if self.lead is not None and self.lead.ballot < ballot:
                self._give_way(now)
        if self.reducing is not None and self.reducing < ballot:
            yield Drop(self.stand.chain, self.reducing)
            self.reducing = None

    def _begin(self, peer: str, ballot: Ballot, plan: Plan, now: float) -> Actions:
        if ballot < self.promised:
            yield from self._say(peer, Refuse(self.stand.chain, self.promised), now)
            return
        yield from self._promise(ballot, now)
        if (digest := self.made.get(_key(ballot))) is not None:
            yield from self._say(peer, Reduced(self.stand.chain, ballot, digest), now)
        elif wrong := self._wrong(plan):
            failed = Failed(self.stand.chain, ballot, wrong, (), ())
            yield from self._say(peer, failed, now)
        elif self.reducing != ballot:
            self.reducing = ballot
            yield Reduce(self.stand.chain, ballot, plan, now + self.patience.reduce)

    def _wrong(self, plan: Plan) -> str:
        """Why this peer takes no part in such a plan: nobody's weight is taken at its word."""
        if self.me not in plan.group or len(plan.group) != len(plan.weights):
            return f"{self.me} is not in the group"
        ends = [0, *(part.stop for part in plan.parts)]
        if [part.start for part in plan.parts] + [self.size] != ends:
            return "the parts are not the whole"
        if not all(part.reducer in plan.group and part.start < part.stop for part in plan.parts):
            return "a part has no reducer in the group"
        for peer, weight in zip(plan.group, plan.weights, strict=True):
            if peer not in self.roster:
                return f"{peer} is not in the roster"
            if weight not in (0.0, self.roster[peer].weight):
                return f"the weight of {peer} is not the roster's"
        return ""

    def _accept(self, peer: str, accept: Accept, now: float) -> Actions:
        if accept.ballot < self.promised:
            yield from self._say(peer, Refuse(self.stand.chain, self.promised), now)
            return
        yield from self._promise(accept.ballot, now)
        if accept.value.digest not in self.held:
            self.asked = accept
            yield from self._get(accept.value.digest, accept.holders)
            return
        self.accepted = (accept.ballot, accept.value)
        yield from self._say(peer, Accepted(self.stand.chain, accept.ballot), now)

    def _mean_made(self, digest: str, ballot: Ballot | None, now: float) -> Actions:
        if ballot is None:
            self.getting = ""
        elif ballot != self.reducing:
            return
        else:
            self.made[_key(ballot)] = digest
            self.reducing = None
        self.held.add(digest)
        if self.owed is not None and self.owed.digest == digest:
            yield from self._apply(self.owed)
            return
        if ballot is not None:
            yield from self._say(ballot[1], Reduced(self.stand.chain, ballot, digest), now)
        if self.asked is not None and self.asked.value.digest == digest:
            asked, self.asked = self.asked, None
            yield from self._accept(asked.ballot[1], asked, now)

    def _mean_failed(self, failed: MeanFailed, now: float) -> Actions:
        if failed.ballot is None:
            self.getting, self.asked, self.owed = "", None, None  # heard of again, or downloaded
        elif failed.ballot == self.reducing:
            self.reducing = None
            said = Failed(
                self.stand.chain, failed.ballot, failed.reason, failed.missing, failed.spoiled
            )
            yield from self._say(failed.ballot[1], said, now)

    # ---- the end of an epoch -------------------------------------------------------------------

    def _owe(self, value: Value, teller: str) -> Actions:
        self.owed = value
        if value.digest in self.held:
            yield from self._apply(value)
        else:
            others = (peer for peer in value.group if peer != teller)
            yield from self._get(value.digest, (teller, *others))

    def _get(self, digest: str, holders: tuple[str, ...]) -> Actions:
        if self.getting != digest:
            self.getting = digest
            yield Get(self.stand.chain, digest, tuple(h for h in holders if h != self.me))

    def _apply(self, value: Value) -> Actions:
        last = Commit(self.stand.chain, value)
        weights = dict(zip(value.group, value.weights, strict=True))
        yield Apply(value, used=weights.get(self.me, 0.0) > 0)
        yield from self._stand_at(self.stand.next(value), value.group, last)

    def _stand_at(self, stand: Stand, members: tuple[str, ...], last: Commit | None) -> Actions:
        """A new epoch: whatever belonged to the former one is over."""
        if self.reducing is not None:
            yield Drop(self.stand.chain, self.reducing)
        self.stand, self.members, self.last = stand, members, last
        self.ready, self.accepted, self.reducing, self.ripe = False, None, None, None
        self.promised, self.promised_at, self.pause = (0, ""), -1e9, -1e9
        self.asked, self.owed, self.lead, self.getting, self.tries = None, None, None, "", 0
        for of_the_epoch in (self.made, self.held, self.spoiled, self.shunned):
            of_the_epoch.clear()
        yield from self._announce()
        yield TrainOn(stand)

    def _behind(self, peer: str, last: Commit | None, now: float) -> Actions:
        """Somebody's model is better than mine: one mean away, or to be downloaded."""
        if last is not None and last.base == self.stand.chain:
            yield from self._owe(last.value, peer)
        elif not self.loading:
            near = [p for p in self._near(now) if self.doubted.get(p, now) <= now]
            best = max(self.roster[p].stand.rank for p in near)  # `peer` is one of them
            donors = [p for p in near if self.roster[p].stand.rank == best]
            self.loading = donors[sum(self.me.encode()) % len(donors)]  # not all to one
            self.loading_at = now
            yield Download(self.loading)

    def _doubt(self, donor: str, now: float) -> None:
        self.doubted[donor] = now + self.patience.silence
        self.loading = ""

    # ---- proposing -----------------------------------------------------------------------------

    def _proceed(self, now: float) -> Actions:
        """What time, or an answer, has made possible."""
        taking_part = self.up and not self.left and self.me in self.members
        if not taking_part or self.owed is not None:
            return
        while True:
            before = None if self.lead is None else self.lead.phase
            if self.lead is None:
                yield from self._propose(now)
            elif self.lead.phase == "prepare":
                yield from self._prepared(self.lead, now)
            elif self.lead.phase == "reduce":
                yield from self._reduced(self.lead, now)
            else:
                yield from self._voted(self.lead, now)
            if self.lead is None or self.lead.phase == before or self.me not in self.members:
                return

    def _propose(self, now: float) -> Actions:
        here = self._here_too(now)
        ready = [p for p in here if self._weight(p) > 0]
        if ready and self.ripe is None:
            self.ripe = now
        if all(p in self.spoiled for p in here):
            yield Abort("nobody's work is finite")
            self.spoiled.clear()
            self.ready, self.pause = False, now + self.patience.reply
            yield TrainOn(self.stand)
        if now < self.pause or [p for p in here if p in self.members][:1] != [self.me]:
            return
        if self._others_turn(now) or not quorum(here, self.members, self.gone()):
            return
        # A member that is near and not at this model yet is on its way to it: it is waited for.
        awaited = {*here, *(p for p in self._near(now) if p in self.members)} - self.spoiled
        waited = self.ripe is not None and now >= self.ripe + self.patience.ready
        if self.accepted is None and not (ready and (waited or awaited <= set(ready))):
            return
        ballot = (self.promised[0] + 1, self.me)
        self.lead = Lead(ballot, now)
        for peer in here:
            yield from self._say(peer, Prepare(self.stand.chain, ballot), now)

    def _others_turn(self, now: float) -> bool:
        """Another's proposal was promised, and it has had no time to end yet."""
        proposer, patience = self.promised[1], self.patience
        until = self.promised_at + patience.reply + patience.reduce + patience.fetch
        return proposer not in ("", self.me) and now < until and proposer in self._near(now)

    def _prepared(self, lead: Lead, now: float) -> Actions:
        late = now >= lead.since + self.patience.reply
        if not late and not set(self._here_too(now)) <= set(lead.promises):
            return
        if not quorum(lead.promises, self.members, self.gone()):
            if late:
                self._give_way(now)
            return
        known = [p.accepted for p in lead.promises.values()]
        known += [self.farewells[p].accepted for p in self.gone(here=True)]
        voted = [accepted for accepted in known if accepted is not None]
        if voted:
            # It may be decided already, by some who are gone: no other value may be proposed.
            lead.value = max(voted, key=lambda accepted: accepted[0])[1]
            yield from self._ask_votes(lead, now)
            return
        lead.plan = self._plan(lead.promises)
        if lead.plan is None:
            self._give_way(now)
            return
        lead.phase, lead.since = "reduce", now
        for peer in lead.plan.group:
            yield from self._say(peer, Begin(self.stand.chain, lead.ballot, lead.plan), now)

    def _plan(self, promises: dict[str, Promise]) -> Plan | None:
        """The group of all who promised; None where nobody's work is done or nobody can reduce."""
        group = sorted(p for p in promises if p in self.roster and p not in self.shunned)
        for peer in group:
            self.roster[peer].ready = promises[peer].ready
        weights = tuple(self._weight(p) for p in group)
        alone = len(group) == 1  # and needs no connection
        bandwidths = [1.0 if alone else self.roster[p].bandwidth for p in group]
        if not any(weights) or not any(bandwidths):
            return None
        parts, start = [], 0
        for peer, count in zip(group, split(self.size, shares(bandwidths)), strict=True):
            if count:
                parts.append(Part(peer, start, start + count))
                start += count
        return Plan(tuple(group), weights, tuple(parts))

    def _reduced(self, lead: Lead, now: float) -> Actions:
        assert lead.plan is not None
        plan, digests = lead.plan, sorted(set(lead.reports.values()))
        lost = {*plan.group} - {*self._near(now), self.me}  # with a part that others may lack
        late = now >= lead.since + self.patience.reduce + self.patience.reply
        whole = len(lead.reports) == len(plan.group)
        if not (whole or lost or lead.failures or late):
            return
        for digest in digests:
            holders = sorted(p for p, d in lead.reports.items() if d == digest)
            if holders == list(plan.group) or quorum(holders, self.members, self.gone()):
                lead.value = Value(lead.ballot, plan.group, plan.weights, digest)
                yield from self._ask_votes(lead, now)
                return
        for failed in lead.failures.values():
            self.spoiled.update(failed.spoiled)
        self._shun(lead, now)
        self.tries += 1
        self.lead = None
        if self.tries >= self.patience.attempts:
            reasons = [f"{p}: {lead.failures[p].reason}" for p in sorted(lead.failures)]
            reasons += [f"{p} is lost" for p in sorted(lost)] or ["it took too long"] * late
            yield Abort("; ".join(reasons) or "the digests differ")
            self.tries, self.pause, self.ripe = 0, now + self.patience.ready, None
            self.shunned.clear()
            return
        yield from self._propose(now)

    def _shun(self, lead: Lead, now: float) -> None:
        """Two that are near to me and not to each other: one of them must wait for the next."""
        near = {*self._near(now), self.me}
        pairs = [(p, m) for p, f in lead.failures.items() for m in f.missing if m in near]
        counts = {p: sum(p in pair for pair in pairs) for pair in pairs for p in pair}
        counts.pop(self.me, None)
        if counts:
            self.shunned.add(max(counts, key=lambda p: (counts[p], p)))

    def _ask_votes(self, lead: Lead, now: float) -> Actions:
        assert lead.value is not None
        lead.phase, lead.since, lead.votes = "accept", now, set()
        for peer in self._here_too(now):
            yield from self._say(peer, self._to_vote(lead), now)

    def _to_vote(self, lead: Lead) -> Accept:
        assert lead.value is not None
        holds = [p for p, d in lead.reports.items() if d == lead.value.digest]
        holders = tuple(sorted(holds)) or lead.value.group
        return Accept(self.stand.chain, lead.ballot, lead.value, holders)

    def _voted(self, lead: Lead, now: float) -> Actions:
        assert lead.value is not None
        if quorum(lead.votes, self.members, self.gone()):
            commit = Commit(self.stand.chain, lead.value)
            yield from self._all(commit)
            yield from self._message(self.me, commit, now)
        elif now >= lead.since + self.patience.fetch:
            self._give_way(now)

    def _give_way(self, now: float) -> None:
        """Propose nothing for a while: the first in order waits shortest."""
        place = self.members.index(self.me) if self.me in self.members else 0
        self.lead = None
        self.pause = now + self.patience.reply * (1 + place)

    def _say_again(self, now: float) -> Actions:
        """Messages get lost: a proposer says its last one again to those who have not answered."""
        lead = self.lead
        if lead is None:
            return
        match lead.phase:
            case "prepare":
                for peer in self._here_too(now):
                    if peer not in lead.promises:
                        yield from self._say(peer, Prepare(self.stand.chain, lead.ballot), now)
            case "reduce":
                assert lead.plan is not None
                for peer in lead.plan.group:
                    if peer not in lead.reports:
                        begin = Begin(self.stand.chain, lead.ballot, lead.plan)
                        yield from self._say(peer, begin, now)
            case _:
                for peer in self._here_too(now):
                    if peer not in lead.votes:
                        yield from self._say(peer, self._to_vote(lead), now)

    # ---- small change --------------------------------------------------------------------------

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

    def _near(self, now: float) -> list[str]:
        """Others that were heard of lately, sorted."""
        since = now - self.patience.silence
        return sorted(p for p, k in self.roster.items() if k.heard > since and p != self.me)

    def _here_too(self, now: float) -> list[str]:
        """Those at the same model, this one among them, sorted."""
        chain = self.stand.chain
        here = [p for p in self._near(now) if self.roster[p].stand.chain == chain]
        return sorted([*here, self.me])

    def _here(self) -> Announce:
        return Announce(self.stand, self.ready, self.last)

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


def _key(ballot: Ballot) -> str:
    return f"{ballot[0]} {ballot[1]}"
