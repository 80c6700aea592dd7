"""What peers say to each other to meet, and what it is about: values, models. Plain values.

Every message names the model it is about by `chain`, a hash over all commits that made it, so that
one about another model, an older one or another branch's, can never be taken for ours.
"""

import hashlib
from dataclasses import dataclass

from atoll.aggregation.allreduce import Plan

Ballot = tuple[int, str]  # (count, who proposes); the higher one holds


@dataclass(frozen=True, slots=True)
class Value:
    """What an epoch decides: one group's mean."""

    ballot: Ballot  # of the attempt that made it
    group: tuple[str, ...]  # the members of the next epoch
    weights: tuple[float, ...]
    digest: str  # of the mean, over its parts
    seals: tuple[tuple[str, str], ...] = ()  # (peer, seal) of those who made it themselves
    gone: tuple["Left", ...] = ()  # members who are not counted any more


@dataclass(frozen=True, slots=True)
class Stand:
    """Where a peer's model stands. The greater (heavy, chain) is the better one."""

    epoch: int = -1  # commits so far; -1: no model yet
    chain: str = ""  # hash over all of them
    heavy: float = -1.0  # weight of all of them together

    @property
    def rank(self) -> tuple[float, str]:
        return self.heavy, self.chain

    def next(self, value: Value) -> "Stand":
        epoch, heavy = self.epoch + 1, self.heavy + sum(value.weights)
        return Stand(epoch, _chain(epoch, heavy, Commit(self.chain, value)), heavy)

    def follows(self, last: "Commit | None") -> bool:
        """Whether `last` leads here: an announcement is not taken at its word. None: to a start."""
        if last is None:
            return self.epoch <= 0 and self.heavy <= 0
        return self.chain == _chain(self.epoch, self.heavy, last)


def _chain(epoch: int, heavy: float, last: "Commit") -> str:
    value = last.value
    text = f"{epoch} {heavy!r} {last.base} {value.digest} {value.group} {value.weights}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Left:
    """`peer` has said goodbye at the model `stand`, and sealed that."""

    peer: str
    stand: Stand
    seal: str


# ---- messages between peers ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Commit:
    """Decided: the mean that follows the model `base`."""

    base: str
    value: Value


@dataclass(frozen=True, slots=True)
class Announce:
    """I am here, with this model; `ready`: my work on it is done. Said at every beat."""

    stand: Stand
    ready: bool
    last: Commit | None  # that made the model, for who missed it
    bits: str = ""  # digest of the model's values and the outer state's; empty: not known yet


@dataclass(frozen=True, slots=True)
class Prepare:
    """I want to lead this epoch: promise me to vote for nothing below this ballot."""

    chain: str
    ballot: Ballot


@dataclass(frozen=True, slots=True)
class Promise:
    """I take part, and vote for nothing below `ballot` any more."""

    chain: str
    ballot: Ballot
    ready: bool
    accepted: tuple[Ballot, Value] | None  # what I voted for last
    length: float = 0.0  # L2, of my work; 0: not said, or it is none


@dataclass(frozen=True, slots=True)
class Refuse:
    """I have promised a higher ballot than yours."""

    chain: str
    ballot: Ballot  # a higher one that was promised


@dataclass(frozen=True, slots=True)
class Begin:
    """Enough have promised: reduce by this plan."""

    chain: str
    ballot: Ballot
    plan: Plan


@dataclass(frozen=True, slots=True)
class Reduced:
    """I have made this mean; `seal`: that I did (`seals.made`)."""

    chain: str
    ballot: Ballot
    digest: str
    seal: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt came to no mean here; `missing` and `spoiled` as in `allreduce.Fail`."""

    chain: str
    ballot: Ballot
    reason: str
    missing: tuple[str, ...]
    spoiled: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Accept:
    """Vote for `value`; who lacks its mean gets it from `holders` first."""

    chain: str
    ballot: Ballot
    value: Value
    holders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Accepted:
    """I have voted for the value of this ballot, and hold its mean."""

    chain: str
    ballot: Ballot


@dataclass(frozen=True, slots=True)
class Goodbye:
    """I leave, and will never vote again: this is what I voted for."""

    stand: Stand
    accepted: tuple[Ballot, Value] | None
    seal: str  # `seals.left`


@dataclass(frozen=True, slots=True)
class Whence:
    """How did your model come from mine?"""

    heavy: float  # of mine: steps up to there are not needed


@dataclass(frozen=True, slots=True)
class Step:
    """A model and the commit that made it."""

    stand: Stand
    last: Commit


@dataclass(frozen=True, slots=True)
class Path:
    """So: the first step of each group, and the last of all, as far as I remember."""

    steps: tuple[Step, ...]


Message = (
    Announce | Prepare | Promise | Refuse | Begin | Reduced | Failed | Accept | Accepted | Commit
    | Goodbye | Whence | Path
)  # fmt: skip
