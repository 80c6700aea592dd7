"""Simulation: what came of a run in virtual time."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from atoll.server.rules import Rules
from atoll.server.totals import Row


@dataclass(frozen=True, slots=True)
class ClientSummary:
    updates: int  # finished
    steps: int  # local steps of these
    busy: float  # seconds with an order: transfers and training
    connected: float  # seconds
    bytes_up: int = 0  # of results that arrived
    bytes_down: int = 0  # of models sent

    @property
    def idle(self) -> float:
        """Share of the time connected in which it had nothing to do."""
        return max(0.0, 1.0 - self.busy / self.connected) if self.connected else 0.0


@dataclass(frozen=True)
class Simulation:
    """Print it for a summary; `history` are the rows of a real run's `history.jsonl`."""

    strategy: str
    seconds: float  # virtual
    reason: str  # why it ended
    events: int  # heard
    versions: int
    updates_used: int
    steps_used: int  # local steps in the updates used
    mean_staleness: float  # versions, of the updates used
    clients: Mapping[str, ClientSummary]
    history: list[Row] = field(repr=False)
    hash: str  # SHA-256 over all that was heard and decided
    rules: Rules = field(repr=False)
    accuracy: list[tuple[float, float]] = field(default_factory=list)  # (virtual seconds, value)
    epsilon: float | None = None  # that central DP has cost the client that paid most; None: none

    @property
    def bytes_up(self) -> int:
        return sum(c.bytes_up for c in self.clients.values())

    @property
    def bytes_down(self) -> int:
        return sum(c.bytes_down for c in self.clients.values())

    @property
    def idle(self) -> float:
        """Share of all clients' connected time in which they had nothing to do."""
        connected = sum(c.connected for c in self.clients.values())
        busy = sum(min(c.busy, c.connected) for c in self.clients.values())
        return 1.0 - busy / connected if connected else 0.0

    def seconds_to(self, accuracy: float) -> float | None:
        """Virtual seconds until a version first had this accuracy; None: none had."""
        return next((t for t, value in self.accuracy if value >= accuracy), None)

    def __str__(self) -> str:
        lines = [
            f"{self.strategy}: {self.versions} versions in {self.seconds:g} virtual seconds"
            f" ({self.reason})",
            f"  {self.updates_used} updates and {self.steps_used} local steps merged,"
            f" mean staleness {self.mean_staleness:.2f}",
            f"  clients idle {100 * self.idle:.0f} % of their time",
        ]
        if self.bytes_up or self.bytes_down:
            up, down = self.bytes_up / 1e6, self.bytes_down / 1e6
            lines.append(f"  {up:.3g} MB up, {down:.3g} MB down")
        if self.accuracy:
            best = max(value for _, value in self.accuracy)
            lines.append(f"  accuracy {self.accuracy[-1][1]:.4f}, best {best:.4f}")
        if self.epsilon is not None:
            lines.append(f"  epsilon {self.epsilon:.4g}")
        if len(self.clients) <= 12:
            width = max(map(len, self.clients), default=0)
            lines += [
                f"  {name:<{width}}  {c.updates:6} updates {c.steps:8} steps"
                f"  idle {100 * c.idle:3.0f} %"
                for name, c in self.clients.items()
            ]
        return "\n".join([*lines, f"  hash {self.hash[:16]}"])
