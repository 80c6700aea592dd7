"""Meter: how fast a peer's line is, by the bulk that it moved in its last rounds. Pure.

    meter.took(size, began, ended)      # and `gave`, of each transfer
    if rate := meter.turn(): ...        # a round is over: this is new, and worth telling

Transfers overlap, and one is as slow as the slower of its two ends, so none alone tells what a line
can do. But at each moment the rates of all that are on their way add up: the rate of a round is the
one that a quarter of its bytes went at, or faster. So a slow partner, or many of them, hides no
fast line, and a short burst out of a buffer makes no slow one fast. Of the last rounds the median
counts, of the two directions the slower, as the closed form of `shares.py` wants it.
"""

import itertools
import statistics
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

ROUNDS = 5  # of which the median counts
LEAST = 2  # before anything is said
PART = 0.25  # of a round's bytes, that went at its rate or faster
SHORT = 1e-3  # seconds: what came out of a buffer tells nothing
NEW = 1.25  # factor between what was said and what is worth saying


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bulk that went one way."""

    size: float  # bytes
    began: float  # seconds
    ended: float


@dataclass
class Way:
    """One direction."""

    moved: list[Transfer] = field(default_factory=list)  # in the round under way
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=ROUNDS))

    def turn(self, enough: float) -> None:
        if sum(t.size for t in self.moved) >= enough:
            self.rates.append(rate(self.moved))
        self.moved.clear()

    @property
    def rate(self) -> float:
        """0: not known yet."""
        return statistics.median(self.rates) if len(self.rates) >= LEAST else 0.0


@dataclass
class Meter:
    """Bytes and seconds of any clock. `said`: bytes a second, as `turn` said last; 0: nothing."""

    tiny: float = 1 << 20  # bytes below which a transfer tells nothing
    enough: float = 4 << 20  # bytes below which a round, in one direction, tells nothing
    up: Way = field(default_factory=Way)
    down: Way = field(default_factory=Way)
    said: float = 0.0

    def took(self, size: float, began: float, ended: float) -> None:
        self._note(self.down, size, began, ended)

    def gave(self, size: float, began: float, ended: float) -> None:
        self._note(self.up, size, began, ended)

    def _note(self, way: Way, size: float, began: float, ended: float) -> None:
        if size >= self.tiny and ended - began >= SHORT:
            way.moved.append(Transfer(size, began, ended))

    def turn(self) -> float:
        """A round is over: bytes a second of the slower direction, where that is news; else 0."""
        for way in (self.up, self.down):
            way.turn(self.enough)
        found = min(self.up.rate, self.down.rate)
        if not found or self.said / NEW < found < self.said * NEW:
            return 0.0
        self.said = found
        return found


def rate(transfers: Sequence[Transfer], part: float = PART) -> float:
    """The rate, of all transfers together, that `part` of their bytes went at or faster."""
    times = sorted({t for one in transfers for t in (one.began, one.ended)})
    rates = [0.0] * len(times)  # from that time to the next
    for one in transfers:
        each = one.size / (one.ended - one.began)
        for i in range(bisect_left(times, one.began), bisect_left(times, one.ended)):
            rates[i] += each
    spans = zip(rates, itertools.pairwise(times), strict=False)  # after the last there is nothing
    fastest = sorted(((found, found * (b - a)) for found, (a, b) in spans), reverse=True)
    sums = itertools.accumulate(size for _, size in fastest)
    enough = part * sum(one.size for one in transfers) * (1 - 1e-9)
    return next(found for (found, _), done in zip(fastest, sums, strict=True) if done >= enough)
