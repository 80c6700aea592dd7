"""Lifted: bulk is taken out of a control message before protobuf copies it, twice.

Whoever packs by hand (`packed.py`, `blobwire.py`) puts the bytes of a model or of an update first
in each of the messages around them, behind so much of `Blob.pad` that they begin at a multiple of 8
bytes. So they are found without a look at the rest, and can be read where they lie; the rest is
read by protobuf. A message laid out in any other way is read by protobuf alone, with the same
result.
"""

from atoll.protocols import wire_pb2
from atoll.protocols.blobs import Bulk
from atoll.protocols.blobwire import INLINE_FIELD, PAD_FIELD
from atoll.protocols.messages import PAYLOAD_FIELD, RESULT_FIELD
from atoll.protocols.packed import ALIGNED, MORE, tag, varint
from atoll.protocols.sent import MODEL_FIELD, ORDER_FIELD

PAD, INLINE = tag(PAD_FIELD), tag(INLINE_FIELD)
RESULT = (tag(RESULT_FIELD), tag(PAYLOAD_FIELD))
ORDER = (tag(ORDER_FIELD), tag(MODEL_FIELD))
FURTHER = (tag(MORE), *ORDER)


def client_message(data: bytes) -> tuple[wire_pb2.ClientMessage, Bulk]:
    """A message and the bytes of its payload; empty: protobuf read them, if any. DecodeError."""
    rest, bulk = lift(data, RESULT) or (data, b"")
    return wire_pb2.ClientMessage.FromString(rest), bulk


def server_messages(data: bytes) -> list[tuple[wire_pb2.ServerMessage, Bulk]]:
    """The messages that came in one, each with the bytes of its model. DecodeError."""
    if data.startswith(FURTHER[0]):  # an order that others go before stands first in the bytes
        rest, bulk = lift(data, FURTHER) or (data, b"")
        message = wire_pb2.ServerMessage.FromString(rest)
        first, *others = message.more
        return [(message, b""), (first, bulk), *((other, b"") for other in others)]
    rest, bulk = lift(data, ORDER) or (data, b"")
    message = wire_pb2.ServerMessage.FromString(rest)
    return [(message, bulk), *((further, b"") for further in message.more)]


def lift(data: bytes, path: tuple[bytes, ...]) -> tuple[bytes, memoryview] | None:
    """A serialized message without its bulk, and that. `path`: the tags of the messages around it.
    None: it is small, or does not lie where we put it."""
    at, end, lengths = 0, len(data), []
    for mark in path:
        length = _length(data, at, mark)
        at += len(mark) + 3
        if length is None or at + length > end:
            return None
        end = at + length
        lengths.append(length)
    begin = at
    if data.startswith(PAD, at) and at + 2 < end and data[at + 1] < ALIGNED:
        at += 2 + data[at + 1]
    length = _length(data, at, INLINE)
    at += 4
    if length is None or at + length > end:
        return None
    rest, gone = data[at + length :], at + length - begin
    for mark, around in zip(reversed(path), reversed(lengths), strict=True):
        shorter = varint(around - gone)
        rest, gone = mark + shorter + rest, gone + 3 - len(shorter)
    return rest, memoryview(data)[at : at + length]


def _length(data: bytes, at: int, mark: bytes) -> int | None:
    """Of the field whose tag is `mark`, if it is there and its length a varint of three bytes."""
    if not data.startswith(mark, at):
        return None
    three = data[at + len(mark) : at + len(mark) + 3]
    if len(three) < 3 or not three[0] & three[1] & 0x80 or three[2] & 0x80:
        return None
    return three[0] & 0x7F | (three[1] & 0x7F) << 7 | three[2] << 14
