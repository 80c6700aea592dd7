"""AllReduce: one attempt at the mean of a group's vectors, a part of it by each peer. A machine.

Butterfly all-reduce (hivemind's `averaging/allreduce.py`, DeDLOC, https://arxiv.org/abs/2106.10207)
by pulling: whoever reduces a part fetches it from every contributor, sums in the plan's order, and
all fetch the result from there, its own reducer's decoded values included. So one part has one
maker, and all who finish hold the same bits. It says `Done` with a digest over the parts, or
`Fail`; it never gives a partial mean, and what is done with the result is `rendezvous.py`'s affair.
"""

import hashlib
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

What = Literal["input", "result"]


@dataclass(frozen=True, slots=True)
class Part:
    """Elements `start` to `stop` of the flat vector, and who reduces them."""

    reducer: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Who is in the group, with which weight, and who reduces what. Computed once, by its leader.

    A peer of weight 0 contributes nothing and gets the result like the others.
    """

    group: tuple[str, ...]  # sorted: the order of the sum
    weights: tuple[float, ...]  # by the roster's rule, beside `group`
    parts: tuple[Part, ...]
    lengths: tuple[float, ...] = ()  # L2, of what each gives, by its own word, beside `group`

    def longest(self, most: float) -> float:
        """How long a mean can be where no part may count for more than `most` medians of length:
        of what a reducer returns this much can be checked. inf where no lengths were said.

        The limit is one of each part, and the medians of the parts, taken together, can be longer
        than that of the wholes: for each part one of those no longer than the median is as long as
        the part's, and they are n / 2 + 1 at most, so the root of that is what comes on top.
        """
        said = [n for n, w in zip(self.lengths, self.weights, strict=bool(self.lengths)) if w > 0]
        if not any(said):
            return math.inf
        return most * statistics.median(said) * math.sqrt(len(said) / 2 + 1)

    def contributors(self) -> list[tuple[str, float]]:
        pairs = zip(self.group, self.weights, strict=True)
        return [(peer, weight) for peer, weight in pairs if weight > 0]


# ---- heard ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Go:
    """The plan is there: begin."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """What was fetched lies here, whole and checked by the transport."""

    peer: str
    what: What
    part: int
    digest: str = ""  # of a result: SHA-256 over its bytes, in hex
    length: float = 0.0  # of a result: L2, of its values


@dataclass(frozen=True, slots=True)
class Missed:
    """A fetch that failed, or found nothing yet. It is tried again at the next beat."""

    peer: str
    what: What
    part: int


@dataclass(frozen=True, slots=True)
class Combined:
    """A part of this peer's is reduced; `spoiled`: whose input was not finite."""

    part: int
    digest: str
    spoiled: tuple[str, ...] = ()
    length: float = 0.0  # L2, of the result


@dataclass(frozen=True, slots=True)
class PartReady:
    """A message of the reducer `peer`: the result of `part` can be fetched from it.

    Who it is from the transport says, not the message.
    """

    peer: str
    part: int
    digest: str


@dataclass(frozen=True, slots=True)
class Gone:
    """A peer is lost."""

    peer: str


@dataclass(frozen=True, slots=True)
class Beat:
    """Time has passed: the driver says so every half second or so."""


ReduceEvent = Go | Arrived | Missed | Combined | PartReady | Gone | Beat

# ---- said ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pull:
    """Fetch it: hear `Arrived` or `Missed`, once."""

    peer: str
    what: What
    part: int


