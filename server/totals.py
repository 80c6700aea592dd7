"""Totals: what a server knows of its run's history by heart: sums, not rows.

Rows go in one by one and are let go of; what is kept grows with the clients and with what is not
merged yet, never with the length of the run. Who wants series and spans as well reads the file:
`server/history.py`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

Row = Mapping[str, Any]  # one line of `history.jsonl`: JSON, the fields of its kind


@dataclass(slots=True)
class ClientTotals:
    """Sums over one client's life in the run."""

    examples: int = 0
    updates: int = 0  # received
    merged: int = 0
    discarded: int = 0
    steps: int = 0  # of received updates
    train_seconds: float = 0.0
    staleness: int = 0  # sum over merged updates
    bytes_up: int = 0
    bytes_down: int = 0
    restarts: int = 0
    here: bool = True

    @property
    def mean_staleness(self) -> float:
        """Versions; 0 where nothing was merged."""
        return self.staleness / self.merged if self.merged else 0.0

    @property
    def pace(self) -> float:
        """Local steps per second of training; 0 where nothing was trained."""
        return self.steps / self.train_seconds if self.train_seconds > 0 else 0.0


@dataclass
class Totals:
    """Append rows; ask for sums. Each row costs the same, however many came before."""

    clients: dict[str, ClientTotals] = field(default_factory=dict)
    versions: int = 0  # merged
    limits: Mapping[str, Any] = field(default_factory=dict)  # as asked for last
    finished: str | None = None
    ended: float | None = None  # run clock of the finish, or of the last version
    epsilon: float | None = None  # that noise has cost the client that paid most; None: no noise

    _orders: dict[str, str] = field(default_factory=dict, repr=False)  # client -> its newest
    _whose: dict[str, str] = field(default_factory=dict, repr=False)  # order -> client
    _updates: dict[str, str] = field(default_factory=dict, repr=False)  # not merged -> client
    # version -> its updates' clients and staleness, until it is merged
    _merging: dict[int, dict[str, tuple[str, int]]] = field(default_factory=dict, repr=False)

    def append(self, row: Row) -> None:
        """Take one row in; rows come in the order of their `t`."""
        take = self._takers.get(row["kind"])
        if take is not None:
            take(self, row, float(row["t"]))

    # ---- one row each ------------------------------------------------------------------------

    def _client(self, row: Row) -> ClientTotals:
        name = row["client"]
        if name not in self.clients:
            self.clients[name] = ClientTotals()
        return self.clients[name]

    def _join(self, row: Row, t: float) -> None:
        client = self._client(row)
        client.examples, client.here = row["examples"], True

    def _leave(self, row: Row, t: float) -> None:
        self._client(row).here = False

    def _restart(self, row: Row, t: float) -> None:
        self._client(row).restarts += 1

    def _train(self, row: Row, t: float) -> None:
        self._client(row)
        name, order = row["client"], row["order"]
        self._whose.pop(self._orders.get(name, ""), None)
        self._orders[name], self._whose[order] = order, name

    def _started(self, row: Row, t: float) -> None:
        name = self._whose.get(row["order"])
        if name is not None:
            self.clients[name].bytes_down += row.get("bytes", 0)

    def _update(self, row: Row, t: float) -> None:
        client = self._client(row)
        client.updates += 1
        client.steps += row["steps"]
        client.train_seconds += row["train_seconds"]
        client.bytes_up += row["bytes"]
        self._pay(row["metrics"])
        self._updates[row["update"]] = row["client"]

    def _aggregate(self, row: Row, t: float) -> None:
        merging = self._merging[row["version"]] = {}
        for update, staleness in row["staleness"].items():
            name = self._updates.pop(update, None)
            if name is not None:
                client = self.clients[name]
                client.merged += 1
                client.staleness += staleness
                merging[update] = name, staleness

    def _merged(self, row: Row, t: float) -> None:
        self.versions += 1
        if self.ended is not None:  # the last one was still being made
            self.ended = t
        merging = self._merging.pop(row["version"], {})
        for update, _ in row.get("dropped", ()):
            if update in merging:  # it was taken for merged when that was said
                name, staleness = merging[update]
                client = self.clients[name]
                client.merged, client.discarded = client.merged - 1, client.discarded + 1
                client.staleness -= staleness
        self._pay(row["stats"])

    def _pay(self, told: Mapping[str, Any]) -> None:
        if "epsilon" in told:
            paid = math.inf if told["epsilon"] is None else float(told["epsilon"])
            self.epsilon = max(paid, self.epsilon or 0.0)

    def _discard(self, row: Row, t: float) -> None:
        name = self._updates.pop(row["update"], None)
        if name is not None:
            self.clients[name].discarded += 1

    def _limits(self, row: Row, t: float) -> None:
        self.limits = {k: v for k, v in row.items() if k not in ("t", "kind")}

    def _finish(self, row: Row, t: float) -> None:
        self.finished, self.ended = row["reason"], t

    _takers: ClassVar[Mapping[str, Callable[[Any, Row, float], None]]] = {
        "join": _join,
        "leave": _leave,
        "restart": _restart,
        "train": _train,
        "started": _started,
        "update": _update,
        "aggregate": _aggregate,
        "merged": _merged,
        "discard": _discard,
        "limits": _limits,
        "finish": _finish,
    }
