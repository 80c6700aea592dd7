"""Journal: every input of a run and what was decided, written down before anything of it is said.

A batch of inputs is durable when the redo log has it, in one write; so receipts are released
together. SQLite (WAL mode, one connection, used by one thread at a time: SQLite before 3.51.3 can
corrupt a WAL that two connections write) has them a little later, and is what everything is read
from. Opening a journal brings SQLite to where the log ends.
"""

import json
import math
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from atoll.protocols import state
from atoll.protocols.errors import ServerError
from atoll.protocols.events import Action, Event
from atoll.server.ahead import ACTIONS, META, PLACE, SCHEMA, SEQ, Ahead, Rows, transaction
from atoll.server.payloads import Payload, kept, row_of
from atoll.server.redo import Place, RedoLog
from atoll.server.room import FULL

ACKS = "acks/"  # meta keys: outcomes acknowledged since the last snapshot
KEY = "log/key"  # meta key
FAILED = "failed"
FOLLOW = 64  # batches after which SQLite follows, whatever else there is to do

KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}


@dataclass(slots=True)
class Batch:
    """What is written together."""

    entries: list[list[Any]]  # rows of `event`
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
    """One run's book. All calls but `enter`, `take` and `stage` block: make them from one worker
    thread."""

    def __init__(self, path: Path, run: str, *, durable: bool = True) -> None:
        """Open or make `path`. `durable` False skips fsync: then a power cut loses the tail.

        ServerError FL-S203 (full disk), FL-S206 (no journal, or not all of it).
        """
        self.run = run
        self._ahead = Ahead()
        self.base = _opened(path, durable)
        try:
            self._log = self._open_log(path.parent, durable)
            self._catch_up(path)
            found = self.base.execute("SELECT coalesce(max(seq), 0) FROM event").fetchone()
        except BaseException as error:
            self.base.close()
            if isinstance(error, sqlite3.DatabaseError | OSError):
                raise _unopened(path, error) from error
            raise
        self.seq = int(found[0])  # of the last input that was entered
        self._entered: list[list[Any]] = []
        self._decided: list[tuple[str, int]] = []
        self._written = self.seq
        self._writing: tuple[Batch, Rows, bytes] | None = None
        self._lost = False  # a batch could not be written: nothing that followed from it may be

    def _open_log(self, folder: Path, durable: bool) -> RedoLog:
        found = self.base.execute("SELECT segment FROM payload WHERE segment IS NOT NULL")
        live = [int(row[0]) for row in found]
        if (key := self._meta(KEY)) is None:
            key = secrets.token_hex(32)
            self.base.execute(META, (KEY, key))
        number, start = 0, Place(max(live, default=0) + 1, 0)
        if (place := self._meta(PLACE)) is not None:
            number, *begins = map(int, place.split())
            start = Place(*begins)
        return RedoLog(folder, bytes.fromhex(key), start, number, live, durable=durable)

    def _catch_up(self, path: Path) -> None:
        """Let SQLite have what only the log had when the process died."""
        while (batch := self._log.find(self._whole)) is not None:
            rows = Rows.loaded(batch.rows)
            self._log.found(batch, rows.segments())
            self._ahead.add(rows)
        if self._log.beyond():
            raise ServerError(
                "FL-S206",
                f"{path} is older than its log: what lies between them is missing",
                "copy a state directory whole, with journal.sqlite-wal, or restore a backup",
            )
        try:
            self._log.confirm()
        except OSError as error:
            raise _unwritten(error) from error
        self.follow()
        self._log.clear()

    def _whole(self, rows: bytes) -> bool:
        """Whether the bytes are there of all payloads that came with these rows."""
        came = (kept(row, self._log) for row in Rows.loaded(rows).payloads)
        return all(p.data is None or len(p.data) == p.info.size for p in came)

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
            self._decided = [one for one in self._decided if one[1] <= self._written]
        first = self.seq + 1
        for now, event in events:
            self.enter(now, event)
        self.commit(self.take(payloads, forget, meta))
        return first

    def enter(self, now: float, event: Event) -> int:
        """Take in an input, its seq; the next batch writes it."""
        text = state.dumps_values(event)
        self.seq += 1
        self._entered.append([self.seq, self.run, now, type(event).__name__, text, None])
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

        In two parts, so that a loop need not wait for the disk: `write` does, and is for another
        thread.
        """
        self.stage(batch)
        self.write()

    def stage(self, batch: Batch) -> None:
        """Make its rows, and say where its payloads will lie."""
        assert self._writing is None, "a batch is being written"
        try:
            inside = [p.data for p in batch.payloads if p.data is not None]
            places = iter(self._log.stage(inside))
            payloads = [
                row_of(p, self.run, None if p.data is None else next(places))
                for p in batch.payloads
            ]
            rows = Rows(batch.entries, batch.decided, payloads, batch.forget, batch.meta)
            self._writing = batch, rows, rows.dumped()
        except BaseException as error:
            self._undo(batch, error)
            raise

    def write(self) -> None:
        """Make what is staged durable. SQLite has it later, unless it is far behind."""
        assert self._writing is not None, "stage a batch first"
        batch, rows, text = self._writing
        try:
            if self._ahead.batches >= FOLLOW:
                self.follow()
            self._log.write(text)
        except BaseException as error:
            self._undo(batch, error)
            raise
        self._writing = None
        if batch.entries:
            self._written = batch.entries[-1][SEQ]
        self._ahead.add(rows)

    def follow(self) -> None:
        """Let SQLite have what the log has. FL-S203: it has not, and nothing is lost."""
        if not self._ahead.batches:
            return
        try:
            forgotten = self._ahead.write(self.base, self._log.number, self._log.next)
        except sqlite3.OperationalError as error:
            raise _unwritten(error) from error
        self._ahead = Ahead()
        self._log.retire(forgotten)

    @property
    def ahead(self) -> bool:
        """Whether the log has something that SQLite has not."""
        return self._ahead.batches > 0

    @property
    def behind(self) -> bool:
        """Whether something waits to be written with the next inputs."""
        return bool(self._entered or self._decided) and not self._lost

    def decide(self, seq: int, actions: Sequence[Action]) -> None:
        """What was decided about input `seq`; written with it, or with the next batch."""
        self._decide(seq, dump_actions(actions))

    def fail(self, seq: int, error: str) -> None:
        """Nothing was decided about input `seq`: the strategy failed on it."""
        self._decide(seq, json.dumps({FAILED: error}))

    def _decide(self, seq: int, text: str) -> None:
        at = len(self._entered) - 1 - (self.seq - seq)
        if at >= 0:
            self._entered[at][ACTIONS] = text
        else:
            self._decided.append((text, seq))

    def snapshot(self, now: float, text: str) -> None:
        """A state from which reading may start, instead of from the beginning. FL-S203."""
        self.flush()
        self.follow()
        try:
            with transaction(self.base):
                row = (self._written, self.run, now, text)
                self.base.execute("INSERT OR REPLACE INTO snapshot VALUES (?, ?, ?, ?)", row)
                self.base.execute("DELETE FROM snapshot WHERE seq < ?", (self._written,))
                self.base.execute("DELETE FROM meta WHERE key LIKE ?", (ACKS + "%",))
        except sqlite3.OperationalError as error:
            raise _unwritten(error) from error

    def last(self) -> float:
        """Run clock of the newest input; minus infinity where there is none."""
        now = self._read("SELECT max(now) FROM event").fetchone()[0]
        return -math.inf if now is None else float(now)

    def last_snapshot(self) -> tuple[int, float, str] | None:
        row = self._read(
            "SELECT seq, now, state FROM snapshot ORDER BY seq DESC LIMIT 1"
        ).fetchone()
        return None if row is None else (int(row[0]), float(row[1]), str(row[2]))

    def rows(self, after: int = 0) -> Iterator[Row]:
        """Inputs after `after`, in order."""
        for seq, now, kind, event, actions in self._read(
            "SELECT seq, now, kind, event, actions FROM event WHERE seq > ? ORDER BY seq", (after,)
        ):
            decided = None if actions is None or actions.startswith("{") else actions
            yield Row(int(seq), float(now), load_event(kind, event), decided)

    def failures(self) -> Iterator[tuple[int, str]]:
        """Inputs on which the strategy failed, and how."""
        for seq, text in self._read(
            "SELECT seq, actions FROM event WHERE actions LIKE '{%' ORDER BY seq"
        ):
            yield int(seq), str(json.loads(text)[FAILED])

    def acknowledged(self) -> Iterator[tuple[str, str]]:
        """(client, update) of outcomes acknowledged since the last snapshot."""
        for (text,) in self._read("SELECT value FROM meta WHERE key LIKE ?", (ACKS + "%",)):
            for client, update in json.loads(text):
                yield str(client), str(update)

    def payloads(self) -> Iterator[Payload]:
        """Every payload that is not forgotten; `data` is empty where a power cut took it."""
        rows = self._read("SELECT id, run, info, segment, offset FROM payload").fetchall()
        yield from (kept(row, self._log) for row in rows)

    def meta(self, key: str) -> str | None:
        self.follow()
        return self._meta(key)

    def _meta(self, key: str) -> str | None:
        row = self.base.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def _read(self, query: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        """What SQLite answers when it has all that was written."""
        self.follow()
        return self.base.execute(query, values)

    def _undo(self, batch: Batch, error: BaseException) -> None:
        """A batch was not written, so nothing that was entered since may be. ServerError FL-S203
        where the disk did not take it."""
        self._lost = True
        self._decided = batch.decided + self._decided
        self._writing = None
        if isinstance(error, OSError):
            raise _unwritten(error) from error

    def flush(self) -> None:
        """Write what has not ridden along yet."""
        if self.behind:
            self.append([])

    def close(self) -> None:
        """Write what is left, and let go of the files, also where the disk does not take it."""
        try:
            self.flush()
            self.follow()
        finally:
            self.abandon()

    def abandon(self) -> None:
        self._log.close()
        self.base.close()


def _opened(path: Path, durable: bool) -> sqlite3.Connection:
    try:
        base = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        base.execute("PRAGMA journal_mode=WAL")
        base.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        base.executescript(SCHEMA)
    except sqlite3.DatabaseError as error:
        raise _unopened(path, error) from error
    return base


def _unopened(path: Path, error: Exception) -> ServerError:
    full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    if full or getattr(error, "errno", None) in FULL:
        return _unwritten(error)
    remedy = "restore it from a backup, or start with a new state directory"
    return ServerError("FL-S206", f"journal {path} cannot be read: {error}", remedy)


def _unwritten(error: Exception) -> ServerError:
    return ServerError(
        "FL-S203",
        f"the journal cannot be written: {error}",
        "free space on its disk and start again: nothing acknowledged is lost",
    )


def dump_actions(actions: Sequence[Action]) -> str:
    """Actions as JSON, each with its name: equal actions are equal text."""
    return state.dumps_values([(type(a).__name__, a) for a in actions]) if actions else "[]"


def same(was: str, is_now: str) -> bool:
    """Whether two texts of `dump_actions` say the same, however their numbers are written."""
    return was == is_now or bool(json.loads(was) == json.loads(is_now))


def load_event(kind: str, text: str) -> Event:
    return state.loads(KINDS[kind], text)