@dataclass(frozen=True, slots=True)
class Combine:
    """Reduce `part`: the weighted mean of these inputs, in this order. Hear `Combined`."""

    part: int
    order: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message; it may be lost."""

    peer: str
    message: PartReady


@dataclass(frozen=True, slots=True)
class Done:
    """All parts are held: the mean can be read."""

    digest: str  # over the parts' digests, in order; hex


@dataclass(frozen=True, slots=True)
class Fail:
    """The attempt is over and its parts are worth nothing. Nothing was changed."""

    reason: str
    missing: tuple[str, ...] = ()  # who was waited for
    spoiled: tuple[str, ...] = ()  # whose input was not finite


ReduceAction = Pull | Combine | Tell | Done | Fail


@dataclass
class AllReduce:
    """One peer's side of one attempt. `over` is set once: after `Done` or `Fail` it says no more
    but where its parts are."""

    me: str
    plan: Plan
    deadline: float  # when it fails, seconds of `now`
    longest: float = math.inf  # length of a mean that is believed
    awaited: dict[int, set[str]] = field(default_factory=dict)  # my parts -> inputs still missing
    results: dict[int, str] = field(default_factory=dict)  # part -> digest, of those held
    lengths: dict[int, float] = field(default_factory=dict)  # of the same
    ready: dict[int, str] = field(default_factory=dict)  # others' parts that can be fetched
    pulling: set[tuple[str, What, int]] = field(default_factory=set)
    over: bool = False

    def handle(self, event: ReduceEvent, now: float) -> list[ReduceAction]:
        return [] if self.over else list(self._handle(event, now))

    def _handle(self, event: ReduceEvent, now: float) -> Iterator[ReduceAction]:
        match event:
            case Go():
                yield from self._go()
            case Arrived(peer, what, part):
                self.pulling.discard((peer, what, part))
                yield from self._arrived(event)
            case Missed(peer, what, part):
                self.pulling.discard((peer, what, part))
            case Combined():
                yield from self._combined(event)
            case PartReady(peer, part, digest):
                known = 0 <= part < len(self.plan.parts) and self.plan.parts[part].reducer == peer
                if known and part not in self.results:
                    self.ready[part] = digest
                    yield from self._pull(peer, "result", part)
            case Gone(peer):
                if peer in self.waits_for():
                    yield self._fail(f"{peer} is lost", missing=(peer,))
            case Beat():  # pragma: no branch
                yield from self._beat(now)

    def waits_for(self) -> list[str]:
        """Peers without whom it cannot go on, sorted."""
        inputs = {peer for missing in self.awaited.values() for peer in missing}
        makers = {p.reducer for i, p in enumerate(self.plan.parts) if i not in self.results}
        return sorted((inputs | makers) - {self.me})

    def _go(self) -> Iterator[ReduceAction]:
        contributors = [peer for peer, _ in self.plan.contributors()]
        assert contributors, "a plan without a weight above 0"
        for i, part in enumerate(self.plan.parts):
            if part.reducer != self.me:
                continue
            self.awaited[i] = set(contributors) - {self.me}
            if not self.awaited[i]:
                yield Combine(i, tuple(self.plan.contributors()))
            for peer in contributors:
                if peer != self.me:
                    yield from self._pull(peer, "input", i)

    def _arrived(self, arrived: Arrived) -> Iterator[ReduceAction]:
        peer, part, digest = arrived.peer, arrived.part, arrived.digest
        if arrived.what == "input":
            missing = self.awaited.get(part, set())
            if peer in missing:
                missing.discard(peer)
                if not missing:
                    yield Combine(part, tuple(self.plan.contributors()))
        elif self.ready.setdefault(part, digest) != digest:
            yield self._fail(f"part {part} has another digest than {peer} said", missing=(peer,))
        else:
            yield from self._hold(part, digest, arrived.length)

    def _combined(self, combined: Combined) -> Iterator[ReduceAction]:
        part, digest, spoiled = combined.part, combined.digest, combined.spoiled
        if spoiled:
            yield self._fail(f"not finite: {', '.join(spoiled)}", spoiled=spoiled)
            return
        for peer in self.plan.group:
            if peer != self.me:
                yield Tell(peer, PartReady(self.me, part, digest))
        yield from self._hold(part, digest, combined.length)

    def _hold(self, part: int, digest: str, length: float) -> Iterator[ReduceAction]:
        self.results[part], self.lengths[part] = digest, length
        if (found := math.hypot(*self.lengths.values())) > self.longest:
            worst = max(self.lengths, key=lambda i: (self.lengths[i], -i))
            maker = self.plan.parts[worst].reducer
            reason = f"{maker} gives a mean of length {found:.3g}, at most {self.longest:.3g}"
            yield self._fail(reason, missing=(maker,))
        elif len(self.results) == len(self.plan.parts):
            self.over = True
            yield Done(whole(self.results[i] for i in range(len(self.plan.parts))))

    def _beat(self, now: float) -> Iterator[ReduceAction]:
        if now >= self.deadline:
            waits = self.waits_for()
            yield self._fail(f"still without {', '.join(waits)}", missing=tuple(waits))
            return
        for i, part in enumerate(self.plan.parts):
            for peer in sorted(self.awaited.get(i, ())):
                yield from self._pull(peer, "input", i)
            # Also where nobody said that it is ready: that message may have been lost.
            if part.reducer != self.me and i not in self.results:
                yield from self._pull(part.reducer, "result", i)

    def _pull(self, peer: str, what: What, part: int) -> Iterator[ReduceAction]:
        if (peer, what, part) not in self.pulling:
            self.pulling.add((peer, what, part))
            yield Pull(peer, what, part)

    def _fail(
        self, reason: str, *, missing: tuple[str, ...] = (), spoiled: tuple[str, ...] = ()
    ) -> Fail:
        self.over = True
        return Fail(reason, missing, spoiled)


def whole(digests: Iterator[str]) -> str:
    """The digest of a result: over those of its parts, in order."""
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()
