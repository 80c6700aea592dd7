"""What happened in a run, as rows: `history.jsonl`, and everything tables and plots ask of it.

One JSON object a line, in journal order, written by the driver (real or virtual):

    {"t": 1.25, "kind": "train", "client": "fast", "order": "o3", "steps": 40, "version": 2}

`t` is the run's clock in seconds, never decreasing, but for rows of no input
(back, resumed, ...), which may be a moment ahead. The kinds and their fields:

    join       client, examples
    leave      client, reason
    restart    client
    state-lost client, state                        it came back without this private state
    train      client, order, steps, version        an order is given
    started    order [, bytes]                      it can be fetched; bytes: what is sent down
    update     client, order, update, steps, base, train_seconds, started, bytes, metrics [, final]
    aggregate  version, items [[update, weight]], staleness {update: versions}
    merged     version, stats                       of a rule over the set, what it took of each:
                                                    lambda/<update> or coefficient/<update>; gamma
               [, dropped [[update, reason]]]       what it could not use
    evaluated  version, metrics
    discard    update, reason
    not-asked  client, reason                       it judges no models in merges, until it is back
    unjudged   reason                               too few did: nothing was learned in a merge
    group      group, arrival, latest, members      FedCompass: when it is expected, and at latest
    limits     target, metric, versions, ...         what ends it, from now on; absent: no limit
    finish     reason

A kind that is not known here is kept and written, and counts for nothing.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import orjson

from atoll.server.totals import Row, Totals

OVER = "the run is over"  # why an order open at the end came to nothing


@dataclass(slots=True)
class Span:
    """One order's life on one client: from when it could be fetched to its end."""

    client: str
    order: str
    version: int  # base
    steps: int  # ordered
    start: float  # run clock
    end: float | None = None  # run clock; None: still open
    train_seconds: float = 0.0  # of it; the rest is transfer and waiting
    update: str | None = None  # None: it ended without a result
    staleness: int | None = None  # versions between base and merge; None: not merged
    reason: str = ""  # why it was not used


@dataclass(slots=True)
class Group:
    """FedCompass' arrival group: who is to arrive together, and when."""

    name: str
    opened: float  # run clock
    arrival: float  # expected
    latest: float  # after which it is merged without those missing
    members: tuple[str, ...]
    closed: float | None = None  # run clock of the merge that took its members' work


@dataclass(frozen=True, slots=True)
class Taken:
    """What one merge took of whom, where its rule chose."""

    t: float  # run clock
    version: int
    shares: Mapping[str, tuple[float, float]]  # client -> (what was taken, what its weight was)
    gamma: float | None  # FedLAW's scale of the whole; None: the rule has none


@dataclass(frozen=True, slots=True)
class Point:
    t: float  # run clock
    version: int
    value: float


