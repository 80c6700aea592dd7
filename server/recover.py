"""Recover: a run as it stood, from its journal: its inputs are handled again, nothing done twice.

From the last snapshot on, every journaled input goes through the same machines. What they decide is
compared with what was decided then, where that was written down: a strategy whose code has changed
is found out before it does harm.
"""

import json
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace

from atoll.aggregation.strategy import Strategy
from atoll.protocols import state
from atoll.protocols.errors import ServerError
from atoll.protocols.events import Action, Evaluated, Event, Merged
from atoll.protocols.membership import Membership
from atoll.server.journal import Journal, Row, dump_actions, same
from atoll.server.rules import Rules
from atoll.server.run import Effect, Merge, Run, failed
from atoll.server.workshop import Stock

Heard = Callable[[Run, float, Event, list[Action], list[Effect]], None]


@dataclass
class Recovered:
    run: Run
    membership: Membership
    rules: Rules
    stock: Stock  # merges whose updates are still kept
    now: float = 0.0  # run clock of the last input
    inputs: int = 0  # handled again


def recover(
    journal: Journal,
    strategy: Strategy,
    rules: Rules,
    membership: Membership,
    heard: Heard | None = None,
) -> Recovered:
    """Bring fresh machines to where the journal ends. ServerError FL-S206 where they disagree.

    `heard` is told of every input that is handled again.
    """
    found = Recovered(Run(strategy), membership, rules, Stock())
    snapshot = journal.last_snapshot()
    after = 0
    try:
        if snapshot is not None:
            after, found.now, text = snapshot
            _load(found, json.loads(text))
        for row in journal.rows(after):
            _again(found, row, heard)
        told = journal.meta("membership")
        if told is not None:
            state.restore(membership, json.loads(told))
    except (sqlite3.DatabaseError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise _unlike(str(error)) from error
    for client, update in journal.acknowledged():
        found.run.acknowledge(client, update)
    membership.restart(found.now)
    return found


def snapshot(run: Run, membership: Membership, rules: Rules, stock: Stock) -> str | None:
    """Everything that recovery needs besides the journal's later inputs; None where a strategy
    keeps state beside its dataclass fields: then recovery reads all inputs again."""
    strategy = run.strategy
    if not is_dataclass(strategy) or vars(strategy).keys() - {f.name for f in fields(strategy)}:
        return None
    return json.dumps(
        {
            "run": state.dump(run),
            "strategy": state.dump(strategy),
            "membership": state.dump(membership),
            "rules": state.dump(rules),
            "stock": state.dump(stock),
        }
    )


def _load(found: Recovered, data: dict[str, state.Json]) -> None:
    state.restore(found.run, data["run"])
    state.restore(found.run.strategy, data["strategy"])
    state.restore(found.membership, data["membership"])
    limits = replace(found.rules)
    state.restore(found.rules, data["rules"])
    found.rules.take_limits(limits, found.now)  # what the user asks for now, not then
    found.stock = state.load(Stock, data["stock"])


def _again(found: Recovered, row: Row, told: Heard | None) -> None:
    try:
        event, actions, effects = found.run.handle(row.event, row.now)
    except Exception as error:  # a strategy may raise anything
        heard = f"input {row.seq} ({type(row.event).__name__} at {row.now:.3f} s)"
        if row.actions is not None:
            raise _unlike(f"{heard} was answered before, and now fails: {error!r}") from error
        raise failed(heard, error) from error
    if row.actions is not None and not same(row.actions, dump_actions(actions)):
        raise ValueError(
            f"input {row.seq} ({type(row.event).__name__} at {row.now:.3f} s) was answered with "
            f"{row.actions}, now with {dump_actions(actions)}"
        )
    if isinstance(row.event, Evaluated):
        found.rules.evaluated(row.event.version, row.event.metrics, row.now)
    if isinstance(row.event, Merged):
        found.rules.merged(row.event.stats)
        found.stock.published(row.event)
    found.stock.merges.extend(e for e in effects if isinstance(e, Merge))
    found.now = row.now
    found.inputs += 1
    if told is not None:
        told(found.run, row.now, event, actions, effects)


def _unlike(what: str) -> ServerError:
    return ServerError(
        "FL-S206",
        f"the journal cannot be replayed: {what}",
        "start with the version of the software and of the strategy that wrote it",
    )
