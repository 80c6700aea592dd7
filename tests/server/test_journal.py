"""The journal: all of a batch or nothing, in the order in which it came, and back as it was."""

import fcntl
import os
import shutil
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
from atoll.server.journal import ACKS, FOLLOW, KINDS, Journal, Row, dump_actions
from atoll.server.payloads import Payload
from tests.server.test_redo import largest_file

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


def _is_open(fd: int) -> bool:
    return Path(f"/proc/self/fd/{fd}").exists()


def payload(update: str, data: bytes | None = b"1234") -> Payload:
    section = Section("trainable", "fp32", 1, 4)
    return Payload(update, BlobInfo(f"u/{update}", 4, b"\7" * 32, (section,)), data)


def small(update: str, data: bytes) -> Payload:
    section = Section("trainable", "fp32", 1, len(data))
    return Payload(update, BlobInfo(f"u/{update}", len(data), b"", (section,)), data)


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


def test_a_batch_is_one_write_that_returns_when_the_disk_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receipt for bytes that a power cut takes would be a lie."""
    book = Journal(tmp_path / "journal.sqlite", "run", durable=True)
    seen: list[str] = []
    real = os.pwritev

    def written(fd: int, parts: list[memoryview], at: int) -> int:
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DSYNC, "it returns before the disk has it"
        seen.append(os.readlink(f"/proc/self/fd/{fd}"))
        return real(fd, parts, at)

    monkeypatch.setattr(os, "pwritev", written)
    book.append(EVENTS[:1])
    book.append(EVENTS[1:2], payloads=[payload("o0.0")])
    assert seen == [str(tmp_path / "1.payloads")] * 2
    assert book.base.execute("PRAGMA synchronous").fetchone() == (2,)
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
    book.append(EVENTS[:1], payloads=[payload("o0.0"), payload("o1.0", b"5678")])
    book.close()
    (segment,) = tmp_path.glob("*.payloads")
    data = bytearray(segment.read_bytes())
    data[data.index(b"5678")] ^= 1
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
    with largest_file(400), pytest.raises(ServerError, match="large") as full:
        book.append(EVENTS[1:3], payloads=[payload("o0.0")], meta=[("a", "b" * 100_000)])
    assert full.value.code == "FL-S203"
    assert "free space" in full.value.hint
    assert (len(list(book.rows())), book.meta("a")) == (1, None)
    book.snapshot(0.5, "of what was written")
    assert book.last_snapshot() == (1, 0.5, "of what was written")
    assert book.append(EVENTS[1:3]) == 2  # there is room again, and the decision was not lost
    assert next(iter(book.rows())).actions == "[]"
    book.close()


def test_a_database_that_the_disk_does_not_take_loses_nothing(tmp_path: Path) -> None:
    """The log has it: SQLite follows when there is room, in this life or in the next."""
    book = journal(tmp_path)
    book.append(EVENTS[:1])
    book.follow()
    (pages,) = book.base.execute("PRAGMA page_count").fetchone()
    book.base.execute(f"PRAGMA max_page_count = {pages}")
    book.append(EVENTS[1:3], payloads=[payload("o0.0")], meta=[("a", "b" * 100_000)])
    for attempt in (book.follow, lambda: book.snapshot(1.0, "state")):
        with pytest.raises(ServerError, match="full") as full:
            attempt()
        assert full.value.code == "FL-S203"
        assert book.ahead
    book.base.execute(f"PRAGMA max_page_count = {pages + 100}")
    assert len(list(book.rows())) == 3
    with pytest.raises(ServerError, match="full"):
        book.snapshot(1.0, "x" * 1_000_000)
    assert book.last_snapshot() is None
    book.append(EVENTS[3:4], meta=[("b", "c" * 1_000_000)])
    with pytest.raises(ServerError, match="full"):
        book.close()
    again = journal(tmp_path)
    assert [row.event for row in again.rows()] == [event for _, event in EVENTS[:4]]
    assert len(again.meta("b") or "") == 1_000_000
    assert [p.data for p in again.payloads()] == [b"1234"]
    again.close()


def test_sqlite_follows_in_a_busy_hour_too_and_a_batch_waits_for_it(tmp_path: Path) -> None:
    book = journal(tmp_path)
    reader = sqlite3.connect(tmp_path / "journal.sqlite")
    for number in range(FOLLOW + 1):
        assert reader.execute("SELECT count(*) FROM event").fetchone() == (0,)
        book.append([(float(number), TimerFired("t"))])
    assert reader.execute("SELECT count(*) FROM event").fetchone() == (FOLLOW,)
    reader.close()
    book.close()


def test_a_batch_that_comes_when_sqlite_cannot_follow_any_further_is_refused(
    tmp_path: Path,
) -> None:
    book = journal(tmp_path)
    for number in range(FOLLOW):
        book.append([(float(number), TimerFired("t" * 4000))])
    book.base.execute("PRAGMA max_page_count = 1")
    with pytest.raises(ServerError, match="full"):
        book.append(EVENTS[:1])
    book.base.execute("PRAGMA max_page_count = 100000")
    assert book.append(EVENTS[:1]) == FOLLOW + 1
    assert [row.seq for row in book.rows()] == list(range(1, FOLLOW + 2))
    book.close()


def test_where_the_disk_takes_no_payload_its_batch_says_so(tmp_path: Path) -> None:
    book = journal(tmp_path)
    with largest_file(0), pytest.raises(ServerError, match="large") as full:
        book.append(EVENTS[:1], payloads=[payload("o0.0")])
    assert full.value.code == "FL-S203"
    book.append(EVENTS[:1], payloads=[payload("o0.0")])
    assert [p.data for p in book.payloads()] == [b"1234"]
    book.close()


def test_nothing_is_staged_while_a_batch_is_being_written(tmp_path: Path) -> None:
    book = journal(tmp_path)
    book.enter(*EVENTS[0])
    book.stage(book.take([payload("o0.0")]))
    with pytest.raises(AssertionError, match="being written"):
        book.stage(book.take())
    assert on_disk(tmp_path) == 0
    book.write()
    with pytest.raises(AssertionError, match="stage a batch"):
        book.write()
    assert book.seq == 1
    book.close()


def test_whatever_kept_a_batch_from_the_disk_it_was_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = journal(tmp_path)
    book.append(EVENTS[:1], payloads=[payload("o0.0")])

    def broken(*_: object) -> int:
        raise ZeroDivisionError

    with monkeypatch.context() as broke:
        broke.setattr(os, "pwritev", broken)
        book.enter(*EVENTS[1])
        book.stage(book.take([payload("o1.0")]))
        with pytest.raises(ZeroDivisionError):
            book.write()
    assert not book.behind
    assert [p.id for p in book.payloads()] == ["o0.0"]
    assert book.append(EVENTS[1:2], payloads=[payload("o2.0")]) == 2
    assert [p.id for p in book.payloads()] == ["o0.0", "o2.0"]
    book.close()


def test_a_bug_in_a_batch_leaves_no_half_of_it(tmp_path: Path) -> None:
    book = journal(tmp_path)
    with pytest.raises(TypeError):
        book.append(EVENTS[:1], payloads=[payload("o0.0")], meta=[("a", object())])  # type: ignore[list-item]
    assert list(book.rows()) == []
    assert list(book.payloads()) == []
    assert book.append(EVENTS[:1]) == 1
    book.close()


@pytest.mark.parametrize(("number", "code"), [(28, "FL-S203"), (13, "FL-S206")])
def test_a_log_that_cannot_be_opened_says_whether_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    """Of a full disk it said to restore a backup."""

    def refuses(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("atoll.server.journal.RedoLog", refuses)
    with pytest.raises(ServerError, match=os.strerror(number)) as refused:
        journal(tmp_path)
    assert refused.value.code == code


def test_what_fails_amid_a_transaction_leaves_none_open(tmp_path: Path) -> None:
    book = journal(tmp_path)
    with pytest.raises(sqlite3.Error):
        book.snapshot(0.0, object())  # type: ignore[arg-type]
    assert not book.base.in_transaction
    book.append(EVENTS[:1])
    book.base.execute("INSERT INTO event VALUES (1, 'another', 0, '', '', '')")
    with pytest.raises(sqlite3.IntegrityError):
        book.follow()
    assert not book.base.in_transaction
    assert book.ahead
    book.base.execute("DELETE FROM event")
    assert [row.seq for row in book.rows()] == [1]
    book.close()


def test_a_file_that_is_no_journal_is_told(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ServerError, match="not a database") as broken:
        journal(tmp_path)
    assert broken.value.code == "FL-S206"


def test_a_payload_that_comes_goes_and_comes_again_is_the_last_that_came(tmp_path: Path) -> None:
    """One name twice, with SQLite following between, or not: the second was taken for the first."""
    story: list[tuple[bytes | None, bool]] = [(b"one", False), (None, True), (b"two", False)]
    for follows in ((), (0,), (1,), (0, 1)):
        for steps in (story, [story[0], story[2]], [story[0], story[2], story[1]]):
            folder = tmp_path / f"{follows}{len(steps)}{steps[-1][1]}"
            folder.mkdir()
            book = journal(folder)
            kept = None
            for at, (data, gone) in enumerate(steps):
                came = [] if data is None else [small("u", data)]
                book.append([], came, ["u"] if gone else [])
                kept = None if gone else data
                if at in follows:
                    book.follow()
            again = journal(left(folder))
            for one in (book, again):
                assert [p.data for p in one.payloads()] == ([] if kept is None else [kept])
                if not follows:
                    assert one._log._live.total() == (kept is not None)
                one.close()


def test_one_name_twice_in_a_batch_and_a_payload_of_nothing_spoil_nothing(tmp_path: Path) -> None:
    """The batch, and all after it, were gone after a kill."""
    book = journal(tmp_path)
    book.append(EVENTS[:1], [small("u", b"one"), small("u", b"two"), small("none", b"")])
    book.append(EVENTS[1:2])
    again = journal(left(tmp_path))
    assert again.seq == 2
    assert {p.id: p.data for p in again.payloads()} == {"u": b"two", "none": b""}
    again.close()
    book.close()


def test_what_was_decided_about_an_input_that_was_refused_is_not_anothers(tmp_path: Path) -> None:
    book = journal(tmp_path)
    seq = book.enter(*EVENTS[0])
    batch = book.take()
    book.decide(seq, [Train("a", 5)])
    with largest_file(0), pytest.raises(ServerError):
        book.commit(batch)
    assert book.append(EVENTS[1:2]) == seq
    assert [row.actions for row in book.rows()] == [None]
    book.close()


def test_a_batch_whose_write_failed_and_which_is_there_is_made_durable_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: list[str]
) -> None:
    book = Journal(tmp_path / "journal.sqlite", "run", durable=True)
    book.append(EVENTS[:1])
    real = os.pwritev

    def fails(fd: int, parts: list[memoryview], at: int) -> int:
        real(fd, parts, at)
        raise OSError(5, "the disk fails")

    def refuses(*_: object) -> int:
        raise OSError(5, "the disk fails")

    with monkeypatch.context() as failing:
        failing.setattr(os, "pwritev", fails)
        with pytest.raises(ServerError):
            book.append(EVENTS[1:2], [payload("o0.0")])
    book.abandon()
    del synced[:]
    with monkeypatch.context() as failing:
        failing.setattr(os, "pwrite", refuses)
        with pytest.raises(ServerError) as refused:
            Journal(tmp_path / "journal.sqlite", "run", durable=True)
    assert refused.value.code == "FL-S203"
    again = Journal(tmp_path / "journal.sqlite", "run", durable=True)
    assert (again.seq, synced) == (2, [str(tmp_path)])
    assert [p.data for p in again.payloads()] == [b"1234"]
    again.close()


# ---- killed, and opened again ------------------------------------------------------------------


def left(folder: Path, name: str = "copy") -> Path:
    """What a process killed now would leave."""
    return Path(shutil.copytree(folder, folder.parent / f"{folder.name}-{name}"))


def test_all_that_was_written_is_there_after_a_kill(tmp_path: Path) -> None:
    book = journal(tmp_path)
    book.append(EVENTS[:3], payloads=[payload("o0.0"), payload("o1.0", None)], meta=[("a", "1")])
    book.decide(2, [Train("a", 5)])
    book.append(EVENTS[3:5], payloads=[payload("o2.0", b"5678")], meta=[("a", "2")])
    book.append([], forget=["o0.0", "o9.0"])
    assert book.ahead
    again = journal(left(tmp_path))
    assert not again.ahead
    assert [(row.now, row.event) for row in again.rows()] == EVENTS[:5]
    assert [row.actions for row in again.rows()] == [
        None,
        dump_actions([Train("a", 5)]),
        *3 * [None],
    ]
    assert again.meta("a") == "2"
    found = {kept.id: kept for kept in again.payloads()}
    assert found == {"o1.0": payload("o1.0", None), "o2.0": payload("o2.0", b"5678")}
    assert again.append(EVENTS[5:]) == 6
    third = journal(left(again_folder := tmp_path.parent / f"{tmp_path.name}-copy", "again"))
    assert again_folder.exists()
    assert [(row.now, row.event) for row in third.rows()] == EVENTS
    for one in (book, again, third):
        one.close()


def test_a_kill_at_any_batch_leaves_what_was_written_by_then(tmp_path: Path) -> None:
    """Over segments that are used again, with SQLite following now and then."""
    book = journal(tmp_path)
    book._log._segment = 3000
    kept: list[str] = []
    for number in range(60):
        update = f"o{number}.0"
        gone = kept.pop(0) if len(kept) > 3 and number % 3 else None
        data = bytes([number]) * 500
        kept.append(update)
        section = Section("trainable", "fp32", 1, 500)
        came = Payload(update, BlobInfo(f"u/{update}", 500, b"\7" * 32, (section,)), data)
        book.append([(float(number), TimerFired("t"))], [came], [gone] if gone else [])
        if number % 7 == 6:
            book.follow()
        copy = left(tmp_path, str(number))
        again = journal(copy)
        assert [row.now for row in again.rows()] == [float(n) for n in range(number + 1)]
        assert {p.id: p.data for p in again.payloads()} == {
            u: bytes([int(u[1:-2])]) * 500 for u in kept
        }
        again.close()
        assert not list(journal(copy).failures())
    book.follow()
    live = {row[0] for row in book.base.execute("SELECT segment FROM payload")}
    files = {int(path.stem) for path in tmp_path.glob("*.payloads")}
    assert len(files - live - {book._log.next.segment}) <= 1  # to be used again
    book.close()


def test_a_batch_that_a_power_cut_left_without_its_payloads_was_not_written(
    tmp_path: Path,
) -> None:
    book = journal(tmp_path)
    book.append(EVENTS[:1], payloads=[payload("o0.0")])
    book.append(EVENTS[1:2], payloads=[payload("o1.0", b"5678")])
    copy = left(tmp_path)
    book.close()
    data = (copy / "1.payloads").read_bytes()
    (copy / "1.payloads").write_bytes(data.replace(b"5678", b"\0" * 4))
    again = journal(copy)
    assert again.seq == 1
    assert [p.id for p in again.payloads()] == ["o0.0"]
    assert again.append(EVENTS[1:2], payloads=[payload("o1.0", b"5678")]) == 2
    third = journal(left(copy))
    assert {p.id: p.data for p in third.payloads()} == {"o0.0": b"1234", "o1.0": b"5678"}
    again.close()
    third.close()


def test_a_database_that_is_older_than_its_log_is_refused(tmp_path: Path) -> None:
    """Restored from a backup, without the rest: what lies between is gone."""
    book = journal(tmp_path)
    book._log._segment = 100
    book.append(EVENTS[:1], payloads=[payload("o0.0")])
    book.follow()
    backup = left(tmp_path)
    for number in range(1, 5):
        book.append(EVENTS[number : number + 1], payloads=[payload(f"o{number}.0")])
        book.append([], forget=[f"o{number - 1}.0"])
        book.follow()
    book.append(EVENTS[5:6])
    book.abandon()
    for path in backup.glob("journal.sqlite*"):
        shutil.copy(path, tmp_path)
    with pytest.raises(ServerError, match="older than its log") as refused:
        journal(tmp_path)
    assert refused.value.code == "FL-S206"
    assert "backup" in refused.value.hint
    held = (os.readlink(f"/proc/self/fd/{fd}") for fd in range(3, 64) if _is_open(fd))
    assert not [path for path in held if path.startswith(f"{tmp_path}/")]


def test_a_directory_of_the_former_software_goes_on(tmp_path: Path) -> None:
    """Its payloads lie in segments without rows."""
    book = journal(tmp_path)
    book.append(EVENTS[:1], payloads=[payload("o0.0")])
    book.follow()
    book.base.execute("DELETE FROM meta")
    book.base.execute("UPDATE payload SET segment = 4, offset = 2")
    book.abandon()
    (tmp_path / "1.payloads").unlink()
    (tmp_path / "4.payloads").write_bytes(b"__1234")
    (tmp_path / "3.payloads").write_bytes(b"of nobody")
    again = journal(tmp_path)
    again.append(EVENTS[1:2], payloads=[payload("o1.0", b"5678")])
    third = journal(left(tmp_path))
    assert {p.id: p.data for p in third.payloads()} == {"o0.0": b"1234", "o1.0": b"5678"}
    assert third.seq == 2
    assert {path.name for path in tmp_path.glob("*.payloads")} == {"4.payloads", "5.payloads"}
    again.close()
    third.close()


def test_a_process_killed_in_a_transaction_leaves_none_of_it(tmp_path: Path) -> None:
    book = journal(tmp_path)
    book.append(EVENTS[:1])
    book.follow()
    book.base.execute("BEGIN IMMEDIATE")
    book.base.execute("UPDATE event SET now = 99")
    again = journal(left(tmp_path))
    book.base.execute("ROLLBACK")
    book.close()
    assert [row.now for row in again.rows()] == [0.0]
    again.close()


def test_rows_name_their_run(tmp_path: Path) -> None:
    book = journal(tmp_path)
    book.append(EVENTS[:1], payloads=[payload("o0.0")])
    book.follow()
    for table in ("event", "payload"):
        assert book.base.execute(f"SELECT run FROM {table}").fetchall() == [("run",)]
    assert isinstance(next(iter(book.rows())), Row)
    book.close()
