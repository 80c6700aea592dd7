"""Table: a vector that the server keeps for each client, such as its control variate: mapped rows.

A row is never changed in place. The merge that takes in what a client's update changes writes the
next generation of the client's row (`server/rewrite.py`), and the version that comes of it says in
its numbers which generation is its own. So rows and versions are in step wherever a process is
killed: a row that no version speaks of is written over when its merge is done again, and a former
one is forgotten when nobody may go back to a version that speaks of it. With many clients the table
is larger than memory: rows are written tile by tile, and mapped where they are read.
"""

import mmap
import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.aggregation.half import Half, Numbers, generation
from atoll.protocols.blobs import Blob, BlobInfo
from atoll.protocols.codecs import as_bytes, as_tensor
from atoll.protocols.errors import RemoteError, ServerError
from atoll.protocols.ids import CLIENT_NAME
from atoll.protocols.tensors import extra_sections
from atoll.server.regions import FileRegion, Hasher, MemoryRegion, Region, Sealed, disk, sync

CHECK = "row/"  # and a client: of a version's numbers, `Sealed.check` of the client's row
PART = ".part"
NO_BYTES = memoryview(b"")


class Key(NamedTuple):
    client: str
    generation: int  # from 1; 0 is a row of zeros, which lies nowhere

    @property
    def name(self) -> str:
        return f"{self.client}.{self.generation}"

    @property
    def blob(self) -> str:
        return f"own/{self.client}/{self.generation}"


