"""Proposing: the half of a rendezvous that leads: who is in a group, what a quorum decides.

The lowest of the members that are near proposes, a proposal at a time: it asks for promises, has
the group reduce, asks for votes. Nothing is decided by what it believes, all by what it is told.
"""

from collections import Counter
from dataclasses import replace

from atoll.aggregation.allreduce import Part, Plan
from atoll.aggregation.circle import Actions, Circle, Lead
from atoll.aggregation.quorum import quorum
from atoll.aggregation.rendezvous_events import Abort, TrainOn
from atoll.aggregation.rendezvous_messages import Accept, Begin, Commit, Left, Prepare, Promise
from atoll.aggregation.shares import assumed, cut, shares, split


class Proposer(Circle):
    """The leading half of `Rendezvous`."""

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
            self.blamed.clear()
            self.ready, self.pause = False, now + self.patience.reply
            yield TrainOn(self.stand)
        if now < self.pause or [p for p in here if p in self.members][:1] != [self.me]:
            return
        done = {*ready, *(self.spoiled & {*here})}
        if self.stand.epoch == 0 and len(done) < self.patience.first:
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
        voted = [a for a in known if a is not None and self._sound(a[1])]
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
        group = sorted({*promises} & self.roster.keys() - self._waiting())
        for peer in group:
            self.roster[peer].ready = promises[peer].ready
        weights = tuple(self._weight(p) for p in group)
        alone = len(group) == 1  # and needs no connection
        bandwidths = assumed([1.0 if alone else self.roster[p].bandwidth for p in group])
        if not any(weights) or not any(bandwidths):
            return None
        parts, start = [], 0
        for peer, count in zip(group, split(self.size, shares(bandwidths)), strict=True):
            for piece in cut(count, self.piece) if count else ():
                parts.append(Part(peer, start, start + piece))
                start += piece
        lengths = tuple(promises[p].length for p in group)
        return Plan(tuple(group), weights, tuple(parts), lengths if any(lengths) else ())

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
            if quorum(holders, self.members, self.gone()):
                seals = tuple((p, lead.seals[p]) for p in holders)
                lead.value = replace(lead.would_be(digest), seals=seals, gone=self._left())
                yield from self._ask_votes(lead, now)
                return
        self._blame(lead)
        self._set_apart(lead, now)
        self.tries += 1
        self.lead = None
        if self.tries >= self.patience.attempts:
            reasons = [f"{p}: {lead.failures[p].reason}" for p in sorted(lead.failures)]
            reasons += [f"{p} is lost" for p in sorted(lost)] or ["it took too long"] * late
            yield Abort("; ".join(reasons) or "the digests differ")
            self.tries, self.pause, self.ripe = 0, now + self.patience.ready, None
            self.apart.clear()
            return
        yield from self._propose(now)

    def _left(self) -> tuple[Left, ...]:
        """Members that a quorum does not count, with their own word for it."""
        said = [(p, self.farewells[p]) for p in self.gone() if p in self.members]
        return tuple(Left(peer, goodbye.stand, goodbye.seal) for peer, goodbye in said)

    def _blame(self, lead: Lead) -> None:
        """Whose work is not finite its reducers say, and one of them may lie: who says so of more
        than others say it of, weighs nothing itself. Of one word against one the blamed is taken
        out. So a liar silences one in a round, and not all but itself."""
        for peer, failed in lead.failures.items():
            self.blamed |= {(peer, other) for other in failed.spoiled if other in self.roster}
        self.spoiled = {peer for peer, other in self.blamed if peer == other}
        while open_ := [pair for pair in self.blamed if not self.spoiled.intersection(pair)]:
            said = Counter(peer for pair in open_ for peer in pair)
            of = Counter(other for _, other in open_)
            self.spoiled.add(max(said, key=lambda p: (said[p], of[p], p)))

    def _set_apart(self, lead: Lead, now: float) -> None:
        """Two that are near to me and not to each other: one of them must wait for the next."""
        near = {*self._near(now), self.me}
        for peer, failed in lead.failures.items():
            self.apart |= {(min(peer, m), max(peer, m)) for m in failed.missing if m in near}

    def _waiting(self) -> set[str]:
        """Whom to leave out, so that no two are in the group that cannot reach each other: those
        first whom most others miss. That may be I, who lead the others all the same."""
        found: set[str] = set()
        while pairs := [pair for pair in self.apart if not found.intersection(pair)]:
            counts = Counter(peer for pair in pairs for peer in pair)
            found.add(max(counts, key=lambda p: (counts[p], p != self.me, p)))
        return found

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
