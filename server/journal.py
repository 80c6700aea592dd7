"""Journal: every input of a run and what was decided, written down before anything of it is said.

SQLite in WAL mode, one connection, used by one thread at a time (SQLite before 3.51.3 can corrupt
a WAL that two connections write). Inputs are entered as they are decided; a batch of them is one
transaction, so receipts are released together. What it writes are pages: a table with a text as its
key is kept WITHOUT ROWID, as one tree and not two.
"""

import json
import math
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from atoll.protocols import state
from atoll.protocols.blobs import BlobInfo, Bulk, Section
from atoll.protocols.errors import ServerError
from atoll.protocols.events import Action, Event
from atoll.protocols.frames import checksums
from atoll.server.payloads import PayloadLog, Place

ACKS = "acks/"  # meta keys: outcomes acknowledged since the last snapshot
FAILED = "failed"

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
META = "INSERT OR REPLACE INTO meta VALUES (?, ?)"
FORGET = "DELETE FROM payload WHERE id = ? RETURNING segment"

KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}


@dataclass(slots=True)
class Payload:
    """The bytes of an update, as received: here when small, else in the update store's file."""

    id: str
    info: BlobInfo  # without SHA-256 where there is `data`: its CRC tells whether it is whole
    data: Bulk | None


@dataclass(slots=True)
class Entry:
    """A row of `event`, not yet written."""

    seq: int
    now: float
    event: Event
    actions: str | None = None

    def row(self, run: str) -> tuple[object, ...]:
        kind = type(self.event).__name__
        return self.seq, run, self.now, kind, state.dumps_values(self.event), self.actions


@dataclass(slots=True)
class Batch:
    """What one transaction writes."""

    entries: list[Entry]
    decided: list[tuple[str, int]]  # (actions, seq) of rows written before
    payloads: list[Payload]
    forget: list[str]  # payloads no longer needed
    meta: list[tuple[str, str]]

    @property
    def size(self) -> int:
        """Bytes of the payloads."""
        return sum(len(p.data) for p in self.payloads if p.data is not None)


@dataclass(frozen=True, slots=True)
class Row:
    seq: int
    now: float
    event: Event
    actions: str | None  # JSON; None where the process died before them, or the strategy failed


