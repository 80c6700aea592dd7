"""Spill files: where an update's bytes lie while they come in and until they are merged.

`<id>.part` while bytes come, `<id>` once they are complete. Files of merged updates are kept and
overwritten by the next ones: with new files each time a round of 4 x 100 MB took 1.2-1.4 s, with
old ones 0.85 s. So a file's length says nothing, and how far it is stands behind the bytes, in a
trailer that is rewritten after each chunk. A killed process leaves it true; after a power cut it
may lie, which the SHA-256 of the whole finds out.
"""

import hashlib
import mmap
import os
import struct
import weakref
from dataclasses import dataclass, field
from pathlib import Path

from atoll.protocols.blobs import CHUNK, Bulk
from atoll.protocols.durable import sync

PART = ".part"
SPARE = "_spare."  # no update id begins with an underscore
_TRAILER = struct.Struct("<8sQQ")  # magic, size of the update, bytes held in order
_MAGIC = b"atoll-up"


@dataclass(slots=True)
class StoredUpdate:
    """A committed update's bytes."""

    id: str
    size: int
    sha256: bytes  # empty of what came inline
    path: Path | None  # None: in memory
    data: Bulk = b""
    _maps: "list[weakref.ref[mmap.mmap]]" = field(default_factory=list, compare=False, repr=False)

    def view(self) -> memoryview:
        """The bytes, read only; mapped anew at each call, unmapped when the last view is gone."""
        if self.path is None:
            return memoryview(self.data)
        fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            mapped = mmap.mmap(fd, self.size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self._maps.append(weakref.ref(mapped))
        return memoryview(mapped)

    @property
    def in_use(self) -> bool:
        """Whether anyone still holds a view of the file: then it must not be overwritten."""
        return any(ref() is not None for ref in self._maps)


class Spares:
    """Files to overwrite, at most `limit` bytes of them. Not for use by two threads at once."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self.held = 0  # bytes
        self._files: list[tuple[Path, int]] = []
        self._made = 0

    def give(self, path: Path, size: int) -> bool:
        """Take over the file at `path`; False where there are enough."""
        if self.held + size > self.limit:
            return False
        self._made += 1
        spare = self.folder / f"{SPARE}{self._made}"
        os.replace(path, spare)
        self._files.append((spare, size))
        self.held += size
        return True

    def take(self) -> Path | None:
        if not self._files:
            return None
        path, size = self._files.pop()
        self.held -= size
        return path

    def clear(self) -> None:
        """Give the disk its room back."""
        while (path := self.take()) is not None:
            path.unlink(missing_ok=True)


class SpillFile:
    """One update's file. All methods wait for the disk and may raise OSError."""

    def __init__(self, folder: Path, update: str, size: int) -> None:
        self.part = folder / (update + PART)
        self.whole = folder / update
        self.size = size
        self._fd = -1  # open only while chunks come

    def take_up(self) -> "tuple[int, hashlib._Hash]":
        """What a former process left: the bytes held, in whole chunks, and their SHA-256."""
        sha = hashlib.sha256()
        if self.whole.exists():  # complete, but the news of it may have been lost
            os.replace(self.whole, self.part)
        try:
            self._open(create=False)
        except FileNotFoundError:
            return 0, sha
        held = self._read_trailer()
        for at in range(0, held, CHUNK):
            piece = os.pread(self._fd, min(CHUNK, held - at), at)
            if not piece:  # cut behind our back
                return 0, hashlib.sha256()
            sha.update(piece)
        return held, sha

    def adopt(self, spare: Path) -> None:
        """Overwrite `spare` from here on."""
        fd = os.open(spare, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:  # never under our name while its trailer is another's
            if os.fstat(fd).st_size > self.size + _TRAILER.size:
                os.ftruncate(fd, self.size + _TRAILER.size)
            os.pwrite(fd, _TRAILER.pack(_MAGIC, self.size, 0), self.size)
            os.replace(spare, self.part)
        except OSError:
            os.close(fd)
            raise
        self._fd = fd

    def write(self, data: memoryview, at: int) -> None:
        """Keep the chunk that follows the `at` bytes held."""
        self._open(create=True)
        done = 0
        while done < len(data):  # a nearly full disk writes short
            done += os.pwrite(self._fd, data[done:], at + done)
        self._mark(at + len(data))

    def reset(self) -> None:
        """What is held is worth nothing."""
        self._open(create=True)
        self._mark(0)

    def seal(self, durable: bool) -> Path:
        """All bytes are here and right."""
        if durable:
            self._open(create=False)
            os.fdatasync(self._fd)
        self.close()
        os.replace(self.part, self.whole)
        if durable:
            sync(self.whole.parent)
        return self.whole

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        self.close()
        self.part.unlink(missing_ok=True)
        self.whole.unlink(missing_ok=True)

    @property
    def opened(self) -> bool:
        return self._fd >= 0

    def _open(self, create: bool) -> None:
        if self._fd < 0:
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
            self._fd = os.open(self.part, flags, 0o600)

    def _mark(self, held: int) -> None:
        os.pwrite(self._fd, _TRAILER.pack(_MAGIC, self.size, held), self.size)

    def _read_trailer(self) -> int:
        found = os.pread(self._fd, _TRAILER.size, self.size)
        if len(found) < _TRAILER.size:
            return 0
        magic, size, held = _TRAILER.unpack(found)
        whole = held == self.size or (held < self.size and held % CHUNK == 0)
        return int(held) if magic == _MAGIC and size == self.size and whole else 0