class Table:
    """All rows of one run. `folder` None: in memory. Methods may be called from any thread."""

    def __init__(self, name: str, count: int, folder: Path | None) -> None:
        """`name`: what a row holds, as clients are sent it; `count`: its elements."""
        self.name, self.count, self.folder = name, count, folder
        self.bytes = 4 * count  # of a row
        self._lock = threading.Lock()
        self._known: dict[Key, Sealed] = {}  # hashes of rows; in memory their bytes too
        self._stored: dict[str, set[int]] = {}  # client -> generations that there are
        self._unsynced: set[Path] = set()
        if folder is None:
            return
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for path in sorted(folder.iterdir()):
                client, _, number = path.name.rpartition(".")
                if number.isdecimal():
                    self._stored.setdefault(client, set()).add(int(number))
                elif path.suffix == PART:  # of a process that died while it wrote
                    path.unlink()

    # ---- reading -------------------------------------------------------------------------------

    def row(self, numbers: Numbers, client: str) -> Tensor | None:
        """The client's row in the version that has these numbers; None: zeros. Never write to it.

        ServerError FL-S206 where it is not what was written.
        """
        key = Key(client, generation(numbers, client))
        if not key.generation:
            return None
        return as_tensor(self._read(key, numbers).view, torch.float32)

    def blob(self, numbers: Numbers, client: str) -> Blob | None:
        """The same as it travels to the client."""
        key = Key(client, generation(numbers, client))
        return self._blob(key, numbers) if key.generation else None

    def find(self, client: str, blob: str) -> Blob | None:
        """A blob that `client` was told of: nobody is given another one's."""
        with self._lock:
            found = [Key(client, number) for number in self._stored.get(client, ())]
        for key in found:
            if key.blob == blob:
                try:
                    return self._blob(key, {})
                except ServerError as error:  # forgotten meanwhile
                    what = f"no blob {blob!r}"
                    raise RemoteError("FL-W107", what, "take the newest order") from error
        return None

    def check(self, numbers: Numbers) -> None:
        """Read all rows of a version once, as after a crash. ServerError FL-S206."""
        for name in sorted(numbers):
            if name.startswith(CHECK):
                client = name.removeprefix(CHECK)
                self._read(Key(client, generation(numbers, client)), numbers)

    def _blob(self, key: Key, numbers: Numbers) -> Blob:
        row = self._read(key, numbers)
        sections = extra_sections({self.name: self.count})
        return Blob(BlobInfo(key.blob, self.bytes, row.sha256, sections), row.view, row.crcs)

    def _read(self, key: Key, numbers: Numbers) -> Sealed:
        """The row, hashed when it is first read in a process's life."""
        with self._lock:
            known = self._known.get(key)
        if self.folder is None:
            assert known is not None, f"row {key} was forgotten too early"
            return known
        try:
            view = _mapped(self._path(key), self.bytes)
        except (OSError, ValueError) as error:
            raise _damaged(key, str(error)) from error
        row = replace(known, view=view) if known is not None else _hashed(view)
        if numbers.get(CHECK + key.client, row.check) != row.check:
            raise _damaged(key, "it is not what was written")
        with self._lock:
            self._known[key] = replace(row, view=NO_BYTES)
        return row

    # ---- writing -------------------------------------------------------------------------------

    def begin(self, key: Key) -> Region:
        """A row to be written; then `seal` it, or `abandon` it. ServerError FL-S203."""
        if self.folder is None:
            return MemoryRegion(self.bytes, sha=True)
        assert CLIENT_NAME.fullmatch(key.client), f"{key.client!r} is not to become a path"
        path = self._path(key, PART)
        with disk(path):
            path.unlink(missing_ok=True)
            return FileRegion(path, b"", self.bytes, sha=True)

    def write(self, key: Key, region: Region, lo: int, values: Tensor) -> None:
        """Elements [lo, lo + len) of it, from any thread. ServerError FL-S203."""
        with disk(self._path(key)):
            region.write(4 * lo, as_bytes(values))

    def seal(self, key: Key, region: Region) -> int:
        """From now on the row can be read; its check. ServerError FL-S203."""
        with disk(self._path(key)):
            row = region.seal()
            if self.folder is not None:
                os.replace(self._path(key, PART), self._path(key))
        with self._lock:
            self._stored.setdefault(key.client, set()).add(key.generation)
            self._known[key] = row if self.folder is None else replace(row, view=NO_BYTES)
            self._unsynced.add(self._path(key))
        return row.check

    def abandon(self, key: Key, region: Region) -> None:
        region.close()
        if self.folder is not None:
            self._path(key, PART).unlink(missing_ok=True)

    # ---- keeping -------------------------------------------------------------------------------

    def sync(self) -> None:
        """All rows onto the disk, before a version that speaks of them is. ServerError FL-S203."""
        with self._lock:
            paths, self._unsynced = self._unsynced, set()
        if self.folder is None or not paths:
            return
        with disk(self.folder):
            for path in sorted(paths):
                sync(path)
            sync(self.folder)

    def prune(self, oldest: Numbers, ordered: Mapping[str, Collection[Numbers]]) -> None:
        """Forget former rows. `oldest`: of the oldest version that a run may go back to; `ordered`:
        client -> of the versions that its open orders start from."""

        def gone(key: Key) -> bool:
            wanted = {generation(numbers, key.client) for numbers in ordered.get(key.client, ())}
            return key.generation < generation(oldest, key.client) and key.generation not in wanted

        self._forget_if(gone)

    def roll_back(self, newest: Numbers) -> None:
        """Forget rows that no version speaks of, or only one that is to be made again."""
        self._forget_if(lambda key: key.generation > generation(newest, key.client))

    def forget(self, keys: Iterable[Key]) -> None:
        """ServerError FL-S203."""
        for key in keys:
            with self._lock:
                self._stored.get(key.client, set()).discard(key.generation)
                self._known.pop(key, None)
                self._unsynced.discard(self._path(key))
            if self.folder is not None:
                with disk(self._path(key)):
                    self._path(key).unlink(missing_ok=True)

    def _forget_if(self, gone: Callable[[Key], bool]) -> None:
        with self._lock:
            keys = [Key(c, number) for c, numbers in self._stored.items() for number in numbers]
        self.forget(key for key in keys if gone(key))

    def _path(self, key: Key, suffix: str = "") -> Path:
        return (self.folder or Path()) / (key.name + suffix)


def table_of(half: Half | None, count: int, folder: Path | None) -> Table | None:
    """The table that a half asks for, of a model of `count` trainable elements."""
    if half is None or half.own is None:
        return None
    return Table(half.own[0], count, folder)


def _mapped(path: Path, size: int) -> memoryview:
    """ValueError, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        view = memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_READ))
    finally:
        os.close(fd)
    if len(view) != size:
        raise ValueError(f"it has {len(view)} bytes, not {size}")
    return view


def _hashed(view: memoryview) -> Sealed:
    hasher = Hasher(sha=True)
    hasher.advance(view, len(view))
    return hasher.sealed(view)


def _damaged(key: Key, what: str) -> ServerError:
    return ServerError(
        "FL-S206",
        f"row {key.generation} of client {key.client} in the server's table is damaged: {what}",
        "restore the state directory from a backup",
    )
