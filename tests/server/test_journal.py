"""The journal: all of a batch or nothing, in the order in which it came, and back as it was."""

import fcntl
import os
import sqlite3
from pathlib import Path

import pytest

from atoll.protocols.blobs import BlobInfo, Section
from atoll.protocols.errors import ServerError
from atoll.protocols.events import (
    Action,
    Aggregate,
    ClientInfo,
    ClientJoined,
    ClientLeft,
    Discard,
    Evaluated,
    Event,
    Merged,
    Stopping,
    TimerFired,
    Train,
    Update,
    UpdateReceived,
)
from atoll.server.journal import ACKS, KINDS, Journal, Payload, Row, dump_actions
from tests.server.test_payloads import largest_file

EVENTS: list[tuple[float, Event]] = [
    (0.0, ClientJoined("a", ClientInfo(10, 0.1 + 0.2, ("fp32", "bf16")))),
    (1 / 3, UpdateReceived(Update("o0.0", "o0", "a", 0, 5, 160, 0.0, 0.5, {"loss": 1e-17}))),
    (1 / 3, TimerFired("deadline")),
    (2.0, Merged(1, ("o0.0",), (("o1.0", "not finite"),), {"delta_norm": 3.3})),
    (2.5, Evaluated(1, {"accuracy": 0.9})),
    (3.0, ClientLeft("a", "gone")),
    (4.0, Stopping("enough")),
]


def journal(folder: Path) -> Journal:
    return Journal(folder / "journal.sqlite", "run", durable=False)


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.payloads"))


def payload(update: str, data: bytes | None = b"1234") -> Payload:
    section = Section("trainable", "fp32", 1, 4)
    return Payload(update, BlobInfo(f"u/{update}", 4, b"\7" * 32, (section,)), data)


def test_every_event_comes_back_as_it_was(tmp_path: Path) -> None:
    assert {type(event) for _, event in EVENTS} == set(KINDS.values())
    book = journal(tmp_path)
    assert book.append(EVENTS[:3]) == 1
    assert book.append(EVENTS[3:]) == 4
    book.close()
    again = journal(tmp_path)
    assert [(row.now, row.event) for row in again.rows()] == EVENTS
    assert [row.seq for row in again.rows(after=5)] == [6, 7]
    assert again.seq == 7
    assert again.append(EVENTS[:1]) == 8
    again.close()


def test_decisions_ride_with_the_next_batch_or_the_close(tmp_path: Path) -> None:
    book = journal(tmp_path)
    book.append(EVENTS[:1])
    actions: list[Action] = [Train("a", 5), Aggregate((("o0.0", 0.5),)), Discard("o1.0", "late")]
    book.decide(1, actions)
    assert next(iter(book.rows())).actions is None
    book.append(EVENTS[1:2])
    assert next(iter(book.rows())).actions == dump_actions(actions)
    book.decide(2, [])
    book.close()
    again = journal(tmp_path)
    assert [row.actions for row in again.rows()] == [dump_actions(actions), "[]"]
    again.close()


def test_a_failure_of_the_strategy_is_no_decision(tmp_path: Path) -> None:
    book = journal(tmp_path)
    book.append(EVENTS[:2])
    book.decide(1, [Discard("{", "a reason that starts like one")])
    book.fail(2, "ZeroDivisionError('x')")
    book.flush()
    assert [row.actions is None for row in book.rows()] == [False, True]
    assert list(book.failures()) == [(2, "ZeroDivisionError('x')")]
    book.close()


def test_payloads_are_kept_until_they_are_forgotten(tmp_path: Path) -> None:
    book = journal(tmp_path)
    book.append(EVENTS[:1], payloads=[payload("o0.0"), payload("o1.0", None)])
    book.append(EVENTS[1:2], payloads=[payload("o2.0")], forget=["o0.0"])
    book.close()
    again = journal(tmp_path)
    found = {kept.id: kept for kept in again.payloads()}
    assert found == {"o1.0": payload("o1.0", None), "o2.0": payload("o2.0")}
    again.close()


def test_a_payload_that_came_and_went_with_one_batch_is_not_kept(tmp_path: Path) -> None:
    book = journal(tmp_path)
    book.append(EVENTS[:1], payloads=[payload("o0.0")], forget=["o0.0", "o9.0"])
    assert list(book.payloads()) == []
    book.close()


