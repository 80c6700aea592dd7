"""Redo log: what a run has heard is durable here first, payloads and rows in one write.

A database copies a 100 KB value page by page, twice, and waits for the disk once more; this is one
write into a file that was used before. SQLite follows many batches later and says how far it has
come: what lies behind that place is read again when the journal is opened. Segment files are taken
again once SQLite knows their rows and their payloads are forgotten.

A batch in a segment: HEAD, the bytes of its payloads, its rows. The seal in the head is keyed, for
a payload is a stranger's bytes, and what is left of one must never be taken for a batch.
`write` waits for the disk and may be called in a thread of its own, while nothing is staged;
everything else is for one thread at a time.
"""

import contextlib
import hmac
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from atoll.protocols.blobs import Bulk
from atoll.protocols.durable import sync
from atoll.server.room import disk_free

SEGMENT = 32 << 20  # bytes after which a new segment is begun
LEAST = 1 << 20  # of a segment where the disk is small
SHARE = 32  # a segment is at most this part of what is free, for some live at a time
BUFFERS = 512  # pieces written by one call of the system, which takes 1,024 on Linux
SUFFIX = ".payloads"

HEAD = struct.Struct("<16sQQQ")  # seal, number of the batch, bytes of payloads, bytes of rows
NUMBERS = struct.Struct("<QQQ")  # the same without the seal


@dataclass(frozen=True, slots=True)
class Place:
    segment: int
    offset: int


@dataclass(frozen=True, slots=True)
class Found:
    """A batch that was found again."""

    rows: bytes
    begin: Place
    end: Place  # where the next one begins


