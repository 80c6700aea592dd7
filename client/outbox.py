"""Outbox: a client's finished work, kept until the server has told what became of it.

On disk where the client has a folder, so that a process killed after training never trains again:
a small result in a slot (`slots.py`), a big one as a file of bytes whose description is renamed
into place last, so what is listed is whole. It also keeps what a client must remember between two
lives: its node id and where its data order stands.
"""

import contextlib
import fcntl
import json
import mmap
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from google.protobuf.message import DecodeError

from atoll.client.room import disk, map_new, reason, rewrite
from atoll.client.slots import ROOM, Slots
from atoll.protocols import messages, wire_pb2
from atoll.protocols.blobs import INLINE
from atoll.protocols.errors import ClientError, RemoteError
from atoll.protocols.ids import ulid
from atoll.protocols.messages import Result
from atoll.protocols.packed import Parts, size

SUFFIX = ".result"
SERVERS = ("run.json", "journal.sqlite")  # what a server's state directory has, and ours never


@dataclass
class Memory:
    """What outlives a client's process."""

    node: str = field(default_factory=ulid)
    run: str = ""
    sent: int = 0  # updates with noise, in this run: each costs privacy


class Outbox:
    """`folder` None keeps everything in memory: then a killed client trains its order again."""

    def __init__(self, folder: Path | None) -> None:
        """Take the folder; ClientError FL-C108 where another client or a server has it, or what is
        in it cannot be read, FL-S203 where its disk is full."""
        self.folder = folder
        self.memory = Memory()
        self._results: dict[str, Result] = {}
        self._bytes: dict[str, memoryview] = {}
        self._packed: dict[str, Parts] = {}  # small ones, as they are written and sent
        self._slots: Slots | None = None
        self._slot: dict[str, int] = {}  # of results that lie in one
        self._steps = memoryview(bytearray(8))
        self._lock = -1
        if folder is not None:
            try:
                _not_a_servers(folder)
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                refused = self._not_taken(folder, error)
                self.close()
                raise refused from error
            with contextlib.suppress(OSError):  # a full disk: only for whoever comes second
                os.truncate(self._lock, 0)
                os.write(self._lock, str(os.getpid()).encode())
            try:
                self._read(folder)
            except OSError as error:
                self.close()
                raise self._not_taken(folder, error) from error
            except BaseException:
                self.close()
                raise

    def _not_taken(self, folder: Path, error: OSError) -> ClientError:
        if isinstance(error, BlockingIOError):
            pid = os.read(self._lock, 20).decode(errors="replace") or "?"
            return ClientError(
                "FL-C108",
                f"client folder {folder} is in use by another client (pid {pid})",
                f"stop it (kill {pid}), or give another --dir",
            )
        return ClientError(
            "FL-C108",
            f"client folder {folder} cannot be taken: {reason(error, folder)}",
            "give another --dir",
        )

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
        self.memory = replace(self.memory, run=run, sent=0)
        self.steps = 0
        self.remember()

    def spend(self) -> None:
        """Another update with noise is to leave: it is paid for on the disk before it can."""
        self.memory = replace(self.memory, sent=self.memory.sent + 1)
        self.remember(durable=True)

    def remember(self, durable: bool = False) -> None:
        if self.folder is not None:
            text = json.dumps(vars(self.memory))
            with disk(self.folder):
                rewrite(self.folder / "client.json", text.encode(), durable)

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
        update = result.update
        small = len(view) <= INLINE  # then it lies in the description itself
        packed = messages.packed_result(result, view if small else b"")
        if self._slots is not None and small and size(packed) <= ROOM:
            self._slot[update] = self._slots.put(packed)
        elif self.folder is not None:
            with disk(self.folder):
                rewrite(self.folder / f"{update}{SUFFIX}", b"".join(packed))
        if small:
            self._packed[update] = packed
        self._bytes[update] = view
        self._results[update] = result
        if result.final:
            self.steps += result.steps

    def get(self, update: str) -> tuple[Result, memoryview] | None:
        if update not in self._results:
            return None
        return self._results[update], self._bytes[update]

    def packed(self, update: str) -> Parts | None:
        """A result with its bytes as a serialized `Result`; None where they are no small ones."""
        return self._packed.get(update)

    def drop(self, update: str) -> None:
        self._results.pop(update, None)
        self._packed.pop(update, None)
        view = self._bytes.pop(update, None)
        if self.folder is None or view is None:
            return
        slot = self._slot.pop(update, None)
        if slot is not None and self._slots is not None:
            self._slots.free(slot)
            return
        (self.folder / f"{update}{SUFFIX}").unlink(missing_ok=True)
        if len(view) > INLINE:
            (self.folder / f"{update}.bin").unlink(missing_ok=True)

    def _read(self, folder: Path) -> None:
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            self.memory = Memory(**json.loads((folder / "client.json").read_text()))
        self._steps = map_new(folder / "steps", 8)
        for path in sorted(folder.glob(f"*{SUFFIX}"), key=lambda p: p.stat().st_mtime_ns):
            try:
                self._take(path.read_bytes())
            except (OSError, ValueError, DecodeError, RemoteError):
                path.unlink(missing_ok=True)  # not ours, or damaged: not listed again
        self._slots = Slots(folder)
        for slot, packed in self._slots.found:
            try:
                self._slot[self._take(packed)] = slot
            except (OSError, ValueError, DecodeError, RemoteError):
                self._slots.free(slot)
        for path in folder.glob("o*.bin"):
            if path.stem not in self._results:  # its process was killed before it was whole
                path.unlink()

    def _take(self, packed: bytes) -> str:
        """List a result that lies on disk, its update; ValueError where it is not whole."""
        assert self.folder is not None
        result = messages.result_from_wire(wire_pb2.Result.FromString(packed))
        small = result.payload.size <= INLINE
        if small:
            found = memoryview(result.inline)
        else:
            with open(self.folder / f"{result.update}.bin", "rb") as file:
                found = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        if len(found) != result.payload.size:
            raise ValueError(f"{result.update}: {len(found)} bytes, not {result.payload.size}")
        self._results[result.update] = replace(result, inline=b"")
        self._bytes[result.update] = found
        if small:
            self._packed[result.update] = (packed,)
        return result.update


def _not_a_servers(folder: Path) -> None:
    """ClientError FL-C108: a client's files among a server's would go with it, or be in its way."""
    for name in SERVERS:
        if (folder / name).exists():
            what = f"{folder} is a server's state directory: it has {name}"
            raise ClientError("FL-C108", what, "give another --dir")
