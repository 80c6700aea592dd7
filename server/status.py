"""Status: where a run stands, as a server tells it or its state directory does. Plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, cast

T = TypeVar("T")

RunState = Literal["running", "stopped", "finished"]
Doing = Literal["training", "sending", "waiting", "suspect", "left", "expected", "offline"]


@dataclass(frozen=True, slots=True)
class ClientStatus:
    """One client. Times in seconds; None: not known."""

    name: str
    state: str = "active"  # its membership: new, active, suspect, left; offline: no server runs
    reason: str = ""
    since_s: float | None = None  # in this state for so long
    heard_s: float | None = None  # last sign of life so long ago
    seconds_per_step: float | None = None
    order: str | None = None
    steps: int | None = None  # of its order
    step: int | None = None  # done of it
    updates: int | None = None
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def doing(self) -> Doing:
        match self.state:
            case "suspect" | "left" | "offline":
                return cast("Doing", self.state)
            case "new":
                return "expected"
        if self.order is None:
            return "waiting"
        return "sending" if self.steps and (self.step or 0) >= self.steps else "training"


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """FedCompass' arrival group. Times on the run's clock, in seconds."""

    name: str
    members: tuple[str, ...]
    arrived: tuple[str, ...]
    expected: float
    latest: float


@dataclass(frozen=True, slots=True)
class Status:
    run: str  # ULID
    name: str
    strategy: str
    state: RunState
    reason: str = ""  # why it ended, or is not served
    version: int = 0
    updates: int = 0  # used
    steps: int = 0  # local steps in them
    elapsed_s: float = 0.0  # run clock
    metric: str = "accuracy"
    target: float | None = None  # of the metric
    latest: float | None = None
    latest_version: int | None = None
    best: float | None = None
    best_version: int | None = None
    epsilon: float | None = None  # that noise has cost the client that paid most; None: no noise
    clients: tuple[ClientStatus, ...] = ()
    groups: tuple[GroupStatus, ...] = ()
    address: str | None = None
    state_dir: str | None = None

    @classmethod
    def of(cls, told: Mapping[str, Any], **more: Any) -> "Status":
        """From a server's answer; what a newer server says besides is left out."""
        found = replace(_known(cls, told), **more)
        clients = tuple(_known(ClientStatus, c) for c in told.get("clients", ()))
        groups = tuple(g for g in map(_group, told.get("groups", ())) if g is not None)
        return replace(found, clients=tuple(sorted(clients, key=lambda c: c.name)), groups=groups)


def _known(kind: type[T], told: Mapping[str, Any]) -> T:
    names = {f.name for f in fields(cast("Any", kind))}
    return kind(**{key: value for key, value in told.items() if key in names})


def _group(told: object) -> GroupStatus | None:
    """None for what a strategy of the user's own calls a group, if it is another thing."""
    match told:
        case [str(name), [*members], [*arrived], float() | int() as at, float() | int() as latest]:
            named = tuple(map(str, members)), tuple(map(str, arrived))
            return GroupStatus(name, *named, float(at), float(latest))
    return None
