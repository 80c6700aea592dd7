"""A version of the model: as it is written, tile by tile, and as it is once it is sealed."""

import functools
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from atoll.aggregation.outer import STEPS
from atoll.protocols import state
from atoll.protocols.blobs import Blob, Section
from atoll.protocols.codecs import as_bytes, as_tensor
from atoll.protocols.manifest import TRAVELLING, Group, Manifest
from atoll.protocols.tensors import dtype_of, unflatten
from atoll.server.books import Books
from atoll.server.modelfile import Layout, layout
from atoll.server.regions import FileRegion, MemoryRegion, Region, Sealed, disk, write_file

IN_MEMORY = nullcontext()  # what is not on a disk needs no watch over it
MODEL, OUTER, FACTS = "model.safetensors", "outer.safetensors", "version.json"


@dataclass(frozen=True, slots=True)
class Facts:
    """What `version.json` says of a version."""

    version: int
    parent: int | None
    sha256: str  # of the payload, hex; empty while a small version is only in memory
    outer_check: int  # `Sealed.check` of outer.safetensors' data; 0: none
    schema: str
    inputs: tuple[tuple[str, float], ...] = ()  # (update id, weight) it was made from
    metrics: Mapping[str, float] = field(default_factory=dict)
    books: Books | None = None  # of central DP, as this version leaves them
    numbers: Mapping[str, float] = field(default_factory=dict)  # of the local algorithm's half

    def write(self, folder: Path, *, durable: bool = False) -> None:
        """Replaced atomically."""
        part = folder / (FACTS + ".part")
        write_file(part, [state.dumps(self).encode() + b"\n"], durable=durable)
        os.replace(part, folder / FACTS)

    @classmethod
    def read(cls, folder: Path) -> "Facts":
        return state.loads(cls, (folder / FACTS).read_text())


@dataclass(frozen=True, slots=True)
class Shelf:
    """What all versions of one model share."""

    folder: Path
    manifest: Manifest
    schema: str
    sections: tuple[Section, ...]  # of the fp32 payload
    layout: Layout  # of the model file
    memory_limit: int  # bytes up to which a version is small

    @property
    def small(self) -> bool:
        """Whether they are made in memory, and go inline."""
        return self.layout.size <= self.memory_limit

    def path(self, number: int) -> Path:
        return self.folder / str(number)


@dataclass(eq=False)
class Version:
    """A sealed model: its bytes, their hashes, and the outer optimizer's state after it."""

    facts: Facts
    shelf: Shelf
    view: memoryview  # the fp32 payload, read only
    crcs: Sequence[int]
    outer: Mapping[str, Tensor]  # flat; empty where the outer optimizer keeps no state
    on_disk: bool  # its files are complete
    durable: bool = False  # and synced
    blobs: dict[str, Blob] = field(default_factory=dict)  # codec name -> its bytes, once encoded
    lock: threading.Lock = field(default_factory=threading.Lock)
    _flats: dict[Group, Tensor] = field(default_factory=dict, repr=False)
    _sha256: bytes = b""

    @property
    def number(self) -> int:
        return self.facts.version

    @property
    def sha256(self) -> bytes:
        """Of its payload. A small one is hashed when somebody asks: no round waits for it."""
        if not self._sha256:
            told = bytes.fromhex(self.facts.sha256)
            self._sha256 = told or hashlib.sha256(self.view).digest()
        return self._sha256

    @property
    def folder(self) -> Path:
        return self.shelf.path(self.number)

    def flat(self, group: Group) -> Tensor:
        """The flat vector of a group, over the version's own bytes: never write to it."""
        found = self._flats.get(group)
        if found is None:
            found = torch.empty(0, dtype=dtype_of(group))
            for section, at in placed(self.shelf.sections):
                if section.group == group:
                    found = as_tensor(self.view[at : at + section.length], dtype_of(group))
            self._flats[group] = found
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All travelling tensors by name; they may alias the version's bytes."""
        named: dict[str, Tensor] = {}
        for group in TRAVELLING:
            named.update(unflatten(self.shelf.manifest, group, self.flat(group)))
        return named


