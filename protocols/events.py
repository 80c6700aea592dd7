"""The vocabulary of a run: what a strategy is told, and what it may say.

Events are past, actions imperative. Nothing here carries a tensor, touches a socket or reads a
clock, so a run can be written down, replayed and tested as plain values. A driver's promises
(order of events, one open order per client, when versions exist) are kept in one place for every
driver: `atoll.server.run`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

MAX_COUNT = 1 << 53  # of steps, examples and the like: exact as a float and in JSON

Then = Literal["continue", "send", "drop"]


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """What a client says of itself when it joins."""

    examples: int  # training examples it holds
    seconds_per_step: float | None = None  # its own benchmark, None if it made none
    capabilities: tuple[str, ...] = ()  # codecs, trainers, extras it can serve


@dataclass(frozen=True, slots=True)
class Update:
    """One client's finished work. The driver holds its tensors under `id`."""

    id: str  # "o17.0": order and attempt
    order: str  # the order it answers
    client: str
    base: int  # version of the global model it was trained from
    steps: int  # local steps really run
    examples: int  # examples seen
    started: float  # run clock when its order could be fetched
    train_seconds: float  # measured by the client; the rest of the delay is transfer and waiting
    metrics: Mapping[str, float] = field(default_factory=dict)
    current: bool = True  # answers the client's open order; False: a former order, closed meanwhile
    final: bool = True  # False: a snapshot, the client trains on (see Ask)


# ---- heard ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClientJoined:
    """It may be given orders from now on, and has none open."""

    client: str
    info: ClientInfo


@dataclass(frozen=True, slots=True)
class ClientLeft:
    """The member's lease ended or it said goodbye. A broken stream alone is not a leave."""

    client: str
    reason: str


@dataclass(frozen=True, slots=True)
class UpdateReceived:
    """Work is here: to be aggregated or discarded, once, now or later."""

    update: Update


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The time of a timer has come that was set and not cancelled."""

    timer: str


@dataclass(frozen=True, slots=True)
class Merged:
    """The version an `Aggregate` promised now exists; its bytes can be fetched."""

    version: int
    used: tuple[str, ...]  # update ids
    dropped: tuple[tuple[str, str], ...] = ()  # (update id, reason)
    stats: Mapping[str, float] = field(default_factory=dict)  # e.g. delta_norm


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Metrics of a version, newest first: not every version is evaluated."""

    version: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Stopping:
    """A stop rule ended the run: the last chance to aggregate what is held. No order follows."""

    reason: str


Event = ClientJoined | ClientLeft | UpdateReceived | TimerFired | Merged | Evaluated | Stopping


# ---- said ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Train:
    """Train `steps` local steps from the newest version. The driver names the order."""

    client: str
    steps: int
    extra: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask a training client for what it has: a snapshot and go on, its work so far, or nothing."""

    client: str
    then: Then


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Make the next version from these updates, in this order, with these weights."""

    items: tuple[tuple[str, float], ...]  # (update id, raw weight)
    model: str = "main"
    outer: bool = True  # False: add the weighted sum as it is, past the outer optimizer's state


@dataclass(frozen=True, slots=True)
class Discard:
    """Never use this update. Its client is told the reason."""

    update: str
    reason: str


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Hear `TimerFired` at `at`. One that is set under this name already is set anew."""

    timer: str
    at: float  # run clock, seconds


@dataclass(frozen=True, slots=True)
class CancelTimer:
    """Never mind that timer; nothing where it is not set."""

    timer: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The run is done; the reason is for people."""

    reason: str


Action = Train | Ask | Aggregate | Discard | SetTimer | CancelTimer | Finish
