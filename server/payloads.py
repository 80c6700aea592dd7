"""Payloads: the bytes of small updates, appended to segment files beside the journal.

A database copies a 100 KB value page by page, twice; here it is one write into a file that was
used before. The journal's rows say where each payload lies; a segment whose payloads are all
forgotten is taken again for new ones. `write` waits for the disk and may be called in a thread of
its own, while nothing is put; everything else is for one thread at a time.
"""

import os
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from atoll.protocols.blobs import Bulk
from atoll.protocols.durable import sync
from atoll.server.room import disk_free

SEGMENT = 32 << 20  # bytes after which a new segment is begun
LEAST = 1 << 20  # of a segment where the disk is small
SHARE = 32  # a segment is at most this part of what is free, for some live at a time
BUFFERS = 512  # payloads written by one call of the system, which takes 1,024 on Linux
SUFFIX = ".payloads"


@dataclass(slots=True)
class Place:
    segment: int
    offset: int


class PayloadLog:
    """`live` are the segments of the payloads that are still known, one entry for each payload."""

    def __init__(
        self,
        folder: Path,
        live: Iterable[int],
        *,
        durable: bool = True,
        segment: int | None = None,
    ) -> None:
        self.folder = folder
        self._durable = durable
        self._live = Counter(live)
        self._spare: Path | None = None
        self._fd = -1
        self._at = 0
        self._named = True  # the file's name is on the disk
        self._lock = threading.RLock()  # held while what was put is written, or taken back
        self._put: list[Bulk] = []  # not written yet: the end of the segment up to `_at`
        self._number = max(self._live, default=0)
        for path in folder.glob(f"*{SUFFIX}"):
            if not path.stem.isdecimal() or int(path.stem) not in self._live:
                path.unlink()
        self._segment = segment or fitting(disk_free(folder))

    def put(self, data: Bulk) -> Place:
        """Where `data` will lie, once `write` has written it."""
        if self._fd < 0 or self._at >= self._segment:
            self._turn()
        place = Place(self._number, self._at)
        self._at += len(data)
        self._live[self._number] += 1
        self._put.append(data)
        return place

    def write(self) -> None:
        """Write what was put; `durable`: it survives a power cut from then on. OSError where the
        disk does not take it: then none of it was put."""
        with self._lock:
            start = self._at - sum(map(len, self._put))
            try:
                self._write(start)
            except OSError:
                try:
                    if not self._give_back():
                        raise
                    self._write(start)
                except OSError:
                    self.take_back()
                    raise
            self._put.clear()

    def take_back(self) -> None:
        """What was put and is not written never was."""
        with self._lock:
            self._at -= sum(map(len, self._put))
            self._live[self._number] -= len(self._put)
            self._put.clear()

    def read(self, place: Place, size: int) -> bytes:
        """The bytes, fewer than `size` where they never reached the disk."""
        try:
            with open(self._path(place.segment), "rb") as file:
                file.seek(place.offset)
                return file.read(size)
        except FileNotFoundError:
            return b""

    def drop(self, segment: int) -> None:
        """One payload of `segment` is forgotten."""
        self._live[segment] -= 1
        if self._live[segment] <= 0 and segment != self._number:
            del self._live[segment]
            self._retire(segment)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, at: int) -> None:
        waiting = [memoryview(data) for data in self._put]
        while waiting:
            written = os.pwritev(self._fd, waiting[:BUFFERS], at)
            at += written
            while waiting and written >= len(waiting[0]):
                written -= len(waiting.pop(0))
            if written:  # a nearly full disk writes short
                waiting[0] = waiting[0][written:]
        if not self._named:
            sync(self.folder)  # the file's name is as durable as what it holds
            self._named = True

    def _give_back(self) -> bool:
        """Let the disk have what only makes us quicker; False where there is nothing of it."""
        if self._spare is None:
            return False
        self._spare.unlink(missing_ok=True)
        self._spare = None
        return True

    def _turn(self) -> None:
        self.write()
        former = self._number
        self.close()
        path = self._path(former + 1)
        if self._spare is not None:
            os.replace(self._spare, path)
            self._spare = None
        synced = os.O_DSYNC if self._durable else 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | synced, 0o600)
        self._number, self._at = former + 1, 0
        self._named = not self._durable
        if former and not self._live[former]:
            del self._live[former]
            self._retire(former)

    def _retire(self, segment: int) -> None:
        path = self._path(segment)
        if self._spare is None and path.exists():
            self._spare = path
        else:
            path.unlink(missing_ok=True)

    def _path(self, segment: int) -> Path:
        return self.folder / f"{segment}{SUFFIX}"


def fitting(free: int) -> int:
    """Bytes of a segment on a disk with so many free."""
    return max(LEAST, min(SEGMENT, free // SHARE))
