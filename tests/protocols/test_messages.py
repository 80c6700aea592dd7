"""Messages survive the wire, and nothing unbounded gets through."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from atoll.protocols import blobwire, bounds, messages, refusals, wire_pb2
from atoll.protocols.blobs import INLINE, BlobInfo, Section
from atoll.protocols.errors import AtollError, RefusedError, RemoteError, ServerError
from atoll.protocols.events import MAX_COUNT, ClientInfo, Then
from atoll.protocols.messages import Fate, Hello, Order, Outcome, Result
from atoll.protocols.sent import packed_sent

NODE = "01J9Z3K4M5N6P7Q8R9S0T1V2W3"
BLOB = BlobInfo(
    "m12/bf16",
    24,
    bytes(range(32)),
    (Section("trainable", "bf16", 8, 16), Section("extra:control", "fp32", 2, 8)),
)
HELLO = Hello(1, "r1", "hospital-3", NODE, ClientInfo(500, 0.02, ("fp32", "bf16")), "ab" * 32)
RESULT = Result("o17", 1, 20, 640, 1.25, BLOB, {"loss": 0.5, "eval/top.1": 0.9})
ORDER = Order("o17", 1, 12, 20, BLOB, b"", {"mu": 0.1}, 60.0)


def refused(read: Callable[[], object]) -> str:
    with pytest.raises(RemoteError) as caught:
        read()
    return caught.value.code


# ---- there and back ----------------------------------------------------------------------------

COUNT = st.integers(0, MAX_COUNT)
SECONDS = st.floats(0, 1e9)
METRICS = st.dictionaries(
    st.from_regex(r"\A[a-zA-Z0-9_./-]{1,64}\Z"),
    st.floats(allow_nan=False, allow_infinity=False),
    max_size=5,
)


@given(COUNT, COUNT, SECONDS, METRICS, st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_results_survive_the_wire(
    steps: int, examples: int, seconds: float, metrics: dict[str, float], attempt: int, snap: int
) -> None:
    result = Result("o3", attempt, steps, examples, seconds, BLOB, metrics, snap == 0, snap)
    wire = wire_pb2.Result.FromString(messages.result_to_wire(result).SerializeToString())
    assert messages.result_from_wire(wire) == result


def test_hello_order_outcome_and_ask_survive_the_wire() -> None:
    hello = replace(
        HELLO, holding=("o1", "o2"), version="0.1.0", kept={"residual": 0, "scaffold": 7}
    )
    assert messages.hello_from_wire(messages.hello_to_wire(hello)) == hello
    unknown = replace(HELLO, info=ClientInfo(7, None, ()), schema="", run="")
    assert messages.hello_from_wire(messages.hello_to_wire(unknown)) == unknown
    assert messages.order_from_wire(messages.order_to_wire(ORDER)) == ORDER
    inline = replace(ORDER, inline=bytes(24))
    assert messages.order_from_wire(messages.order_to_wire(inline)) == inline
    fates: tuple[Fate, ...] = ("used", "discarded", "superseded")
    for fate in fates:
        outcome = Outcome("o17", "o17.1", fate, 13, "its order was closed")
        assert messages.outcome_from_wire(messages.outcome_to_wire(outcome)) == outcome
    thens: tuple[Then, ...] = ("continue", "send", "drop")
    for then in thens:
        assert messages.ask_from_wire(messages.ask_to_wire("o1", then)) == ("o1", then)


def test_questions_and_answers_survive_the_wire() -> None:
    question = messages.Question("q7", BLOB, bytes(24), True, False, 30.0)
    assert messages.question_from_wire(messages.question_to_wire(question)) == question
    answer = replace(RESULT, order="", question="q7", attempt=0)
    assert messages.result_from_wire(messages.result_to_wire(answer)) == answer
    bare = replace(answer, payload=messages.NOTHING)
    wire = messages.result_to_wire(bare)
    assert not wire.HasField("payload")
    assert messages.result_from_wire(wire) == bare
    assert bare.update == "q7"
    for one, inline in ((answer, bytes(24)), (bare, b"")):
        packed = wire_pb2.Result.FromString(b"".join(messages.packed_result(one, inline)))
        assert messages.result_from_wire(packed) == replace(one, inline=inline)
    for odd in ({"order": "o1"}, {"question": ""}, {"question": "o1"}):
        wrong = messages.result_to_wire(replace(answer, **odd))  # type: ignore[arg-type]
        assert refused(lambda wrong=wrong: messages.result_from_wire(wrong)) == "FL-W101"  # type: ignore[misc]
    named = messages.question_to_wire(replace(question, id="7"))
    assert refused(lambda: messages.question_from_wire(named)) == "FL-W101"


def test_extras_of_an_order_survive_the_wire_and_are_bounded() -> None:
    extras = BlobInfo("v3/extra", 8, bytes(32), (Section("extra:control", "fp32", 2, 8),))
    order = replace(ORDER, extras=((extras, bytes(8)), (extras, b"")))
    wire = messages.order_to_wire(order)
    assert messages.order_from_wire(wire) == order
    sent = packed_sent(order.sent)
    beside = wire_pb2.Order(extras=wire.extras).SerializeToString()
    packed = b"".join(messages.packed_order(replace(order, extras=()), sent, beside))
    assert messages.order_from_wire(wire_pb2.ServerMessage.FromString(packed).order) == order
    many = messages.order_to_wire(replace(order, extras=((extras, b""),) * 5))
    assert refused(lambda: messages.order_from_wire(many)) == "FL-W101"


def test_a_hello_bounds_what_it_says_of_private_state() -> None:
    def said(**kept: int) -> Callable[[], object]:
        wire = messages.hello_to_wire(replace(HELLO, kept=kept))
        return lambda: messages.hello_from_wire(wire)

    assert refused(said(UP=1)) == "FL-W101"
    assert refused(said(**{f"k{i}": 1 for i in range(bounds.MAX_LIST + 1)})) == "FL-W101"
    assert refused(said(k=MAX_COUNT + 1)) == "FL-W101"


def test_the_enums_have_the_numbers_of_the_proto() -> None:
    assert messages.ask_to_wire("o1", "drop").then == wire_pb2.Ask.DROP
    assert messages.ask_to_wire("o1", "continue").then == wire_pb2.Ask.CONTINUE
    assert messages.outcome_to_wire(Outcome("o1", "o1.0", "used")).fate == wire_pb2.Outcome.USED
    gone = messages.outcome_to_wire(Outcome("o1", "o1.0", "superseded")).fate
    assert gone == wire_pb2.Outcome.SUPERSEDED


def test_an_update_is_named_by_order_attempt_and_snapshot() -> None:
    assert RESULT.update == "o17.1"
    assert replace(RESULT, final=False, snapshot=2).update == "o17.1.s2"
    assert bounds.UPDATE.fullmatch("o17.1")
    assert bounds.UPDATE.fullmatch("o17.1.s2")


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("client", ""),
        ("client", "Upper"),
        ("client", "../../etc"),
        ("client", "a" * 64),
        ("client", "a\n"),
        ("node", ""),
        ("node", NODE[:-1]),
        ("node", NODE.lower()),
        ("node", "8" + NODE[1:]),  # more than 128 bits
        ("run", "a b"),
        ("run", "x" * 64),
        ("examples", 2**53 + 1),
        ("seconds_per_step", math.nan),
        ("seconds_per_step", -1.0),
        ("seconds_per_step", math.inf),
        ("capabilities", ["\x1b[31m"]),
        ("capabilities", ["c"] * 65),
        ("schema", "AB" * 32),
        ("holding", ["o1", "p2"]),
        ("holding", ["o1"] * 65),
    ],
)
def test_a_hello_out_of_bounds_is_refused(field: str, value: Any) -> None:
    wire = messages.hello_to_wire(HELLO)
    wire.ClearField(field)
    wire.MergeFrom(wire_pb2.Hello(**{field: value}))
    if field in ("client", "node") and value == "":
        setattr(wire, field, "")
    assert refused(lambda: messages.hello_from_wire(wire)) == "FL-W101"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("order", ""),
        ("order", "17"),
        ("order", "o17/../x"),
        ("order", "o" + "1" * 19),
        ("steps", 2**53 + 1),
        ("examples", 2**64 - 1),
        ("train_seconds", math.nan),
        ("train_seconds", -0.5),
        ("final", False),  # then it must be a numbered snapshot
        ("snapshot", 1),  # and a final result is none
        ("metrics", {"loss": math.inf}),
        ("metrics", {"loss": math.nan}),
        ("metrics", {"": 1.0}),
        ("metrics", {"a b": 1.0}),
        ("metrics", {"m" * 65: 1.0}),
        ("metrics", {"<img>": 1.0}),
        ("metrics", {f"m{n}": 1.0 for n in range(257)}),
    ],
)
def test_a_result_out_of_bounds_is_refused(field: str, value: Any) -> None:
    wire = messages.result_to_wire(replace(RESULT, metrics={}))
    if isinstance(value, dict):
        wire.metrics.update(value)
    else:
        setattr(wire, field, value)
    assert refused(lambda: messages.result_from_wire(wire)) == "FL-W101"


def test_256_metrics_are_taken() -> None:
    wire = messages.result_to_wire(replace(RESULT, metrics={f"m{n}": 1.0 for n in range(256)}))
    assert len(messages.result_from_wire(wire).metrics) == 256


@pytest.mark.parametrize(
    "changed",
    [
        replace(BLOB, id=""),
        replace(BLOB, id="../x"),
        replace(BLOB, id="a" * 129),
        replace(BLOB, size=25),
        replace(BLOB, size=2**63),
        replace(BLOB, sha256=bytes(31)),
        replace(BLOB, sections=()),
        replace(BLOB, sections=BLOB.sections[:1]),
        replace(BLOB, sections=BLOB.sections[:1] * 2, size=32),
        replace(BLOB, sections=(Section("TRAINABLE", "fp32", 1, 24),)),
        replace(BLOB, sections=(Section("extra:", "fp32", 1, 24),)),
        replace(BLOB, sections=(Section("trainable", "", 1, 24),)),
        replace(BLOB, sections=(Section("trainable", "fp32", 2**60, 24),)),
        replace(
            BLOB, sections=tuple(Section(f"extra:{n}", "fp32", 0, 0) for n in range(65)), size=0
        ),
    ],
)
def test_a_blob_that_does_not_add_up_is_refused(changed: BlobInfo) -> None:
    assert refused(lambda: blobwire.blob_from_wire(blobwire.blob_to_wire(changed))) == "FL-W101"


def test_inline_bytes_are_bounded_and_complete() -> None:
    short = blobwire.blob_to_wire(BLOB, bytes(23))
    assert refused(lambda: blobwire.blob_from_wire(short)) == "FL-W101"
    size = INLINE + 1
    large = BlobInfo("b", size, b"", (Section("trainable", "fp32", 1, size),))
    wire = blobwire.blob_to_wire(large, bytes(size))
    assert refused(lambda: blobwire.blob_from_wire(wire)) == "FL-W103"
    fits = replace(large, size=INLINE, sections=(Section("trainable", "fp32", 1, INLINE),))
    assert blobwire.blob_from_wire(blobwire.blob_to_wire(fits, bytes(INLINE)))[1] == bytes(INLINE)


def test_numbers_an_enum_does_not_have_are_refused() -> None:
    ask = wire_pb2.Ask.FromString(b"\x0a\x02o1\x10\x09")
    assert refused(lambda: messages.ask_from_wire(ask)) == "FL-W101"
    outcome = wire_pb2.Outcome.FromString(b"\x0a\x02o1\x10\x09\x2a\x04o1.0")
    assert refused(lambda: messages.outcome_from_wire(outcome)) == "FL-W101"


KINDS: list[tuple[Any, Callable[[Any], object]]] = [
    (wire_pb2.Hello, messages.hello_from_wire),
    (wire_pb2.Order, messages.order_from_wire),
    (wire_pb2.Result, messages.result_from_wire),
    (wire_pb2.Blob, blobwire.blob_from_wire),
    (wire_pb2.Ask, messages.ask_from_wire),
    (wire_pb2.Outcome, messages.outcome_from_wire),
    (wire_pb2.Refusal, refusals.error_from_wire),
]


@given(st.sampled_from(KINDS), st.binary(max_size=60))
def test_garbage_that_protobuf_can_read_raises_nothing_but_a_refusal(
    kind: tuple[Any, Callable[[Any], object]], data: bytes
) -> None:
    try:
        wire = kind[0].FromString(data)
    except DecodeError:
        return
    refusal: RemoteError | None = None
    try:
        found = kind[1](wire)
    except RemoteError as error:
        refusal = error
    if refusal is None:
        assert read_again(found) == found
    else:
        assert refusal.code in ("FL-W101", "FL-W103")
        assert refusal.hint


def read_again(found: Any) -> Any:
    """What was read, written and read once more."""
    match found:
        case Hello():
            return messages.hello_from_wire(messages.hello_to_wire(found))
        case Order():
            return messages.order_from_wire(messages.order_to_wire(found))
        case Result():
            return messages.result_from_wire(messages.result_to_wire(found))
        case Outcome():
            return messages.outcome_from_wire(messages.outcome_to_wire(found))
        case AtollError():
            return found if found.message == bounds.text(found.message) else None
        case (BlobInfo(), bytes()):
            return blobwire.blob_from_wire(blobwire.blob_to_wire(*found))
        case _:
            return messages.ask_from_wire(messages.ask_to_wire(*found))


# ---- errors ------------------------------------------------------------------------------------


def test_a_refusal_tells_the_client_code_words_and_whether_to_try_again() -> None:
    full = RemoteError("FL-W109", "no room", "wait for room", retry_seconds=5.0)
    wire = refusals.error_to_wire(full, order="o3")
    assert (wire.code, wire.fatal, wire.retry_seconds, wire.order) == ("FL-W109", False, 5.0, "o3")
    heard = refusals.error_from_metadata(refusals.error_metadata(full))
    assert isinstance(heard, RefusedError)
    assert str(heard) == "FL-W109: no room (wait for room)"
    assert heard.retry_seconds == 5.0
    again = refusals.error_from_wire(refusals.error_to_wire(RemoteError("FL-W102", "closed")))
    assert again.fatal
    assert refusals.error_to_wire(ServerError("FL-S203", "disk")).fatal


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0, 1e300])
def test_an_absurd_time_to_wait_is_an_hour(seconds: float) -> None:
    wire = wire_pb2.Refusal(code="FL-W109", fatal=False, retry_seconds=seconds)
    assert refusals.error_from_wire(wire).retry_seconds == 3600.0


def test_an_unknown_code_is_told_in_words() -> None:
    heard = refusals.error_from_wire(wire_pb2.Refusal(code="FL-Z9\x1b", message="new", fatal=True))
    assert (heard.code, heard.message) == ("FL-S100", "FL-Z9 : new")


def test_metadata_without_a_readable_refusal_is_none() -> None:
    assert refusals.error_from_metadata(None) is None
    assert refusals.error_from_metadata([("x", "y"), ("atoll-error-bin", "text")]) is None
    assert refusals.error_from_metadata([("atoll-error-bin", b"\xff")]) is None


def test_text_for_people_is_short_and_without_control_characters() -> None:
    assert bounds.text("plain, with ünicode") == "plain, with ünicode"
    assert bounds.text("\x1b]0;x\x07 [red]\u202e\u2028\n") == " ]0;x  [red]   "
    assert bounds.text("a" * 2000) == "a" * 999 + "…"
    assert bounds.text("abcdef", 3) == "ab…"


@given(st.text(max_size=50))
def test_text_is_printable_whatever_came(value: str) -> None:
    cleaned = bounds.text(value)
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in cleaned)
    assert len(cleaned) == len(value)
