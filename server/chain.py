"""Chain: the server's half of a chain of models (`protocols/chains.py`), one per down-link codec.

It follows the versions of the run: each is encoded once as a difference, for all clients that hold
the one before. Who lacks it gets x^ itself. What is kept is bounded: differences for as long as
together they are smaller than a model, and x^ of the newest version and of those being trained.
A chain is not kept over a restart: it begins anew, under another label, at the version then newest.
"""

import contextlib
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from atoll.protocols import chains
from atoll.protocols.blobs import INLINE, Blob, BlobInfo, Section
from atoll.protocols.bounds import MAX_DIFFERENCES
from atoll.protocols.codecs import FP32, TILE, Codec, Decoder, as_tensor, contracted, reads
from atoll.protocols.payload import Payload
from atoll.protocols.sent import Sent
from atoll.protocols.tensors import group_of, pack, sections_of
from atoll.server.draft import Version
from atoll.server.regions import FileRegion, MemoryRegion, Region, Sealed, disk
from atoll.server.versions import VersionStore


@dataclass(slots=True)
class Load:
    """What goes down to one client: blobs, and how they are announced."""

    sent: Sent
    size: int  # bytes of all blobs


@dataclass(slots=True)
class _Shadow:
    """x^ of a version."""

    view: memoryview
    region: Region | None  # to be sealed when somebody has to fetch it
    blob: Blob | None = None
    into: memoryview | None = None  # to write the next x^ over this one, once it is forgotten

    def close(self) -> None:
        if self.region is not None:
            self.region.close()


