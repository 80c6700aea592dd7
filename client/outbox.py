"""Outbox: a client's finished work, kept until the server has told what became of it.

On disk where the client has a folder, so that a process killed after training never trains again;
the result's description is renamed into place last, so what is listed is whole. It also keeps what
a client must remember between two lives: its node id and where its data order stands.
"""

import contextlib
import fcntl
import json
import mmap
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from google.protobuf.message import DecodeError

from atoll.protocols import messages, wire_pb2
from atoll.protocols.blobs import INLINE
from atoll.protocols.errors import ClientError, RemoteError
from atoll.protocols.frames import checksums
from atoll.protocols.ids import ulid
from atoll.protocols.messages import Result

SUFFIX = ".result"
SPARE = "spare."  # files whose bytes nobody needs


@dataclass
class Memory:
    """What outlives a client's process."""

    node: str = field(default_factory=ulid)
    run: str = ""


class Outbox:
    """`folder` None keeps everything in memory: then a killed client trains its order again."""

    def __init__(self, folder: Path | None) -> None:
        """Take the folder; ClientError FL-C108 where another client has it."""
        self.folder = folder
        self.memory = Memory()
        self._results: dict[str, Result] = {}
        self._bytes: dict[str, memoryview] = {}
        self._packed: dict[str, bytes] = {}  # small ones, as they are written and sent
        self._spares: list[Path] = []  # at most one file to be overwritten: three times as fast
        self._steps = memoryview(bytearray(8))
        self._lock = -1
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self.close()
                raise ClientError(
                    "FL-C108",
                    f"client folder {folder} cannot be taken: {error.strerror}",
                    "stop the client that uses it, or give another --dir",
                ) from error
            self._read(folder)

    def close(self) -> None:
        """Leave the folder to others; what is in it stays."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def steps(self) -> int:
        """Local steps in results so far: where the data order stands. Counted in mapped memory,
        which outlives the process and costs no call of the system."""
        return int.from_bytes(self._steps, "little")

    @steps.setter
    def steps(self, count: int) -> None:
        self._steps[:] = count.to_bytes(8, "little")

    def enter(self, run: str) -> None:
        """Belong to `run`; what is left of another one is dropped."""
        if self.memory.run == run:
            return
        for update in list(self._results):
            self.drop(update)
        self.memory = replace(self.memory, run=run)
        self.steps = 0
        self.remember()

    def remember(self) -> None:
        if self.folder is not None:
            text = json.dumps(vars(self.memory))
            with _disk(self.folder):
                _replace(self.folder / "client.json", text.encode())

    def waiting(self) -> tuple[tuple[str, str], ...]:
        """(order, update) of each result, oldest first."""
        return tuple((r.order, u) for u, r in self._results.items())

    def buffer(self, update: str, size: int) -> memoryview:
        """Where to write a result's bytes: a mapped file when it is big and there is a folder."""
        if self.folder is None or size <= INLINE:
            return memoryview(bytearray(size))
        return map_new(self.folder / f"{update}.bin", size)

    def put(self, result: Result, view: memoryview) -> None:
        """Keep a result, its bytes in a view that `buffer` gave."""
        small = len(view) <= INLINE  # then it lies in the description itself
        whole = replace(result, inline=bytes(view)) if small else result
        packed = messages.result_to_wire(whole).SerializeToString()
        if self.folder is not None:
            with _disk(self.folder):
                self._write(self.folder / f"{result.update}{SUFFIX}", packed)
        if small:
            self._packed[result.update] = packed
        self._bytes[result.update] = view
        self._results[result.update] = result
        self.steps += result.steps if result.final else 0

    def get(self, update: str) -> tuple[Result, memoryview] | None:
        if update not in self._results:
            return None
        return self._results[update], self._bytes[update]

    def packed(self, update: str) -> bytes | None:
        """A result with its bytes as a serialized `Result`; None where they are no small ones."""
        return self._packed.get(update)

    def drop(self, update: str) -> None:
        self._results.pop(update, None)
        self._packed.pop(update, None)
        view = self._bytes.pop(update, None)
        if self.folder is None or view is None:
            return
        path = self.folder / f"{update}{SUFFIX}"
        if len(view) <= INLINE and not self._spares:
            spare = self.folder / f"{SPARE}{update}"
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, spare)
                self._spares.append(spare)
            return
        path.unlink(missing_ok=True)
        if len(view) > INLINE:
            (self.folder / f"{update}.bin").unlink(missing_ok=True)

    def _write(self, path: Path, packed: bytes) -> None:
        """Write beside and rename, so that a reader finds all of it or nothing. After a power cut
        an overwritten file may hold some of what it held before: its CRC says so."""
        data = _crc(packed) + packed
        try:
            beside = self._spares.pop()
        except IndexError:
            beside = path.with_name(f"{SPARE}{path.name}")
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            written = 0
            while written < len(data):  # a nearly full disk writes short
                written += os.write(fd, memoryview(data)[written:])
            os.ftruncate(fd, len(data))
            now = time.time_ns()
            os.utime(fd, ns=(now, now))  # their order: the system's own stamps are milliseconds
        finally:
            os.close(fd)
        os.replace(beside, path)

    def _read(self, folder: Path) -> None:
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            self.memory = Memory(**json.loads((folder / "client.json").read_text()))
        with open(folder / "steps", "ab+") as file:
            file.truncate(8)
            self._steps = memoryview(mmap.mmap(file.fileno(), 8))
        for path in sorted(folder.glob(f"*{SUFFIX}"), key=lambda p: p.stat().st_mtime_ns):
            try:
                result, view, packed = _read_result(path)
            except (OSError, ValueError, DecodeError, RemoteError):
                path.unlink(missing_ok=True)  # not ours, or damaged: not listed again
                continue
            self._results[result.update] = result
            self._bytes[result.update] = view
            if packed is not None:
                self._packed[result.update] = packed
        for path in folder.glob(f"{SPARE}*"):
            path.unlink()
        for path in folder.glob("o*.bin"):
            if path.stem not in self._results:  # its process was killed before it was whole
                path.unlink()


