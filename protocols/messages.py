"""Messages: what `wire.proto` says, as plain values, read strictly and written plainly.

Nothing that came over a wire goes further than this file, with `sent.py` and `blobwire.py`, without
having been bounded: numbers are finite and of the right size, names match, lists are short, sizes
add up, and text that people read has no control characters (`bounds.py`). Whatever is wrong is
RemoteError FL-W101 with the value.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from atoll.protocols import bounds, wire_pb2
from atoll.protocols.blobs import BlobInfo, Bulk
from atoll.protocols.blobwire import blob_from_wire, blob_to_wire, packed_blob
from atoll.protocols.events import ClientInfo, Then
from atoll.protocols.links import AS_THE_RUN, Link
from atoll.protocols.packed import Parts, around, nested
from atoll.protocols.sent import ORDER_FIELD, Sent, sent_from_wire, sent_to_order

SESSION_KEY = "atoll-session"  # metadata of every call beside Control
VALIDATE = "validate"  # capability of clients that judge models in the middle of a merge
LOSS = "loss"  # metric of an answer
NOTHING = BlobInfo("", 0, b"", ())  # payload of an answer without a gradient

RESULT_FIELD, ACK_FIELD = 3, 4  # ClientMessage.result, .ack
PAYLOAD_FIELD = 8  # Result.payload
BEFORE = around(RESULT_FIELD, PAYLOAD_FIELD)  # a payload's bytes

Fate = Literal["used", "discarded", "superseded"]
_THEN: tuple[Then, ...] = get_args(Then)  # in the order of the enum's numbers
_FATE: tuple[Fate, ...] = get_args(Fate)
_FATE_NAME = {fate: wire_pb2.Outcome.Fate.Name(i) for i, fate in enumerate(_FATE)}


@dataclass(frozen=True, slots=True)
class Hello:
    protocol: int
    run: str  # empty: the server's only run
    client: str
    node: str  # ULID
    info: ClientInfo
    schema: str = ""  # empty: the client takes the run's model
    holding: tuple[str, ...] = ()
    version: str = ""
    kept: Mapping[str, int] = field(default_factory=dict)  # kind of private state -> outcomes in it
    asked: Link = AS_THE_RUN
    base: str = ""  # what it holds of a chain of models; empty: nothing


@dataclass(slots=True)
class Result:
    """A finished piece of work as the client reports it; the bytes are inline or come as a blob."""

    order: str
    attempt: int
    steps: int
    examples: int
    train_seconds: float
    payload: BlobInfo
    metrics: Mapping[str, float] = field(default_factory=dict)
    final: bool = True
    snapshot: int = 0  # counts snapshots of the same order from 1; 0 for a final result
    inline: Bulk = b""
    question: str = ""  # it answers this one, and no order
    # the update's id: `o17.0` is order and attempt, `o17.0.s2` its second snapshot. Of an answer
    # the question's, which is one client's alone
    update: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        tail = f".s{self.snapshot}" if self.snapshot else ""
        self.update = self.question or f"{self.order}.{self.attempt}{tail}"


@dataclass(slots=True)
class Order:
    id: str
    attempt: int
    version: int
    steps: int
    model: BlobInfo | None
    inline: Bulk = b""
    extra: Mapping[str, float] = field(default_factory=dict)
    deadline_seconds: float = 0.0  # advisory; 0: none
    base: str = ""
    differences: tuple[tuple[BlobInfo, Bulk], ...] = ()
    extras: tuple[tuple[BlobInfo, Bulk], ...] = ()  # vectors for the local algorithm; inline bytes

    @property
    def sent(self) -> Sent:
        return Sent(self.version, self.model, self.inline, self.base, self.differences)


@dataclass(frozen=True, slots=True)
class Question:
    """What is the loss of a model on the examples that a client holds out?"""

    id: str
    model: BlobInfo
    inline: Bulk = b""
    gradient: bool = False
    batch_statistics: bool = True
    deadline_seconds: float = 0.0


@dataclass(slots=True)
class Outcome:
    order: str
    update: str
    fate: Fate
    version: int = 0
    reason: str = ""


# ---- hello -----------------------------------------------------------------------------------


def hello_to_wire(hello: Hello) -> wire_pb2.Hello:
    info = hello.info
    return wire_pb2.Hello(
        protocol=hello.protocol,
        run=hello.run,
        client=hello.client,
        node=hello.node,
        examples=info.examples,
        seconds_per_step=info.seconds_per_step or 0.0,
        capabilities=info.capabilities,
        schema=hello.schema,
        holding=hello.holding,
        version=hello.version,
        kept=hello.kept,
        up_codec=hello.asked.up,
        down_codec=hello.asked.down,
        base=hello.base,
    )


def hello_from_wire(wire: wire_pb2.Hello) -> Hello:
    pace = bounds.seconds("seconds_per_step", wire.seconds_per_step)
    return Hello(
        protocol=wire.protocol,
        run=_run(wire.run),
        client=bounds.name("client name", wire.client, bounds.CLIENT),
        node=bounds.name("node", wire.node, bounds.ULID),
        info=ClientInfo(
            examples=bounds.count("examples", wire.examples),
            seconds_per_step=pace or None,
            capabilities=bounds.names("capabilities", wire.capabilities, bounds.CAPABILITY),
        ),
        schema=bounds.name("schema", wire.schema, bounds.SCHEMA),
        holding=bounds.names("holding", wire.holding, bounds.ORDER),
        version=bounds.text(wire.version, 64),
        kept=_kept(wire.kept),
        asked=Link(
            bounds.name("up_codec", wire.up_codec, bounds.LINK),
            bounds.name("down_codec", wire.down_codec, bounds.LINK),
        ),
        base=bounds.name("base", wire.base, bounds.BASE),
    )


# ---- orders and results ------------------------------------------------------------------------


def order_to_wire(order: Order) -> wire_pb2.Order:
    wire = _order_alone(order)
    wire.MergeFrom(sent_to_order(order.sent))
    wire.extras.extend(blob_to_wire(info, inline) for info, inline in order.extras)
    return wire


def packed_order(order: Order, sent: Parts, beside: bytes = b"") -> Parts:
    """A ServerMessage with an order, whose model is in `sent`, as `packed_sent` makes it, and
    `beside` an Order with nothing but extras."""
    return nested(ORDER_FIELD, *sent, _order_alone(order).SerializeToString(), beside)


def _order_alone(order: Order) -> wire_pb2.Order:
    return wire_pb2.Order(
        id=order.id,
        attempt=order.attempt,
        version=order.version,
        steps=order.steps,
        extra=order.extra or None,  # an empty map takes as long as all the rest
        deadline_seconds=order.deadline_seconds,
    )


def order_from_wire(wire: wire_pb2.Order, bulk: Bulk = b"") -> Order:
    """`bulk`: the model's bytes, where they were taken out of it before (`lifted.py`)."""
    sent = sent_from_wire(wire, bulk)
    if len(wire.extras) > bounds.MAX_EXTRAS:
        raise bounds.malformed(f"{len(wire.extras)} extras, at most {bounds.MAX_EXTRAS} are taken")
    return Order(
        id=bounds.name("order", wire.id, bounds.ORDER),
        attempt=wire.attempt,
        version=sent.version,
        steps=bounds.count("steps", wire.steps),
        model=sent.model,
        inline=sent.inline,
        extra=metrics_from_wire(wire.extra),
        deadline_seconds=bounds.seconds("deadline_seconds", wire.deadline_seconds),
        base=sent.base,
        differences=sent.differences,
        extras=tuple(blob_from_wire(blob) for blob in wire.extras),
    )


