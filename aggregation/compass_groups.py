"""Arrival groups: how fast each client is, and how many steps let it arrive together with others.

Clients of one group are given different numbers of local steps, so that all finish at the same
instant. A new group is timed so that a group that exists can become one with it in its next round;
so few groups remain, about log(slowest / fastest) to the base of max_steps / min_steps.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

NOISE = 1e-6  # (1.4 + 15 - 1.4) / 0.15 is 99.99999999999999 in floats, and means 100 steps
INSTANT = 1e-9  # seconds a step at least: a measured 0 must not divide


@dataclass(slots=True)
class Member:
    """A client: what it holds, how fast it is, and its open order."""

    examples: int
    pace: float = 0.0  # seconds per local step, running mean; 0: not known yet
    overhead: float = 0.0  # seconds an order takes beyond its steps, where that is told apart
    present: bool = True
    busy: bool = False  # an order is open
    given: float = 0.0  # run clock when its last order was given
    group: str | None = None  # that order's group; None: a first order, alone
    owed: float | None = None  # it left with an order open, given then: its result is still wanted


@dataclass(slots=True)
class Record:
    """A result that waits to be merged."""

    id: str
    client: str
    base: int
    seen: int  # version when it arrived
    steps: int


@dataclass(slots=True)
class Group:
    """Clients that are to arrive together. Times in seconds of the run clock."""

    expected: float  # run clock: when all are to arrive (Ta)
    latest: float  # when it is merged without those who are missing (Tmax)
    created: float
    version: int  # the newest when it was made
    pending: set[str] = field(default_factory=set)  # members still training
    arrived: list[str] = field(default_factory=list)  # members waiting for the others
    buffer: list[Record] = field(default_factory=list)
    turn: float = 0.0  # shortest full order of a member, seconds; 0: to be computed
    silent_at: float = math.inf  # closed: when the missing are taken for dead


def observe(member: Member, duration: float, steps: int, smoothing: float) -> None:
    """Learn the pace from an order of `steps` that took `duration` seconds in all."""
    seen = max(duration / max(steps, 1), INSTANT)
    member.pace = seen if not member.pace else (1 - smoothing) * member.pace + smoothing * seen


def observe_two_part(
    member: Member, duration: float, train_seconds: float, steps: int, smoothing: float
) -> None:
    """The same, with what was not training (transfer, waiting) told apart from the steps."""
    plausible = 0.0 <= train_seconds <= duration  # it is the client's word
    inside = train_seconds if plausible else duration
    rest, known = duration - inside, member.pace
    observe(member, inside, steps, smoothing)
    member.overhead = (1 - smoothing) * member.overhead + smoothing * rest if known else rest


def whole_steps(seconds: float, pace: float) -> int:
    return math.floor(seconds / pace + NOISE)


def joinable(
    groups: Mapping[str, Group], member: Member, now: float, least: int, most: int
) -> tuple[str, int] | None:
    """The open group this member can meet with the most steps, the newest among equals."""
    begin, pace, found, best = now + member.overhead, member.pace, "", least
    for name, group in groups.items():
        steps = math.floor((group.expected - begin) / pace + NOISE)
        if best <= steps <= most:
            found, best = name, steps
    return (found, best) if found else None


def steps_of_new_group(
    groups: Iterable[Group],
    members: Mapping[str, Member],
    member: Member,
    now: float,
    least: int,
    most: int,
) -> int:
    """Steps of one who opens a group: to arrive when an open group will, in its next round."""
    begin, steps = now + member.overhead, -1
    for group in groups:
        if now < group.expected:
            arrives = group.expected + fastest_turn(group, members, most)
            steps = max(steps, whole_steps(arrives - begin, member.pace))
    return most if steps < 0 else min(max(steps, least), most)


def fastest_turn(group: Group, members: Mapping[str, Member], most: int) -> float:
    """How long the fastest member's next order of `most` steps will take, seconds."""
    if not group.turn:
        group.turn = min(turn(members[c], most) for c in (*group.pending, *group.arrived))
    return group.turn


def turn(member: Member, most: int) -> float:
    return member.overhead + member.pace * most
