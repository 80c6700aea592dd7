"""Links: lines of finite speed in virtual time, shared fairly by all that is on its way over them.

Each peer has a line up and a line down. A transfer goes at the smaller of the two parts that it has
of its giver's and its taker's, and all are reckoned anew whenever one begins or ends. As on the
network a taker has few of one kind on their way from one giver; the others wait in order.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from atoll.p2p.world import Network

AHEAD = 2  # on their way from one giver, as `reducing.py` has it


@dataclass(eq=False)
class _Moving:
    giver: str
    taker: str
    kind: str
    left: float  # of its size
    arrive: Callable[[float, float], None]
    began: float = -1.0  # below 0: it waits


class Links:
    """`speeds`: of each peer's line, in either direction, sizes a second; inf: as nothing."""

    def __init__(self, net: Network, speeds: Mapping[str, float]) -> None:
        self._net, self._speeds = net, speeds
        self._all: list[_Moving] = []
        self._since = 0.0

    def move(
        self, giver: str, taker: str, kind: str, size: float, arrive: Callable[[float, float], None]
    ) -> None:
        """`arrive(began, ended)` when it is there."""
        self._advance()
        self._all.append(_Moving(giver, taker, kind, size, arrive))
        self._go_on()

    def _moving(self) -> list[tuple[_Moving, float]]:
        """Those on their way, with their rates."""
        these = [one for one in self._all if one.began >= 0]
        up, down = Counter(m.giver for m in these), Counter(m.taker for m in these)
        lines = self._speeds
        return [
            (m, min(lines[m.giver] / up[m.giver], lines[m.taker] / down[m.taker])) for m in these
        ]

    def _advance(self) -> None:
        for one, rate in self._moving():
            one.left -= rate * (self._net.now - self._since)
        self._since = self._net.now

    def _go_on(self) -> None:
        ways: Counter[tuple[str, str, str]] = Counter()
        for one in self._all:
            way = one.giver, one.taker, one.kind
            if one.began < 0 and ways[way] < AHEAD:
                one.began = self._net.now
            ways[way] += 1
        if moving := self._moving():
            self._net.after(max(0.0, min(m.left / rate for m, rate in moving)), self._look)

    def _look(self) -> None:
        """Also where another transfer has begun since this was expected: then there is nothing."""
        self._advance()
        there = [m for m, _ in self._moving() if m.left <= 1e-9]
        if there:
            self._all = [m for m in self._all if m not in there]
            for one in there:
                one.arrive(one.began, self._net.now)
            self._go_on()