class Chain:
    """All methods may be called from any thread."""

    def __init__(self, codec: Codec, store: VersionStore, anchor: Version, folder: Path) -> None:
        """Begin at `anchor`. `folder` is the chain's own; large versions are files in it."""
        self.label = f"{codec.name}/{anchor.number}"
        self.newest = anchor.number
        self._codec = contracted(codec)  # what one difference leaves out is part of the next
        self._store = store
        self._folder = folder
        self._sections = sections_of(store.manifest, codec)
        self._size = sum(s.length for s in chains.whole(store.manifest))
        first = _Shadow(anchor.view, None, whole(store, anchor))
        self._shadows: dict[int, _Shadow] = {anchor.number: first}
        self._differences: dict[int, Blob] = {}
        self._spare: tuple[Region, memoryview] | None = None  # of x^ that nobody has seen
        self._following = threading.Lock()
        self._lock = threading.Lock()  # of what is kept; held for moments only

    def follow(self, number: int) -> None:
        """Take in versions up to `number`. ServerError FL-S107: one is gone; FL-S203: disk full."""
        with self._following:
            while self.newest < number:
                self._next(self._store.open(self.newest + 1))

    def load(self, number: int, held: tuple[str, int] | None) -> Load | None:
        """How a client that holds `held` comes to version `number`; None: it is not kept here."""
        with self._lock:
            blobs = self._after(number, held)
            if blobs is not None and held is not None:
                size = sum(b.info.size for b in blobs)
                inline = size <= INLINE
                parts = tuple((b.info, bytes(b.view) if inline else b"") for b in blobs)
                return Load(Sent(number, None, b"", chains.spoken(*held), parts), size)
            if number not in self._shadows:
                return None
            return announced(number, self._whole(number), self.label)

    def size(self, number: int, held: tuple[str, int] | None) -> int:
        """Bytes of what `load` gives."""
        with self._lock:
            blobs = self._after(number, held)
            return self._size if blobs is None else sum(b.info.size for b in blobs)

    def _after(self, number: int, held: tuple[str, int] | None) -> list[Blob] | None:
        """The differences from what is held to `number`; None: x^ itself is shorter."""
        if held is None or held[0] != self.label or not held[1] <= number <= self.newest:
            return None
        blobs = [self._differences.get(n) for n in range(held[1] + 1, number + 1)]
        found = [b for b in blobs if b is not None]
        short = sum(b.info.size for b in found) < self._size and len(found) <= MAX_DIFFERENCES
        return found if short and len(found) == len(blobs) else None

    def find(self, blob: str) -> Blob | None:
        """The blob of that id, if it is one of this chain's that are kept."""
        with self._lock:
            for difference in self._differences.values():
                if blob == difference.info.id:
                    return difference
            for number, shadow in self._shadows.items():
                if shadow.blob is not None and blob == shadow.blob.info.id:
                    return self._whole(number)
        return None

    def keep(self, needed: Collection[int]) -> None:
        """Forget x^ of versions that are neither the newest nor `needed`."""
        with self._lock:
            for number in [n for n in self._shadows if n < self.newest and n not in needed]:
                self._forget(number)

    def view(self, number: int) -> memoryview:
        """The bytes of x^ of a version that is kept: never write to them."""
        with self._lock:
            shadow = self._shadows[number]
            shadow.into = None
            return shadow.view

    def knows(self, number: int) -> bool:
        with self._lock:
            return number in self._shadows

    def close(self) -> None:
        """Leave no file behind; whoever holds a blob can go on reading it."""
        with self._lock:
            for number, shadow in self._shadows.items():
                shadow.close()
                self._unlink(number, "whole")
            for number in self._differences:
                self._unlink(number, "difference")
            if self._spare is not None:
                self._spare[0].close()
                (self._folder / "spare").unlink(missing_ok=True)

    # ---- the next version --------------------------------------------------------------------

    def _next(self, version: Version) -> None:
        manifest, number = self._store.manifest, version.number
        held = self._shadows[number - 1].view
        shadow, into = self._room(number)
        sections, sealed = self._difference(version, held, into)
        payload = Payload(sections, sealed.view, self._codec)
        chains.step(manifest, held, payload, into)
        info = BlobInfo(f"v{number}/{self.label}/d", len(sealed.view), sealed.sha256, sections)
        with self._lock:
            self._differences[number] = Blob(info, sealed.view, sealed.crcs)
            self._shadows[number] = _Shadow(into.toreadonly(), shadow, into=into)
            self.newest = number
            self._drop_old()

    def _difference(
        self, version: Version, held: memoryview, into: memoryview
    ) -> tuple[tuple[Section, ...], Sealed]:
        """C(x - x^) and the buffers. Where x - x^ has to lie somewhere, it is where x^ will lie."""
        groups = {group_of(s): version.flat(group_of(s)) for s in self._sections}
        read: Decoder | None = None
        for section in self._sections[:1]:
            assert section.group == "trainable", "it stands first"
            read = _Between(groups["trainable"], as_tensor(held, torch.float32))
            if not reads(self._codec):
                room = as_tensor(into, torch.float32)[: section.count]
                for lo in range(0, section.count, TILE):
                    read(lo, min(lo + TILE, section.count), room[lo : lo + TILE])
                groups["trainable"], read = room, None
        size = sum(s.length for s in self._sections)
        if getattr(self._codec, "variable", False):
            sections, packed = pack(self._store.manifest, groups, self._codec)
            region = self._region(version.number, "difference", len(packed))
            region.write(0, packed)
        else:
            region = self._region(version.number, "difference", size)
            out = region.whole()
            sections, _ = pack(self._store.manifest, groups, self._codec, out, read=read)
        with disk(self._folder):
            return sections, region.seal()

    def _room(self, number: int) -> tuple[Region, memoryview]:
        """Where x^ of that version goes: where a forgotten one lay, if nobody has ever seen it.

        To write over it costs a third of what the pages of a new file do.
        """
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is None:
            region = self._region(number, "whole", self._size)
            return region, region.whole()
        self._move("spare", f"{number}.whole")
        return spare

    def _forget(self, number: int) -> None:
        shadow = self._shadows.pop(number)
        region, into = shadow.region, shadow.into
        if region is None or into is None or shadow.blob is not None or self._spare is not None:
            shadow.close()
            self._unlink(number, "whole")
            return
        self._move(f"{number}.whole", "spare")
        self._spare = region, into

    def _move(self, old: str, new: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # a small one is no file
            (self._folder / old).rename(self._folder / new)

    def _drop_old(self) -> None:
        """More differences than a model's bytes are worth nothing: x^ itself is shorter."""
        total = 0
        for number in sorted(self._differences, reverse=True):
            total += self._differences[number].info.size
            if total >= self._size and number != self.newest:
                del self._differences[number]
                self._unlink(number, "difference")

    def _whole(self, number: int) -> Blob:
        """x^ as a blob, hashed when the first client needs it."""
        shadow = self._shadows[number]
        if shadow.blob is None:
            assert shadow.region is not None, "only the first is not our own"
            with disk(self._folder):
                sealed: Sealed = shadow.region.seal()
            sections = chains.whole(self._store.manifest)
            info = BlobInfo(f"v{number}/{self.label}", self._size, sealed.sha256, sections)
            shadow.blob = Blob(info, sealed.view, sealed.crcs)
        return shadow.blob

    def _region(self, number: int, what: str, size: int) -> Region:
        if size <= self._store.shelf.memory_limit:
            return MemoryRegion(size, sha=True)
        with disk(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._path(number, what)
            path.unlink(missing_ok=True)
            return FileRegion(path, b"", size, sha=True, behind=False)

    def _path(self, number: int, what: str) -> Path:
        return self._folder / f"{number}.{what}"

    def _unlink(self, number: int, what: str) -> None:
        self._path(number, what).unlink(missing_ok=True)


class _Between:
    """x - x^, tile by tile: a `Decoder`."""

    def __init__(self, values: Tensor, before: Tensor) -> None:
        self._values, self._before = values, before

    def __call__(self, lo: int, hi: int, out: Tensor) -> Tensor:
        return torch.sub(self._values[lo:hi], self._before[lo:hi], out=out[: hi - lo])


def whole(store: VersionStore, version: Version) -> Blob:
    """A version exactly, as it lies there."""
    return store.blob(version, FP32)


def announced(number: int, blob: Blob, base: str = "") -> Load:
    """All of a model: inline where it is small."""
    inline = bytes(blob.view) if blob.info.size <= INLINE else b""
    return Load(Sent(number, blob.info, inline, base), blob.info.size)
