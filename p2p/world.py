"""World: how fast simulated peers are, when they die, and the network between them."""

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

Happen = Callable[[], None]


@dataclass(frozen=True)
class PeerModel:
    name: str
    pace: float = 1.0  # seconds of local work in a round, give or take a fifth
    weight: float = 1.0  # by the roster
    bandwidth: float = 100.0  # as it claims at first; 0: it cannot accept connections
    link: float = math.inf  # elements a second, of its line in either direction
    joins: float = 0.0  # later than 0: it has no model yet
    dies: float = math.inf
    dies_after: int = 0  # events it has handled; 0: it does not die of that
    leaves: float = math.inf  # with a goodbye
    dies_applying: int = 0  # the epoch whose mean it applies last, with some of its words unsaid
    spoils: int = -1  # the epoch in which its work is not finite, until it is done again
    flips: int = -1  # the epoch whose model its memory spoils: other bits than the others'
    poisons: bool = False  # what it gives for its model are other bits
    lies: bool = False  # at each beat it says one of `lies.py` to each of the others
    returns: float = math.inf  # seconds from its first death until it is there again, as itself


@dataclass(frozen=True)
class Weather:
    """The network. `parted`: (from, until, those on one side); the rest is on the other."""

    delay: tuple[float, float] = (0.01, 0.05)  # seconds, of each message by itself
    loss: float = 0.0  # of messages, and of fetches
    twice: float = 0.0  # messages that arrive two times
    calm: float = math.inf  # when loss ends
    parted: tuple[tuple[float, float, frozenset[str]], ...] = ()

    def cut(self, a: str, b: str, now: float) -> bool:
        return any(lo <= now < hi and (a in side) != (b in side) for lo, hi, side in self.parted)


class Network:
    """Virtual time, and messages in it that come late, twice or never. Its seed draws all."""

    def __init__(self, weather: Weather, seed: str, lives: Callable[[str], bool]) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0  # seconds
        self._weather, self._lives = weather, lives
        self._heap: list[tuple[float, int, Happen]] = []
        self._count = 0

    def next_before(self, until: float) -> bool:
        """Let the next thing happen; False where there is none before `until`."""
        if not self._heap or self._heap[0][0] >= until:
            return False
        self.now, _, happen = heapq.heappop(self._heap)
        happen()
        return True

    def at(self, when: float, happen: Happen) -> None:
        if when < math.inf:
            self._count += 1
            heapq.heappush(self._heap, (when, self._count, happen))

    def after(self, seconds: float, happen: Happen) -> None:
        self.at(self.now + seconds, happen)

    def delay(self) -> float:
        return self.rng.uniform(*self._weather.delay)

    def lost(self, a: str, b: str) -> bool:
        """Whether what a sends to b now is lost."""
        weather = self._weather
        noisy = self.now < weather.calm and self.rng.random() < weather.loss
        return noisy or weather.cut(a, b, self.now) or not self._lives(b)

    def send(self, sender: str, to: str, happen: Happen, refused: Happen) -> None:
        """`happen` when it arrives; `refused` where nobody is there."""
        times = 2 if self.rng.random() < self._weather.twice else 1
        for _ in range(times):
            if not self._lives(to):
                self.after(self.delay(), refused)
            elif not self.lost(sender, to):
                self.after(self.delay(), happen)
