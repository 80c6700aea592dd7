"""Messages: what `wire.proto` says, as plain values, read strictly and written plainly.

Nothing that came over a wire goes further than this file without having been bounded: numbers are
finite and of the right size, names match, lists are short, sizes add up, and text that people read
has no control characters. Whatever is wrong is RemoteError FL-W101 with the value.
"""

import functools
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from google.protobuf.message import DecodeError

from atoll.protocols import wire_pb2
from atoll.protocols.blobs import BLOB_ID, INLINE, BlobInfo, Section
from atoll.protocols.errors import CATALOGUE, AtollError, RefusedError, RemoteError
from atoll.protocols.events import ClientInfo, Then
from atoll.protocols.ids import CLIENT_NAME
from atoll.protocols.links import AS_THE_RUN, Link
from atoll.protocols.packed import Parts, nested

ERROR_KEY = "atoll-error-bin"  # trailing metadata of a refused call
SESSION_KEY = "atoll-session"  # metadata of every call beside Control

CLIENT = CLIENT_NAME
ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
ORDER = re.compile(r"o[0-9]{1,18}")
UPDATE = re.compile(r"o[0-9]{1,18}\.[0-9]{1,10}(\.s[0-9]{1,10})?")
METRIC = re.compile(r"[a-zA-Z0-9_./-]{1,64}")
CAPABILITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,63}")
SCHEMA = re.compile(r"([0-9a-f]{64})?")
GROUP = re.compile(r"[a-z_]{1,32}(:[A-Za-z0-9_.\-/]{1,64})?")
KIND = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
CODEC = re.compile(r"[A-Za-z0-9_.:,=+-]{1,64}")
LINK = re.compile(r"[A-Za-z0-9_.:=,+-]{0,128}")
BASE = re.compile(r"([A-Za-z0-9_.:,=+-]{1,64}/[0-9]{1,16}(@[0-9]{1,16})?)?")

ORDER_FIELD, MODEL_FIELD, EXTRAS_FIELD = 3, 5, 9  # ServerMessage.order, Order.model, .extras
RESULT_FIELD, ACK_FIELD = 3, 4  # ClientMessage.result, .ack
PAYLOAD_FIELD, INLINE_FIELD = 8, 5  # Result.payload, Blob.inline

MAX_COUNT = 1 << 53  # exact as a float and in JSON
MAX_METRICS = 256
MAX_SECTIONS = 64
MAX_LIST = 64
MAX_DIFFERENCES = 64  # of a model, in one order
MAX_EXTRAS = 4  # blobs of one order
MAX_TEXT = 1000  # characters of a message for people

Fate = Literal["used", "discarded", "superseded"]
_THEN: tuple[Then, ...] = get_args(Then)  # in the order of the enum's numbers
_FATE: tuple[Fate, ...] = get_args(Fate)


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


@dataclass(frozen=True, slots=True)
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
    inline: bytes = b""

    @property
    def update(self) -> str:
        """The update's id: `o17.0` is order and attempt, `o17.0.s2` its second snapshot."""
        tail = f".s{self.snapshot}" if self.snapshot else ""
        return f"{self.order}.{self.attempt}{tail}"


@dataclass(frozen=True, slots=True)
class Sent:
    """A version of the model on its way to a client: all of it, or what is to be added."""

    version: int
    model: BlobInfo | None
    inline: bytes = b""  # of the model; empty: to be fetched
    base: str = ""  # `base_encoding` of wire.proto; empty: `model` is all of it
    differences: tuple[tuple[BlobInfo, bytes], ...] = ()  # each with its bytes, if inline

    @property
    def here(self) -> bool:
        """Whether nothing has to be fetched."""
        whole = self.model is None or len(self.inline) > 0
        return whole and all(inline for _, inline in self.differences)


@dataclass(frozen=True, slots=True)
class Order:
    id: str
    attempt: int
    version: int
    steps: int
    model: BlobInfo | None
    inline: bytes = b""
    extra: Mapping[str, float] = field(default_factory=dict)
    deadline_seconds: float = 0.0  # advisory; 0: none
    base: str = ""
    differences: tuple[tuple[BlobInfo, bytes], ...] = ()
    extras: tuple[tuple[BlobInfo, bytes], ...] = ()  # vectors for the local algorithm; inline bytes

    @property
    def sent(self) -> Sent:
        return Sent(self.version, self.model, self.inline, self.base, self.differences)


