"""Averager: the weighted mean of vectors across a group, and nothing else.

What trains never knows who stands behind it: a server, peers, or `Loopback`, the members of one
process. An average that is to go on while training does is a task: `asyncio.create_task(...)`.
"""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from atoll.aggregation.part_mean import part_mean


@dataclass(frozen=True)
class Averaged:
    """A round's mean, and whose work is in it."""

    mean: Tensor  # flat, fp32: the same bits for all of the group; not to be written
    group: tuple[tuple[str, float], ...]  # (member, weight) of those who are in it, in their order

    @property
    def weight(self) -> float:
        return sum(weight for _, weight in self.group)


class NotAveragedError(Exception):
    """This round has no mean: the anchor stays as it is."""


class Averager(Protocol):
    """Whoever carries a group's vectors to each other."""

    async def average(self, number: int, delta: Tensor, weight: float) -> Averaged:
        """The mean of round `number`. Weight 0: learn it without being in it. Submitted twice: the
        second counts. NotAveragedError where there is none."""


class Loopback:
    """The group in one process. A round closes when all `members` are in, or at `close`.

    `shares`: lengths of the parts that are reduced one by one, as among peers; None: in one piece.
    """

    def __init__(self, members: Sequence[str], shares: Sequence[int] | None = None) -> None:
        self.members, self.shares = tuple(sorted(members)), shares
        self._given: dict[int, dict[str, tuple[Tensor, float]]] = {}
        self._done: dict[int, asyncio.Future[Averaged]] = {}

    def seat(self, member: str) -> "Seat":
        assert member in self.members, f"{member} is not one of {self.members}"
        return Seat(self, member)

    async def submit(self, member: str, number: int, delta: Tensor, weight: float) -> Averaged:
        done = self._done.setdefault(number, asyncio.get_running_loop().create_future())
        if not done.done():  # a late one learns the mean that the others had
            given = self._given.setdefault(number, {})
            given[member] = delta, weight
            if len(given) == len(self.members):
                self.close(number)
        return await asyncio.shield(done)

    def close(self, number: int) -> None:
        """End a round with those who are in."""
        given = self._given.pop(number, {})
        voters = [(m, *given[m]) for m in self.members if m in given and given[m][1] > 0]
        done = self._done[number]
        if not voters:
            done.set_exception(NotAveragedError(f"round {number}: nobody has work that counts"))
            return
        mean, bad = in_parts([d for _, d, _ in voters], [w for _, _, w in voters], self.shares)
        if bad:
            names = ", ".join(voters[i][0] for i in bad)
            done.set_exception(NotAveragedError(f"round {number}: {names}: not finite"))
        else:
            done.set_result(Averaged(mean, tuple((m, w) for m, _, w in voters)))


@dataclass(frozen=True)
class Seat:
    """One member's `Averager`."""

    loopback: Loopback
    member: str

    async def average(self, number: int, delta: Tensor, weight: float) -> Averaged:
        return await self.loopback.submit(self.member, number, delta, weight)


def in_parts(
    deltas: Sequence[Tensor], weights: Sequence[float], shares: Sequence[int] | None = None
) -> tuple[Tensor, tuple[int, ...]]:
    """The mean part by part, and the places of deltas that are not finite: see `part_mean`."""
    ends = list(itertools.accumulate([deltas[0].numel()] if shares is None else shares))
    assert ends[-1] == deltas[0].numel(), f"shares {shares} of {deltas[0].numel()} elements"
    spans = zip([0, *ends], ends, strict=False)
    made = [part_mean([delta[lo:hi] for delta in deltas], weights) for lo, hi in spans]
    return torch.cat([mean for mean, _ in made]), tuple(sorted({i for _, bad in made for i in bad}))