class RedoLog:
    """`start`: where the batch after number `number` begins; `live`: the segments of the payloads
    that SQLite knows, one entry for each."""

    def __init__(
        self,
        folder: Path,
        key: bytes,
        start: Place,
        number: int,
        live: Iterable[int],
        *,
        durable: bool = True,
        segment: int | None = None,
    ) -> None:
        self.folder = folder
        self.next, self.number = start, number
        self._key = key
        self._durable = durable
        self._live = Counter(live)
        self._live.setdefault(start.segment, 0)
        self._spare: Path | None = None
        self._fd, self._open = -1, 0  # of which segment
        self._newest: Found | None = None
        self._staged: list[Bulk] = []
        self._at = start  # of what is staged
        self._segment = segment or fitting(disk_free(folder))

    # ---- reading -----------------------------------------------------------------------------

    def find(self, whole: Callable[[bytes], bool]) -> Found | None:
        """The batch after the newest that is known, None where the log ends. `whole`: are the
        payloads there that such rows name? A power cut may have kept the rows alone."""
        places = [self.next]
        if self.next.offset:
            places.append(Place(self.next.segment + 1, 0))
        for place in places:
            found = self._batch(place)
            if found is not None and found[0] == self.number + 1 and whole(found[1].rows):
                return found[1]
        return None

    def found(self, batch: Found, segments: Iterable[int]) -> None:
        """`find` gave it, and it is whole: these are the segments of its payloads."""
        self.next, self.number = batch.end, self.number + 1
        self._newest = batch
        self._live.setdefault(batch.end.segment, 0)
        self._live.update(segments)

    def confirm(self) -> None:
        """Make the newest batch that was found durable; all before it are. It was read from
        memory, and its write may never have returned: killed, or with an error, after which a sync
        alone writes nothing. OSError where the disk does not take it."""
        if self._newest is None or not self._durable:
            return
        begin, end = self._newest.begin, self._newest.end
        file = os.open(self._path(begin.segment), os.O_RDWR | os.O_CLOEXEC | os.O_DSYNC)
        try:
            whole = memoryview(os.pread(file, end.offset - begin.offset, begin.offset))
            done = 0
            while done < len(whole):
                done += os.pwrite(file, whole[done:], begin.offset + done)
        finally:
            os.close(file)
        sync(self.folder)

    def beyond(self) -> bool:
        """Whether there is a later batch, which those before it do not lead to."""
        later = (Place(s, 0) for s in self._segments() if s > self.next.segment)
        heads = (found[0] for place in later if (found := self._batch(place)) is not None)
        return any(number > self.number + 1 for number in heads)

    def _batch(self, place: Place) -> tuple[int, Found] | None:
        """A batch of ours that begins at `place`, with its number."""
        try:
            with open(self._path(place.segment), "rb") as file:
                file.seek(place.offset)
                head = file.read(HEAD.size)
                if len(head) < HEAD.size:
                    return None
                seal, number, payloads, size = HEAD.unpack(head)
                left = os.fstat(file.fileno()).st_size - file.tell()
                if payloads + size > left:
                    return None
                file.seek(payloads, os.SEEK_CUR)
                rows = file.read(size)
        except FileNotFoundError:
            return None
        if not hmac.compare_digest(seal, self._seal(number, payloads, rows)):
            return None
        end = place.offset + HEAD.size + payloads + size
        return number, Found(rows, place, Place(place.segment, end))

    def read(self, place: Place, size: int) -> bytes:
        """The bytes of a payload, fewer than `size` where they never reached the disk."""
        try:
            with open(self._path(place.segment), "rb") as file:
                file.seek(place.offset)
                return file.read(size)
        except FileNotFoundError:
            return b""

    # ---- writing -----------------------------------------------------------------------------

    def stage(self, payloads: Sequence[Bulk]) -> list[Place]:
        """Where the payloads of the next batch will lie, once `write` has written it."""
        self._at, self._staged = self.next, list(payloads)
        if self._at.offset >= self._segment:
            self._at = Place(self._at.segment + 1, 0)
        places, offset = [], self._at.offset + HEAD.size
        for data in payloads:
            places.append(Place(self._at.segment, offset))
            offset += len(data)
        return places

    def write(self, rows: bytes) -> None:
        """Write what was staged, and its rows; `durable`: it survives a power cut from then on.
        OSError where the disk does not take it: then none of it was."""
        number, size = self.number + 1, sum(map(len, self._staged))
        head = HEAD.pack(self._seal(number, size, rows), number, size, len(rows))
        parts = [head, *self._staged, rows]
        try:
            self._write(parts)
        except OSError:
            if not self._give_back():
                raise
            self._write(parts)
        segment, offset = self._at.segment, self._at.offset
        self.next, self.number = Place(segment, offset + HEAD.size + size + len(rows)), number
        self._live[segment] += len(self._staged)
        self._staged = []

    def retire(self, forgotten: Iterable[int]) -> None:
        """SQLite knows all that was written; payloads in these segments are `forgotten`."""
        self._live.subtract(forgotten)
        for segment in [s for s, n in self._live.items() if n <= 0 and s < self.next.segment]:
            del self._live[segment]
            path = self._path(segment)
            if self._spare is None and path.exists():
                self._spare = path
            else:
                with contextlib.suppress(OSError):  # it only takes room
                    path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what nobody knows of any more, once SQLite knows all that was found."""
        for segment in self._segments():
            if not self._live[segment] and segment != self.next.segment:
                self._path(segment).unlink()
        self._spare = None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # ---- below -------------------------------------------------------------------------------

    def _seal(self, number: int, payloads: int, rows: bytes) -> bytes:
        seal = blake2b(NUMBERS.pack(number, payloads, len(rows)), digest_size=16, key=self._key)
        seal.update(rows)
        return seal.digest()

    def _write(self, parts: Sequence[Bulk]) -> None:
        self._turn()
        at = self._at.offset
        waiting = [memoryview(data) for data in parts]
        while waiting:
            written = os.pwritev(self._fd, waiting[:BUFFERS], at)
            at += written
            while waiting and written >= len(waiting[0]):
                written -= len(waiting.pop(0))
            if written:  # a nearly full disk writes short
                waiting[0] = waiting[0][written:]

    def _turn(self) -> None:
        """Have the segment open into which is written."""
        segment = self._at.segment
        if self._fd >= 0 and self._open == segment:
            return
        self.close()
        path = self._path(segment)
        if self._spare is not None and self._at.offset == 0:
            os.replace(self._spare, path)
            self._spare = None
        synced = os.O_DSYNC if self._durable else 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | synced, 0o600)
        self._open = 0
        if self._durable:
            sync(self.folder)  # its name is as durable as what it will hold
        self._open = segment

    def _give_back(self) -> bool:
        """Let the disk have what only makes us quicker; False where there is nothing of it."""
        if self._spare is None:
            return False
        self._spare.unlink(missing_ok=True)
        self._spare = None
        return True

    def _segments(self) -> list[int]:
        stems = (path.stem for path in self.folder.glob(f"*{SUFFIX}"))
        return [int(stem) for stem in stems if stem.isdecimal()]

    def _path(self, segment: int) -> Path:
        return self.folder / f"{segment}{SUFFIX}"


def fitting(free: int) -> int:
    """Bytes of a segment on a disk with so many free."""
    return max(LEAST, min(SEGMENT, free // SHARE))
