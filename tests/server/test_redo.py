"""The redo log: what was written is found again, whatever lies around it; room is given back."""

import fcntl
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from atoll.server.redo import HEAD, LEAST, SEGMENT, Place, RedoLog, fitting

KB = 1024
KEY = b"k" * 32
BEGIN = Place(1, 0)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As a disk that is full there: writing beyond fails, and before it writes short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def opened(
    folder: Path, start: Place = BEGIN, number: int = 0, key: bytes = KEY, segment: int = 100 * KB
) -> RedoLog:
    return RedoLog(folder, key, start, number, (), durable=False, segment=segment)


def put(log: RedoLog, number: int, size: int = 40 * KB) -> Place:
    (place,) = log.stage([bytes([number]) * size])
    log.write(b"rows %d" % number)
    return place


def found(log: RedoLog) -> list[bytes]:
    rows = []
    while (batch := log.find(lambda _: True)) is not None:
        log.found(batch, ())
        rows.append(batch.rows)
    return rows


def left(folder: Path, start: Place = BEGIN, number: int = 0, key: bytes = KEY) -> list[bytes]:
    """What another process finds."""
    return found(opened(folder, start, number, key))


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.payloads"))


# ---- what is found again -----------------------------------------------------------------------


def test_what_was_written_is_found_again_in_order_over_many_segments(tmp_path: Path) -> None:
    log = opened(tmp_path)
    places = []
    for number in range(9):
        places.append(put(log, number))
        log.stage([])
        log.write(b"no payload")
    log.close()
    assert places[-1].segment == 3
    rows = [text for number in range(9) for text in (b"rows %d" % number, b"no payload")]
    assert left(tmp_path) == rows
    for number, place in enumerate(places):
        assert log.read(place, 40 * KB) == bytes([number]) * 40 * KB


def test_only_what_comes_behind_the_known_place_is_read(tmp_path: Path) -> None:
    log = opened(tmp_path)
    places = [BEGIN]
    for number in range(7):
        put(log, number)
        places.append(log.next)
    log.close()
    for number, place in enumerate(places):
        assert left(tmp_path, place, number) == [b"rows %d" % n for n in range(number, 7)]


def test_a_batch_that_was_cut_off_was_never_written_and_the_next_takes_its_place(
    tmp_path: Path,
) -> None:
    log = opened(tmp_path, segment=1 << 20)
    put(log, 0)
    at = log.next
    put(log, 1)
    log.close()
    whole = (tmp_path / "1.payloads").read_bytes()
    for size in (at.offset, at.offset + 5, at.offset + HEAD.size + 3, len(whole) - 1):
        (tmp_path / "1.payloads").write_bytes(whole[:size])
        again = opened(tmp_path)
        assert found(again) == [b"rows 0"]
        assert (again.next, again.number) == (at, 1)
        put(again, 2)
        again.close()
        assert left(tmp_path) == [b"rows 0", b"rows 2"]


@pytest.mark.parametrize("at", [0, 20, 28, 36, HEAD.size + 40 * KB + 2])
def test_a_byte_that_changed_in_a_head_or_in_rows_ends_the_log(tmp_path: Path, at: int) -> None:
    log = opened(tmp_path)
    put(log, 0)
    begins = log.next.offset
    put(log, 1)
    log.close()
    data = bytearray((tmp_path / "1.payloads").read_bytes())
    data[begins + at] ^= 1
    (tmp_path / "1.payloads").write_bytes(data)
    assert left(tmp_path) == [b"rows 0"]


def test_a_batch_whose_payloads_are_not_whole_is_looked_for_in_the_next_segment(
    tmp_path: Path,
) -> None:
    """A power cut may keep the rows without the payloads; the next life writes that batch anew,
    and on a smaller disk it begins another segment for it."""
    log = opened(tmp_path, segment=1 << 20)
    put(log, 0)
    put(log, 1)
    log.close()
    second = opened(tmp_path, segment=10 * KB)
    assert second.find(lambda _: True) is not None
    batch = second.find(lambda _: True)
    assert batch is not None
    second.found(batch, ())
    assert second.find(lambda rows: rows != b"rows 1") is None
    put(second, 7)
    second.close()
    third = opened(tmp_path)
    first = third.find(lambda rows: rows != b"rows 1")
    assert first is not None
    third.found(first, ())
    batch = third.find(lambda rows: rows != b"rows 1")
    assert batch is not None
    assert batch.rows == b"rows 7"


