"""Work: one order from its model's bytes to its update's bytes. Runs in the training thread."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atoll.client.keep import Keep, nothing_sent
from atoll.client.outbox import Outbox
from atoll.client.room import map_new
from atoll.client.trainer import Task, Trained, Trainer
from atoll.protocols import tensors
from atoll.protocols.blobs import INLINE, BlobInfo
from atoll.protocols.codecs import Codec
from atoll.protocols.errors import AtollError, ClientError
from atoll.protocols.events import Then
from atoll.protocols.manifest import TRAVELLING, Manifest
from atoll.protocols.messages import Order, Result
from atoll.protocols.tensors import Payload

Fetch = Callable[[BlobInfo, memoryview], None]


class Dropped(Exception):  # noqa: N818  # not an error: the order was closed
    """Training stopped because it was told to drop the order."""


class Workbench:
    """A trainer, warm for the client's life, and the buffers between it and the wire."""

    def __init__(
        self,
        trainer: Trainer,
        manifest: Manifest,
        up: Codec,
        down: Codec,
        outbox: Outbox,
        keep: Keep | None = None,
    ) -> None:
        """`keep` None: private state is kept in memory."""
        self.trainer = trainer
        self.keep = keep if keep is not None else Keep(None)
        for kind, rule in getattr(trainer, "rules", {}).items():
            self.keep.register(kind, rule)
        self.manifest = manifest
        self.up, self.down = up, down
        self.outbox = outbox
        self._sections = tensors.sections_of(manifest, up)
        self._size = sum(s.length for s in self._sections)  # bytes of an update
        self._model: memoryview | None = None  # the last big model's bytes, overwritten by the next
        self._held = b""  # their SHA-256: a version is fetched once for several orders

    def load(self, info: BlobInfo, inline: bytes, fetch: Fetch) -> Payload:
        """Bring the model that `info` describes into the trainer."""
        view = memoryview(inline) if inline else self._fetched(info, fetch)
        payload = tensors.parse(self.manifest, info.sections, view, self.down, "model")
        named: dict[str, Any] = {}
        for group in TRAVELLING:
            if payload.has(group):
                named |= tensors.unflatten(self.manifest, group, payload.read(group))
        try:
            self.trainer.load(named)
        except ValueError as error:
            raise ClientError(
                "FL-C103",
                f"the trainer does not fit the run's model: {error}",
                "give this client the run's model: see `fl-client test`",
            ) from error
        return payload

    def do(
        self,
        order: Order,
        fetch: Fetch,
        asked: Callable[[], Then | None],
        report: Callable[[int], None],
        snapped: Callable[[Result], None],
    ) -> Result:
        """Train one order and put the result into the outbox. Raises Dropped, or what failed.

        `report(0)` says that the model is here: from then on no server is needed. `snapped` is
        called with each snapshot of the work that was asked for; it lies in the outbox too.
        """
        base = self.load(order.model, order.inline, fetch)
        report(0)
        began, snapshots = time.perf_counter(), itertools.count(1)

        def snapshot(work: Trained) -> None:
            seconds = time.perf_counter() - began
            snapped(self._seal(order, base, work, seconds, next(snapshots)))

        task = Task(
            order.steps, self.outbox.steps, order.extra, asked, report, snapshot, self.keep.now
        )
        trained = self._train(task)
        seconds = time.perf_counter() - began
        if asked() == "drop":
            raise Dropped
        return self._seal(order, base, trained, seconds)

    def evaluate(self, info: BlobInfo, inline: bytes, fetch: Fetch) -> dict[str, float]:
        self.load(info, inline, fetch)
        return dict(self.trainer.evaluate())

    def _train(self, task: Task) -> Trained:
        try:
            return self.trainer.train(task)
        except AtollError:
            raise
        except Exception as error:  # a user's trainer may raise anything
            raise ClientError(
                "FL-C104", f"the trainer failed: {error!r}", "see the client's log"
            ) from error

    def _seal(
        self, order: Order, base: Payload, trained: Trained, seconds: float, snapshot: int = 0
    ) -> Result:
        sections, size = self._sections, self._size
        result = Result(
            order.id,
            order.attempt,
            trained.steps,
            trained.examples,
            seconds,
            BlobInfo(f"u/{order.id}.{order.attempt}.{snapshot}", size, b"", sections),
            dict(trained.metrics),
            final=not snapshot,
            snapshot=snapshot,
        )
        view = self.outbox.buffer(result.update, size)
        self._pack(base, trained, view)
        payload = Payload(sections, view, self.up)
        tensors.finite(self.manifest, payload)
        self.keep.hold(result.update, trained.state)  # before the result: see `client/keep.py`
        self.outbox.put(result, view)
        return result

    def settle(self, update: str, fate: str) -> None:
        """Private state hears what became of a result that the outbox still has."""
        kept = self.outbox.get(update)
        sent = nothing_sent
        if kept is not None:
            sent = Payload(kept[0].payload.sections, kept[1], self.up).read
        self.keep.settle(update, fate, sent)

    def _pack(self, base: Payload, trained: Trained, view: memoryview) -> None:
        """delta and buffers into `view`; an fp32 delta is computed right where it will lie."""
        at = 0
        for section in self._sections:
            part = view[at : at + section.length]
            codec = tensors.section_codec(section.group, self.up)
            if section.group == "trainable":
                start = base.read("trainable")
                if codec.name == "fp32":
                    out = tensors.as_flat(part)
                    tensors.delta(self.manifest, start, trained.tensors, out)
                else:
                    codec.encode(tensors.delta(self.manifest, start, trained.tensors), part)
            else:
                group = tensors.group_of(section)
                codec.encode(tensors.flatten(self.manifest, trained.tensors, group), part)
            at += section.length

    def _fetched(self, info: BlobInfo, fetch: Fetch) -> memoryview:
        if self._model is not None and len(self._model) != info.size:
            self._model = None
        if self._model is None:
            self._model, self._held = self._buffer(info.size), b""
        if self._held != info.sha256 or not info.sha256:
            self._held = b""
            fetch(info, self._model)
            self._held = info.sha256
        return self._model

    def _buffer(self, size: int) -> memoryview:
        folder: Path | None = self.outbox.folder
        if folder is None or size <= INLINE:
            return memoryview(bytearray(size))
        return map_new(folder / "model.bin", size)