@dataclass(frozen=True, slots=True)
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
    pace = _seconds("seconds_per_step", wire.seconds_per_step)
    return Hello(
        protocol=wire.protocol,
        run=_run(wire.run),
        client=_name("client name", wire.client, CLIENT),
        node=_name("node", wire.node, ULID),
        info=ClientInfo(
            examples=_count("examples", wire.examples),
            seconds_per_step=pace or None,
            capabilities=_names("capabilities", wire.capabilities, CAPABILITY),
        ),
        schema=_name("schema", wire.schema, SCHEMA),
        holding=_names("holding", wire.holding, ORDER),
        version=text(wire.version, 64),
        kept=_kept(wire.kept),
        asked=Link(
            _name("up_codec", wire.up_codec, LINK), _name("down_codec", wire.down_codec, LINK)
        ),
        base=_name("base", wire.base, BASE),
    )


# ---- orders and results ------------------------------------------------------------------------


def order_to_wire(order: Order) -> wire_pb2.Order:
    wire = _order_alone(order)
    wire.MergeFrom(sent_to_order(order.sent))
    wire.extras.extend(blob_to_wire(info, inline) for info, inline in order.extras)
    return wire


def packed_order(order: Order, sent: bytes, beside: bytes = b"") -> Parts:
    """A ServerMessage with an order, whose model is the serialized `sent_to_order` in `sent`, and
    `beside` an Order with nothing but extras."""
    return nested(ORDER_FIELD, _order_alone(order).SerializeToString(), sent, beside)


def _order_alone(order: Order) -> wire_pb2.Order:
    return wire_pb2.Order(
        id=order.id,
        attempt=order.attempt,
        version=order.version,
        steps=order.steps,
        extra=order.extra,
        deadline_seconds=order.deadline_seconds,
    )


def order_from_wire(wire: wire_pb2.Order) -> Order:
    sent = sent_from_wire(wire)
    if len(wire.extras) > MAX_EXTRAS:
        raise _malformed(f"{len(wire.extras)} extras, at most {MAX_EXTRAS} are taken")
    return Order(
        id=_name("order", wire.id, ORDER),
        attempt=wire.attempt,
        version=sent.version,
        steps=_count("steps", wire.steps),
        model=sent.model,
        inline=sent.inline,
        extra=metrics_from_wire(wire.extra),
        deadline_seconds=_seconds("deadline_seconds", wire.deadline_seconds),
        base=sent.base,
        differences=sent.differences,
        extras=tuple(blob_from_wire(blob) for blob in wire.extras),
    )


def sent_to_order(sent: Sent) -> wire_pb2.Order:
    """The fields of an order that say how its model comes; the same for all who hold the same."""
    return wire_pb2.Order(
        model=None if sent.model is None else blob_to_wire(sent.model, sent.inline),
        base_encoding=sent.base,
        differences=[blob_to_wire(info, inline) for info, inline in sent.differences],
    )


def sent_to_evaluate(sent: Sent) -> wire_pb2.Evaluate:
    return wire_pb2.Evaluate(
        version=sent.version,
        model=None if sent.model is None else blob_to_wire(sent.model, sent.inline),
        base_encoding=sent.base,
        differences=[blob_to_wire(info, inline) for info, inline in sent.differences],
    )


def sent_from_wire(wire: wire_pb2.Order | wire_pb2.Evaluate) -> Sent:
    """How the model of an order, or of a version to be judged, comes."""
    base = _name("base_encoding", wire.base_encoding, BASE)
    version = _count("version", wire.version)
    _, at, held = base.partition("@")
    if not at:
        if wire.differences:
            raise _malformed(f"{len(wire.differences)} differences to no base")
        return Sent(version, *blob_from_wire(wire.model), base)
    if wire.HasField("model") or int(held) + len(wire.differences) != version:
        raise _malformed(f"version {version} as {len(wire.differences)} differences to {base}")
    if len(wire.differences) > MAX_DIFFERENCES:
        raise _malformed(
            f"{len(wire.differences)} differences, at most {MAX_DIFFERENCES} are taken"
        )
    return Sent(version, None, b"", base, tuple(map(blob_from_wire, wire.differences)))