def test_what_is_left_in_a_used_segment_is_no_batch(tmp_path: Path) -> None:
    log = opened(tmp_path, segment=50 * KB)
    for number in range(12):
        put(log, number, 20 * KB)
        log.retire([log.next.segment])
    place, number = log.next, log.number
    put(log, 99, 3 * KB)  # over a part of what an older batch left there
    log.close()
    assert left(tmp_path, place, number) == [b"rows 99"]


def test_a_payload_that_looks_like_a_batch_is_none(tmp_path: Path) -> None:
    """A client may send what it likes, also the bytes that are found behind the last batch."""
    forged = opened(tmp_path / "..", key=b"x" * 32)
    rows = b"forged"
    head = HEAD.pack(forged._seal(2, 0, rows), 2, 0, len(rows))
    log = opened(tmp_path, segment=1 << 20)
    put(log, 0, 1000)
    at = log.next.offset
    (place,) = log.stage([(head + rows) * 50])
    log.write(b"rows 1")
    log.close()
    data = (tmp_path / "1.payloads").read_bytes()
    (tmp_path / "1.payloads").write_bytes(data[:at] + data[place.offset :])
    assert left(tmp_path) == [b"rows 0"]
    assert left(tmp_path, Place(1, at), 1) == []
    assert left(tmp_path, Place(1, at), 1, key=b"x" * 32) == [rows]  # so it would be found


def test_a_log_of_another_journal_is_not_read(tmp_path: Path) -> None:
    log = opened(tmp_path)
    put(log, 0)
    log.close()
    assert left(tmp_path, key=b"another".ljust(32)) == []


def test_batches_that_nothing_leads_to_are_seen(tmp_path: Path) -> None:
    """A place from a backup: the segments after it were used for later batches."""
    log = opened(tmp_path, segment=10 * KB)
    for number in range(3):
        put(log, number)
    log.close()
    (tmp_path / "2.payloads").unlink()
    again = opened(tmp_path)
    assert found(again) == [b"rows 0"]
    assert again.beyond()
    (tmp_path / "3.payloads").unlink()
    assert not again.beyond()


def test_a_batch_that_is_spoilt_before_whole_ones_is_seen(tmp_path: Path) -> None:
    log = opened(tmp_path, segment=50 * KB)
    put(log, 0)
    at = log.next.offset
    put(log, 1)
    put(log, 2)
    log.close()
    data = bytearray((tmp_path / "1.payloads").read_bytes())
    data[at] ^= 1
    (tmp_path / "1.payloads").write_bytes(data)
    again = opened(tmp_path)
    assert found(again) == [b"rows 0"]
    assert again.next.segment == 1
    assert again.beyond()


def test_a_batch_that_was_torn_at_the_end_is_not_beyond(tmp_path: Path) -> None:
    log = opened(tmp_path, segment=10 * KB)
    put(log, 0)
    put(log, 1)
    log.close()
    again = opened(tmp_path)
    batch = again.find(lambda _: True)
    assert batch is not None
    again.found(batch, ())
    assert again.find(lambda _: False) is None
    assert not again.beyond()


def test_sizes_that_lie_are_no_batch(tmp_path: Path) -> None:
    for size in (1, 1 << 40, (1 << 64) - 1):
        (tmp_path / "1.payloads").write_bytes(struct.pack("<16sQQQ", b"x" * 16, 1, size, size))
        assert left(tmp_path) == []


# ---- room --------------------------------------------------------------------------------------


def test_a_segment_is_a_small_part_of_a_small_disk() -> None:
    """Two segments of 32 MB alone filled a disk of 64 MB, with a few payloads alive in them."""
    assert fitting(1 << 40) == SEGMENT
    assert fitting(64 << 20) == 2 << 20
    assert fitting(0) == LEAST


def test_segments_are_used_again_so_the_log_does_not_grow(tmp_path: Path) -> None:
    log = opened(tmp_path)
    former = put(log, 0)
    for number in range(1, 60):
        place = put(log, number)
        log.retire([former.segment])
        former = place
        assert log.read(place, 40 * KB) == bytes([number]) * 40 * KB
    assert on_disk(tmp_path) <= 3 * 140 * KB
    log.close()