class Journal:
    """One run's book. All calls block: make them from one worker thread."""

    def __init__(self, path: Path, run: str, *, durable: bool = True) -> None:
        """Open or make `path`. `durable` False skips fsync: then a power cut loses the tail."""
        self.run = run
        try:
            self.base = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self.base.execute("PRAGMA journal_mode=WAL")
            self.base.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self.base.executescript(SCHEMA)
            found = self.base.execute("SELECT coalesce(max(seq), 0) FROM event").fetchone()
            live = self.base.execute("SELECT segment FROM payload WHERE segment IS NOT NULL")
            segments = [int(row[0]) for row in live]
            self._log = PayloadLog(path.parent, segments, durable=durable)
        except sqlite3.DatabaseError as error:
            full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
            raise ServerError(
                "FL-S203" if full else "FL-S206",
                f"journal {path} cannot be {'written' if full else 'read'}: {error}",
                "free space on its disk and start again"
                if full
                else "restore it from a backup, or start with a new state directory",
            ) from error
        self.seq = int(found[0])  # of the last input that was entered
        self._entered: list[Entry] = []
        self._decided: list[tuple[str, int]] = []
        self._written = self.seq
        self._writing: Batch | None = None
        self._places: dict[str, Place] = {}  # of its payloads, by update
        self._spilt: Exception | None = None  # why they could not be put there
        self._dropped: list[tuple[int | None]] = []  # segments of payloads it forgets
        self._lost = False  # a batch could not be written: nothing that followed from it may be

    def note(self, key: str, value: str) -> None:
        """Write one meta row down. Raises ServerError FL-S203."""
        self.append([], meta=[(key, value)])

    def append(
        self,
        events: Sequence[tuple[float, Event]],
        payloads: Iterable[Payload] = (),
        forget: Iterable[str] = (),
        meta: Iterable[tuple[str, str]] = (),
    ) -> int:
        """Enter inputs and write all that waits; the seq of the first. Raises ServerError FL-S203
        where the disk does not take it."""
        if self._lost:
            self.seq, self._entered, self._lost = self._written, [], False
        first = self.seq + 1
        for now, event in events:
            self.enter(now, event)
        self.commit(self.take(payloads, forget, meta))
        return first

    def enter(self, now: float, event: Event) -> int:
        """Take in an input, its seq; the next batch writes it."""
        self.seq += 1
        self._entered.append(Entry(self.seq, now, event))
        return self.seq

    def take(
        self,
        payloads: Iterable[Payload] = (),
        forget: Iterable[str] = (),
        meta: Iterable[tuple[str, str]] = (),
    ) -> Batch:
        """All that waits, to be given to `commit`, perhaps in another thread."""
        entered, self._entered = self._entered, []
        decided, self._decided = self._decided, []
        return Batch(entered, decided, list(payloads), list(forget), list(meta))

    def commit(self, batch: Batch) -> None:
        """Write it down, durably. ServerError FL-S203 where the disk does not take it: then what
        was entered since is forgotten with it.

        In four parts, so that a loop need not wait for the disk: `spill` and `seal` do, and are
        for another thread, one after the other; `write` may go on while `spill` does.
        """
        self.stage(batch)
        self.spill()
        self.write()
        self.seal()

    def stage(self, batch: Batch) -> bool:
        """Say where its payloads will lie. Whether there are any to spill."""
        assert self._writing is None, "a batch is being written"
        self._writing, self._spilt = batch, None
        try:
            self._places = {
                p.id: self._log.put(p.data) for p in batch.payloads if p.data is not None
            }
        except BaseException as error:
            self._undo(error)
            raise
        return bool(self._places)

    def spill(self) -> None:
        """Put the payloads there. What goes wrong is told by `seal`, which then writes nothing."""
        try:
            self._log.write()
        except Exception as error:  # noqa: BLE001  # no row may name what is not there
            self._spilt = error

    def write(self) -> None:
        """Write the rows, of which nothing is durable yet."""
        batch = self._writing
        assert batch is not None, "stage a batch first"
        try:
            self.base.execute("BEGIN IMMEDIATE")
            self._many(EVENT, [entry.row(self.run) for entry in batch.entries])
            self._many(DECIDED, batch.decided)
            self._many(PAYLOAD, [self._row(p) for p in batch.payloads])
            for update in batch.forget:
                self._dropped += self.base.execute(FORGET, (update,)).fetchall()
            self._many(META, batch.meta)
        except BaseException as error:
            self._undo(error)
            raise

    def seal(self) -> None:
        """Make the rows durable, once the payloads are that they name."""
        try:
            if self._spilt is not None:
                raise self._spilt
            self.base.execute("COMMIT")
        except BaseException as error:
            self._undo(error)
            raise
        assert self._writing is not None, "stage a batch first"
        if self._writing.entries:
            self._written = self._writing.entries[-1].seq
        dropped, self._dropped, self._writing = self._dropped, [], None
        for (segment,) in dropped:
            if segment is not None:
                self._log.drop(segment)

    def _many(self, statement: str, rows: Sequence[Sequence[object]]) -> None:
        if rows:
            self.base.executemany(statement, rows)

    @property
    def behind(self) -> bool:
        """Whether something waits to be written with the next inputs."""
        return bool(self._entered or self._decided) and not self._lost

    def _row(self, payload: Payload) -> tuple[object, ...]:
        """A row of `payload`, whose bytes lie in the log where they came with it."""
        place = self._places.get(payload.id)
        if place is None:
            return payload.id, self.run, _info(payload), None, None
        return payload.id, self.run, _info(payload), place.segment, place.offset

    def decide(self, seq: int, actions: Sequence[Action]) -> None:
        """What was decided about input `seq`; written with it, or with the next batch."""
        self._decide(seq, dump_actions(actions))

    def fail(self, seq: int, error: str) -> None:
        """Nothing was decided about input `seq`: the strategy failed on it."""
        self._decide(seq, json.dumps({FAILED: error}))

    def _decide(self, seq: int, text: str) -> None:
        at = len(self._entered) - 1 - (self.seq - seq)
        if at >= 0:
            self._entered[at].actions = text
        else:
            self._decided.append((text, seq))

    def snapshot(self, now: float, text: str) -> None:
        """A state from which reading may start, instead of from the beginning. FL-S203."""
        self.flush()
        try:
            self.base.execute("BEGIN IMMEDIATE")
            self.base.execute(
                "INSERT OR REPLACE INTO snapshot VALUES (?, ?, ?, ?)",
                (self.seq, self.run, now, text),
            )
            self.base.execute("DELETE FROM snapshot WHERE seq < ?", (self.seq,))
            self.base.execute("DELETE FROM meta WHERE key LIKE ?", (ACKS + "%",))
            self.base.execute("COMMIT")
        except BaseException as error:
            self._undo(error)
            raise

    def last(self) -> float:
        """Run clock of the newest input; minus infinity where there is none."""
        now = self.base.execute("SELECT max(now) FROM event").fetchone()[0]
        return -math.inf if now is None else float(now)

    def last_snapshot(self) -> tuple[int, float, str] | None:
        row = self.base.execute(
            "SELECT seq, now, state FROM snapshot ORDER BY seq DESC LIMIT 1"
        ).fetchone()
        return None if row is None else (int(row[0]), float(row[1]), str(row[2]))

    def rows(self, after: int = 0) -> Iterator[Row]:
        """Inputs after `after`, in order."""
        for seq, now, kind, event, actions in self.base.execute(
            "SELECT seq, now, kind, event, actions FROM event WHERE seq > ? ORDER BY seq", (after,)
        ):
            decided = None if actions is None or actions.startswith("{") else actions
            yield Row(int(seq), float(now), load_event(kind, event), decided)

    def failures(self) -> Iterator[tuple[int, str]]:
        """Inputs on which the strategy failed, and how."""
        for seq, text in self.base.execute(
            "SELECT seq, actions FROM event WHERE actions LIKE '{%' ORDER BY seq"
        ):
            yield int(seq), str(json.loads(text)[FAILED])

    def acknowledged(self) -> Iterator[tuple[str, str]]:
        """(client, update) of outcomes acknowledged since the last snapshot."""
        for (text,) in self.base.execute("SELECT value FROM meta WHERE key LIKE ?", (ACKS + "%",)):
            for client, update in json.loads(text):
                yield str(client), str(update)

    def payloads(self) -> Iterator[Payload]:
        """Every payload that is not forgotten; `data` is empty where a power cut took it."""
        rows = self.base.execute("SELECT id, info, segment, offset FROM payload").fetchall()
        for update, text, segment, offset in rows:
            plain = json.loads(text)
            plain["sha256"] = bytes.fromhex(plain["sha256"])
            crcs = plain.pop("crcs")
            sections = tuple(state.load(Section, s) for s in plain.pop("sections"))
            info = BlobInfo(**plain, sections=sections)
            inside = segment is not None
            data = self._log.read(Place(segment, offset), info.size) if inside else None
            if data is not None and checksums(memoryview(data)) != crcs:
                data = b""
            yield Payload(str(update), info, data)

    def meta(self, key: str) -> str | None:
        row = self.base.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def _undo(self, error: BaseException) -> None:
        """Take back what was begun, all of it. ServerError FL-S203 where the disk did not take
        it."""
        if self.base.in_transaction:
            self.base.execute("ROLLBACK")
        self._log.take_back()
        if self._writing is not None:
            self._lost = True
            self._decided = self._writing.decided + self._decided
            self._writing, self._dropped = None, []
        if isinstance(error, sqlite3.OperationalError | OSError):
            raise ServerError(
                "FL-S203",
                f"the journal cannot be written: {error}",
                "free space on its disk and start again: nothing acknowledged is lost",
            ) from error

    def flush(self) -> None:
        """Write what has not ridden along yet."""
        if self.behind:
            self.append([])

    def close(self) -> None:
        """Write what is left, and let go of the files, also where the disk does not take it."""
        try:
            self.flush()
        finally:
            self.abandon()

    def abandon(self) -> None:
        self._log.close()
        self.base.close()


def dump_actions(actions: Sequence[Action]) -> str:
    """Actions as JSON, each with its name: equal actions are equal text."""
    return state.dumps_values([(type(a).__name__, a) for a in actions]) if actions else "[]"


def same(was: str, is_now: str) -> bool:
    """Whether two texts of `dump_actions` say the same, however their numbers are written."""
    return was == is_now or bool(json.loads(was) == json.loads(is_now))


def load_event(kind: str, text: str) -> Event:
    return state.loads(KINDS[kind], text)


def _info(payload: Payload) -> str:
    """A payload's description, as JSON."""
    info = payload.info
    return state.dumps_values(
        {
            "id": info.id,
            "size": info.size,
            "sha256": info.sha256.hex(),
            "crcs": checksums(memoryview(payload.data or b"")),
            "sections": info.sections,
        }
    )