def result_to_wire(result: Result) -> wire_pb2.Result:
    return wire_pb2.Result(
        order=result.order,
        attempt=result.attempt,
        steps=result.steps,
        examples=result.examples,
        train_seconds=result.train_seconds,
        metrics=result.metrics,
        final=result.final,
        payload=blob_to_wire(result.payload, result.inline),
        snapshot=result.snapshot,
    )


def packed_result(result: Result, inline: bytes | memoryview) -> bytes:
    """A Result with these bytes inline, which are copied once."""
    alone = wire_pb2.Result(
        order=result.order,
        attempt=result.attempt,
        steps=result.steps,
        examples=result.examples,
        train_seconds=result.train_seconds,
        metrics=result.metrics,
        final=result.final,
        snapshot=result.snapshot,
    ).SerializeToString()
    info = blob_to_wire(result.payload).SerializeToString()
    held = nested(INLINE_FIELD, inline) if len(inline) else ()
    return b"".join((alone, *nested(PAYLOAD_FIELD, info, *held)))


def result_from_wire(wire: wire_pb2.Result) -> Result:
    payload, inline = blob_from_wire(wire.payload)
    if wire.final == bool(wire.snapshot):
        raise _malformed(f"a result with final={wire.final} and snapshot={wire.snapshot}")
    return Result(
        order=_name("order", wire.order, ORDER),
        attempt=wire.attempt,
        steps=_count("steps", wire.steps),
        examples=_count("examples", wire.examples),
        train_seconds=_seconds("train_seconds", wire.train_seconds),
        payload=payload,
        metrics=metrics_from_wire(wire.metrics),
        final=wire.final,
        snapshot=wire.snapshot,
        inline=inline,
    )


def metrics_from_wire(wire: Mapping[str, float]) -> dict[str, float]:
    """A sorted copy; every value is finite."""
    if len(wire) > MAX_METRICS:
        raise _malformed(f"{len(wire)} metrics, at most {MAX_METRICS} are taken")
    found: dict[str, float] = {}
    for key in sorted(wire):
        _name("metric", key, METRIC)
        if not math.isfinite(wire[key]):
            raise _malformed(f"metric {key}={wire[key]}")
        found[key] = wire[key]
    return found


# ---- blobs -------------------------------------------------------------------------------------


def blob_to_wire(info: BlobInfo, inline: bytes = b"") -> wire_pb2.Blob:
    return wire_pb2.Blob(
        id=info.id,
        size=info.size,
        sha256=info.sha256,
        sections=[
            wire_pb2.Section(group=s.group, codec=s.codec, count=s.count, length=s.length)
            for s in info.sections
        ],
        inline=inline,
    )


def blob_from_wire(wire: wire_pb2.Blob) -> tuple[BlobInfo, bytes]:
    """The blob's description and its inline bytes (empty: to be fetched, or an empty blob)."""
    if len(wire.sections) > MAX_SECTIONS:
        raise _malformed(f"{len(wire.sections)} sections, at most {MAX_SECTIONS} are taken")
    sections, length = _sections(
        tuple((s.group, s.codec, s.count, s.length) for s in wire.sections)
    )
    size = _count("blob size", wire.size)
    if length != size:
        raise _malformed(f"blob size {size}, its sections have {length}")
    if len(wire.sha256) not in (0, 32):
        raise _malformed(f"a SHA-256 of {len(wire.sha256)} bytes")
    inline = wire.inline  # each look at it is a copy
    if len(inline) > INLINE:
        raise RemoteError(
            "FL-W103", f"{len(inline)} bytes inline, the limit is {INLINE}", "send a blob"
        )
    if inline and len(inline) != size:
        raise _malformed(f"blob size {size}, but {len(inline)} bytes inline")
    return BlobInfo(_name("blob id", wire.id, BLOB_ID), size, wire.sha256, sections), inline


@functools.lru_cache(maxsize=64)  # a run's blobs have the same few
def _sections(told: tuple[tuple[str, str, int, int], ...]) -> tuple[tuple[Section, ...], int]:
    """Sections, and their bytes together."""
    sections = tuple(
        Section(
            group=_name("section group", group, GROUP),
            codec=_name("section codec", codec, CODEC),
            count=_count("section count", count),
            length=_count("section length", length),
        )
        for group, codec, count, length in told
    )
    if len({s.group for s in sections}) != len(sections):
        raise _malformed("a section group stands twice")
    return sections, sum(s.length for s in sections)


# ---- ask and outcome ---------------------------------------------------------------------------