def test_a_segment_stays_until_sqlite_knows_its_rows_and_its_payloads_are_forgotten(
    tmp_path: Path,
) -> None:
    log = opened(tmp_path, segment=10 * KB)
    places = [put(log, number) for number in range(4)]
    assert len(list(tmp_path.glob("*.payloads"))) == 4
    log.retire([places[0].segment])
    assert log._spare == tmp_path / "1.payloads"
    log.retire([places[1].segment, places[3].segment])
    assert {path.name for path in tmp_path.glob("*")} == {"1.payloads", "3.payloads", "4.payloads"}
    assert log.read(places[2], 40 * KB) == b"\2" * 40 * KB
    log.close()


def test_segments_of_a_former_life_are_used_again_too(tmp_path: Path) -> None:
    """Also those that hold nothing but rows, which no payload counts."""
    log = opened(tmp_path, segment=1 * KB)
    log.stage([])
    log.write(b"x" * 2 * KB)
    first = log.next
    log.stage([])
    log.write(b"y" * 2 * KB)
    log.close()
    for start, number, batches in ((BEGIN, 0, 2), (first, 1, 1)):
        again = opened(tmp_path, start, number, segment=1 * KB)
        assert len(found(again)) == batches
        put(again, 3)
        again.retire([])
        again.close()
        assert again._spare == tmp_path / "1.payloads"
        assert not (tmp_path / "2.payloads").exists()
        (tmp_path / "3.payloads").unlink()
        log = opened(tmp_path, segment=1 * KB)
        log.stage([])
        log.write(b"x" * 2 * KB)
        log.stage([])
        log.write(b"y" * 2 * KB)
        log.close()


def test_what_nobody_knows_of_is_removed_at_the_start(tmp_path: Path) -> None:
    for name in ("1.payloads", "2.payloads", "3.payloads", "notes.payloads"):
        (tmp_path / name).write_bytes(b"from before")
    log = RedoLog(tmp_path, KEY, Place(3, 0), 0, [1], durable=False)
    log.clear()
    assert {p.name for p in tmp_path.glob("*")} == {"1.payloads", "3.payloads", "notes.payloads"}


def test_what_the_disk_does_not_take_changes_nothing(tmp_path: Path) -> None:
    log = opened(tmp_path, segment=1 << 20)
    first = put(log, 1)
    behind = log.next
    with largest_file(60 * KB), pytest.raises(OSError, match="large"):
        put(log, 2)
    assert (log.next, log.number) == (behind, 1)
    second = put(log, 3)  # there is room again
    assert second == Place(first.segment, behind.offset + HEAD.size)
    assert log.read(first, 40 * KB) == bytes([1]) * 40 * KB
    log.close()
    assert left(tmp_path) == [b"rows 1", b"rows 3"]


def test_a_new_segment_that_the_disk_does_not_take_is_begun_again(tmp_path: Path) -> None:
    log = opened(tmp_path, segment=10 * KB)
    put(log, 1)
    with largest_file(0), pytest.raises(OSError, match="large"):
        put(log, 2)
    assert put(log, 3).segment == 2
    log.close()
    assert left(tmp_path) == [b"rows 1", b"rows 3"]


def test_nothing_is_written_before_it_is_asked_for_and_then_all_at_once(tmp_path: Path) -> None:
    log = opened(tmp_path)
    places = log.stage([bytes([number]) * 30 * KB for number in range(3)])
    assert on_disk(tmp_path) == 0
    log.write(b"rows")
    assert places == [Place(1, HEAD.size + at * 30 * KB) for at in range(3)]
    for number, place in enumerate(places):
        assert log.read(place, 30 * KB) == bytes([number]) * 30 * KB
    log.close()


def test_more_payloads_than_one_call_of_the_system_takes(tmp_path: Path) -> None:
    log = opened(tmp_path, segment=1 << 20)
    places = log.stage([bytes([number % 251]) * 7 for number in range(1500)])
    log.write(b"rows")
    for number, place in enumerate(places):
        assert log.read(place, 7) == bytes([number % 251]) * 7
    log.close()
    assert left(tmp_path) == [b"rows"]


def test_short_writes_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwritev

    def short(fd: int, parts: list[memoryview], at: int) -> int:
        whole = b"".join(parts)
        return real(fd, [whole[: 9 * KB]], at)

    monkeypatch.setattr(os, "pwritev", short)
    log = opened(tmp_path, segment=1 << 20)
    sizes = [(number * 5 + 1) * KB for number in range(4)]
    places = log.stage([bytes([number]) * size for number, size in enumerate(sizes)])
    log.write(b"rows")
    for number, (place, size) in enumerate(zip(places, sizes, strict=True)):
        assert log.read(place, size) == bytes([number]) * size
    log.close()
    assert left(tmp_path) == [b"rows"]


