"""Reduces: the all-reduces of a swarm in virtual time: what its peers pull, sum up and tell.

It drives `allreduce.py` as `exchange.py` does, over links of finite speed, with short vectors.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from atoll.aggregation import allreduce
from atoll.aggregation.allreduce import AllReduce, Plan, ReduceEvent, What
from atoll.aggregation.rendezvous_events import Lost, MeanFailed, MeanMade, PeerEvent
from atoll.p2p import vectors
from atoll.p2p.links import Links
from atoll.p2p.promises import Promises
from atoll.p2p.simulated import Simulated
from atoll.p2p.vectors import Vector
from atoll.p2p.world import Network

MOST = 10.0  # medians of length that a mean may have


@dataclass
class _Side:
    """What one peer has of the attempts it is in."""

    machines: dict[str, AllReduce] = field(default_factory=dict)  # attempt -> its machine
    given: set[str] = field(default_factory=set)  # attempts that it has put its work out for
    inputs: dict[str, dict[int, dict[str, Vector]]] = field(default_factory=dict)
    parts: dict[str, dict[int, Vector]] = field(default_factory=dict)  # reduced here, or fetched


class Reduces:
    """`hear(name, event)`: a peer's rendezvous hears how an attempt ended; its mean is then among
    the peer's `means`. `delta(name, chain)`: what its work on a model comes to."""

    def __init__(
        self,
        net: Network,
        peers: Mapping[str, Simulated],
        promises: Promises,
        *,
        hear: Callable[[str, PeerEvent], None],
        delta: Callable[[str, str], Vector],
    ) -> None:
        self._net, self._peers, self._promises = net, peers, promises
        self._hear, self._delta = hear, delta
        self._links = Links(net, {name: p.model.link for name, p in peers.items()})
        self._sides = {name: _Side() for name in peers}

    def begin(
        self, name: str, chain: str, ballot: tuple[int, str], plan: Plan, deadline: float
    ) -> None:
        attempt, side = _attempt(chain, ballot), self._sides[name]
        side.machines[attempt] = AllReduce(name, plan, deadline, plan.longest(MOST))
        side.given.add(attempt)
        self._handle(name, attempt, allreduce.Go())

    def drop(self, name: str, chain: str, ballot: tuple[int, str]) -> None:
        self._sides[name].machines.pop(_attempt(chain, ballot), None)

    def beat(self, name: str) -> None:
        for attempt in sorted(self._sides[name].machines):
            self._handle(name, attempt, allreduce.Beat())

    def turn(self, name: str, base: str) -> None:
        """It has applied the mean that follows `base`: what it has of that others may still want,
        of all before it nobody does."""
        side = self._sides[name]
        side.machines.clear()
        for kept in (side.inputs, side.parts):
            for attempt in [a for a in kept if not a.startswith(base)]:
                del kept[attempt]

    def forget(self, name: str) -> None:
        """It was killed."""
        self._sides[name] = _Side()

    def _handle(self, name: str, attempt: str, event: ReduceEvent) -> None:
        peer, side = self._peers[name], self._sides[name]
        machine = side.machines.get(attempt)
        if machine is None or not peer.alive:
            return
        chain, ballot = _named(attempt)
        for action in machine.handle(event, self._net.now):
            match action:
                case allreduce.Pull(giver, what, part):
                    pulled = partial(self._pulled, name, attempt, giver, what, part)
                    self._net.after(2 * self._net.delay(), pulled)
                case allreduce.Combine(part, order):
                    self._net.after(0.001, partial(self._combined, name, attempt, part, order))
                case allreduce.Tell(to, message):
                    told = partial(self._handle, to, attempt, message)
                    self._net.send(name, to, told, partial(self._hear, name, Lost(to)))
                case allreduce.Done(digest):
                    parts = side.parts[attempt]
                    peer.means[digest] = [x for i in sorted(parts) for x in parts[i]]
                    self._hear(name, MeanMade(chain, digest, ballot))
                case allreduce.Fail(reason, missing, spoiled):
                    failed = MeanFailed(chain, reason, ballot, missing, spoiled)
                    self._hear(name, failed)

    def _pulled(self, name: str, attempt: str, giver: str, what: What, part: int) -> None:
        peer, other = self._peers[name], self._peers[giver]
        machine, theirs = self._sides[name].machines.get(attempt), self._sides[giver]
        if machine is None:
            return
        result = theirs.parts.get(attempt, {}).get(part)
        begun = what == "result" or attempt in theirs.given
        if self._net.lost(name, giver) or not begun or (what == "result" and result is None):
            self._handle(name, attempt, allreduce.Missed(giver, what, part))
            return
        if math.isinf(min(peer.model.link, other.model.link)):
            self._arrived(name, attempt, giver, what, part)
            return
        size = machine.plan.parts[part].stop - machine.plan.parts[part].start

        def arrive(began: float, ended: float) -> None:
            peer.meter.took(size, began, ended)
            other.meter.gave(size, began, ended)
            self._arrived(name, attempt, giver, what, part)

        self._links.move(giver, name, what, size, arrive)

    def _arrived(self, name: str, attempt: str, giver: str, what: What, part: int) -> None:
        side = self._sides[name]
        machine = side.machines.get(attempt)
        result = self._sides[giver].parts.get(attempt, {}).get(part)
        if machine is None or (what == "result" and result is None):
            return
        digest, long = "", 0.0
        if what == "result":
            assert result is not None
            digest, long = vectors.sha256(result), vectors.length(result)
            side.parts.setdefault(attempt, {})[part] = result
        else:
            given = self._given(giver, attempt, machine, part)
            side.inputs.setdefault(attempt, {}).setdefault(part, {})[giver] = given
        self._handle(name, attempt, allreduce.Arrived(giver, what, part, digest, long))

    def _combined(
        self, name: str, attempt: str, part: int, order: tuple[tuple[str, float], ...]
    ) -> None:
        side = self._sides[name]
        machine = side.machines.get(attempt)
        if machine is None:
            return
        given = dict(side.inputs.get(attempt, {}).get(part, {}))
        given[name] = self._given(name, attempt, machine, part)
        spoiled = tuple(p for p, _ in order if not all(map(math.isfinite, given[p])))
        mean = vectors.mean([(given[p], w) for p, w in order])
        if not spoiled:
            side.parts.setdefault(attempt, {})[part] = mean
        combined = allreduce.Combined(part, vectors.sha256(mean), spoiled, vectors.length(mean))
        self._handle(name, attempt, combined)

    def _given(self, giver: str, attempt: str, machine: AllReduce, part: int) -> Vector:
        """A part of a peer's work, as of its life now."""
        self._promises.given(attempt, giver, self._peers[giver].lives)
        place, (chain, _) = machine.plan.parts[part], _named(attempt)
        return self._delta(giver, chain)[place.start : place.stop]


def _attempt(chain: str, ballot: tuple[int, str]) -> str:
    return f"{chain}/{ballot[0]}/{ballot[1]}"


def _named(attempt: str) -> tuple[str, tuple[int, str]]:
    """Its chain and its ballot."""
    chain, count, proposer = attempt.split("/")
    return chain, (int(count), proposer)