@dataclass
class History(Totals):
    """Append rows; ask for totals, series and spans. Each row costs the same, however many."""

    rows: list[Row] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)  # in the order they began
    open: dict[str, Span] = field(default_factory=dict)  # client -> what it is at
    groups: dict[str, Group] = field(default_factory=dict)
    merges: list[tuple[float, int]] = field(default_factory=list)  # (run clock, version)
    evaluations: list[tuple[float, int, Mapping[str, float]]] = field(default_factory=list)
    taken: list[Taken] = field(default_factory=list)

    _ordered: dict[str, Span] = field(default_factory=dict, repr=False)
    _spans: dict[str, Span] = field(default_factory=dict, repr=False)  # of updates not merged
    _waiting: dict[str, Group] = field(default_factory=dict, repr=False)  # groups not closed
    # version -> its updates' spans and weights, until it is merged
    _items: dict[int, dict[str, tuple[Span, float]]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Self:
        history = cls()
        for row in rows:
            history.append(row)
        return history

    @classmethod
    def read(cls, path: Path) -> Self:
        """The history in a file. A torn last line (the writer was killed) is left out.

        Raises ValueError, naming the line, where any other line is not a row.
        """
        history = cls()
        with path.open("rb") as file:
            for at, text in enumerate(file, 1):
                if text.endswith(b"\n") and text != b"\n":  # else it is torn
                    take(history, text, f"{path}:{at}")
        return history

    @property
    def now(self) -> float:
        """The run's clock at the last row."""
        return float(self.rows[-1]["t"]) if self.rows else 0.0

    def waiting(self, now: float) -> list[Group]:
        """The groups that may still be merged together, the next to close first."""
        open_groups = [g for g in self._waiting.values() if g.latest >= now]
        return sorted(open_groups, key=lambda g: (g.latest, g.name))

    @property
    def version(self) -> int:
        return self.merges[-1][1] if self.merges else 0

    def append(self, row: Row) -> None:
        """Take one row in; rows come in the order of their `t`."""
        self.rows.append(row)
        super().append(row)

    def series(self, metric: str) -> list[Point]:
        """A metric over time, e.g. "accuracy", of the evaluated versions that have it."""
        found = ((t, v, m.get(metric, math.nan)) for t, v, m in self.evaluations)
        return [Point(t, v, value) for t, v, value in found if not math.isnan(value)]

    def latest(self, metric: str) -> float | None:
        """The metric of the newest evaluated version that has it."""
        points = self.series(metric)
        return max(points, key=lambda p: p.version).value if points else None

    def seconds_to(self, metric: str, target: float) -> float | None:
        """Run clock at which the metric first was at least `target`; None: never."""
        return next((p.t for p in self.series(metric) if p.value >= target), None)

    def seconds_left(self, metric: str, target: float, last: int = 4) -> float | None:
        """Seconds until `target` if the rest (1 - metric) goes on shrinking as it did lately.

        A line through log(1 - metric) of the last points. None where that says nothing: fewer
        than three points, no progress, or a target of 1.
        """
        points = [p for p in self.series(metric) if p.value < 1][-last:]
        if len(points) < 3 or not points[-1].value < target < 1:
            return 0.0 if points and points[-1].value >= target else None
        slope = _slope([(p.t, math.log(1 - p.value)) for p in points])
        if slope >= 0:
            return None
        ahead = (math.log(1 - target) - math.log(1 - points[-1].value)) / slope
        return max(0.0, points[-1].t + ahead - self.now)

    # ---- one row each ------------------------------------------------------------------------

    def _leave(self, row: Row, t: float) -> None:
        super()._leave(row, t)
        self._end(row["client"], t, row["reason"])

    def _train(self, row: Row, t: float) -> None:
        super()._train(row, t)
        name = row["client"]
        self._end(name, t, "its order was closed")
        span = Span(name, row["order"], row["version"], row["steps"], t)
        self.spans.append(span)
        self.open[name] = self._ordered[span.order] = span

    def _started(self, row: Row, t: float) -> None:
        super()._started(row, t)
        span = self._ordered.get(row["order"])
        if span is not None:
            span.start = t

    def _update(self, row: Row, t: float) -> None:
        super()._update(row, t)
        span = self._ordered.get(row["order"])
        if span is None:  # the order was given before this history began
            span = Span(row["client"], row["order"], row["base"], row["steps"], row["started"])
            self.spans.append(span)
        span.end, span.update = t, row["update"]
        span.train_seconds, span.reason = row["train_seconds"], ""
        self._spans[row["update"]] = span
        if row.get("final", True):
            self._ordered.pop(span.order, None)
            if self.open.get(span.client) is span:
                del self.open[span.client]

    def _aggregate(self, row: Row, t: float) -> None:
        super()._aggregate(row, t)
        self._items[row["version"]] = {
            update: (self._spans[update], weight)
            for update, weight in row["items"]
            if update in self._spans
        }
        merged: set[str] = set()
        for update, staleness in row["staleness"].items():
            span = self._spans.pop(update, None)
            if span is not None:
                merged.add(span.client)
                span.staleness = staleness
        self._close_groups(merged, t)

    def _close_groups(self, merged: set[str], t: float) -> None:
        """A merge with work of a group's members closes it, unless members may still arrive."""
        for group in [g for g in self._waiting.values() if merged.intersection(g.members)]:
            if t >= group.latest or not any(m in self.open for m in group.members):
                group.closed = t
                del self._waiting[group.name]

    def _merged(self, row: Row, t: float) -> None:
        super()._merged(row, t)
        self.merges.append((t, row["version"]))
        items = self._items.pop(row["version"], {})
        for update, reason in row.get("dropped", ()):
            if update in items:
                items[update][0].staleness, items[update][0].reason = None, reason
        shares = {
            span.client: (float(row["stats"][key]), weight)
            for update, (span, weight) in items.items()
            for key in (f"lambda/{update}", f"coefficient/{update}")
            if row["stats"].get(key) is not None
        }
        if shares:
            whole = math.fsum(weight for _, weight in shares.values()) or 1.0
            parts = {client: (took, weight / whole) for client, (took, weight) in shares.items()}
            self.taken.append(Taken(t, row["version"], parts, row["stats"].get("gamma")))

    def _evaluated(self, row: Row, t: float) -> None:
        found = {k: math.nan if v is None else v for k, v in row["metrics"].items()}
        self.evaluations.append((t, row["version"], found))

    def _discard(self, row: Row, t: float) -> None:
        super()._discard(row, t)
        span = self._spans.pop(row["update"], None)
        if span is not None:
            span.reason = row["reason"]

    def _group(self, row: Row, t: float) -> None:
        name, members = row["group"], tuple(row["members"])
        group = self.groups.get(name)
        if group is None:
            group = Group(name, t, row["arrival"], row["latest"], members)
            self.groups[name] = self._waiting[name] = group
        group.arrival, group.latest, group.members = row["arrival"], row["latest"], members

    def _finish(self, row: Row, t: float) -> None:
        super()._finish(row, t)
        for name in list(self.open):
            self._end(name, t, OVER)

    def _end(self, client: str, t: float, reason: str) -> None:
        span = self.open.pop(client, None)
        if span is not None and span.end is None:
            span.end, span.reason = max(t, span.start), reason

    _takers: ClassVar[Mapping[str, Callable[[Any, Row, float], None]]] = {
        **Totals._takers,
        "leave": _leave,
        "train": _train,
        "started": _started,
        "update": _update,
        "aggregate": _aggregate,
        "merged": _merged,
        "evaluated": _evaluated,
        "discard": _discard,
        "group": _group,
        "finish": _finish,
    }


def line(row: Row) -> bytes:
    """A row as the line of `history.jsonl`, newline included; what is not finite becomes null."""
    try:
        return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # numpy's floats, and whatever else is not quite plain
        return json.dumps(_finite(row), separators=(",", ":")).encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse(text: str | bytes, where: str) -> Row:
    """The row in a line. ValueError, naming `where`, where there is none."""
    try:
        row = orjson.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict) or "t" not in row or "kind" not in row:
        raise ValueError(f"{where}: a row has t and kind: {str(text)[:80]}")
    return row


def take(history: Totals, text: bytes, where: str) -> None:
    """Append the row in a line. ValueError, naming `where`, where it is none or lacks a field."""
    row = parse(text, where)
    try:
        history.append(row)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not a whole row: {error!r}") from error


def _slope(points: list[tuple[float, float]]) -> float:
    """Of the least squares line through (x, y); 0 where all x are equal."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if spread == 0:
        return 0.0
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
