"""What a rendezvous hears and says, and what binds it. Plain values."""

from dataclasses import dataclass

from atoll.aggregation.allreduce import Plan
from atoll.aggregation.rendezvous_messages import (
    Ballot,
    Commit,
    Goodbye,
    Message,
    Stand,
    Step,
    Value,
)

# ---- heard ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """This peer is up."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """The roster has a peer, or knows it better. `weight`: by the run's rule, not by its word."""

    peer: str
    weight: float
    bandwidth: float  # any unit; inf: not measured; 0: nobody can connect to it, it reduces nothing


@dataclass(frozen=True, slots=True)
class Removed:
    """The roster has a peer no longer: what it says is ignored."""

    peer: str


@dataclass(frozen=True, slots=True)
class Heard:
    """Another peer says something. Who it is from the transport says, not the message."""

    peer: str
    message: Message


@dataclass(frozen=True, slots=True)
class Lost:
    """Nobody answers at a peer's address: it is gone, until it is heard of again."""

    peer: str


@dataclass(frozen=True, slots=True)
class StepsDone:
    """The local work on the model `chain` is done."""

    chain: str
    length: float = 0.0  # L2, of what it gives; 0: not said


@dataclass(frozen=True, slots=True)
class MeanMade:
    """The attempt that `Reduce` began has its mean, or `Get` has brought one: it lies here."""

    chain: str
    digest: str
    ballot: Ballot | None = None  # of the attempt; None: it was fetched


@dataclass(frozen=True, slots=True)
class MeanFailed:
    """The attempt failed (`allreduce.Fail`), or, without a ballot, nobody had what `Get` wants."""

    chain: str
    reason: str
    ballot: Ballot | None = None
    missing: tuple[str, ...] = ()
    spoiled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Digested:
    """The model `chain` lies here, and this is the digest of its values."""

    chain: str
    bits: str


@dataclass(frozen=True, slots=True)
class Downloaded:
    """The model that `Download` wanted lies here, checked: `Load` says to use it."""

    chain: str


@dataclass(frozen=True, slots=True)
class NotDownloaded:
    """`doubted`: those who sent nothing, or other bits than they should have."""

    chain: str
    doubted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BeatDue:
    """The time that `Wake` named has come."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """This peer's owner wants it to end."""


PeerEvent = (
    Started | Admitted | Removed | Heard | Lost | StepsDone | MeanMade | MeanFailed | Digested
    | Downloaded | NotDownloaded | BeatDue | Leaving
)  # fmt: skip

# ---- said ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Say:
    """Send a message; it may be lost."""

    peer: str
    message: Message


@dataclass(frozen=True, slots=True)
class Reduce:
    """Begin an all-reduce; hear `MeanMade` or `MeanFailed` with its ballot, once."""

    chain: str
    ballot: Ballot
    plan: Plan
    deadline: float


@dataclass(frozen=True, slots=True)
class Drop:
    """Stop that all-reduce."""

    chain: str
    ballot: Ballot


@dataclass(frozen=True, slots=True)
class Get:
    """Fetch a mean from any of these; hear `MeanMade` or `MeanFailed` without a ballot."""

    chain: str
    digest: str
    holders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Apply:
    """The outer step along the mean `value.digest`. Keep that mean for who missed it."""

    value: Value
    used: bool  # this peer's own work is in it


@dataclass(frozen=True, slots=True)
class Download:
    """Get the model `stand` from any of these; hear `Downloaded` or `NotDownloaded`."""

    stand: Stand
    donors: tuple[str, ...]
    bits: str  # what its values must hash to


@dataclass(frozen=True, slots=True)
class Load:
    """Use the model that was downloaded from now on."""

    stand: Stand


@dataclass(frozen=True, slots=True)
class TrainOn:
    """Train from the model that `stand` names."""

    stand: Stand


@dataclass(frozen=True, slots=True)
class Abort:
    """The attempts are used up: the anchor is as it was, work goes on and is tried again later."""

    reason: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Let `BeatDue` be heard at `at`, seconds of `now`."""

    at: float


PeerAction = Say | Reduce | Drop | Get | Apply | Download | Load | TrainOn | Abort | Wake

# ---- kept ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bound:
    """What binds a peer beyond its death: on disk before anything that follows from it is said.

    With it a peer comes back as itself; without it, it must come back under another name.
    """

    stand: Stand
    members: tuple[str, ...]
    last: Commit | None
    promised: Ballot
    accepted: tuple[Ballot, Value] | None
    farewells: dict[str, Goodbye]
    history: tuple["Step", ...] = ()  # `seals.worth_keeping`: for who is behind
    parted: bool = False  # it says goodbye, and is never to come back under this name
