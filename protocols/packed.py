"""Packed: control messages as bytes, put together by hand where bulk lies in them.

What goes over the wire is exactly what protobuf would write: a nested message is a tag, a length
and its bytes, and the fields of a message may stand one after the other. So a model that goes to
many clients is serialized once, and its bytes are copied once for each, when a message is joined.
Stdlib only.
"""

import functools

Parts = tuple[bytes | memoryview, ...]  # of one message, to be joined

MORE = 16  # ClientMessage.more, ServerMessage.more


def nested(field: int, *parts: bytes | memoryview) -> Parts:
    """`parts`, a serialized message, as the field of that number of the message around it."""
    return varint(field << 3 | 2) + varint(sum(map(len, parts))), *parts


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
