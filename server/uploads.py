"""Uploads: the receiving half of the update store. Bytes as they came, on disk until merged.

open -> put, put, ... -> commit -> (merge reads the bytes) -> free. Every step may be repeated. A
large update lies in `<id>.part` while it comes and in `<id>` once its SHA-256 was right; a part
file outlives the process and the upload goes on from its last whole chunk. Small updates stay in
memory. New files are written: overwriting old ones saves 13 ms per 100 MB alone, but no time of a
round could be shown, and the length of a part file could not say how far it is.

All methods may be called from worker threads; a method that waits for a disk says so.
"""

import errno
import hashlib
import logging
import mmap
import os
import re
import threading
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path

from atoll.protocols.blobs import CHUNK, INLINE
from atoll.protocols.errors import RemoteError
from atoll.protocols.frames import Chunk

logger = logging.getLogger(__name__)

NAME = re.compile(r"[a-z0-9][a-z0-9.]{0,62}")  # update ids; the only names that become paths
PART = ".part"
RETRY = 5.0  # seconds a client waits when there is no room
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class StoredUpdate:
    """A committed update's bytes."""

    id: str
    size: int
    sha256: bytes
    path: Path | None  # None: in memory
    data: bytes = b""

    def view(self) -> memoryview:
        """The bytes, read only; mapped anew at each call, unmapped when the last view is gone."""
        if self.path is None or self.size == 0:
            return memoryview(self.data)
        fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            return memoryview(mmap.mmap(fd, self.size, prot=mmap.PROT_READ))
        finally:
            os.close(fd)