@pytest.mark.parametrize("durable", [True, False])
def test_a_write_returns_when_it_is_on_the_disk_where_that_is_wanted(
    tmp_path: Path, durable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("atoll.server.redo.sync", synced.append)
    log = RedoLog(tmp_path, KEY, BEGIN, 0, (), durable=durable)
    put(log, 1)
    put(log, 2)
    assert bool(fcntl.fcntl(log._fd, fcntl.F_GETFL) & os.O_DSYNC) is durable
    assert synced == ([tmp_path] if durable else [])  # the name of the one new segment
    log.close()


def test_a_segments_name_is_synced_before_anything_in_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sync that failed was never made up for: what came next was acknowledged without."""
    synced: list[Path] = []

    def fails_once(folder: Path) -> None:
        synced.append(folder)
        if len(synced) == 1:
            raise OSError(5, "the disk fails")

    monkeypatch.setattr("atoll.server.redo.sync", fails_once)
    log = RedoLog(tmp_path, KEY, BEGIN, 0, (), durable=True)
    with pytest.raises(OSError, match="the disk fails"):
        put(log, 1)
    put(log, 2)
    put(log, 3)
    assert synced == [tmp_path, tmp_path]
    log.close()
    assert left(tmp_path) == [b"rows 2", b"rows 3"]


@pytest.mark.parametrize("durable", [True, False])
def test_what_is_found_may_never_have_reached_the_disk_and_is_written_again(
    tmp_path: Path, durable: bool, synced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that failed, or was killed, leaves its bytes in memory, where they are found."""
    log = opened(tmp_path, segment=1 << 20)
    put(log, 1)
    begins = log.next.offset
    put(log, 2)
    log.close()
    whole = (tmp_path / "1.payloads").read_bytes()
    again = RedoLog(tmp_path, KEY, BEGIN, 0, (), durable=durable)
    again.confirm()  # nothing was found
    assert synced == []
    assert found(again) == [b"rows 1", b"rows 2"]
    written: list[tuple[int, int, bool]] = []
    real = os.pwrite

    def little(fd: int, data: memoryview, at: int) -> int:
        written.append((at, len(data), bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DSYNC)))
        return real(fd, data[: 20 * KB], at)

    monkeypatch.setattr(os, "pwrite", little)
    again.confirm()
    assert (tmp_path / "1.payloads").read_bytes() == whole
    size = len(whole) - begins
    parts = [(begins + at, size - at, True) for at in range(0, size, 20 * KB)]
    assert written == (parts if durable else [])
    assert synced == ([str(tmp_path)] if durable else [])


def test_a_file_that_cannot_be_removed_only_takes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = opened(tmp_path, segment=10 * KB)
    places = [put(log, number) for number in range(4)]

    def stays(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "unlink", stays)
    log.retire([place.segment for place in places])
    assert put(log, 9).segment == 5
    log.close()


def test_a_spare_file_never_takes_the_place_of_a_segment_in_use(tmp_path: Path) -> None:
    log = opened(tmp_path, segment=50 * KB)
    first = put(log, 1)
    put(log, 2)
    put(log, 3)
    log.retire([first.segment] * 2)
    assert log._spare == tmp_path / "1.payloads"
    log.close()  # and it is opened in the midst of segment 2
    put(log, 4)
    assert left(tmp_path, Place(2, 0), 2) == [b"rows 3", b"rows 4"]
    log.clear()
    assert log._spare is None
    log.close()


def test_a_spare_segment_goes_first_when_the_disk_is_full(tmp_path: Path) -> None:
    """It only makes us quicker; the write is tried again with the room that it leaves."""
    log = opened(tmp_path, segment=30 * KB)
    first, second = put(log, 1), put(log, 2)
    log.retire([first.segment])  # its file waits to be written over
    assert len(list(tmp_path.glob("*.payloads"))) == 2
    log._segment = 1 << 20
    with largest_file(50 * KB), pytest.raises(OSError, match="large"):
        put(log, 3)
    assert [path.name for path in tmp_path.glob("*.payloads")] == [f"{second.segment}.payloads"]
    assert log.read(second, 40 * KB) == bytes([2]) * 40 * KB
    log.close()
