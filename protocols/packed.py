"""Packed: control messages as bytes, put together by hand where bulk lies in them.

What goes over the wire is exactly what protobuf would write: a nested message is a tag, a length
and its bytes, and the fields of a message may stand one after the other. So a model that goes to
many clients is serialized once, and its bytes are copied once for each, when a message is joined.
Bulk is put first, where `lifted.py` finds it. Stdlib only.
"""

import functools

Parts = tuple[bytes | memoryview, ...]  # of one message, to be joined

MORE = 16  # ClientMessage.more, ServerMessage.more
BULK = 1 << 14  # bytes from which a field is bulk: up to 128 times as many, its length has 3 bytes
ALIGNED = 8  # bytes of the largest number that is read where it lies


def tag(field: int) -> bytes:
    """What stands before the length of a field of bytes, or of a message."""
    return varint(field << 3 | 2)


def nested(field: int, *parts: bytes | memoryview) -> Parts:
    """`parts`, a serialized message, as the field of that number of the message around it."""
    return varint(field << 3 | 2) + varint(sum(map(len, parts))), *parts


def padded(pad: int, before: int, field: int, bulk: bytes | memoryview) -> Parts:
    """`bulk` as a field that begins at a multiple of ALIGNED bytes, behind as much of the field
    `pad` as it takes; `before`: bytes of the message, up to here."""
    head = nested(field, bulk)[0]
    lacks = -(before + 2 + len(head)) % ALIGNED  # 2: the tag of `pad` and its length
    return tag(pad) + bytes([lacks]) + bytes(lacks) + head, bulk


def around(*fields: int) -> int:
    """Bytes before a bulky message that is in others, the first field of each: tags and lengths."""
    return sum(len(tag(field)) + 3 for field in fields)


def size(parts: Parts) -> int:
    """Bytes of the message."""
    return sum(map(len, parts))


@functools.lru_cache(maxsize=1024)  # a run's messages have the same few lengths
def varint(value: int) -> bytes:
    """A number as protobuf writes it: seven bits a byte, the lowest first."""
    assert value >= 0, f"{value}: only numbers from 0 on"
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
