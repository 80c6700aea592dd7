"""Work: one order from its model's bytes to its update's bytes. Runs in the training thread."""

import itertools
import secrets
import time
from collections.abc import Callable
from typing import Any, TypeGuard

from torch import Tensor

from atoll.aggregation.half import extras_of
from atoll.aggregation.noise import KEY
from atoll.client import contract, inner, residual
from atoll.client.algorithm import LocalAlgorithm
from atoll.client.holding import Beside, Fetch, Holding
from atoll.client.keep import Keep, nothing_sent
from atoll.client.local import TorchTrainer
from atoll.client.localdp import LocalDP
from atoll.client.outbox import Outbox
from atoll.client.packing import Made, pack
from atoll.client.room import disk
from atoll.client.trainer import Task, Trained, Trainer
from atoll.protocols import tensors
from atoll.protocols.blobs import BlobInfo
from atoll.protocols.codecs import Codec
from atoll.protocols.codecspec import ErrorFeedback
from atoll.protocols.errors import ClientError
from atoll.protocols.events import Then
from atoll.protocols.manifest import Manifest
from atoll.protocols.messages import Order, Result
from atoll.protocols.payload import Payload, finite
from atoll.protocols.sent import Sent


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
        private: LocalDP | None = None,
    ) -> None:
        """`keep` None: private state is kept in memory. `private` None: updates go as they are."""
        self.private = private
        self.trainer = trainer
        self.keep = keep if keep is not None else Keep(None)
        for kind, rule in getattr(trainer, "rules", {}).items():
            self.keep.register(kind, rule)
        self.manifest = manifest
        self._packs: dict[str, Codec] = {}  # agreed in this life, by the name in a section
        self.agree(up, down)
        self.outbox = outbox
        self.holding = Holding(manifest, outbox.folder)
        algorithm = getattr(trainer, "algorithm", None)
        half = algorithm.server_half() if isinstance(algorithm, LocalAlgorithm) else None
        self._says = half.says if half is not None else ()
        self._extras = extras_of(half, manifest.counts["trainable"])
        self._sections = tensors.extra_sections(self._extras.up)
        if private is not None and half is not None and half.up:
            raise ClientError(
                "FL-C107",
                "local noise does not cover what this run's local algorithm sends beside updates: "
                + ", ".join(half.up),
                "leave the run, or ask for one with --local plain, fedprox or fedavg-m",
            )
        if _keeps(trainer) and outbox.folder is not None:
            inner.read(trainer, outbox.folder, outbox.memory.run)
        self._beside = Beside(self._extras.down, outbox.folder, self._extras.own)

    def agree(self, up: Codec, down: Codec, rule: ErrorFeedback | None = None) -> None:
        """Pack and read so from the next order on; one that is at work keeps to its own codec.

        `rule`: what `up` leaves out is kept and sent later. What `up` itself remembers is kept too.
        """
        self._rule = rule
        self.up, self.down = (tensors.fit_to(self.manifest, one) for one in (up, down))
        self._remembers = rule is not None or hasattr(self.up, "encode_from")
        if self._remembers:
            self.keep.register(residual.KIND, residual.Residual())
        self._packs[self.up.name] = self.up

    def load(self, sent: Sent, fetch: Fetch) -> Payload:
        """Bring the model that was sent into the trainer."""
        payload = self.holding.take(sent, fetch, self.down)
        named: dict[str, Any] = {}
        for section in payload.sections:
            group = tensors.group_of(section)
            named |= tensors.unflatten(self.manifest, group, payload.read(group))
        contract.load(self.trainer, named)
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
        if self.private is not None:
            self.private.afford(self.outbox.memory.sent)
        up = self.up
        base = self.load(order.sent, fetch)
        extras = self._beside.take(order, fetch)
        report(0)
        began, snapshots = time.perf_counter(), itertools.count(1)

        def snapshot(work: Trained) -> None:
            seconds = time.perf_counter() - began
            snapped(self._seal(order, base, work, up, seconds, next(snapshots)))

        task = Task(
            order.steps, self.outbox.steps, order.extra, asked, report, snapshot,
            extras, self.keep.now, self.keep.now, self.keep.life,
        )  # fmt: skip
        trained = contract.train(self.trainer, task)
        seconds = time.perf_counter() - began
        if asked() == "drop":
            raise Dropped
        return self._seal(order, base, trained, up, seconds)

    def evaluate(self, sent: Sent, fetch: Fetch) -> dict[str, float]:
        if self.private is not None:  # what the model is worth here would tell of this data
            return {"examples": 0.0}
        self.load(sent, fetch)
        found = contract.said("evaluate", contract.evaluate(self.trainer))
        if found and "examples" not in found:
            found["examples"] = contract.examples(self.trainer)
        return found

    def _seal(
        self,
        order: Order,
        base: Payload,
        trained: Trained,
        up: Codec,
        seconds: float,
        snapshot: int = 0,
    ) -> Result:
        update = f"{order.id}.{order.attempt}" + (f".s{snapshot}" if snapshot else "")
        rule = None if snapshot else self._rule  # a snapshot's work comes again with the whole
        state = self.keep.now(residual.KIND) if self._remembers else {}
        made = Made(base, trained.tensors, self._extras_of(trained), self._protect)
        packed = pack(
            self.manifest, made, self._sections, up, rule, state,
            lambda size: self.outbox.buffer(update, size),
        )  # fmt: skip
        result = Result(
            order.id,
            order.attempt,
            trained.steps,
            trained.examples,
            seconds,
            BlobInfo(
                f"u/{order.id}.{order.attempt}.{snapshot}",
                len(packed.view),
                b"",
                packed.sections,
            ),
            self._told(trained),
            final=not snapshot,
            snapshot=snapshot,
        )
        if not packed.finite:
            finite(self.manifest, Payload(packed.sections, packed.view, up))
        if not snapshot and _keeps(self.trainer) and self.outbox.folder is not None:
            with disk(self.outbox.folder):
                inner.write(self.trainer, self.outbox.folder, self.outbox.memory.run)
        kept = dict(trained.state)
        if self._remembers and not snapshot:
            kept[residual.KIND] = residual.change(state, packed.after)
        self.keep.hold(update, kept)  # before the result: see `client/keep.py`
        self.outbox.put(result, packed.view)
        return result

    def _told(self, trained: Trained) -> dict[str, float]:
        """What is said beside an update; with noise, only what the noise has cost so far."""
        if self.private is None:
            return contract.said("train", trained.metrics)
        self.outbox.spend()  # before it can leave: a killed client has rather paid too much
        cost = self.private.cost(self.outbox.memory.sent)
        return {"epsilon": cost} if cost < float("inf") else {}

    def settle(self, update: str, fate: str) -> None:
        """Private state hears what became of a result that the outbox still has."""
        kept = self.outbox.get(update)
        sent = nothing_sent
        if kept is not None:
            sections = kept[0].payload.sections
            packed = self._packs.get(sections[0].codec)
            sent = Payload(sections, kept[1], packed).read if packed is not None else sent
        self.keep.settle(update, fate, sent)

    @property
    def _protect(self) -> Callable[[Tensor], object] | None:
        """Makes a delta private, in place; None where it may be sent as it is."""
        private = self.private
        if private is None:
            return None
        return lambda delta: private.protect(delta, secrets.token_bytes(KEY))

    def _extras_of(self, trained: Trained) -> dict[str, Tensor]:
        """What the algorithm made besides the model, by section."""
        if not self._extras.up:
            return {}
        return tensors.extra_groups(self._extras.up, trained.extras, trained.said, self._says)


def _keeps(trainer: Trainer) -> TypeGuard[TorchTrainer]:
    """Whether its optimizer's state is to outlive an order, and so a process."""
    return isinstance(trainer, TorchTrainer) and trainer.config.keep_optimizer_state
