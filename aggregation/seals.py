"""Seals: what a member vouches for with its name, so that no other can claim it.

Whoever has made a mean in its own reduce seals the model that the mean leads to, and with it group,
weights and digest. A value counts where a quorum of those who made the model before have sealed it:
a single member can no longer give out a mean of its own, as a commit, as a vote or for one. Whoever
leaves seals where it left, for a quorum counts it no more. Seals travel with the value, so one that
was not there can check a path from the model that it has, group by group.

How seals are made is given to the machine: Ed25519 on the network (`p2p/sealing.py`).
"""

import hashlib
import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from atoll.aggregation.quorum import quorum
from atoll.aggregation.rendezvous_messages import Stand, Step, Value

KEPT = 64  # steps that a peer can show
RECENT = 4  # of the last, of which it has the means too
NAMES = 512  # in the groups of those together: it must fit into a letter


class Seals(Protocol):
    """One peer's."""

    def seal(self, text: str) -> str:
        """That this peer says `text`."""

    def holds(self, peer: str, text: str, seal: str) -> bool:
        """Whether `peer` has said it."""


@dataclass(frozen=True)
class Named:
    """For virtual time: anyone could make another's, and nobody does."""

    me: str

    def seal(self, text: str) -> str:
        return hashlib.sha256(f"{self.me}\n{text}".encode()).hexdigest()[:16]

    def holds(self, peer: str, text: str, seal: str) -> bool:
        return Named(peer).seal(text) == seal


def made(stand: Stand) -> str:
    """What is sealed of a mean that leads to the model `stand`."""
    return f"made {stand.chain}"


def left(stand: Stand) -> str:
    """What is sealed by who leaves at the model `stand`."""
    return f"left {stand.heavy!r} {stand.chain}"


def makers(value: Value, stand: Stand, these: Collection[str], seals: Seals) -> set[str]:
    """Who of `these` has sealed that it made the mean `value`, which leads to the model `stand`."""
    text, said = made(stand), dict(value.seals)
    return {peer for peer in these if peer in said and seals.holds(peer, text, said[peer])}


def sound(value: Value, stand: Stand, members: Sequence[str], seals: Seals) -> bool:
    """Whether a quorum of `members`, who made a model before `stand`, have made the mean to it.

    They need not have made the last one before it: what a quorum of them takes for the run's model
    is that, as well later. So whoever is behind can leap, as far as they are the same.
    """
    gone = {
        one.peer
        for one in value.gone
        if one.peer in members
        and one.stand.rank < stand.rank
        and seals.holds(one.peer, left(one.stand), one.seal)
    }
    return quorum(makers(value, stand, members, seals), members, gone)


def proved(
    steps: Sequence[Step], stand: Stand, members: Sequence[str], seals: Seals, most: float
) -> dict[str, tuple[Step, ...]]:
    """Chain -> the steps that lead to it from the model `stand`, which `members` made."""
    found: dict[str, tuple[Step, ...]] = {}
    way: tuple[Step, ...] = ()
    for step in steps:
        value = step.last.value
        consistent = step.stand.follows(step.last) and fair(value, most)
        if not consistent or step.stand.rank <= stand.rank:
            continue
        if sound(value, step.stand, members, seals):
            stand, members, way = step.stand, value.group, (*way, step)
            found[stand.chain] = way
    return found


def fair(value: Value, most: float) -> bool:
    """By its weights: `most` is that of a whole share."""
    return any(value.weights) and all(0 <= weight <= most for weight in value.weights)


def worth_keeping(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Of those, the first of each group, and the last of all: who is at any of them can leap from
    group to group. No more of them than fit into a letter."""
    found: list[Step] = []
    for step in steps:
        if len(found) > 1 and found[-1].last.value.group == found[-2].last.value.group:
            found.pop()
        found.append(step)
    return tuple(found[-max(1, min(_fit(found), KEPT)) :])


def told(history: Sequence[Step], recent: Sequence[Step]) -> Sequence[Step]:
    """To who asks for a path: `history`, and where a letter has room all of the `recent` steps, by
    whose means it can be gone."""
    both = {step.stand.chain: step for step in (*history, *recent)}.values()
    steps = sorted(both, key=lambda step: step.stand.epoch)
    return steps if len(steps) <= min(_fit(steps), KEPT) else history


def _fit(steps: Sequence[Step]) -> int:
    """How many of the last of them are short enough together."""
    names = itertools.accumulate(len(step.last.value.group) for step in reversed(steps))
    return sum(count <= NAMES for count in names)
