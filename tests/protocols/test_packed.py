"""What is put together by hand is what protobuf writes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.protocols import messages, wire_pb2
from atoll.protocols.blobs import INLINE, BlobInfo, Section
from atoll.protocols.messages import ACK_FIELD, RESULT_FIELD
from atoll.protocols.packed import MORE, nested, size, varint
from atoll.protocols.sent import Sent, packed_sent, sent_from_wire, sent_to_order


@given(st.integers(0, 2**64 - 1))
def test_a_varint_is_what_protobuf_writes(value: int) -> None:
    written = wire_pb2.Chunk(offset=value).SerializeToString()
    assert written == (b"\x10" + varint(value) if value else b"")


@pytest.mark.parametrize("length", [1, 100, 127, 128, 16383, 16384, INLINE])
def test_an_order_put_together_is_what_protobuf_reads(length: int) -> None:
    info = BlobInfo("v3/fp32", length, b"s" * 32, (Section("trainable", "fp32", 1, length),))
    sent = Sent(3, info, b"x" * length)
    order = messages.Order("o1", 2, 3, 4, None, extra={"mu": 0.5}, deadline_seconds=6.0)
    packed = messages.packed_order(order, packed_sent(sent))
    joined = b"".join(packed)
    assert size(packed) == len(joined)
    read = wire_pb2.ServerMessage.FromString(joined)
    assert read.WhichOneof("kind") == "order"
    assert messages.order_from_wire(read.order) == messages.Order(
        "o1", 2, 3, 4, info, b"x" * length, {"mu": 0.5}, 6.0
    )


INFO = BlobInfo("v3/fp32", 4, b"s" * 32, (Section("trainable", "fp32", 1, 4),))


@pytest.mark.parametrize(
    "sent",
    [
        Sent(3, INFO, b"abcd"),
        Sent(3, INFO, b"abcd", "int8/1"),
        Sent(3, INFO),  # to be fetched
        Sent(3, None, b"", "int8/1@1", ((INFO, b"abcd"), (INFO, b""))),
    ],
)
def test_a_model_put_together_is_what_protobuf_reads(sent: Sent) -> None:
    read = wire_pb2.Order.FromString(b"".join(packed_sent(sent)))
    assert read == sent_to_order(sent)
    read.version = sent.version
    assert sent_from_wire(read) == sent


def test_further_messages_stand_behind_the_first() -> None:
    ack = wire_pb2.Ack(updates=["o1.0"])
    result = wire_pb2.Result(order="o2")
    first = nested(RESULT_FIELD, result.SerializeToString())
    more = nested(MORE, *nested(ACK_FIELD, ack.SerializeToString()))
    expected = wire_pb2.ClientMessage(result=result, more=[wire_pb2.ClientMessage(ack=ack)])
    assert wire_pb2.ClientMessage.FromString(b"".join(first + more)) == expected
    assert wire_pb2.ServerMessage.DESCRIPTOR.fields_by_name["more"].number == MORE