def result_to_wire(result: Result) -> wire_pb2.Result:
    return wire_pb2.Result(
        order=result.order,
        attempt=result.attempt,
        steps=result.steps,
        examples=result.examples,
        train_seconds=result.train_seconds,
        metrics=result.metrics,
        final=result.final,
        payload=None if result.payload == NOTHING else blob_to_wire(result.payload, result.inline),
        snapshot=result.snapshot,
        question=result.question,
    )


def packed_result(result: Result, inline: Bulk) -> Parts:
    """A serialized Result with these bytes inline, which are not copied."""
    alone = wire_pb2.Result(
        order=result.order,
        attempt=result.attempt,
        steps=result.steps,
        examples=result.examples,
        train_seconds=result.train_seconds,
        metrics=result.metrics or None,
        final=result.final,
        snapshot=result.snapshot,
        question=result.question,
    ).SerializeToString()
    payload = result.payload
    if payload == NOTHING:
        return (alone,)
    return *nested(PAYLOAD_FIELD, *packed_blob(payload, inline, BEFORE)), alone


def result_from_wire(wire: wire_pb2.Result, bulk: Bulk = b"") -> Result:
    """`bulk`: the payload's bytes, where they were taken out of it before (`lifted.py`)."""
    bare = bool(wire.question) and not wire.HasField("payload")
    payload, inline = (NOTHING, b"") if bare else blob_from_wire(wire.payload, bulk)
    if wire.question:
        bounds.name("question", wire.question, bounds.QUESTION)
    if bool(wire.question) == bool(wire.order):
        order = bounds.text(wire.order, 24)
        raise bounds.malformed(f"a result of order {order!r} and question {wire.question!r}")
    if wire.final == bool(wire.snapshot):
        raise bounds.malformed(f"a result with final={wire.final} and snapshot={wire.snapshot}")
    return Result(
        order=wire.order and bounds.name("order", wire.order, bounds.ORDER),
        attempt=wire.attempt,
        steps=bounds.count("steps", wire.steps),
        examples=bounds.count("examples", wire.examples),
        train_seconds=bounds.seconds("train_seconds", wire.train_seconds),
        payload=payload,
        metrics=metrics_from_wire(wire.metrics),
        final=wire.final,
        snapshot=wire.snapshot,
        inline=inline,
        question=wire.question,
    )


