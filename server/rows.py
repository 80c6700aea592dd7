"""Rows: what was heard and decided, as the rows of a run's history (`server/history.py`)."""

from collections.abc import Callable, Collection, Iterable

from atoll.protocols.events import (
    Action,
    Aggregate,
    ClientJoined,
    ClientLeft,
    Discard,
    Evaluated,
    Event,
    Merged,
    Train,
    UpdateReceived,
)
from atoll.server.run import Deliver, Effect, Order, Run, Stop
from atoll.server.totals import Row


class Recorder:
    """Turns each step of a run into rows. One per run: it remembers the base of each update."""

    def __init__(self) -> None:
        self._bases: dict[str, int] = {}

    def rows(
        self,
        run: Run,
        now: float,
        event: Event,
        actions: Collection[Action],
        effects: Iterable[Effect],
        up: int = 0,
        down: Callable[[Order], int] = lambda order: 0,
    ) -> list[Row]:
        """Rows of one call of `run.handle`; `up` are the bytes of its update, `down` says those of
        an order's model."""
        heard = self._heard(now, event, up)
        rows = [] if heard is None else [heard]
        version = run.version
        for action in actions:
            if isinstance(action, Aggregate):
                version -= 1
        for action in actions:
            if isinstance(action, Aggregate):
                version += 1
                rows.append(self._aggregate(now, version, action))
            elif isinstance(action, Train):
                order = run.open.get(action.client)
                if order is not None:  # None where the run finished in the same breath
                    rows.append({
                        "t": now, "kind": "train", "client": order.client, "order": order.id,
                        "steps": order.steps, "version": order.version,
                    })  # fmt: skip
            elif isinstance(action, Discard):
                self._bases.pop(action.update, None)
                rows.append(_row(now, "discard", update=action.update, reason=action.reason))
        for effect in effects:
            if isinstance(effect, Deliver):
                order = effect.order
                size = down(order)
                rows.append({"t": now, "kind": "started", "order": order.id, "bytes": size})
            elif isinstance(effect, Stop):
                rows.append(_row(now, "finish", reason=effect.reason))
        return rows

    def _heard(self, now: float, event: Event, size: int) -> Row | None:
        match event:
            case UpdateReceived(u):
                self._bases[u.id] = u.base
                return {
                    "t": now, "kind": "update", "client": u.client, "order": u.order,
                    "update": u.id, "steps": u.steps, "base": u.base,
                    "train_seconds": u.train_seconds, "started": u.started, "bytes": size,
                    "metrics": dict(u.metrics), "current": u.current,
                    **({} if u.final else {"final": False}),
                }  # fmt: skip
            case ClientJoined(client, info):
                return _row(now, "join", client=client, examples=info.examples)
            case ClientLeft(client, reason):
                return _row(now, "leave", client=client, reason=reason)
            case Merged(version, _, dropped, stats):
                lost = {"dropped": [list(d) for d in dropped]} if dropped else {}
                return _row(now, "merged", version=version, stats=dict(stats), **lost)
            case Evaluated(version, metrics):
                return _row(now, "evaluated", version=version, metrics=dict(metrics))
        return None

    def _aggregate(self, now: float, version: int, action: Aggregate) -> Row:
        stale = {u: version - 1 - self._bases.pop(u) for u, _ in action.items if u in self._bases}
        items = [[update, weight] for update, weight in action.items]
        return _row(now, "aggregate", version=version, items=items, staleness=stale)


def _row(now: float, kind: str, **fields: object) -> Row:
    return {"t": now, "kind": kind, **fields}
