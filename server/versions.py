"""Versions: every global model a run has made, each sealed once and never written again.

A version is a folder `<N>/` with `model.safetensors`, the outer optimizer's `outer.safetensors`
where it has state, and `version.json`. The data region of the model file is byte for byte the
fp32 payload: what is merged is what is stored is what is served. Large versions are written into
files and mapped; small ones (256 KiB) live in memory and reach the disk when the caller saves them.

    draft = store.draft(12, 11, outer)     # Merger.merge(base, draft, items) writes it
    version = draft.seal()                 # hashed; can be served
    store.save(version)                    # on disk for good

Every method may be called from worker threads.
"""

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from atoll.aggregation.outer import STEPS
from atoll.protocols import places
from atoll.protocols.blobs import INLINE, Blob, BlobInfo
from atoll.protocols.codecs import FP32, TILE, Codec, all_finite, as_bytes
from atoll.protocols.errors import ServerError, UsageError
from atoll.protocols.manifest import TRAVELLING, Group, Manifest
from atoll.protocols.payload import place
from atoll.protocols.tensors import dtype_of, extra_sections, pack, sections_of
from atoll.server.draft import (
    FACTS,
    MODEL,
    OUTER,
    Draft,
    Facts,
    Shelf,
    Version,
    fresh,
    outer_layout,
)
from atoll.server.modelfile import model_layout, read_header, read_init
from atoll.server.regions import (
    FileRegion,
    MemoryRegion,
    Region,
    disk,
    map_file,
    sync,
    write_file,
)

EXTRA = "extra"  # names the blob of what travels beside the model