# ---- questions -----------------------------------------------------------------------------------


def question_to_wire(question: Question) -> wire_pb2.Question:
    return wire_pb2.Question(
        id=question.id,
        model=blob_to_wire(question.model, question.inline),
        gradient=question.gradient,
        batch_statistics=question.batch_statistics,
        deadline_seconds=question.deadline_seconds,
    )


def question_from_wire(wire: wire_pb2.Question) -> Question:
    return Question(
        bounds.name("question", wire.id, bounds.QUESTION),
        *blob_from_wire(wire.model),
        gradient=wire.gradient,
        batch_statistics=wire.batch_statistics,
        deadline_seconds=bounds.seconds("deadline_seconds", wire.deadline_seconds),
    )


def metrics_from_wire(wire: Mapping[str, float]) -> dict[str, float]:
    """A sorted copy; every value is finite."""
    if not wire:
        return {}
    if len(wire) > bounds.MAX_METRICS:
        raise bounds.malformed(f"{len(wire)} metrics, at most {bounds.MAX_METRICS} are taken")
    found: dict[str, float] = {}
    for key in sorted(wire):
        bounds.name("metric", key, bounds.METRIC)
        if not math.isfinite(wire[key]):
            raise bounds.malformed(f"metric {key}={wire[key]}")
        found[key] = wire[key]
    return found


# ---- ask and outcome ---------------------------------------------------------------------------


def ask_to_wire(order: str, then: Then) -> wire_pb2.Ask:
    return wire_pb2.Ask(order=order, then=wire_pb2.Ask.Then.Name(_THEN.index(then)))


def ask_from_wire(wire: wire_pb2.Ask) -> tuple[str, Then]:
    if not 0 <= wire.then < len(_THEN):
        raise bounds.malformed(f"ask {wire.then}")
    return bounds.name("order", wire.order, bounds.ORDER), _THEN[wire.then]


def outcome_to_wire(outcome: Outcome) -> wire_pb2.Outcome:
    return wire_pb2.Outcome(
        order=outcome.order,
        fate=_FATE_NAME[outcome.fate],
        version=outcome.version,
        reason=bounds.text(outcome.reason),
        update=outcome.update,
    )


def outcome_from_wire(wire: wire_pb2.Outcome) -> Outcome:
    if not 0 <= wire.fate < len(_FATE):
        raise bounds.malformed(f"fate {wire.fate}")
    return Outcome(
        order=bounds.name("order", wire.order, bounds.ORDER),
        update=bounds.name("update", wire.update, bounds.UPDATE),
        fate=_FATE[wire.fate],
        version=bounds.count("version", wire.version),
        reason=bounds.text(wire.reason),
    )


def _kept(wire: Mapping[str, int]) -> dict[str, int]:
    kinds = bounds.names("kinds of private state", sorted(wire), bounds.KIND)
    return {kind: bounds.count(f"outcomes in {kind}", wire[kind]) for kind in kinds}


def _run(value: str) -> str:
    return value and bounds.name("run", value, bounds.RUN)
