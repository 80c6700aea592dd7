"""Uploads: the receiving half of the update store. Bytes as they came, on disk until merged.

open -> put, put, ... -> commit -> (the merge reads) -> free. Every step may be repeated. Small
updates stay in memory; a large one lies in a spill file that outlives the process, so that an
upload goes on from its last whole chunk. A full disk costs the client that sends its patience and
nobody anything else. All methods may be called from worker threads.
"""

import hashlib
import logging
import re
import threading
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path

from atoll.protocols.blobs import CHUNK, INLINE, Bulk
from atoll.protocols.errors import RemoteError
from atoll.protocols.frames import Chunk
from atoll.server.room import FULL, Room, disk_free
from atoll.server.spill import PART, SPARE, Spares, SpillFile, StoredUpdate

__all__ = ["StoredUpdate", "Uploads"]

logger = logging.getLogger(__name__)

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}(?<!\.part)")  # the only names that become paths


@dataclass(slots=True)
class _Upload:
    """One update on its way in; `lock` is held by whoever changes it or touches its file."""

    id: str
    size: int
    file: SpillFile | None  # None: in memory
    held: int = 0
    memory: bytearray = field(default_factory=bytearray)
    sha: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    stored: StoredUpdate | None = None
    gone: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


def order_of(update: str) -> str:
    """The order that an update with this id is a result of."""
    return update.partition(".")[0]


