"""Membership: who takes part, since when, and until when unless heard of again. A machine.

Server sessions and the peers' roster drive the same one. A member is `new` (expected, never seen),
`active`, `suspect` (its stream broke or it fell silent: the run hears nothing of it yet) or `left`
(goodbye, or its lease ended). Every hello opens a session with the next `fence`, a counter; what
comes with an older one is a ghost of a former connection and is ignored. What a member's speed was
is remembered after it left, so that it need not be measured again when it comes back.

Time is the caller's `now`, seconds of any clock that never goes back.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from atoll.protocols.errors import RemoteError

Standing = Literal["new", "active", "suspect", "left"]
ALIVE: tuple[Standing, ...] = ("active", "suspect")

SILENCE = 2 / 3  # of the lease: two heartbeats of a third of it missed


@dataclass(slots=True)
class Member:
    """One name in the run. `node` is the ULID it keeps on its disk; it outlives the process."""

    name: str
    node: str
    roles: tuple[str, ...] = ()
    transports: tuple[str, ...] = ()
    standing: Standing = "new"
    since: float = 0.0  # when it came to this standing
    reason: str = ""  # why
    fence: int = 0  # of its newest session, 0 before the first
    lease: float = math.inf  # when it ends, while alive
    heard: float = 0.0  # when it was heard of last
    seconds_per_step: float | None = None  # its speed as last learned

    @property
    def alive(self) -> bool:
        return self.standing in ALIVE


# ---- decisions -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Joined:
    """The run has a new member: to be told as ClientJoined."""

    name: str
    fence: int
    again: bool  # it was a member before and left
    seconds_per_step: float | None  # remembered from then


@dataclass(frozen=True, slots=True)
class Back:
    """A member within its lease opened a new session: its order goes on, the run hears nothing."""

    name: str
    fence: int
    silent: float  # seconds since it was last heard of


@dataclass(frozen=True, slots=True)
class Suspected:
    """For the eyes of people only: it may come back within its lease."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Left:
    """To be told as ClientLeft."""

    name: str
    reason: str


@dataclass
class Membership:
    """All members of one run. `lease` seconds without a sign of life end a membership."""

    lease: float = 20.0
    members: dict[str, Member] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.lease > 0:
            raise ValueError(f"lease={self.lease}: must be more than 0 seconds")

    # ---- what happened -----------------------------------------------------------------------

    def expect(self, name: str, node: str, now: float, reason: str = "expected") -> None:
        """Keep a name for a node that was never seen: enrolled, or named by another's roster."""
        if name not in self.members:
            self.members[name] = Member(name, node, since=now, reason=reason)

    def hello(
        self,
        name: str,
        node: str,
        now: float,
        *,
        roles: tuple[str, ...] = ("trainer",),
        transports: tuple[str, ...] = ("grpc",),
    ) -> Joined | Back:
        """Open a session. Raises RemoteError FL-C105 where another node holds the name."""
        member = self.members.get(name)
        if member is None or (member.standing == "left" and member.node != node):
            # Another machine under a freed name: its speed is not the former one's, but the fence
            # goes on counting, else a ghost of the former node would pass for the new one.
            fence = member.fence if member else 0
            member = self.members[name] = Member(name, node, fence=fence)
        elif member.node != node:
            raise self._taken(member, now)
        came, silent = member.standing, max(0.0, now - member.heard)
        member.roles, member.transports = roles, transports
        member.fence += 1
        self._renew(member, now)
        if came in ALIVE:
            self._turn(member, "active", now, "back within its lease")
            return Back(name, member.fence, silent)
        self._turn(member, "active", now, "joined" if came == "new" else "joined again")
        return Joined(name, member.fence, came == "left", member.seconds_per_step)

    def heard(self, name: str, fence: int, now: float) -> bool:
        """A sign of life. False: of a session that is over; its sender must say hello again."""
        member = self._current(name, fence)
        if member is None:
            return False
        self._renew(member, now)
        if member.standing == "suspect":
            self._turn(member, "active", now, "heard of again")
        return True

    def broken(self, name: str, fence: int, now: float, reason: str = "") -> Suspected | None:
        """The session's stream broke. None where that changes nothing."""
        member = self._current(name, fence)
        if member is None or member.standing == "suspect":
            return None
        self._turn(member, "suspect", now, reason or "its connection broke")
        return Suspected(name, member.reason)

    def goodbye(self, name: str, fence: int, now: float, reason: str = "") -> Left | None:
        """It leaves of its own will. None where the session is over already."""
        member = self._current(name, fence)
        return None if member is None else self._leave(member, now, reason or "said goodbye")

    def expel(self, name: str, now: float, reason: str) -> Left | None:
        """Our side ends the membership, whatever the session. None where there is none."""
        member = self.members.get(name)
        return None if member is None or not member.alive else self._leave(member, now, reason)

    def learned(self, name: str, seconds_per_step: float) -> None:
        """Remember a member's speed for its next life."""
        assert seconds_per_step > 0, f"{name}: {seconds_per_step} seconds per step"
        self.members[name].seconds_per_step = seconds_per_step

    def tick(self, now: float) -> list[Suspected | Left]:
        """What time alone has decided by `now`, in order of names. Call it when `due` says so."""
        decided: list[Suspected | Left] = []
        for name in sorted(self.members):
            member = self.members[name]
            if member.alive and now >= member.lease:
                reason = f"not heard of for {self.lease:g} s"
                decided.append(self._leave(member, now, reason))
            elif member.standing == "active" and now >= self._silent_at(member):
                self._turn(member, "suspect", now, "silent")
                decided.append(Suspected(name, "silent"))
        return decided

    def restart(self, now: float, reason: str = "the server restarted") -> None:
        """Nobody could be heard for a while, as the server was not up: every lease starts anew."""
        for member in self.members.values():
            if member.alive:
                self._renew(member, now)
                self._turn(member, "suspect", now, reason)

    # ---- what is -------------------------------------------------------------------------------

    def due(self) -> float | None:
        """When `tick` has something to do next, if nobody is heard of before; None: never."""
        times = [
            self._silent_at(m) if m.standing == "active" else m.lease
            for m in self.members.values()
            if m.alive
        ]
        return min(times, default=None)

    def alive(self) -> list[str]:
        """Names of the active and the suspect, sorted: those the run counts as members."""
        return sorted(name for name, member in self.members.items() if member.alive)

    def current(self, name: str, fence: int) -> bool:
        """Whether this is the newest session of a living member."""
        return self._current(name, fence) is not None

    # ---- small change --------------------------------------------------------------------------

    def _current(self, name: str, fence: int) -> Member | None:
        member = self.members.get(name)
        return member if member and member.alive and member.fence == fence else None

    def _silent_at(self, member: Member) -> float:
        return member.lease - (1 - SILENCE) * self.lease

    def _renew(self, member: Member, now: float) -> None:
        member.heard = now
        member.lease = now + self.lease

    def _turn(self, member: Member, standing: Standing, now: float, reason: str) -> None:
        member.standing, member.since, member.reason = standing, now, reason

    def _leave(self, member: Member, now: float, reason: str) -> Left:
        self._turn(member, "left", now, reason)
        member.lease = math.inf
        return Left(member.name, reason)

    def _taken(self, member: Member, now: float) -> RemoteError:
        state = f"{member.standing} since {member.since:.1f} s"
        return RemoteError(
            "FL-C105",
            f"client name {member.name!r} is taken by node {member.node} ({state})",
            "choose another --name, or wait until the other one has left",
            retry_seconds=max(0.0, member.lease - now) if member.standing == "suspect" else None,
        )
