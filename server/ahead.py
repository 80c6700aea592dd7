"""Ahead: rows that the redo log holds and SQLite does not have yet, as one transaction of it.

A payload that came and went meanwhile never gets there, and a decision is written with its input.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from atoll.server.redo import Place

SCHEMA = """
CREATE TABLE IF NOT EXISTS event (
  seq INTEGER PRIMARY KEY, run TEXT NOT NULL, now REAL NOT NULL, kind TEXT NOT NULL,
  event TEXT NOT NULL, actions TEXT);
CREATE TABLE IF NOT EXISTS payload (
  id TEXT PRIMARY KEY, run TEXT NOT NULL, info TEXT NOT NULL, segment INTEGER, offset INTEGER
  ) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS snapshot (
  seq INTEGER PRIMARY KEY, run TEXT NOT NULL, now REAL NOT NULL, state TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""

EVENT = "INSERT INTO event VALUES (?, ?, ?, ?, ?, ?)"
DECIDED = "UPDATE event SET actions = ? WHERE seq = ?"
PAYLOAD = "INSERT OR REPLACE INTO payload VALUES (?, ?, ?, ?, ?)"
FORGET = "DELETE FROM payload WHERE id = ? RETURNING segment"
META = "INSERT OR REPLACE INTO meta VALUES (?, ?)"

PLACE = "log/place"  # meta key: number of the last batch that SQLite has, and where it ends
SEQ, ACTIONS = 0, 5  # columns of an event's row
ID, SEGMENT = 0, 3  # of a payload's


@dataclass(slots=True)
class Rows:
    """What one batch writes, ready for the tables."""

    events: list[list[Any]]  # seq, run, now, kind, event, actions
    decided: list[tuple[str, int]]  # (actions, seq) of inputs written before
    payloads: list[list[Any]]  # id, run, info, segment, offset
    forget: list[str]  # payloads no longer needed
    meta: list[tuple[str, str]]

    def dumped(self) -> bytes:
        return orjson.dumps([self.events, self.decided, self.payloads, self.forget, self.meta])

    @classmethod
    def loaded(cls, text: bytes) -> "Rows":
        return cls(*orjson.loads(text))

    def segments(self) -> list[int]:
        """Where the payloads lie that came with it."""
        return [row[SEGMENT] for row in self.payloads if row[SEGMENT] is not None]


@dataclass(slots=True)
class Ahead:
    batches: int = 0
    _events: list[list[Any]] = field(default_factory=list)
    _decided: list[tuple[str, int]] = field(default_factory=list)
    _payloads: dict[str, list[Any]] = field(default_factory=dict)
    _forget: list[str] = field(default_factory=list)
    _meta: dict[str, str] = field(default_factory=dict)
    _dropped: list[int] = field(default_factory=list)  # segments of payloads that came and went

    def add(self, rows: Rows) -> None:
        """A batch that the log holds."""
        self.batches += 1
        self._events += rows.events
        self._decided += rows.decided
        for row in rows.payloads:
            self._drop(row[ID])
            self._payloads[row[ID]] = row
        for update in rows.forget:
            self._drop(update)
            self._forget.append(update)  # also of one that has just gone: SQLite may have another
        self._meta.update(rows.meta)

    def _drop(self, update: str) -> None:
        row = self._payloads.pop(update, None)
        if row is not None and row[SEGMENT] is not None:
            self._dropped.append(row[SEGMENT])

    def write(self, base: sqlite3.Connection, number: int, place: Place) -> list[int]:
        """Let SQLite have all of it, durably, up to batch `number`, which ends at `place`: the
        segments of payloads that are forgotten. sqlite3.Error: none of it was written."""
        dropped = list(self._dropped)
        with transaction(base):
            base.executemany(EVENT, self._events)
            base.executemany(DECIDED, self._decided)
            for update in self._forget:  # before what came after it under the same name
                found = base.execute(FORGET, (update,)).fetchall()
                dropped += [segment for (segment,) in found if segment is not None]
            base.executemany(PAYLOAD, self._payloads.values())
            base.executemany(META, self._meta.items())
            base.execute(META, (PLACE, f"{number} {place.segment} {place.offset}"))
        return dropped


@contextlib.contextmanager
def transaction(base: sqlite3.Connection) -> Iterator[None]:
    """All of it, or nothing."""
    base.execute("BEGIN IMMEDIATE")
    try:
        yield
        base.execute("COMMIT")
    except BaseException:
        if base.in_transaction:
            base.execute("ROLLBACK")
        raise