class VersionStore:
    """All versions of one model in one folder. `memory_limit`: bytes up to which one is small."""

    def __init__(self, folder: Path, manifest: Manifest, *, memory_limit: int = INLINE) -> None:
        self.manifest = manifest
        self.shelf = Shelf(
            folder,
            manifest,
            manifest.schema,
            sections_of(manifest, FP32),
            model_layout(manifest),
            memory_limit,
        )
        self._lock = threading.Lock()
        self._live: dict[int, Version] = {}
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for left in sorted(folder.glob("*.tmp")):  # of a process that died while it wrote
                shutil.rmtree(left, ignore_errors=True)
            self._stored = {int(p.name) for p in folder.iterdir() if p.name.isdecimal()}

    # ---- making ----------------------------------------------------------------------------

    def draft(
        self,
        number: int,
        parent: int | None = None,
        outer: Collection[str] = (),
        *,
        behind: bool = True,
    ) -> Draft:
        """A version to be written; `outer` names the vectors of the outer state, if it has any.

        A large one is hashed behind its writers, or else, `behind` False, when it is sealed.
        ServerError FL-S203 where the disk does not take it.
        """
        length = self.manifest.counts["trainable"]
        sizes = {STEPS: 1, **dict.fromkeys(outer, length)} if outer else {}
        return Draft(self.shelf, number, parent, sizes, self._add, behind)

    def initial(self, tensors: Mapping[str, Tensor], number: int = 0) -> Version:
        """Version 0 from named tensors, sealed. UsageError FL-S106 where they do not fit."""
        for spec in self.manifest.tensors:
            if spec.group != "frozen" and spec.name not in tensors:
                raise _unfit(f"tensor {spec.name!r} {spec.shape} is missing")
            if spec.group != "frozen" and tuple(tensors[spec.name].shape) != spec.shape:
                seen = tuple(tensors[spec.name].shape)
                raise _unfit(f"tensor {spec.name!r} is {seen}, the run expects {spec.shape}")
        draft = self.draft(number)
        try:
            for group in TRAVELLING:
                self._write_initial(draft, group, tensors)
            return draft.seal()
        except BaseException:
            draft.abandon()
            raise

    def initial_from(self, path: Path, number: int = 0) -> Version:
        """Version 0 from a user's safetensors file. UsageError FL-S106 naming what differs."""
        return self.initial(read_init(str(path), self.manifest), number)

    def _write_initial(self, draft: Draft, group: Group, tensors: Mapping[str, Tensor]) -> None:
        for spec, lo, hi in self.manifest.spans(group):
            flat = tensors[spec.name].detach().reshape(-1)
            for at in range(0, hi - lo, TILE):
                tile = flat[at : at + TILE].to("cpu", dtype_of(group)).contiguous()
                if group != "buffers_other" and not all_finite(tile):
                    bad = int((~torch.isfinite(tile)).nonzero()[0])
                    where = place(self.manifest, group, lo + at + bad)
                    raise _unfit(f"{where} is {float(tile[bad])}")
                draft.write(group, lo + at, tile)

    def _add(self, version: Version) -> None:
        with self._lock:
            self._live[version.number] = version
            if version.on_disk:
                self._stored.add(version.number)

    # ---- keeping ---------------------------------------------------------------------------

    def save(self, version: Version, *, durable: bool = True) -> None:
        """Make sure the version is on disk, synced if `durable`. Atomic; ServerError FL-S203."""
        with version.lock, disk(version.folder):
            if not version.on_disk:
                self._write(version, durable)
                with self._lock:
                    if version.number in self._live:
                        self._stored.add(version.number)
            elif durable and not version.durable:
                for name in (MODEL, OUTER, FACTS):
                    sync(version.folder / name)
            if durable and not version.durable:
                sync(version.folder)
                sync(self.shelf.folder)
                version.durable = True
            version.on_disk = True

    def note(self, version: Version, metrics: Mapping[str, float]) -> None:
        """Add metrics to a version; on disk too where it is there."""
        with version.lock, disk(version.folder):
            facts = version.facts
            version.facts = replace(facts, metrics={**facts.metrics, **metrics})
            if version.on_disk:
                version.facts.write(version.folder)

    def export(self, version: Version, path: Path) -> None:
        """The model as a plain safetensors file at `path`, replaced atomically. UsageError FL-S108
        where something else than a file is there, ServerError FL-S203."""
        path = places.target(path)
        with disk(path):
            part = path.with_name(path.name + ".part")
            write_file(part, [self.shelf.layout.head, version.view], durable=False)
            os.replace(part, path)

    def _write(self, version: Version, durable: bool) -> None:
        folder = self.shelf.folder / f"{version.number}.tmp"
        fresh(folder)
        write_file(folder / MODEL, [self.shelf.layout.head, version.view], durable=durable)
        if version.outer:
            lies = outer_layout({n: v.numel() for n, v in version.outer.items()})
            parts = [as_bytes(version.outer[name]) for name in lies.offsets]
            write_file(folder / OUTER, [lies.head, *parts], durable=durable)
        version.facts = replace(version.facts, sha256=version.sha256.hex())
        version.facts.write(folder, durable=durable)
        shutil.rmtree(version.folder, ignore_errors=True)  # the same, made before the last crash
        os.rename(folder, version.folder)

    def prune(self, keep: Collection[int], among: Collection[int] | None = None) -> None:
        """Forget all versions but `keep` (see `kept`). Whoever holds one can go on reading it.

        `among`: those that `keep` was chosen from; what has been sealed since then stays."""
        with self._lock:
            known = self._live.keys() | self._stored
            gone = sorted((known if among is None else known & set(among)) - set(keep))
            for number in gone:
                self._live.pop(number, None)
            files = [number for number in gone if number in self._stored]
            self._stored.difference_update(files)
        for number in files:
            shutil.rmtree(self.shelf.path(number), ignore_errors=True)

    # ---- finding ---------------------------------------------------------------------------

    def numbers(self) -> list[int]:
        """Versions that can be opened, in order."""
        with self._lock:
            return sorted(self._live.keys() | self._stored)

    def saved(self) -> list[int]:
        """Versions whose files are complete, in order."""
        with self._lock:
            return sorted(self._stored)

    def open(self, number: int) -> Version:
        """A version, verified against its SHA-256 when it is first read from disk.

        ServerError FL-S107: there is none; FL-S206: its files are damaged, and were set aside as
        `<N>.corrupt`.
        """
        with self._lock:
            live = self._live.get(number)
            stored = number in self._stored
        if live is not None:
            return live
        if not stored:
            raise ServerError(
                "FL-S107", f"version {number} is not kept here", f"kept: {self.numbers()}"
            )
        version = self._read(number)
        self._add(version)
        return version

    def latest(self) -> Version | None:
        """The newest version that is whole; damaged ones on the way are set aside. None: none."""
        for number in reversed(self.numbers()):
            try:
                return self.open(number)
            except ServerError as error:
                if error.code != "FL-S206":
                    raise
        return None

    def _read(self, number: int) -> Version:
        folder = self.shelf.path(number)
        try:
            facts = Facts.read(folder)
            if facts.schema != self.shelf.schema or facts.version != number:
                raise ValueError(f"{FACTS} is of another version or model")
            head, model = map_file(folder / MODEL, sha=True)
            if head != self.shelf.layout.head or model.sha256.hex() != facts.sha256:
                raise ValueError(f"{MODEL} is not what was written")
            outer = self._read_outer(folder, facts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._set_aside(number)
            raise ServerError(
                "FL-S206",
                f"version {number} is damaged: {error}",
                f"it was set aside as {number}.corrupt; go on from the version before it",
            ) from error
        return Version(facts, self.shelf, model.view, model.crcs, outer, on_disk=True)

    def _read_outer(self, folder: Path, facts: Facts) -> Mapping[str, Tensor]:
        if not facts.outer_check:
            return {}
        head, outer = map_file(folder / OUTER, sha=False)
        if outer.check != facts.outer_check:
            raise ValueError(f"{OUTER} is not what was written")
        shapes = read_header(head)
        return outer_layout({name: shape[0] for name, shape in shapes.items()}).tensors(outer.view)

    def _set_aside(self, number: int) -> None:
        with self._lock:
            self._stored.discard(number)
        aside = self.shelf.folder / f"{number}.corrupt"
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rename(self.shelf.path(number), aside)

    # ---- serving ---------------------------------------------------------------------------

    def blob(self, version: Version, codec: Codec) -> Blob:
        """The version as it travels under `codec`; encoded once, the same bytes for all."""
        with version.lock:
            found = version.blobs.get(codec.name)
            if found is None:
                found = version.blobs[codec.name] = self._encode(version, codec)
            return found

    def extras(self, version: Version, names: Sequence[str]) -> Blob:
        """The version's vectors of these names as they travel beside the model, once for all;
        what it does not have yet is zeros."""
        with version.lock:
            found = version.blobs.get(EXTRA)
            if found is None:
                found = version.blobs[EXTRA] = self._encode_extras(version, names)
            return found

    def _encode_extras(self, version: Version, names: Sequence[str]) -> Blob:
        count = self.manifest.counts["trainable"]
        sections = extra_sections(dict.fromkeys(names, count))
        size = sum(s.length for s in sections)
        with disk(version.folder):
            region = self._blob_region(version, EXTRA, size)
            for place, name in enumerate(names):
                vector = version.outer.get(name)
                for lo in range(0, count, TILE):
                    hi = min(lo + TILE, count)
                    tile = torch.zeros(hi - lo) if vector is None else vector[lo:hi]
                    region.write(4 * (place * count + lo), as_bytes(tile))
            sealed = region.seal()
        name = f"v{version.number}/{EXTRA}"
        return Blob(BlobInfo(name, size, sealed.sha256, sections), sealed.view, sealed.crcs)

    def _encode(self, version: Version, codec: Codec) -> Blob:
        name = f"v{version.number}/{codec.name}"
        if codec.name == "fp32":
            sha256 = b"" if self.shelf.small else version.sha256
            info = BlobInfo(name, len(version.view), sha256, self.shelf.sections)
            return Blob(info, version.view, version.crcs)
        sections = sections_of(self.manifest, codec)
        size = sum(s.length for s in sections)
        with disk(version.folder):
            region = self._blob_region(version, codec.name, size)
            pack(self.manifest, {g: version.flat(g) for g in TRAVELLING}, codec, region.whole())
            sealed = region.seal()
        return Blob(BlobInfo(name, size, sealed.sha256, sections), sealed.view, sealed.crcs)

    def _blob_region(self, version: Version, name: str, size: int) -> Region:
        if size <= self.shelf.memory_limit or not version.on_disk:
            return MemoryRegion(size, sha=True)
        path = version.folder / f"{re.sub('[^a-z0-9.]', '_', name)}.bin"
        path.unlink(missing_ok=True)
        return FileRegion(path, b"", size, sha=True)


def _unfit(what: str) -> UsageError:
    return UsageError("FL-S106", what, "give the tensors of this run's model, all finite")


def kept(numbers: Collection[int], last: int, every: int = 0) -> set[int]:
    """The `last` newest of `numbers`, and every `every`-th (0: none)."""
    newest = sorted(numbers)[-last:] if last else []
    return {*newest, *(n for n in numbers if every and n % every == 0)}
