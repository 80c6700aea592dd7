"""The payload log on small and full disks: nothing acknowledged is lost, and room is given back."""

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
    return log.put(bytes([number]) * size)


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
    log.sync()
    assert log.read(first, 40 * KB) == bytes([1]) * 40 * KB
    assert log.read(second, 40 * KB) == bytes([3]) * 40 * KB
    log.close()
    again = PayloadLog(tmp_path, [first.segment, second.segment])
    assert again.read(first, 40 * KB) == bytes([1]) * 40 * KB


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
