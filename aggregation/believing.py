"""Believing: the half of a rendezvous that follows: what it takes from others as the run's model.

A better model than its own must be shown to be the run's, by seals (`seals.py`); until then it is a
claim, and who makes it is asked whence it came. What is believed is a few means away, which are
fetched and applied one by one, or is downloaded; and of one model with two sets of bits the heavier
side's are right.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator

from atoll.aggregation.circle import Actions, Circle, Known, Loading
from atoll.aggregation.quorum import quorum
from atoll.aggregation.rendezvous_events import Download, Load, Say, TrainOn
from atoll.aggregation.rendezvous_messages import Announce, Commit, Stand, Step, Value, Whence
from atoll.aggregation.seals import KEPT, makers, proved, sound


class Believer(Circle):
    """The following half of `Rendezvous`."""

    @abstractmethod
    def _owe(self, value: Value, teller: str) -> Actions:
        """It is decided: apply its mean as soon as that lies here."""

    @abstractmethod
    def _stand_at(
        self,
        stand: Stand,
        members: tuple[str, ...],
        last: Commit | None,
        history: tuple[Step, ...],
    ) -> Actions:
        """A new epoch."""

    # ---- claims --------------------------------------------------------------------------------

    def _announced(self, peer: str, said: Announce, now: float) -> Actions:
        """A better model is nobody's until it is shown that the run made it."""
        known = self.roster[peer]
        if said.stand.rank > self.stand.rank and not self._believes(peer, said, now):
            known.claim = said
            since = self.history[0].stand if self.history else self.stand
            yield Say(peer, Whence(since.heavy))
            return
        if self._may_replay(said.stand) and not self._ahead(said.stand):
            way = f"{peer} {said.stand.chain}"
            if way not in self.ways:
                yield Say(peer, Whence(self.stand.heavy))
            if now < self.ways.setdefault(way, now) + self.patience.reply:
                known.claim = said
                return
        known.claim = None
        self._learn(known, said)
        yield from self._compare(peer, said.stand, said.last, now)

    def _learn(self, known: Known, said: Announce) -> None:
        if said.stand.rank < known.stand.rank:
            return  # messages overtake each other
        same = said.stand == known.stand
        known.ready = said.ready or (known.ready and same)
        known.bits = said.bits or (known.bits if same else "")
        known.stand, known.last = said.stand, said.last

    def _led(self, peer: str, steps: tuple[Step, ...], now: float) -> Actions:
        """The answer to `Whence`; nobody was asked who claims nothing."""
        claim = self.roster[peer].claim
        if claim is None:
            return
        for way, stand, members in self._anchors():
            found = proved(steps[:KEPT], stand, members, self.seals, self.most)
            self.proved |= {chain: (*way, *more) for chain, more in found.items()}
        asked = f"{peer} {claim.stand.chain}"
        if asked in self.ways or claim.stand.chain in self.proved:  # not whatever it claims
            self.ways[asked] = -math.inf
        if claim.stand.chain in self.proved:
            yield from self._announced(peer, claim, now)

    def _believes(self, peer: str, said: Announce, now: float) -> bool:
        """Whether the better model that `peer` says it has is the run's.

        That is shown by the seals of a quorum of those who made this peer's own, or of a path that
        leads from it, or from the first. Where no path is left, see `_is_said`.
        """
        stand, last = said.stand, said.last
        if stand == self.root or stand.chain in self.proved:
            return True
        if last is not None and sound(last.value, stand, self.members, self.seals):
            self.proved[stand.chain] = *self.history, Step(stand, last)
            return True
        return self._is_said(peer, said, now)

    def _is_said(self, peer: str, said: Announce, now: float) -> bool:
        """Whether more than half of those near who have a model say so, or a quorum of those who
        made this peer's own; to have sealed it is to say so. Who has none believes one alone after
        a while only: there is nobody else. The first model, which all can make, is one only with
        those who decide what follows."""
        stand, last = said.stand, said.last
        near = [p for p in self._near(now) if p == peer or self._has(p, self._says(p))]
        sealed = set() if last is None else makers(last.value, stand, near, self.seals)
        for_it = [p for p in near if p in {peer, *sealed} or self._says(p).chain == stand.chain]
        if not self._has(self.me, self.stand):
            late = now >= self.loads_from + self.patience.load
            return 2 * len(for_it) > len(near) and (len(for_it) > 1 or late)
        return 2 * len(for_it) > len(near) + 1 or quorum(for_it, self.members, self.gone())

    def _has(self, peer: str, stand: Stand) -> bool:
        """Whether it has taken part, or is one without whom nobody has."""
        return stand.epoch > 0 or (stand.epoch == 0 and peer in self.members)

    def _anchors(self) -> Iterator[tuple[tuple[Step, ...], Stand, tuple[str, ...]]]:
        """Models from which a path to another is looked for, each with the steps to it and who made
        it: this peer's own, and those before it, from where another branch may be the heavier.

        Of the latter only those of three or more: of fewer one alone could make another past.
        """
        yield self.history, max(self.stand, self.root, key=lambda one: one.epoch), self.members
        for i, step in enumerate(self.history):
            if len(step.last.value.group) > 2:
                yield self.history[: i + 1], step.stand, step.last.value.group

    def _says(self, peer: str) -> Stand:
        """Where it says that it stands, shown or not."""
        known = self.roster[peer]
        return known.stand if known.claim is None else known.claim.stand

    # ---- models ----------------------------------------------------------------------------------

    def _compare(self, peer: str, stand: Stand, last: Commit | None, now: float) -> Actions:
        """Where another stands: is its model better, or the same one with other bits?"""
        if self.doubted.get(peer, now) > now:
            return
        away = last is not None and last.base == self.stand.chain and self.stand.epoch >= 0
        ahead = self._ahead(stand)
        if stand.rank > self.stand.rank and last is not None and away:
            yield from self._owe(last.value, peer)  # one mean away
        elif ahead and ahead[0].last.value.digest not in self.unheld:
            yield from self._owe(ahead[0].last.value, peer)
        elif self.loading is None and now >= self.loads_from and stand.rank >= self.stand.rank:
            near = [p for p in self._near(now) if self.doubted.get(p, now) <= now]
            best = max(self.roster[p].stand.rank for p in near)  # `peer` is one of them
            there = [p for p in near if self.roster[p].stand.rank == best]
            if best > self.stand.rank:
                yield from self._load(there, there, now)
            elif self.bits:
                yield from self._load(there, [*there, self.me], now)

    def _may_replay(self, stand: Stand) -> bool:
        """Whether some means lead to that model, more than one, and not longer than it is."""
        ahead = stand.epoch - self.stand.epoch
        better = stand.rank > self.stand.rank and self.stand.epoch >= 0
        return better and 1 < ahead <= self.replay and self.loading is None

    def _ahead(self, stand: Stand) -> tuple[Step, ...]:
        """The steps from this peer's model to that one, all of them; () where one is not known."""
        if not self._may_replay(stand):
            return ()
        found, at = [], self.stand.chain
        for step in self.proved.get(stand.chain, ()):
            if step.last.base == at:
                found.append(step)
                at = step.stand.chain
        return tuple(found) if at == stand.chain else ()

    def _load(self, donors: list[str], voters: list[str], now: float) -> Actions:
        """The model that most weight says; of those who say it, and only where this peer has not
        the same: one commit with two models is healed where it is light."""
        sides = self._sides(voters)
        if not sides:
            return  # it is said as soon as it is known
        bits = max(sides, key=lambda one: (sides[one], one))
        donors = [p for p in donors if self.roster[p].bits == bits]
        known = self.roster[donors[0]] if donors else None
        if known is None or (known.stand.chain == self.stand.chain and bits == self.bits):
            return
        first = sum(self.me.encode()) % len(donors)  # not all from one
        turned = (*donors[first:], *donors[:first])
        self.loading = Loading(known.stand, known.last, bits, turned, now)
        yield Download(known.stand, turned, bits)

    def _loaded(self, loading: Loading) -> Actions:
        self.loading = None
        stand = loading.stand
        if stand.rank > self.stand.rank:
            yield Load(stand)
            members = self.members if loading.last is None else loading.last.value.group
            unknown = () if loading.last is None else (Step(stand, loading.last),)
            history = self.proved.get(stand.chain, unknown)
            self.recent = ()
            yield from self._stand_at(stand, members, loading.last, history)
            self.bits = loading.bits
        elif stand.chain == self.stand.chain and self.bits not in ("", loading.bits):
            # Not where a mean has brought it to the same model by now: it has those bits, or says
            # others soon.
            yield Load(stand)
            self.bits = loading.bits
            if not self.ready:
                yield TrainOn(stand)

    def _doubt(self, donors: tuple[str, ...], now: float) -> None:
        self.doubted.update(dict.fromkeys(donors, now + self.patience.silence))
        self.loading = None
