"""Rendezvous: how peers without a server meet for a mean, agree on it, and never fork. A machine.

Each epoch is decided once, by Paxos (Lamport 2001, "Paxos made simple") among those who made the
last one: the lowest of them that is near proposes a group of all who are there, the group reduces
(`allreduce.py`), and the mean is applied by nobody before a quorum holds it and has voted for it.
So a death at any point costs an attempt and never a fork; whoever missed the end fetches that mean
or downloads the model. A promise and a vote bind a peer for an epoch: one that comes back without
its state comes back under another name.

Time is the caller's `now`, in seconds. The network may lose, delay, double and reorder messages.
"""

from dataclasses import dataclass

from atoll.aggregation.allreduce import Plan
from atoll.aggregation.believing import Believer
from atoll.aggregation.circle import Actions, Known, Patience
from atoll.aggregation.plan_check import wrong
from atoll.aggregation.proposing import Proposer
from atoll.aggregation.rendezvous_events import (
    Admitted,
    Apply,
    BeatDue,
    Bound,
    Digested,
    Downloaded,
    Drop,
    Get,
    Heard,
    Leaving,
    Lost,
    MeanFailed,
    MeanMade,
    NotDownloaded,
    PeerAction,
    PeerEvent,
    Reduce,
    Removed,
    Say,
    Started,
    StepsDone,
    TrainOn,
    Wake,
)
from atoll.aggregation.rendezvous_messages import (
    Accept,
    Accepted,
    Announce,
    Ballot,
    Begin,
    Commit,
    Failed,
    Goodbye,
    Message,
    Path,
    Prepare,
    Promise,
    Reduced,
    Refuse,
    Stand,
    Step,
    Value,
    Whence,
)
from atoll.aggregation.seals import RECENT, fair, left, made, told, worth_keeping


