"""Outgoing: what goes to a run's clients: orders with their models, outcomes, receipts.

A model is packed once for all who start from it over the same link and hold the same.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from atoll.aggregation import half
from atoll.protocols import blobwire, messages, tensors, wire_pb2
from atoll.protocols.blobs import INLINE, Blob
from atoll.protocols.errors import AtollError
from atoll.protocols.links import PLAIN
from atoll.protocols.messages import Result
from atoll.protocols.packed import Parts
from atoll.protocols.sent import packed_sent
from atoll.server.chain import Load
from atoll.server.links import Links
from atoll.server.run import Order, Outcome, Run
from atoll.server.sessions import Session, Sessions
from atoll.server.totals import ClientTotals
from atoll.server.versions import EXTRA
from atoll.server.workshop import Workshop


@dataclass
class Traffic:
    """Bytes of one client's models and results."""

    up: int = 0
    down: int = 0


@dataclass(slots=True)
class _Packed:
    """An order as it goes out over one session."""

    session: Session
    load: Load
    parts: Parts
    beside: int  # bytes that it brings beside the model


class Outgoing:
    """`fail` ends the run: a model cannot be read. `former`: what the run's history knows of its
    clients, from servers before this one."""

    def __init__(
        self,
        run: Run,
        workshop: Workshop,
        links: Links,
        sessions: Sessions,
        fail: Callable[[AtollError], None],
        former: Mapping[str, ClientTotals],
    ) -> None:
        self.traffic = {n: Traffic(t.bytes_up, t.bytes_down) for n, t in former.items()}
        self.model_size = sum(s.length for s in workshop.store.shelf.sections)
        self._run = run
        self._workshop = workshop
        self._table = workshop.merger.table
        self._links = links
        self._sessions = sessions
        self._fail = fail
        self._extra_size = sum(s.length for s in tensors.extra_sections(workshop.extras.down))
        self._packed: dict[tuple[int, str], Parts] = {}  # models as last sent, in orders
        self._orders: dict[str, _Packed] = {}  # about to be sent
        self._outcomes: dict[str, bytes] = {}  # of updates, about to be sent
        self._packed_extras = (-1, b"")  # what goes beside the version last ordered

    def ready(self, client: str, what: Order | Outcome) -> None:
        """Pack what will be sent, while there is time. Nothing is counted yet."""
        session = self._sessions.of.get(client)
        if session is None:
            return
        if isinstance(what, Outcome):
            self._outcomes[what.update] = _outcome(what)
        elif session.link.down == PLAIN:  # a chain's depends on what is held when it is sent
            packed = self._pack(session, what)
            if packed is not None:
                self._orders[what.id] = packed

    def order(self, session: Session | None, order: Order) -> None:
        packed = self._orders.pop(order.id, None)
        if session is None:
            return
        if packed is None or packed.session is not session:
            packed = self._pack(session, order)
        if packed is not None:
            self._sent(session, packed.load)
            if packed.beside:
                self.counted(order.client).down += packed.beside
            session.send_parts(packed.parts)

    def _pack(self, session: Session, order: Order) -> "_Packed | None":
        """None: the run ends."""
        try:
            load = self._load(session, order.version)
            key = order.version, load.sent.base
            if key not in self._packed:  # once for all who start from it and hold the same
                self._packed = {k: p for k, p in self._packed.items() if k[0] == order.version}
                self._packed[key] = packed_sent(load.sent)
            extra, beside = self._besides(order)
            size = self._beside_size(order)
        except AtollError as error:
            self._fail(error)
            return None
        told = messages.Order(order.id, 0, order.version, order.steps, None, extra=extra)
        parts = messages.packed_order(told, self._packed[key], beside)
        return _Packed(session, load, parts, size)

    def _besides(self, order: Order) -> tuple[Mapping[str, float], bytes]:
        """What goes beside a model: numbers, and vectors packed. ServerError FL-S206 where its
        client's own cannot be read."""
        extra, vectors = order.extra, self._packed_beside(order.version)
        if self._workshop.merger.half is None:
            return extra, vectors
        numbers = self._numbers(order)
        extra = {**half.told(numbers), **extra}
        if self._table is not None:
            extra |= half.told_to(numbers, order.client)
            own = self._table.blob(numbers, order.client)
            vectors += _beside(own) if own is not None else b""
        return extra, vectors

    def _packed_beside(self, version: int) -> bytes:
        """What goes beside the model of an order, once for all; nothing without such a half."""
        if not self._workshop.extras.down:
            return b""
        if self._packed_extras[0] != version:
            self._packed_extras = version, _beside(self.extras(version))
        return self._packed_extras[1]

    def extras(self, version: int) -> Blob:
        store = self._workshop.store
        return store.extras(store.open(version), tuple(self._workshop.extras.down))

    def load(self, session: Session, version: int) -> Load | None:
        """What is to be sent, and is counted as sent, for `version`. None: the run ends."""
        try:
            load = self._load(session, version)
        except AtollError as error:
            self._fail(error)
            return None
        self._sent(session, load)
        return load

    def _load(self, session: Session, version: int) -> Load:
        return self._links.load(session.link, version, self._run.published, session.held)

    def _sent(self, session: Session, load: Load) -> None:
        base = load.sent.base
        session.held = (base.partition("@")[0], load.sent.version) if base else None
        self.counted(session.client).down += load.size

    def size(self, order: Order) -> int:
        """Bytes of what an order of now brings down."""
        session = self._sessions.of.get(order.client)
        if session is None:
            return self.model_size + self._beside_size(order)
        size = self._links.size(session.link, order.version, session.held)
        return size + self._beside_size(order)

    def _beside_size(self, order: Order) -> int:
        """Bytes of what goes beside its model."""
        if self._table is None:
            return self._extra_size
        own = self._table.bytes if half.generation(self._numbers(order), order.client) else 0
        return self._extra_size + own

    def _numbers(self, order: Order) -> half.Numbers:
        return self._workshop.store.open(order.version).facts.numbers

    def outcome(self, session: Session | None, outcome: Outcome) -> None:
        packed = self._outcomes.pop(outcome.update, None)
        if session is not None:
            told = partial(_outcome, outcome) if packed is None else lambda: packed
            session.send_later(outcome.update, told)

    def counted(self, client: str) -> Traffic:
        if client not in self.traffic:
            self.traffic[client] = Traffic()
        return self.traffic[client]

    def find_blob(self, client: str, blob: str) -> Blob:
        if self._table is not None and (own := self._table.find(client, blob)) is not None:
            return own
        if self._workshop.extras.down:
            for version in reversed(self._workshop.store.numbers()):
                if blob == f"v{version}/{EXTRA}":
                    return self.extras(version)
        return self._links.find(blob)

    def receipt(self, client: str, result: Result) -> None:
        session = self._sessions.of.get(client)
        if session is not None:
            session.send_later(
                result.update, partial(_receipt, result.order, result.update, result.final)
            )


def _beside(blob: Blob) -> bytes:
    """An order with nothing but a blob of extras."""
    small = bytes(blob.view) if blob.info.size <= INLINE else b""
    made = wire_pb2.Order(extras=[blobwire.blob_to_wire(blob.info, small)])
    return made.SerializeToString()


def _outcome(outcome: Outcome) -> bytes:
    told = messages.Outcome(
        outcome.order, outcome.update, outcome.fate, outcome.version, outcome.reason
    )
    return wire_pb2.ServerMessage(outcome=messages.outcome_to_wire(told)).SerializeToString()


def _receipt(order: str, update: str, final: bool) -> bytes:
    receipt = wire_pb2.Receipt(order=order, update=update, final=final)
    return wire_pb2.ServerMessage(receipt=receipt).SerializeToString()