def _read_result(path: Path) -> tuple[Result, memoryview, bytes | None]:
    """A result, its bytes, and both packed where they are small; ValueError where they do not
    belong together."""
    crc, data = (whole := path.read_bytes())[:4], whole[4:]
    if crc != _crc(data):
        raise ValueError(f"{path}: not what was written")
    result = messages.result_from_wire(wire_pb2.Result.FromString(data))
    small = result.payload.size <= INLINE
    if small:
        found = memoryview(result.inline)
    else:
        with open(path.with_name(f"{result.update}.bin"), "rb") as file:
            found = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    if len(found) != result.payload.size:
        raise ValueError(f"{path}: {len(found)} bytes, expected {result.payload.size}")
    return replace(result, inline=b""), found, data if small else None


def _crc(packed: bytes) -> bytes:
    return checksums(memoryview(packed))[0].to_bytes(4, "little")


def _replace(path: Path, data: bytes) -> None:
    """Write beside and rename, so that a reader finds all of it or the former one."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(data)
    os.replace(beside, path)


def map_new(path: Path, size: int) -> memoryview:
    """A file of `size` bytes, mapped to be written. Its room is taken at once: a write into a map
    for which the disk has none would kill the process. ClientError FL-S203."""
    with _disk(path.parent), open(path, "ab+") as file:
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        return memoryview(mmap.mmap(file.fileno(), size))


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """ClientError FL-S203 where the disk does not take it."""
    try:
        yield
    except OSError as error:
        raise ClientError(
            "FL-S203",
            f"client folder {folder} cannot be written: {error.strerror}",
            "free space on its disk and start this client again",
        ) from error
