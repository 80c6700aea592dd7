"""What a client's session machine hears, and what it says: see `session.py`."""

from dataclasses import dataclass

from atoll.protocols.events import Then

# ---- heard ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The process is up; `results` are the update ids found in the outbox, oldest first."""

    results: tuple[tuple[str, str], ...] = ()  # (order, update)


@dataclass(frozen=True, slots=True)
class Welcomed:
    """The server took us in, and holds our place for `lease` seconds of silence."""

    lease: float = float("inf")


@dataclass(frozen=True, slots=True)
class Answered:
    """There is a server at the other end: what takes time before the welcome is ours."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection broke, or could not be made."""

    reason: str
    retry_seconds: float = 0.0  # what the server asked for, at least


@dataclass(frozen=True, slots=True)
class Ordered:
    order: str


@dataclass(frozen=True, slots=True)
class Asked:
    order: str
    then: Then


@dataclass(frozen=True, slots=True)
class Fetched:
    """The model of `order` is here: it can be trained without a server."""

    order: str


@dataclass(frozen=True, slots=True)
class Finished:
    """Training of `order` ended and its result lies in the outbox as `update`."""

    order: str
    update: str
    final: bool = True


@dataclass(frozen=True, slots=True)
class Failed:
    """Training of `order` could not be done."""

    order: str
    code: str
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Dropped:
    """Training of `order` stopped without a result, as it was told to."""

    order: str


@dataclass(frozen=True, slots=True)
class Received:
    """The server holds the bytes of `update`."""

    update: str


@dataclass(frozen=True, slots=True)
class Told:
    """The server has decided about `update`."""

    order: str
    update: str
    fate: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """The server refused something of ours. Without an order, it refused us."""

    code: str
    message: str
    hint: str
    order: str
    fatal: bool
    retry_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Ended:
    """The server said goodbye. `done`: the run is over."""

    reason: str
    done: bool
    retry_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that `Connect.at` or `Wake.at` named has come."""

    at: float


Event = (
    Started
    | Answered
    | Welcomed
    | Lost
    | Ordered
    | Asked
    | Fetched
    | Finished
    | Failed
    | Dropped
    | Received
    | Told
    | Rejected
    | Ended
    | Tick
)

# ---- said ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a new control stream, not before `at`; at `at`, say Tick. The former one is over."""

    at: float


@dataclass(frozen=True, slots=True)
class Wake:
    """Say Tick at `at`, whatever becomes of the connection until then."""

    at: float


@dataclass(frozen=True, slots=True)
class Greet:
    """Send Hello, naming the orders in hand so that they are not sent again."""

    holding: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Work:
    order: str


@dataclass(frozen=True, slots=True)
class Interrupt:
    order: str
    then: Then


@dataclass(frozen=True, slots=True)
class Deliver:
    update: str


@dataclass(frozen=True, slots=True)
class Complain:
    """Tell the server that an order could not be done."""

    order: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Acknowledge:
    update: str


@dataclass(frozen=True, slots=True)
class Settle:
    """Forget `update` in the outbox; its client-side state is committed when it was used."""

    update: str
    fate: str


@dataclass(frozen=True, slots=True)
class Quit:
    """Leave. `code` is empty after a run that ended well."""

    reason: str
    code: str = ""
    hint: str = ""


Action = (
    Connect | Wake | Greet | Work | Interrupt | Deliver | Complain | Acknowledge | Settle | Quit
)
