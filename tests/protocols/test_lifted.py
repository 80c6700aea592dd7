"""Bulk taken out of a message by hand is what protobuf would have read."""

from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from atoll.protocols import lifted, messages, wire_pb2
from atoll.protocols.blobs import INLINE, BlobInfo, Section
from atoll.protocols.blobwire import INLINE_FIELD, PAD_FIELD
from atoll.protocols.lifted import FURTHER, ORDER, RESULT, client_message, lift, server_messages
from atoll.protocols.messages import ACK_FIELD, RESULT_FIELD
from atoll.protocols.packed import ALIGNED, BULK, MORE, nested, tag
from atoll.protocols.sent import Sent, packed_sent
from tests.protocols.test_messages import refused

SIZES = [0, 1, 127, 128, BULK - 1, BULK, BULK + 4, 100_000, INLINE - 1, INLINE]


def bulk(size: int) -> bytes:
    return bytes(i * 7 % 251 for i in range(size))


def info(size: int) -> BlobInfo:
    return BlobInfo("v3/fp32", size, b"", (Section("trainable", "fp32", size // 4, size),))


def result(size: int, **fields: object) -> messages.Result:
    made: dict[str, object] = {"metrics": {"loss": 0.5}, **fields}
    return messages.Result("o7", 0, 5, 160, 1.5, info(size), **made)  # type: ignore[arg-type]


def sent_result(size: int, acks: bool) -> bytes:
    """As a client sends it."""
    parts = nested(RESULT_FIELD, *messages.packed_result(result(size), bulk(size)))
    if acks:
        ack = nested(ACK_FIELD, wire_pb2.Ack(updates=["o6.0"]).SerializeToString())
        parts = (*parts, *nested(MORE, *ack))
    return b"".join(parts)


def sent_order(size: int) -> tuple[bytes, ...]:
    sent = packed_sent(Sent(3, info(size), bulk(size)))
    order = messages.Order("o1", 0, 3, 4, None, extra={"mu": 0.5})
    return tuple(bytes(part) for part in messages.packed_order(order, sent))


@pytest.mark.parametrize("acks", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_result_is_the_same_lifted_or_not(size: int, acks: bool) -> None:
    data = sent_result(size, acks)
    message, found = client_message(data)
    assert messages.result_from_wire(message.result, found) == result(size, inline=bulk(size))
    assert len(found) == (size if size >= BULK else 0)
    plainly = wire_pb2.ClientMessage.FromString(data)
    assert messages.result_from_wire(plainly.result) == result(size, inline=bulk(size))
    assert message.more == plainly.more
    assert len(message.more) == acks


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_an_order_is_the_same_lifted_or_not(size: int, before: int) -> None:
    order = sent_order(size)
    outcomes = [wire_pb2.Outcome(update=f"o{number}.0") for number in range(before)]
    packed = [wire_pb2.ServerMessage(outcome=told).SerializeToString() for told in outcomes]
    if not before:
        data = b"".join(order)
    else:
        further = [*map(b"".join, (nested(MORE, p) for p in packed[1:])), *nested(MORE, *order)]
        data = b"".join((*further, packed[0]))
    read = server_messages(data)
    assert [message.outcome for message, _ in read[:before]] == outcomes
    assert [len(found) for _, found in read[:before]] == [0] * before
    ((message, found),) = read[before:]
    expected = messages.Order("o1", 0, 3, 4, info(size), bulk(size), extra={"mu": 0.5})
    assert messages.order_from_wire(message.order, found) == expected
    assert len(found) == (size if size >= BULK and before < 2 else 0)
    plainly = wire_pb2.ServerMessage.FromString(data)
    last = plainly.more[-1] if before else plainly
    assert messages.order_from_wire(last.order) == expected


@pytest.mark.parametrize("size", [BULK, 100_000, INLINE])
def test_bulk_lies_where_numbers_can_be_read_in_place(size: int) -> None:
    for data, path in (
        (sent_result(size, acks=True), RESULT),
        (b"".join(nested(MORE, *sent_order(size))), FURTHER),
    ):
        assert lift(data, path) is not None
        assert data.index(bulk(64)) % ALIGNED == 0


def test_what_is_laid_out_otherwise_is_left_to_protobuf() -> None:
    wire = messages.result_to_wire(result(100_000, inline=bulk(100_000)))
    data = wire_pb2.ClientMessage(result=wire).SerializeToString()
    message, found = client_message(data)
    assert found == b""
    assert messages.result_from_wire(message.result) == result(100_000, inline=bulk(100_000))
    pad = b"\x32" + bytes([ALIGNED]) + bytes(ALIGNED)  # longer than anybody needs
    blob = pad + b"".join(nested(INLINE_FIELD, bulk(100_000)))
    odd = b"".join(nested(RESULT_FIELD, *nested(messages.PAYLOAD_FIELD, blob)))
    assert client_message(odd)[1] == b""
    assert client_message(odd)[0].result.payload.inline == bulk(100_000)
    assert tag(PAD_FIELD) == pad[:1]


def test_bulk_that_comes_twice_is_what_protobuf_takes() -> None:
    """The last one counts."""
    once = sent_result(100_000, acks=False)
    blob = wire_pb2.Blob(inline=b"other").SerializeToString()
    twice = once + b"".join(nested(RESULT_FIELD, *nested(messages.PAYLOAD_FIELD, blob)))
    message, found = client_message(twice)
    assert len(found) == 100_000
    assert refused(lambda: messages.result_from_wire(message.result, found)) == "FL-W101"
    both = wire_pb2.ClientMessage.FromString(twice)
    assert refused(lambda: messages.result_from_wire(both.result)) == "FL-W101"


WHOLE = {
    "result": (sent_result(BULK, acks=True), RESULT),
    "order": (b"".join(sent_order(BULK)), ORDER),
    "further": (b"".join(nested(MORE, *sent_order(BULK))), FURTHER),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_message_cut_off_anywhere_is_refused(kind: str) -> None:
    data, _ = WHOLE[kind]
    read = client_message if kind == "result" else server_messages
    end = len(b"".join(nested(RESULT_FIELD, b""))) and len(data) - (12 if kind == "result" else 0)
    for at in (*range(1, 60), BULK // 2, *range(end - 30, end)):
        with pytest.raises(DecodeError):
            read(data[:at])


@given(st.sampled_from(sorted(WHOLE)), st.integers(0, 39), st.integers(0, 255))
def test_a_byte_of_the_head_that_is_another_changes_nothing_in_how_it_is_read(
    kind: str, at: int, value: int
) -> None:
    """Lifted or not, both say the same, or both refuse."""
    data, path = WHOLE[kind]
    broken = data[:at] + bytes([value]) + data[at + 1 :]
    kinds: Any = wire_pb2.ClientMessage if kind == "result" else wire_pb2.ServerMessage
    try:
        plainly = kinds.FromString(broken)
    except DecodeError:
        plainly = None
    found = lift(broken, path)
    if found is None:
        return
    rest, inside = found
    try:
        message = kinds.FromString(rest)
    except DecodeError:
        assert plainly is None
        return
    assert plainly is not None
    holder = message if kind != "further" else message.more[0]
    blob = holder.result.payload if kind == "result" else holder.order.model
    if not blob.inline:
        blob.inline = bytes(inside)
    original = plainly if kind != "further" else plainly.more[0]
    same = original.result.payload if kind == "result" else original.order.model
    assert blob.inline == same.inline
    same.ClearField("pad")
    blob.ClearField("pad")
    assert message == plainly


def test_the_paths_are_those_of_the_wire() -> None:
    for kind, path in ((wire_pb2.ClientMessage, RESULT), (wire_pb2.ServerMessage, FURTHER)):
        names = ("result", "payload") if path is RESULT else ("more", "order", "model")
        found: Any = kind.DESCRIPTOR
        for name, mark in zip(names, path, strict=True):
            field = found.fields_by_name[name]
            assert tag(field.number) == mark
            found = field.message_type
        assert tag(found.fields_by_name["inline"].number) == lifted.INLINE
        assert tag(found.fields_by_name["pad"].number) == lifted.PAD