class Uploads:
    """All updates that are coming in or wait for their merge, in one folder of their own.

    `capacity` bounds the bytes announced and not yet freed, `min_free` is what must stay free on
    the disk, `spare` bounds the bytes of files kept to be overwritten, `durable` syncs a file
    before its commit is answered. Call `sweep` once before anything else.
    """

    def __init__(
        self,
        folder: Path,
        *,
        capacity: int | None = None,
        min_free: int = 256 << 20,
        memory_limit: int = INLINE,
        spare: int = 1 << 30,
        durable: bool = False,
        free: Callable[[Path], int] = disk_free,
    ) -> None:
        self.folder = folder
        self.memory_limit = memory_limit
        self.durable = durable
        self._room = Room(folder, capacity, min_free, free)
        self._uploads: dict[str, _Upload] = {}
        self._left: set[str] = set()  # have a file from a former process that nobody goes on with
        self._reserved = 0  # bytes of all of them
        self._spares = Spares(folder, spare)
        self._lock = threading.Lock()  # of the two above; held for moments only

    def sweep(self, known: Container[str]) -> list[str]:
        """At start: make the folder, remove the files of updates not in `known`, name these."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        gone = []
        for path in sorted(self.folder.iterdir()):
            update = path.name.removesuffix(PART)
            if path.name.startswith(SPARE):
                path.unlink()
            elif NAME.fullmatch(update) and update not in known:
                path.unlink()
                gone.append(update)
        with self._lock:
            self._left = self.names() - self._uploads.keys()
        return gone

    def names(self) -> set[str]:
        """The updates that have a file, whole or not."""
        found = (path.name.removesuffix(PART) for path in self.folder.glob("*"))
        return {name for name in found if NAME.fullmatch(name)}

    # ---- coming in ---------------------------------------------------------------------------

    def open(self, update: str, size: int) -> int:
        """Announce `size` bytes, or ask how many are held; the answer is where to go on.

        Reads and hashes what a former process left of it. Raises RemoteError FL-W109 (no room
        now), FL-W111 (announced before with another size).
        """
        return self._begin(update, size).held

    def put(self, update: str, chunk: Chunk) -> int:
        """Verify one chunk and keep it; the answer is how many bytes are held in order.

        Raises RemoteError FL-W105 (CRC), FL-W111 (not the next bytes), FL-W109 (disk full),
        FL-W107 (not open). After an error the upload stands as before.
        """
        upload = self._find(update)
        with upload.lock:
            self._check_alive(upload)
            end = chunk.offset + len(chunk.data)
            whole = len(chunk.data) == CHUNK or end == upload.size
            if upload.stored or chunk.offset != upload.held or end > upload.size or not whole:
                raise _out_of_place(upload, f"bytes {chunk.offset}-{end}")
            chunk.verify()
            if upload.file is None:
                upload.memory += chunk.data
            else:
                self._write(upload, upload.file, chunk.data)
            upload.sha.update(chunk.data)
            upload.held = end
            return end

    def pause(self, update: str) -> None:
        """The stream of chunks ended, whatever the reason: close the file, keep what is held."""
        with self._lock:
            upload = self._uploads.get(update)
        if upload is not None and upload.file is not None:
            with upload.lock:
                upload.file.close()

    def commit(self, update: str, sha256: bytes) -> StoredUpdate:
        """Finish. Raises RemoteError FL-W111 where bytes are missing, FL-W105 where the SHA-256 is
        another one: then nothing is held any more and the upload starts from 0."""
        upload = self._find(update)
        with upload.lock:
            self._check_alive(upload)
            if upload.held != upload.size:
                raise _out_of_place(upload, "commit")
            found = upload.sha.digest()
            try:
                if found != sha256:
                    self._forget_bytes(upload)
                    raise corrupt(update, found, sha256)
                if upload.stored is None:
                    upload.stored = self._seal(upload, found)
            except OSError as error:
                raise self._room.failed(update, upload.size, error) from error
            return upload.stored

    def keep(self, update: str, data: Bulk) -> StoredUpdate:
        """Store a payload that came inline, in one step; may be repeated with the same bytes.

        It is not hashed: few clients say a digest of it, and the journal hashes what it keeps.
        """
        if len(data) > self.memory_limit:
            what = f"{len(data)} bytes inline, the limit is {self.memory_limit}"
            raise RemoteError("FL-W103", what, "send a blob")
        with self._lock:
            if update not in self._uploads and NAME.fullmatch(update):  # nearly every one
                self._refuse_without_room(update, len(data))
                stored = StoredUpdate(update, len(data), b"", None, data)
                upload = _Upload(update, len(data), None, len(data), stored=stored)
                self._uploads[update] = upload
                self._reserved += upload.size
                return stored
        upload = self._begin(update, len(data))
        with upload.lock:
            if upload.stored is None:
                upload.stored = StoredUpdate(update, len(data), b"", None, data)
                upload.held, upload.memory = len(data), bytearray()
            elif upload.stored.data != data:
                found, told = (hashlib.sha256(d).digest() for d in (data, upload.stored.data))
                raise corrupt(update, found, told)
            return upload.stored

    def restore(self, update: str, size: int, sha256: bytes) -> StoredUpdate | None:
        """At start: the update that was committed before, None where its bytes are not here."""
        upload = self._begin(update, size, admit=True)
        if upload.held == size:
            try:
                return self.commit(update, sha256)
            except RemoteError as error:
                logger.warning("update=%s cannot be restored: %s", update, error)
        self.free(update)
        return None

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

    def unfinished(self) -> set[str]:
        """Updates of which bytes were announced or are here, and which are not committed."""
        with self._lock:
            coming = {name for name, upload in self._uploads.items() if upload.stored is None}
            return coming | self._left

    def free(self, update: str) -> None:
        """Forget `update` and its file, finished or not; no-op where it is not known.

        Views that someone still holds stay as they are. Waits for a chunk that is being written.
        """
        with self._lock:
            upload, left = self._pop(update), update in self._left
            self._left.discard(update)
        if left:
            SpillFile(self.folder, update, 0).remove()
        if upload is None:
            return
        with upload.lock:
            upload.gone = True
            if upload.file is None:
                return
            upload.file.close()
            if upload.stored is not None and not upload.stored.in_use:
                with self._lock:
                    if self._spares.give(upload.file.whole, upload.size):
                        return
            upload.file.remove()

    @property
    def reserved(self) -> int:
        """Bytes announced and not yet freed."""
        with self._lock:
            return self._reserved

    # ---- below -------------------------------------------------------------------------------

    def _find(self, update: str) -> _Upload:
        with self._lock:
            upload = self._uploads.get(update)
        if upload is None:
            raise _unknown(update)
        return upload

    def _check_alive(self, upload: _Upload) -> None:
        if upload.gone:
            raise _unknown(upload.id)

    def _begin(self, update: str, size: int, admit: bool = False) -> _Upload:
        if not NAME.fullmatch(update):
            raise RemoteError("FL-W101", f"update id {update[:80]!r}", "send the order's id")
        with self._lock:
            upload = self._uploads.get(update)
            if new := upload is None:
                if not admit:
                    self._refuse_without_room(update, size)
                small = size <= self.memory_limit
                file = None if small else SpillFile(self.folder, update, size)
                upload = self._uploads[update] = _Upload(update, size, file)
                self._left.discard(update)
                self._reserved += size
                upload.lock.acquire()  # nobody else may see it before its file was looked at
        assert upload is not None
        if new:
            try:
                self._take_up(upload)
            finally:
                upload.lock.release()
        if upload.size != size:
            what = f"update {update} was announced with {upload.size} bytes, now with {size}"
            raise RemoteError("FL-W111", what, "an attempt's bytes do not change")
        with upload.lock:
            return upload

    def _pop(self, update: str) -> _Upload | None:
        upload = self._uploads.pop(update, None)
        self._reserved -= upload.size if upload is not None else 0
        return upload

    def _refuse_without_room(self, update: str, size: int) -> None:
        self._room.admit(size, self._reserved)
        if size > self.memory_limit:
            coming = sum(u.size - u.held for u in self._uploads.values() if u.file is not None)
            self._room.on_disk(update, size, coming, self._spares.clear)

    def _take_up(self, upload: _Upload) -> None:
        """Go on with the file of a former process, else overwrite a spare one."""
        if upload.file is None:
            return
        try:
            upload.held, upload.sha = upload.file.take_up()
            if not upload.file.opened:
                with self._lock:
                    spare = self._spares.take()
                if spare is not None:
                    upload.file.adopt(spare)
            upload.file.close()
        except OSError as error:
            with self._lock:
                self._pop(upload.id)
            upload.gone = True
            upload.file.close()
            raise self._room.failed(upload.id, upload.size, error) from error

    def _write(self, upload: _Upload, file: SpillFile, data: memoryview) -> None:
        try:
            try:
                file.write(data, upload.held)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                with self._lock:
                    self._spares.clear()  # that may be the room it takes
                file.write(data, upload.held)
        except OSError as error:
            raise self._room.failed(upload.id, upload.size, error) from error

    def _seal(self, upload: _Upload, sha256: bytes) -> StoredUpdate:
        if upload.file is None:
            data, upload.memory = bytes(upload.memory), bytearray()
            return StoredUpdate(upload.id, upload.size, sha256, None, data)
        path = upload.file.seal(self.durable)
        return StoredUpdate(upload.id, upload.size, sha256, path)

    def _forget_bytes(self, upload: _Upload) -> None:
        if upload.stored is not None:  # they were right once: it is the new claim that is wrong
            return
        upload.memory, upload.sha, upload.held = bytearray(), hashlib.sha256(), 0
        if upload.file is not None:
            upload.file.reset()
            upload.file.close()


def _unknown(update: str) -> RemoteError:
    return RemoteError("FL-W107", f"upload {update} is not open", "open it", retry_seconds=0.0)


def _out_of_place(upload: _Upload, what: str) -> RemoteError:
    return RemoteError(
        "FL-W111",
        f"{what} of update {upload.id}: {upload.held} of {upload.size} bytes are held",
        f"go on at {upload.held} in whole chunks",
        retry_seconds=0.0,
    )


def corrupt(update: str, found: bytes, told: bytes) -> RemoteError:
    """FL-W105: the payload's bytes are others than was said."""
    what = f"update {update} has SHA-256 {found.hex()}, not {told.hex()}"
    return RemoteError("FL-W105", what, "send the payload from the start", retry_seconds=0.0)