@dataclass(slots=True)
class _Upload:
    """One update on its way in; `lock` is held by whoever changes it or touches its file."""

    id: str
    size: int
    path: Path | None  # of the part file; None: in memory
    held: int = 0
    fd: int = -1  # open only while chunks come
    memory: bytearray = field(default_factory=bytearray)
    sha: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    stored: StoredUpdate | None = None
    gone: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def disk_free(folder: Path) -> int:
    """Bytes that may still be written to the disk of `folder`."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


class Uploads:
    """All updates that are coming in or wait for their merge, in one folder of their own.

    `capacity` bounds the bytes announced and not yet freed, `min_free` is what must stay free on
    the disk, `durable` syncs a file before its commit is answered.
    """

    def __init__(
        self,
        folder: Path,
        *,
        capacity: int | None = None,
        min_free: int = 256 << 20,
        memory_limit: int = INLINE,
        durable: bool = False,
        free: Callable[[Path], int] = disk_free,
    ) -> None:
        self.folder = folder
        self.capacity = capacity
        self.min_free = min_free
        self.memory_limit = memory_limit
        self.durable = durable
        self._free = free
        self._uploads: dict[str, _Upload] = {}
        self._lock = threading.Lock()  # of the dict; never held while a disk is waited for

    # ---- coming in ---------------------------------------------------------------------------

    def open(self, update: str, size: int) -> int:
        """Announce `size` bytes, or ask how many are held; the answer is where to go on.

        Waits for the disk where a part file of a former process is taken up again. Raises
        RemoteError FL-W109 (no room now), FL-W111 (announced before with another size).
        """
        upload = self._announce(update, size)
        with upload.lock:
            if upload.path is not None and upload.fd < 0 and upload.held == 0:
                self._take_up(upload)
            return upload.held

    def put(self, update: str, chunk: Chunk) -> int:
        """Verify one chunk and keep it; the answer is how many bytes are held in order.

        Waits for the disk. Raises RemoteError FL-W105 (CRC), FL-W111 (not the next bytes),
        FL-W109 (disk full), FL-W107 (not open). After an error the upload stands as before.
        """
        upload = self._find(update)
        with upload.lock:
            if upload.gone:
                raise _unknown(update)
            end = chunk.offset + len(chunk.data)
            if upload.stored or chunk.offset != upload.held or end > upload.size:
                raise _out_of_place(update, chunk.offset, end, upload)
            if end < upload.size and len(chunk.data) != CHUNK:
                raise _out_of_place(update, chunk.offset, end, upload)
            chunk.verify()
            if upload.path is None:
                upload.memory += chunk.data
            else:
                self._write(upload, chunk.data)
            upload.sha.update(chunk.data)
            upload.held = end
            return end

    def pause(self, update: str) -> None:
        """The stream of chunks ended, whatever the reason: close the file, keep what is held."""
        with self._lock:
            upload = self._uploads.get(update)
        if upload is not None:
            with upload.lock:
                upload.close()

    def commit(self, update: str, sha256: bytes) -> StoredUpdate:
        """Finish. Waits for the disk. Raises RemoteError FL-W111 where bytes are missing, FL-W105
        where the SHA-256 is another one: then all is dropped and the upload starts from 0."""
        upload = self._find(update)
        with upload.lock:
            if upload.gone:
                raise _unknown(update)
            if upload.held != upload.size:
                raise _out_of_place(update, upload.held, upload.held, upload)
            found = upload.sha.digest()
            if found != sha256:
                if upload.stored is None:
                    self._reset(upload)
                raise _corrupt(update, found, sha256)
            if upload.stored is None:
                upload.stored = self._seal(upload, found)
            return upload.stored

    def keep(self, update: str, data: bytes) -> StoredUpdate:
        """Store a payload that came inline, in one step; idempotent for the same bytes."""
        if len(data) > self.memory_limit:
            raise RemoteError(
                "FL-W103",
                f"{len(data)} bytes inline, the limit is {self.memory_limit}",
                "send a blob",
            )
        upload = self._announce(update, len(data))
        sha256 = hashlib.sha256(data).digest()
        with upload.lock:
            if upload.stored is None:
                upload.stored = StoredUpdate(update, len(data), sha256, None, bytes(data))
                upload.held = len(data)
                upload.memory = bytearray()
            elif upload.stored.sha256 != sha256:
                raise _corrupt(update, sha256, upload.stored.sha256)
            return upload.stored

    # ---- going out ---------------------------------------------------------------------------

    def knows(self, update: str) -> bool:
        """Whether `update` was announced and not freed."""
        with self._lock:
            return update in self._uploads

    def stored(self, update: str) -> StoredUpdate | None:
        """The committed bytes of `update`, None where it is not committed."""
        with self._lock:
            upload = self._uploads.get(update)
        return upload.stored if upload else None

    def free(self, update: str) -> None:
        """Forget `update` and its file, finished or not; no-op where it is not known.

        Views that a merge still holds stay readable. Waits for a chunk that is being written.
        """
        with self._lock:
            upload = self._uploads.pop(update, None)
        if upload is None:
            return
        with upload.lock:
            upload.gone = True
            upload.close()
            for path in _paths(self.folder, update):
                path.unlink(missing_ok=True)

    abandon = free  # the client is gone for good, or its order closed: the same, said before commit

    def sweep(self, known: Container[str]) -> list[str]:
        """At start: remove the files of updates that are not in `known`; their ids are returned."""
        gone = []
        for path in sorted(self.folder.iterdir()):
            update = path.name.removesuffix(PART)
            if NAME.fullmatch(update) and update not in known:
                path.unlink()
                gone.append(update)
        return gone

    @property
    def reserved(self) -> int:
        """Bytes announced and not yet freed."""
        with self._lock:
            return sum(u.size for u in self._uploads.values())

    # ---- below -------------------------------------------------------------------------------

    def _find(self, update: str) -> _Upload:
        with self._lock:
            upload = self._uploads.get(update)
        if upload is None:
            raise _unknown(update)
        return upload

    def _announce(self, update: str, size: int) -> _Upload:
        if not NAME.fullmatch(update):
            raise RemoteError("FL-W101", f"update id {update[:80]!r}", "send the order's id")
        free = self._free(self.folder) if size > self.memory_limit else 0
        with self._lock:
            upload = self._uploads.get(update)
            if upload is None:
                self._refuse_without_room(size, free)
                small = size <= self.memory_limit
                path = None if small else self.folder / (update + PART)
                upload = self._uploads[update] = _Upload(update, size, path)
        if upload.size != size:
            raise RemoteError(
                "FL-W111",
                f"update {update} was announced with {upload.size} bytes, now with {size}",
                "an attempt's bytes do not change: send the same payload again",
            )
        return upload

    def _refuse_without_room(self, size: int, free: int) -> None:
        announced = sum(u.size for u in self._uploads.values())
        if self.capacity is not None and announced + size > self.capacity:
            raise _no_room(f"{announced} of {self.capacity} bytes are taken, {size} more asked for")
        coming = sum(u.size - u.held for u in self._uploads.values() if u.path is not None)
        if size > self.memory_limit and free - coming - size < self.min_free:
            raise _no_room(
                f"{free - coming} bytes are free, {size} asked for, {self.min_free} must stay free"
            )

    def _take_up(self, upload: _Upload) -> None:
        """Go on with the file of a former process: what it holds, in whole chunks, hashed anew."""
        assert upload.path is not None
        whole = self.folder / upload.id
        upload.sha = hashlib.sha256()
        try:
            if whole.exists():  # committed there, but its news may have been lost: take it back
                os.replace(whole, upload.path)
            with open(upload.path, "rb+", opener=_no_follow) as file:
                size = os.fstat(file.fileno()).st_size
                held = upload.size if size == upload.size else size // CHUNK * CHUNK
                held = 0 if size > upload.size else held
                file.truncate(held)
                while piece := file.read(CHUNK):
                    upload.sha.update(piece)
            upload.held = held
        except FileNotFoundError:
            return
        except OSError as error:
            raise _disk(upload.id, error) from error

    def _write(self, upload: _Upload, data: memoryview) -> None:
        assert upload.path is not None
        try:
            if upload.fd < 0:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                upload.fd = os.open(upload.path, flags, 0o600)
            at = 0
            while at < len(data):  # a nearly full disk writes short
                at += os.pwrite(upload.fd, data[at:], upload.held + at)
        except OSError as error:
            raise _disk(upload.id, error) from error

    def _seal(self, upload: _Upload, sha256: bytes) -> StoredUpdate:
        if upload.path is None:
            data, upload.memory = bytes(upload.memory), bytearray()
            return StoredUpdate(upload.id, upload.size, sha256, None, data)
        whole = self.folder / upload.id
        try:
            if self.durable:
                self._sync(upload)
            upload.close()
            os.replace(upload.path, whole)
            if self.durable:
                _sync_folder(self.folder)
        except OSError as error:
            raise _disk(upload.id, error) from error
        return StoredUpdate(upload.id, upload.size, sha256, whole)

    def _sync(self, upload: _Upload) -> None:
        assert upload.path is not None
        if upload.fd < 0:
            upload.fd = os.open(upload.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        os.fdatasync(upload.fd)

    def _reset(self, upload: _Upload) -> None:
        upload.close()
        if upload.path is not None:
            upload.path.unlink(missing_ok=True)
        upload.memory, upload.sha, upload.held = bytearray(), hashlib.sha256(), 0


def _paths(folder: Path, update: str) -> tuple[Path, Path]:
    return folder / (update + PART), folder / update


def _no_follow(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unknown(update: str) -> RemoteError:
    return RemoteError(
        "FL-W107", f"upload {update} is not open", "open it first", retry_seconds=0.0
    )


def _out_of_place(update: str, start: int, end: int, upload: _Upload) -> RemoteError:
    return RemoteError(
        "FL-W111",
        f"bytes {start}-{end} of update {update}: {upload.held} of {upload.size} are held",
        f"go on at {upload.held} in whole chunks",
        retry_seconds=0.0,
    )


def _corrupt(update: str, found: bytes, told: bytes) -> RemoteError:
    return RemoteError(
        "FL-W105",
        f"update {update} has SHA-256 {found.hex()[:16]}, not {told.hex()[:16]}",
        "send the payload again from the start",
        retry_seconds=0.0,
    )


def _no_room(what: str) -> RemoteError:
    return RemoteError(
        "FL-W109", f"no room for an upload: {what}", "try again later", retry_seconds=RETRY
    )


def _disk(update: str, error: OSError) -> RemoteError:
    if error.errno not in FULL:
        logger.warning("update=%s the disk fails: %s", update, error)
    what = "the disk is full" if error.errno in FULL else "the disk fails"
    return RemoteError(
        "FL-W109",
        f"update {update}: {what}: {error.strerror}",
        "try again later",
        retry_seconds=RETRY,
    )
