"""The payload log on small and full disks: nothing acknowledged is lost, and room is given back."""

import fcntl
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from atoll.server.payloads import LEAST, SEGMENT, PayloadLog, Place, fitting

KB = 1024


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As a disk that is full there: writing beyond fails, and before it writes short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def put(log: PayloadLog, number: int, size: int = 40 * KB) -> Place:
    place = log.put(bytes([number]) * size)
    log.write()
    return place


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.payloads"))


def test_a_segment_is_a_small_part_of_a_small_disk() -> None:
    """Two segments of 32 MB alone filled a disk of 64 MB, with a few payloads alive in them."""
    assert fitting(1 << 40) == SEGMENT
    assert fitting(64 << 20) == 2 << 20
    assert fitting(0) == LEAST


def test_segments_are_used_again_so_the_log_does_not_grow(tmp_path: Path) -> None:
    log = PayloadLog(tmp_path, (), segment=100 * KB)
    places = [put(log, 0)]
    for number in range(1, 60):
        places.append(put(log, number))
        log.drop(places[-2].segment)
        assert log.read(places[-1], 40 * KB) == bytes([number]) * 40 * KB
    assert on_disk(tmp_path) <= 3 * 140 * KB
    log.close()


def test_what_the_disk_does_not_take_changes_nothing(tmp_path: Path) -> None:
    log = PayloadLog(tmp_path, (), segment=1 << 20)
    first = put(log, 1)
    with largest_file(60 * KB), pytest.raises(OSError, match="large"):
        put(log, 2)
    second = put(log, 3)  # there is room again
    assert second == Place(first.segment, 40 * KB)
    assert log.read(first, 40 * KB) == bytes([1]) * 40 * KB
    assert log.read(second, 40 * KB) == bytes([3]) * 40 * KB
    log.close()
    again = PayloadLog(tmp_path, [first.segment, second.segment])
    assert again.read(first, 40 * KB) == bytes([1]) * 40 * KB


def test_nothing_is_written_before_it_is_asked_for_and_then_all_at_once(tmp_path: Path) -> None:
    log = PayloadLog(tmp_path, (), segment=100 * KB)
    places = [log.put(bytes([number]) * 30 * KB) for number in range(3)]
    assert on_disk(tmp_path) == 0
    log.write()
    log.write()  # nothing is left to write
    assert places == [Place(1, at * 30 * KB) for at in range(3)]
    for number, place in enumerate(places):
        assert log.read(place, 30 * KB) == bytes([number]) * 30 * KB
    log.close()


def test_a_new_segment_begins_behind_what_was_put_into_the_former(tmp_path: Path) -> None:
    log = PayloadLog(tmp_path, (), segment=50 * KB)
    places = [log.put(bytes([number]) * 40 * KB) for number in range(5)]
    log.write()
    assert [place.segment for place in places] == [1, 1, 2, 2, 3]
    for number, place in enumerate(places):
        assert log.read(place, 40 * KB) == bytes([number]) * 40 * KB
    log.close()


def test_what_is_taken_back_leaves_its_place_to_the_next(tmp_path: Path) -> None:
    log = PayloadLog(tmp_path, (), segment=1 << 20)
    first = put(log, 1)
    log.put(bytes([2]) * 70 * KB)
    log.take_back()
    third = put(log, 3)
    assert third == Place(first.segment, 40 * KB)
    assert log.read(third, 40 * KB) == bytes([3]) * 40 * KB
    log.drop(first.segment)
    log.drop(third.segment)
    assert log._live[first.segment] == 0
    log.close()


def test_more_payloads_than_one_call_of_the_system_takes(tmp_path: Path) -> None:
    log = PayloadLog(tmp_path, (), segment=1 << 20)
    places = [log.put(bytes([number % 251]) * 7) for number in range(1500)]
    log.write()
    for number, place in enumerate(places):
        assert log.read(place, 7) == bytes([number % 251]) * 7
    log.close()


def test_short_writes_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwritev

    def short(fd: int, parts: list[memoryview], at: int) -> int:
        whole = b"".join(parts)
        return real(fd, [whole[: 9 * KB]], at)

    monkeypatch.setattr(os, "pwritev", short)
    log = PayloadLog(tmp_path, (), segment=1 << 20)
    places = [log.put(bytes([number]) * (number * 5 + 1) * KB) for number in range(4)]
    log.write()
    for number, place in enumerate(places):
        size = (number * 5 + 1) * KB
        assert log.read(place, size) == bytes([number]) * size
    log.close()


@pytest.mark.parametrize("durable", [True, False])
def test_a_write_returns_when_it_is_on_the_disk_where_that_is_wanted(
    tmp_path: Path, durable: bool, synced: list[str]
) -> None:
    """Its file's name too: a power cut gave a file that was used again its former name back."""
    log = PayloadLog(tmp_path, (), durable=durable, segment=30 * KB)
    first, second = put(log, 1), put(log, 2)
    log.drop(first.segment)
    third = put(log, 3)
    assert [place.segment for place in (first, second, third)] == [1, 2, 3]
    assert bool(fcntl.fcntl(log._fd, fcntl.F_GETFL) & os.O_DSYNC) is durable
    assert synced == ([str(tmp_path)] * 3 if durable else [])
    log.close()


def test_a_spare_segment_goes_first_when_the_disk_is_full(tmp_path: Path) -> None:
    """It only makes us quicker; the write is tried again with the room that it leaves."""
    log = PayloadLog(tmp_path, (), segment=30 * KB)
    first, second = put(log, 1), put(log, 2)
    log.drop(first.segment)  # its file waits to be written over
    assert len(list(tmp_path.glob("*.payloads"))) == 2
    log._segment = 1 << 20
    with largest_file(50 * KB), pytest.raises(OSError, match="large"):
        put(log, 3)
    assert [path.name for path in tmp_path.glob("*.payloads")] == [f"{second.segment}.payloads"]
    assert log.read(second, 40 * KB) == bytes([2]) * 40 * KB
    log.close()