def test_bytes_are_on_the_disk_before_the_rows_that_name_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut between the two would leave a receipt for bytes that never arrived."""
    book = Journal(tmp_path / "journal.sqlite", "run", durable=True)
    reader = sqlite3.connect(tmp_path / "journal.sqlite")
    seen: list[tuple[str, int]] = []

    real = os.pwritev

    def written(fd: int, parts: list[memoryview], at: int) -> int:
        done = real(fd, parts, at)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DSYNC, "it returns before the disk has it"
        named = reader.execute("SELECT count(*) FROM payload").fetchone()[0]
        seen.append((os.readlink(f"/proc/self/fd/{fd}"), named))
        return done

    monkeypatch.setattr(os, "pwritev", written)
    book.append(EVENTS[:1])
    assert seen == []  # nothing but rows: SQLite's own
    book.append(EVENTS[1:2], payloads=[payload("o0.0")])
    assert seen == [(str(tmp_path / "1.payloads"), 0)]
    assert reader.execute("SELECT count(*) FROM payload").fetchone() == (1,)
    reader.close()
    book.close()


def test_a_snapshot_replaces_the_one_before_it(tmp_path: Path) -> None:
    book = journal(tmp_path)
    assert book.last_snapshot() is None
    book.append(EVENTS[:2])
    book.snapshot(0.5, "one")
    book.snapshot(0.5, "one again")
    book.append(EVENTS[2:4])
    book.snapshot(2.0, "two")
    assert book.last_snapshot() == (4, 2.0, "two")
    book.close()


def test_acknowledgements_are_kept_until_a_snapshot_holds_them(tmp_path: Path) -> None:
    """They were not, and a restarted server told thousands of outcomes again at every hello."""
    book = journal(tmp_path)
    book.append([], meta=[(ACKS + "o0.0", '[["a","o0.0"],["b","o1.0"]]'), ("membership", "{}")])
    assert list(book.acknowledged()) == [("a", "o0.0"), ("b", "o1.0")]
    book.append(EVENTS[:1])
    book.snapshot(0.0, "state")
    assert list(book.acknowledged()) == []
    assert book.meta("membership") == "{}"
    book.close()


def test_a_payload_that_a_power_cut_spoiled_comes_back_empty(tmp_path: Path) -> None:
    book = journal(tmp_path)
    book.append(EVENTS[:1], payloads=[payload("o0.0"), payload("o1.0")])
    book.close()
    (segment,) = tmp_path.glob("*.payloads")
    data = bytearray(segment.read_bytes())
    data[5] ^= 1  # in the second
    segment.write_bytes(data)
    again = journal(tmp_path)
    assert {p.id: p.data for p in again.payloads()} == {"o0.0": b"1234", "o1.0": b""}
    segment.write_bytes(data[:2])
    assert [p.data for p in again.payloads()] == [b"", b""]
    again.close()


def test_meta_rows_are_replaced(tmp_path: Path) -> None:
    book = journal(tmp_path)
    assert book.meta("limits") is None
    book.note("limits", "one")
    book.note("limits", "two")
    assert book.meta("limits") == "two"
    assert book.seq == 0
    book.close()


def test_a_full_disk_takes_all_of_a_batch_or_nothing(tmp_path: Path) -> None:
    book = journal(tmp_path)
    book.append(EVENTS[:1])
    book.decide(1, [])
    (pages,) = book.base.execute("PRAGMA page_count").fetchone()
    book.base.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(ServerError, match="full") as full:
        book.append(EVENTS[1:3], payloads=[payload("o0.0")], meta=[("a", "b" * 100_000)])
    assert full.value.code == "FL-S203"
    assert "free space" in full.value.hint
    with pytest.raises(ServerError) as again:
        book.snapshot(1.0, "x" * 100_000)
    assert again.value.code == "FL-S203"
    assert (len(list(book.rows())), book.meta("a")) == (1, None)
    book.base.execute("PRAGMA max_page_count = 100000")
    assert book.append(EVENTS[1:3]) == 2  # there is room again, and the decision was not lost
    assert next(iter(book.rows())).actions == "[]"
    assert book.last_snapshot() is None
    book.close()


def test_where_the_disk_takes_no_payload_its_batch_says_so(tmp_path: Path) -> None:
    book = journal(tmp_path)
    with largest_file(0), pytest.raises(ServerError, match="large") as full:
        book.append(EVENTS[:1], payloads=[payload("o0.0")])
    assert full.value.code == "FL-S203"
    book.append(EVENTS[:1], payloads=[payload("o0.0")])
    assert [p.data for p in book.payloads()] == [b"1234"]
    book.close()


def test_rows_are_written_while_payloads_are_and_sealed_after_them(tmp_path: Path) -> None:
    book = journal(tmp_path)
    reader = sqlite3.connect(tmp_path / "journal.sqlite")
    book.enter(*EVENTS[0])
    assert book.stage(book.take([payload("o0.0")]))
    with pytest.raises(AssertionError, match="being written"):
        book.stage(book.take())
    book.write()
    assert on_disk(tmp_path) == 0
    book.spill()
    assert on_disk(tmp_path) == 4
    assert reader.execute("SELECT count(*) FROM event").fetchone() == (0,)
    book.seal()
    assert reader.execute("SELECT count(*) FROM event").fetchone() == (1,)
    assert not book.stage(book.take())  # nothing to spill
    book.write()
    book.seal()
    reader.close()
    book.close()


def test_payloads_that_were_put_for_rows_that_failed_are_not_known(tmp_path: Path) -> None:
    book = journal(tmp_path)
    book.enter(*EVENTS[0])
    book.stage(book.take([payload("o0.0")], meta=[("a",)]))  # type: ignore[list-item]
    book.spill()
    with pytest.raises(sqlite3.Error):
        book.write()
    assert not book.behind
    assert list(book.payloads()) == []
    assert book.append(EVENTS[:1], payloads=[payload("o1.0")]) == 1
    assert [p.id for p in book.payloads()] == ["o1.0"]
    book.close()


def test_rows_are_not_sealed_whatever_kept_their_payloads_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It happens in another thread, of which nobody awaits the end."""
    book = journal(tmp_path)
    book.append(EVENTS[:1], payloads=[payload("o0.0")])

    def broken() -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as broke:
        broke.setattr(book._log, "write", broken)
        book.enter(*EVENTS[1])
        book.stage(book.take([payload("o1.0")]))
        book.spill()
        book.write()
        with pytest.raises(ZeroDivisionError):
            book.seal()
    assert [p.id for p in book.payloads()] == ["o0.0"]
    assert book.append(EVENTS[1:2], payloads=[payload("o2.0")]) == 2
    assert [p.id for p in book.payloads()] == ["o0.0", "o2.0"]
    assert on_disk(tmp_path) == 8  # what was put for the other is not written with it
    book.close()


