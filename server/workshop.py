"""Workshop: where versions are made and saved, off the event loop, one after another.

It keeps an update's bytes until the version made from it lies on disk with another one before it:
so a crash, or one damaged version, costs a merge done again and nothing else.
"""

import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from atoll.aggregation.half import Numbers, extras_of
from atoll.aggregation.proxy import ASKED
from atoll.protocols.blobs import BlobInfo
from atoll.protocols.codecset import Codecs
from atoll.protocols.errors import ServerError
from atoll.protocols.events import Merged
from atoll.protocols.payload import Payload, parse
from atoll.server.draft import Version
from atoll.server.items import Item, UpdateBytes
from atoll.server.merge import Merger
from atoll.server.run import Merge
from atoll.server.uploads import StoredUpdate, Uploads
from atoll.server.versions import VersionStore, kept

logger = logging.getLogger(__name__)


@dataclass
class Stock:
    """The merges whose updates must still be kept, oldest first; part of every snapshot."""

    merges: list[Merge] = field(default_factory=list)

    def published(self, merged: Merged) -> None:
        """What a merge could not use is not kept, and what it was told by clients is: made again,
        the version has the same bytes."""
        gone = {update for update, _ in merged.dropped}
        told = merged.stats if ASKED in merged.stats else {}
        if gone or told:
            self.merges = [
                replace(m, items=tuple(i for i in m.items if i[0] not in gone), told=told)
                if m.version == merged.version
                else m
                for m in self.merges
            ]


class Workshop:
    """`make` and `save` block; each is called from a worker thread of its own."""

    def __init__(
        self, store: VersionStore, merger: Merger, uploads: Uploads, codecs: Codecs, keep: int
    ) -> None:
        self.store = store
        self.merger = merger
        self.uploads = uploads
        self.codecs = codecs  # an update is read by the one that packed it
        self.keep = keep
        self.extras = extras_of(merger.half, store.manifest.counts["trainable"])
        self.infos: dict[str, BlobInfo] = {}  # of every update whose bytes are kept
        self.read: dict[str, Payload] = {}  # small ones that have been checked, until merged
        self.stock = Stock()
        self.best: int | None = None  # version to keep besides the newest
        self._pinned: set[int] = set()  # being evaluated: one of them may turn out the best
        self._lock = threading.Lock()  # of the pins
        self._durable: list[int] = []  # versions saved in this life, in order

    def make(self, merge: Merge) -> Merged:
        """The version that `merge` asks for, sealed. ServerError FL-S203 where the disk is full."""
        base = self.store.open(merge.version - 1)
        items: list[Item] = []
        dropped: list[tuple[str, str]] = []
        for update, weight in merge.items:
            stored = self.uploads.stored(update)
            if stored is None or update not in self.infos:
                dropped.append((update, "its bytes are lost"))
                continue
            payload = self.read.pop(update, None) or self._parsed(update, stored)
            items.append((UpdateBytes(update, payload, merge.clients.get(update, "")), weight))
        draft = self.store.draft(merge.version, base.number, self.merger.vectors)
        try:
            stats = self.merger.merge(base, draft, items, merge.outer, merge.known, merge.told)
            draft.seal(inputs=merge.items)
        except BaseException:
            draft.abandon()
            raise
        return Merged(merge.version, stats.used, (*dropped, *stats.dropped), stats.stats)

    def _parsed(self, update: str, stored: StoredUpdate) -> Payload:
        sections = self.infos[update].sections
        manifest, packed, extras = self.store.manifest, self.codecs.of(sections), self.extras.up
        return parse(manifest, sections, stored.view(), packed, "update", extras)

    def rebuild(self, merges: Iterable[Merge]) -> None:
        """Make versions again that were published before a crash and are not on disk."""
        for merge in merges:
            made = self.make(merge)
            lost = [update for update, reason in made.dropped if reason == "its bytes are lost"]
            if lost:
                raise ServerError(
                    "FL-S206",
                    f"version {merge.version} cannot be made again: update {lost[0]} is gone",
                    "restore the state directory from a backup",
                )
            logger.info("version=%d made again from %d updates", merge.version, len(made.used))

    def pin(self, number: int) -> Version:
        """A version for the evaluator, kept until `unpin`."""
        with self._lock:
            self._pinned.add(number)
        return self.store.open(number)

    def unpin(self, number: int, best: int | None) -> None:
        """It has been evaluated. The best one stays pinned until it is saved as such."""
        with self._lock:
            self._pinned = {n for n in self._pinned if n > number or n == best}

    def save(self, number: int, *, durable: bool = True) -> Version:
        """Version `number` on disk for good."""
        version = self.store.open(number)
        if durable and self.merger.table is not None:
            self.merger.table.sync()
        self.store.save(version, durable=durable)
        self._durable = sorted({*self._durable, number})[-2:]
        return version

    def settle(self) -> list[str]:
        """After a save, in the loop's thread: updates whose bytes need not be kept any longer."""
        safe = self._durable[0] if len(self._durable) > 1 else 0
        gone = [m for m in self.stock.merges if m.version <= safe]
        self.stock.merges = [m for m in self.stock.merges if m.version > safe]
        return [update for m in gone for update, _ in m.items]

    def prune(self, ordered: Mapping[str, int] = MappingProxyType({})) -> None:
        """Forget old versions; the first, the best and those to rebuild from stay, and those that
        open orders start from (`ordered`, by client): their clients may have to fetch them, again
        or for the first time. So it is with the rows of the table.
        """
        numbers = self.store.numbers()
        needed = [m.version - 1 for m in self.stock.merges]
        oldest = min(needed, default=max(numbers, default=0))
        stay = kept(numbers, self.keep) | {0, *ordered.values()}
        stay.update(n for n in numbers if n >= oldest)
        if self.merger.table is not None:
            starts = {c: [self._numbers(v)] for c, v in ordered.items() if v in numbers}
            self.merger.table.prune(self._numbers(oldest), starts)
        with self._lock:
            stay |= self._pinned
        if self.best is not None:
            stay.add(self.best)
        if not stay.issuperset(numbers):
            self.store.prune(stay, numbers)  # the merging thread may have sealed another one

    def _numbers(self, version: int) -> Numbers:
        return self.store.open(version).facts.numbers

    def forget(self, updates: Iterable[str]) -> None:
        for update in updates:
            self.infos.pop(update, None)
            self.read.pop(update, None)
            self.uploads.free(update)