class Draft:
    """A version being written, in tiles, from any thread. `seal` it or `abandon` it."""

    books: Books | None = None  # to be kept with it

    def __init__(
        self,
        shelf: Shelf,
        number: int,
        parent: int | None,
        outer: Mapping[str, int],
        sealed: Callable[[Version], None],
        behind: bool = True,
    ) -> None:
        """`outer`: elements of each vector of the outer state; empty where there is none."""
        self._behind = behind
        self.numbers: Mapping[str, float] = {}  # of the local algorithm's half
        self.number, self.parent = number, parent
        self._shelf, self._sealed = shelf, sealed
        self._at = {s.group: at for s, at in placed(shelf.sections)}
        self._outer_layout = outer_layout(outer)
        self._small = shelf.small
        self._outer: Region | None = None
        with self._disk():
            if not self._small:
                fresh(self._folder)
            self._model = self._region(MODEL, shelf.layout, sha=not self._small)
            try:
                if outer:
                    self._outer = self._region(OUTER, self._outer_layout, sha=False)
            except BaseException:
                self.abandon()
                raise

    def write(self, group: Group, lo: int, values: Tensor) -> None:
        """Put elements [lo, lo + len) of a group's flat vector in place. ServerError FL-S203."""
        with self._disk():
            self._model.write(self._at[group] + lo * values.itemsize, as_bytes(values))

    def place(self, group: Group, lo: int, hi: int) -> Tensor | None:
        """Where elements [lo, hi) may be written in place; None: `write` them, to a file."""
        if not isinstance(self._model, MemoryRegion):
            return None
        dtype = dtype_of(group)
        at = self._at[group]
        view = self._model.whole()[at + lo * dtype.itemsize : at + hi * dtype.itemsize]
        return as_tensor(view, dtype)

    def write_outer(self, name: str, lo: int, values: Tensor) -> None:
        """Put elements [lo, lo + len) of a vector of the outer state in place. FL-S203."""
        assert self._outer is not None, "this draft was opened without outer state"
        at, dtype, _ = self._outer_layout.offsets[name]
        with self._disk():
            self._outer.write(at + lo * dtype.itemsize, as_bytes(values))

    def rewind(self) -> None:
        """Everything will be written once more."""
        self._model.rewind()
        if self._outer is not None:
            self._outer.rewind()

    def seal(
        self,
        inputs: Sequence[tuple[str, float]] = (),
        metrics: Mapping[str, float] | None = None,
    ) -> Version:
        """The version; every element must have been written. ServerError FL-S203."""
        shelf = self._shelf
        with self._disk():
            model = self._model.seal()
            outer = self._outer.seal() if self._outer is not None else Sealed(memoryview(b""))
            facts = Facts(
                self.number, self.parent, model.sha256.hex(), outer.check, shelf.schema,
                tuple(inputs), dict(metrics or {}), self.books, dict(self.numbers),
            )  # fmt: skip
            named = self._outer_layout.tensors(outer.view) if outer.view else {}
            version = Version(facts, shelf, model.view, model.crcs, named, not self._small)
            if not self._small:
                facts.write(self._folder)
                shutil.rmtree(version.folder, ignore_errors=True)  # made before the last crash
                os.rename(self._folder, version.folder)
        self._sealed(version)
        return version

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._model.close()
        if self._outer is not None:
            self._outer.close()
        if not self._small:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _folder(self) -> Path:
        return self._shelf.folder / f"{self.number}.tmp"

    def _disk(self) -> AbstractContextManager[None]:
        return IN_MEMORY if self._small else disk(self._folder)

    def _region(self, name: str, lies: Layout, *, sha: bool) -> Region:
        if self._small:
            return MemoryRegion(lies.size, sha=sha)
        return FileRegion(self._folder / name, lies.head, lies.size, sha=sha, behind=self._behind)


def placed(sections: Sequence[Section]) -> list[tuple[Section, int]]:
    """Each section with its first byte."""
    at, found = 0, []
    for section in sections:
        found.append((section, at))
        at += section.length
    return found


def outer_layout(vectors: Mapping[str, int]) -> Layout:
    """The file of an outer optimizer's state: its vectors, by name."""
    return _outer_layout(tuple(vectors.items()))


@functools.lru_cache(maxsize=8)  # the same for every version of a run
def _outer_layout(vectors: tuple[tuple[str, int], ...]) -> Layout:
    return layout(
        (name, torch.int64 if name == STEPS else torch.float32, (count,))
        for name, count in sorted(vectors, key=lambda v: (v[0] != STEPS, v[0]))  # int64 is aligned
    )


def fresh(folder: Path) -> None:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