@dataclass
class Rendezvous(Proposer, Believer):
    """One peer, both halves: `handle` what it hears."""

    @classmethod
    def again(cls, me: str, size: int, bound: Bound, patience: Patience) -> "Rendezvous":
        """The peer whose memory `bound` is, after its death, and that has said no goodbye. The mean
        that it voted for, if any, must lie here."""
        assert not bound.parted, "it has said that it never votes again"
        machine = cls(me, size, bound.members, bound.stand, patience, last=bound.last)
        machine.history = bound.history
        machine.promised, machine.accepted = bound.promised, bound.accepted
        machine.lost = bound.promised
        machine.farewells = dict(bound.farewells)
        if bound.accepted is not None:
            machine.held.add(bound.accepted[1].digest)
        return machine

    def bound(self) -> Bound:
        """To be on disk before what `handle` returned is carried out."""
        return Bound(
            self.stand,
            self.members,
            self.last,
            self.promised,
            self.accepted,
            dict(self.farewells),
            self.history,
            self.parted,
        )

    def handle(self, event: PeerEvent, now: float) -> list[PeerAction]:
        """What to do about `event` at `now`, seconds, never decreasing."""
        if self.left:
            return []
        return [*self._hear(event, now), *self._proceed(now)]

    # ---- what happened -----------------------------------------------------------------------

    def _hear(self, event: PeerEvent, now: float) -> Actions:
        match event:
            case Started():
                self.up, self.loads_from = True, now + self.patience.beat
                for known in self.roster.values():
                    known.heard = now  # nobody has had the time to be silent
                yield Wake(now + self.patience.beat)
                yield from self._announce()
                if self.stand.epoch >= 0:
                    yield TrainOn(self.stand)
                if self.lost[1] and self.lost[1] != self.me:
                    yield Say(self.lost[1], self._ended(self.lost))
            case Admitted(peer, weight, bandwidth):
                known = self.roster.setdefault(peer, Known(weight, bandwidth))
                known.weight, known.bandwidth = weight, bandwidth
            case Removed(peer):
                self.roster.pop(peer, None)
                self.doubted.pop(peer, None)
                self._forget_gone()
                self.left = self.left or peer == self.me
            case Heard(peer, message):
                if peer in self.roster and peer != self.me:
                    self.roster[peer].heard = now
                    yield from self._message(peer, message, now)
            case Lost(peer):
                if peer in self.roster:
                    self.roster[peer].heard = -1e9
            case StepsDone(chain, length):
                if chain == self.stand.chain and not self.ready:
                    self.ready, self.length = True, length
                    yield from self._announce()
            case MeanMade(chain, digest, ballot):
                if chain == self.stand.chain:
                    yield from self._mean_made(digest, ballot, now)
            case MeanFailed(chain):
                if chain == self.stand.chain:
                    yield from self._mean_failed(event, now)
            case Digested(chain, bits):
                if chain == self.stand.chain and bits != self.bits:
                    self.bits = bits
                    yield from self._announce()
            case Downloaded(chain):
                if self.loading is not None and chain == self.loading.stand.chain:
                    yield from self._loaded(self.loading)
            case NotDownloaded(chain, doubted):
                if self.loading is not None and chain == self.loading.stand.chain:
                    self._doubt(doubted, now)
            case BeatDue():
                yield Wake(now + self.patience.beat)
                loading = self.loading
                if loading is not None and now >= loading.since + self.patience.load:
                    self._doubt(loading.donors, now)
                yield from self._announce()
                yield from self._say_again(now)
            case Leaving():  # pragma: no branch
                yield from self._leave()

    def _leave(self) -> Actions:
        # Who is alone may come back as itself: nobody decides without it meanwhile.
        if {*self.members} - {*self.gone()} != {self.me}:
            seal = self.seals.seal(left(self.stand))
            yield from self._all(Goodbye(self.stand, self.accepted, seal))
            self.parted = True
        if self.reducing is not None:
            yield Drop(self.stand.chain, self.reducing)
        self.left = True

    def _message(self, peer: str, message: Message, now: float) -> Actions:
        """From another peer, or from this one to itself where it proposes."""
        match message:
            case Announce(stand, _, last):
                if stand.follows(last) and (last is None or fair(last.value, self.most)):
                    yield from self._announced(peer, message, now)
            case Commit(base, value):
                here = base == self.stand.chain and self.stand.epoch >= 0
                if here and self._sound(value):
                    yield from self._owe(value, peer)
            case Goodbye(stand, _, seal):
                if self.seals.holds(peer, left(stand), seal):
                    self.farewells[peer] = message
                    self.roster[peer].heard = -1e9
            case Whence(heavy):
                steps = told(self.history, self.recent)
                yield Say(peer, Path(tuple(s for s in steps if s.stand.heavy > heavy)))
            case Path(steps):
                yield from self._led(peer, steps, now)
            case _ if message.chain != self.stand.chain:
                if not isinstance(message, Promise | Refuse | Reduced | Failed | Accepted):
                    yield Say(peer, self._here())  # too late, or too early: this is where I stand
            case Prepare(_, ballot) if self._may_propose(peer, ballot):
                yield from self._prepare(peer, ballot, now)
            case Begin(_, ballot, plan) if self._may_propose(peer, ballot):
                yield from self._begin(peer, ballot, plan, now)
            case Accept(_, ballot, value) if self._may_propose(peer, ballot) and self._sound(value):
                yield from self._accept(peer, message, now)
            case Refuse(_, ballot) if self._counts(ballot):
                self.promised = max(self.promised, ballot)
                if self.lead is not None and ballot > self.lead.ballot:
                    self._give_way(now)
            case Promise() | Reduced() | Failed() | Accepted():
                self._answered(peer, message)
            case _:
                pass  # a proposal of who may make none

    def _answered(self, peer: str, message: Promise | Reduced | Failed | Accepted) -> None:
        """To a proposal of this peer's."""
        lead = self.lead
        if lead is None or message.ballot != lead.ballot:
            return
        match message:
            case Promise():
                lead.promises[peer] = message
            case Reduced(_, _, digest, seal):
                if lead.plan is not None and self.seals.holds(
                    peer, made(self.stand.next(lead.would_be(digest))), seal
                ):
                    lead.reports[peer] = digest
                    lead.seals[peer] = seal
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
        said = Promise(self.stand.chain, ballot, self.ready, self.accepted, self.length)
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
        key = _key(ballot)
        known = ballot <= self.lost or ballot == self.reducing or key in {*self.made, *self.failed}
        if not known and (reason := wrong(plan, self)):  # it binds nobody
            said = Failed(self.stand.chain, ballot, reason, (), ())
            yield from self._say(peer, said, now)
            return
        yield from self._promise(ballot, now)
        if (mine := self.made.get(key)) is not None:
            yield from self._say(peer, Reduced(self.stand.chain, ballot, *mine), now)
        elif ballot <= self.lost:
            yield from self._say(peer, self._ended(ballot), now)
        elif (failed := self.failed.get(key)) is not None:
            yield from self._say(peer, failed, now)
        elif self.reducing != ballot:
            self.reducing, self.plan = ballot, plan
            yield Reduce(self.stand.chain, ballot, plan, now + self.patience.reduce)

    def _ended(self, ballot: Ballot) -> Failed:
        return Failed(self.stand.chain, ballot, f"{self.me} was started anew", (), ())

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
            assert self.plan is not None, "it reduces by one"
            value = Value(ballot, self.plan.group, self.plan.weights, digest)
            seal = self.seals.seal(made(self.stand.next(value)))
            self.made[_key(ballot)] = digest, seal
            self.reducing = None
        self.held.add(digest)
        if self.owed is not None and self.owed.digest == digest:
            yield from self._apply(self.owed)
            return
        if ballot is not None:
            mine = self.made[_key(ballot)]
            yield from self._say(ballot[1], Reduced(self.stand.chain, ballot, *mine), now)
        if self.asked is not None and self.asked.value.digest == digest:
            asked, self.asked = self.asked, None
            yield from self._accept(asked.ballot[1], asked, now)

    def _mean_failed(self, failed: MeanFailed, now: float) -> Actions:
        if failed.ballot is None:
            self.unheld |= {self.owed.digest} if self.owed is not None else set()
            self.getting, self.asked, self.owed = "", None, None  # heard of again, or downloaded
        elif failed.ballot == self.reducing:
            self.reducing = None
            said = Failed(
                self.stand.chain, failed.ballot, failed.reason, failed.missing, failed.spoiled
            )
            self.failed[_key(failed.ballot)] = said
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
        step = Step(self.stand.next(value), last)
        self.recent = (*self.recent, step)[-RECENT:]
        yield from self._stand_at(step.stand, value.group, last, (*self.history, step))

    def _stand_at(
        self,
        stand: Stand,
        members: tuple[str, ...],
        last: Commit | None,
        history: tuple[Step, ...],
    ) -> Actions:
        """A new epoch: whatever belonged to the former one is over."""
        if self.reducing is not None:
            yield Drop(self.stand.chain, self.reducing)
        self.stand, self.members, self.last = stand, members, last
        self._forget_gone()
        self.history = worth_keeping(history)
        self.ready, self.accepted, self.reducing, self.ripe = False, None, None, None
        self.bits, self.length = "", 0.0
        self.promised, self.promised_at, self.pause = (0, ""), -1e9, -1e9
        self.asked, self.owed, self.lead, self.getting, self.tries = None, None, None, "", 0
        self.lost = (0, "")
        for of_the_epoch in (
            self.made, self.failed, self.held, self.blamed, self.spoiled, self.apart, self.proved,
            self.unheld, self.ways,
        ):  # fmt: skip
            of_the_epoch.clear()
        yield from self._announce()
        yield TrainOn(stand)


def _key(ballot: Ballot) -> str:
    return f"{ballot[0]} {ballot[1]}"
