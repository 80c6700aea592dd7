"""Every error a user can meet, in one tree and one table.

    AtollError                  code, message (what, the value), hint (the remedy), exit code
    ├── UsageError              you asked for something that cannot be
    ├── DataError               your data cannot be used
    ├── ServerError             this server cannot go on
    ├── ClientError             this client cannot go on
    ├── PeerError               this peer cannot go on
    └── RemoteError             the other side did wrong: refused, never raised in our own loop
        └── RefusedError        what the other side answered when it refused us

Codes are `FL-<area><number>`: S server, C client, P peer, W wire, D data. A number is
never reused. `docs/errors.md` has a section for each, and a test raises each.
"""

from typing import NamedTuple

# What code of a user's own may raise, `sys.exit()` too: `except RAISED` tells it as an error of its
# own. KeyboardInterrupt is a person's word, and goes on.
RAISED = (Exception, SystemExit)


class Entry(NamedTuple):
    """What a code ends a command with, and the title of its section in `docs/errors.md`."""

    exit_code: int  # at most 125, a shell keeps 8 bits
    title: str


CATALOGUE: dict[str, Entry] = {
    # usage and configuration
    "FL-S100": Entry(1, "unexpected error"),
    "FL-S101": Entry(78, "unknown name for a slot"),
    "FL-S102": Entry(78, "bad parameter for a slot"),
    "FL-S103": Entry(78, "module:object cannot be imported or made"),
    "FL-S104": Entry(78, "combination refused"),
    "FL-S105": Entry(64, "unsafe address refused"),
    "FL-S106": Entry(78, "initial model does not fit the run's model"),
    "FL-S107": Entry(3, "no such run or version"),
    "FL-S108": Entry(2, "bad argument"),
    "FL-S109": Entry(4, "state directory belongs to another run"),
    "FL-S110": Entry(78, "name offered twice"),
    "FL-S201": Entry(73, "port in use"),
    "FL-S202": Entry(73, "state directory in use by another server"),
    "FL-S203": Entry(74, "disk full or failing"),
    "FL-S204": Entry(6, "run failed: an error in its strategy"),
    "FL-S205": Entry(5, "target not reached in time"),
    "FL-S206": Entry(78, "state directory cannot be read"),
    "FL-S207": Entry(69, "server not reachable"),
    "FL-S208": Entry(130, "interrupted"),
    "FL-S209": Entry(6, "replay differs from the journal"),
    "FL-S210": Entry(6, "run diverged"),
    "FL-S211": Entry(6, "a worker of a simulation ended"),
    # client
    "FL-C101": Entry(69, "server not reachable"),
    "FL-C102": Entry(76, "protocol version mismatch"),
    "FL-C103": Entry(78, "client model does not match the run"),
    "FL-C104": Entry(78, "trainer failed"),
    "FL-C105": Entry(4, "client name taken"),
    "FL-C106": Entry(2, "not built yet"),
    "FL-C107": Entry(77, "refused by this client's own policy"),
    "FL-C108": Entry(73, "client directory in use"),
    "FL-C109": Entry(76, "model comes as a difference to another"),
    # peer
    "FL-P201": Entry(69, "peer daemon does not start"),
    "FL-P202": Entry(69, "swarm not reachable"),
    "FL-P203": Entry(69, "peer does not answer"),
    "FL-P301": Entry(2, "not an invite"),
    "FL-P302": Entry(2, "invite truncated or mistyped"),
    "FL-P303": Entry(76, "invite of another version"),
    "FL-P304": Entry(77, "the run's secret was not shown"),
    "FL-P305": Entry(76, "roster entry cannot be taken"),
    "FL-P306": Entry(77, "manifest is not the invite's"),
    "FL-P307": Entry(75, "run has all the members it can have"),
    "FL-P308": Entry(3, "not a peer's directory"),
    "FL-P309": Entry(4, "directory holds something else"),
    "FL-P310": Entry(3, "no peer runs there"),
    "FL-P311": Entry(5, "peer has not ended in time"),
    "FL-P312": Entry(9, "doctor found problems"),
    "FL-P401": Entry(64, "codec cannot be used among peers"),
    "FL-P402": Entry(75, "a peer does not have it"),
    "FL-P403": Entry(76, "a mean that is not finite"),
    "FL-P404": Entry(75, "nobody has the mean"),
    "FL-P405": Entry(74, "peer's memory cannot be kept or read"),
    "FL-P406": Entry(73, "peer directory in use"),
    "FL-P407": Entry(78, "peer directory of another run"),
    "FL-P408": Entry(78, "this machine makes another first model"),
    "FL-P409": Entry(75, "the peers' run is over"),
    "FL-P410": Entry(73, "peer runs twice"),
    # data
    "FL-D101": Entry(3, "data path not found"),
    "FL-D102": Entry(78, "data file malformed"),
    "FL-D103": Entry(78, "unknown data source"),
    "FL-D104": Entry(78, "partition cannot be made"),
    "FL-D105": Entry(78, "not enough data"),
    "FL-D106": Entry(78, "proxy data overlap the test set"),
    "FL-D107": Entry(78, "proxy data lack a class"),
    # wire
    "FL-W101": Entry(76, "malformed message"),
    "FL-W102": Entry(76, "unknown or closed order"),
    "FL-W103": Entry(76, "message too large"),
    "FL-W104": Entry(76, "tensors do not match the run's manifest"),
    "FL-W105": Entry(76, "chunk or payload corrupt"),
    "FL-W106": Entry(76, "not a number in an update"),
    "FL-W107": Entry(76, "unknown blob"),
    "FL-W108": Entry(76, "codec not offered by this run"),
    "FL-W109": Entry(75, "server cannot take uploads now"),
    "FL-W110": Entry(76, "no such session"),
    "FL-W111": Entry(76, "upload out of place"),
    "FL-W112": Entry(75, "transfer stalled"),
}


class AtollError(Exception):
    """What went wrong, with the value, and the remedy; `code` is a key of CATALOGUE."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    @property
    def exit_code(self) -> int:
        return CATALOGUE[self.code].exit_code if self.code in CATALOGUE else 1

    @property
    def docs(self) -> str:
        return f"docs/errors.md#{self.code.lower()}"

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" + (f" ({self.hint})" if self.hint else "")


class UsageError(AtollError):
    """You asked for something that cannot be."""


class DataError(AtollError):
    """Your data cannot be used."""


class ServerError(AtollError):
    """This server cannot go on."""


class ClientError(AtollError):
    """This client cannot go on."""


class PeerError(AtollError):
    """This peer cannot go on."""


class RemoteError(AtollError):
    """The other side did wrong: it is refused, and the run goes on without it.

    `retry_seconds` is None where the same attempt will fail again, else how long to wait before it.
    """

    def __init__(
        self, code: str, message: str, hint: str = "", *, retry_seconds: float | None = None
    ) -> None:
        super().__init__(code, message, hint)
        self.retry_seconds = retry_seconds

    @property
    def fatal(self) -> bool:
        return self.retry_seconds is None


class RefusedError(RemoteError):
    """What the other side answered when it refused us."""