def ask_to_wire(order: str, then: Then) -> wire_pb2.Ask:
    return wire_pb2.Ask(order=order, then=wire_pb2.Ask.Then.Name(_THEN.index(then)))


def ask_from_wire(wire: wire_pb2.Ask) -> tuple[str, Then]:
    if not 0 <= wire.then < len(_THEN):
        raise _malformed(f"ask {wire.then}")
    return _name("order", wire.order, ORDER), _THEN[wire.then]


def outcome_to_wire(outcome: Outcome) -> wire_pb2.Outcome:
    return wire_pb2.Outcome(
        order=outcome.order,
        fate=wire_pb2.Outcome.Fate.Name(_FATE.index(outcome.fate)),
        version=outcome.version,
        reason=text(outcome.reason),
        update=outcome.update,
    )


def outcome_from_wire(wire: wire_pb2.Outcome) -> Outcome:
    if not 0 <= wire.fate < len(_FATE):
        raise _malformed(f"fate {wire.fate}")
    return Outcome(
        order=_name("order", wire.order, ORDER),
        update=_name("update", wire.update, UPDATE),
        fate=_FATE[wire.fate],
        version=_count("version", wire.version),
        reason=text(wire.reason),
    )


# ---- errors ------------------------------------------------------------------------------------


def error_to_wire(error: AtollError, order: str = "") -> wire_pb2.Refusal:
    retry = error.retry_seconds if isinstance(error, RemoteError) else None
    return wire_pb2.Refusal(
        code=error.code,
        message=text(error.message),
        hint=text(error.hint),
        fatal=retry is None,
        retry_seconds=retry or 0.0,
        order=order,
    )


def error_from_wire(wire: wire_pb2.Refusal) -> RefusedError:
    """What the other side told us; an unknown code stays readable as FL-S100."""
    seconds = wire.retry_seconds
    patience = seconds if math.isfinite(seconds) and 0 <= seconds <= 3600 else 3600.0
    known = wire.code in CATALOGUE
    return RefusedError(
        wire.code if known else "FL-S100",
        ("" if known else f"{text(wire.code, 16)}: ") + text(wire.message),
        text(wire.hint),
        retry_seconds=None if wire.fatal else patience,
    )


def error_metadata(error: AtollError) -> tuple[tuple[str, bytes], ...]:
    """Trailing metadata for a refused call."""
    return ((ERROR_KEY, error_to_wire(error).SerializeToString()),)


def error_from_metadata(metadata: Iterable[tuple[str, str | bytes]] | None) -> RefusedError | None:
    """The refusal in a call's trailing metadata, None where there is none that can be read."""
    for key, value in metadata or ():
        if key == ERROR_KEY and isinstance(value, bytes):
            try:
                return error_from_wire(wire_pb2.Refusal.FromString(value))
            except DecodeError:
                return None
    return None


def text(value: str, limit: int = MAX_TEXT) -> str:
    """`value` for people's eyes: cut to `limit`, control and direction characters replaced."""
    cut = value if len(value) <= limit else value[: limit - 1] + "…"
    if cut.isascii() and cut.isprintable():
        return cut
    return "".join(
        " " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in cut
    )


def _name(what: str, value: str, pattern: re.Pattern[str]) -> str:
    if not pattern.fullmatch(value):
        raise _malformed(f"{what} {text(value, 80)!r}")
    return value


def _names(what: str, values: Iterable[str], pattern: re.Pattern[str]) -> tuple[str, ...]:
    found = tuple(values)
    if len(found) > MAX_LIST:
        raise _malformed(f"{len(found)} {what}, at most {MAX_LIST} are taken")
    return tuple(_name(what, value, pattern) for value in found)


def _kept(wire: Mapping[str, int]) -> dict[str, int]:
    kinds = _names("kinds of private state", sorted(wire), KIND)
    return {kind: _count(f"outcomes in {kind}", wire[kind]) for kind in kinds}


def _run(value: str) -> str:
    return value and _name("run", value, RUN)


def _count(what: str, value: int) -> int:
    if not 0 <= value <= MAX_COUNT:
        raise _malformed(f"{what}={value}")
    return value


def _seconds(what: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise _malformed(f"{what}={value}")
    return value


def _malformed(what: str) -> RemoteError:
    return RemoteError("FL-W101", f"malformed message: {what}", "see protocols/wire.proto")