def test_a_bug_in_a_batch_leaves_no_half_of_it(tmp_path: Path) -> None:
    book = journal(tmp_path)
    with pytest.raises(sqlite3.Error):
        book.append(EVENTS[:1], meta=[("a",)])  # type: ignore[list-item]
    assert list(book.rows()) == []
    assert book.append(EVENTS[:1]) == 1
    book.close()


def test_a_file_that_is_no_journal_is_told(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ServerError, match="not a database") as broken:
        journal(tmp_path)
    assert broken.value.code == "FL-S206"


def test_a_process_killed_in_a_transaction_leaves_none_of_it(tmp_path: Path) -> None:
    book = journal(tmp_path)
    book.append(EVENTS[:1])
    book.base.execute("BEGIN IMMEDIATE")
    book.base.execute("UPDATE event SET now = 99")
    for name in ("journal.sqlite", "journal.sqlite-wal"):  # what a killed process leaves
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_bytes((tmp_path / name).read_bytes())
    book.base.execute("ROLLBACK")
    book.close()
    again = journal(tmp_path / "copy")
    assert [row.now for row in again.rows()] == [0.0]
    again.close()


def test_rows_name_their_run(tmp_path: Path) -> None:
    book = journal(tmp_path)
    book.append(EVENTS[:1], payloads=[payload("o0.0")])
    for table in ("event", "payload"):
        assert book.base.execute(f"SELECT run FROM {table}").fetchall() == [("run",)]
    assert isinstance(next(iter(book.rows())), Row)
    book.close()
