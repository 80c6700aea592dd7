"""Blobwire: descriptions of blobs on the wire, with the bytes of small ones, read strictly.

As `messages.py`, which they are part of: whatever is wrong is RemoteError FL-W101 with the value,
or FL-W103 where it is too large.
"""

import functools
from collections.abc import Sequence

from atoll.protocols import bounds, wire_pb2
from atoll.protocols.blobs import BLOB_ID, INLINE, BlobInfo, Bulk, Section
from atoll.protocols.errors import RemoteError
from atoll.protocols.packed import BULK, Parts, nested, padded

INLINE_FIELD, PAD_FIELD = 5, 6  # Blob.inline, .pad


def blob_to_wire(info: BlobInfo, inline: Bulk = b"") -> wire_pb2.Blob:
    return wire_pb2.Blob(
        id=info.id,
        size=info.size,
        sha256=info.sha256,
        sections=_wire_sections(info.sections),
        inline=bytes(inline),
    )


def _wire_sections(sections: Sequence[Section]) -> list[wire_pb2.Section]:
    return [
        wire_pb2.Section(group=s.group, codec=s.codec, count=s.count, length=s.length)
        for s in sections
    ]


@functools.lru_cache(maxsize=64)
def packed_sections(sections: tuple[Section, ...]) -> bytes:
    """A serialized Blob with nothing but these."""
    return wire_pb2.Blob(sections=_wire_sections(sections)).SerializeToString()


def packed_blob(info: BlobInfo, inline: Bulk, before: int) -> Parts:
    """A serialized Blob, whose inline bytes are not copied; empty: they are not in it. `before`:
    bytes before it in the message that is sent."""
    alone = wire_pb2.Blob(id=info.id, size=info.size, sha256=info.sha256).SerializeToString()
    held: Parts = ()
    if len(inline) >= BULK:
        held = padded(PAD_FIELD, before, INLINE_FIELD, inline)
    elif len(inline):
        held = nested(INLINE_FIELD, inline)
    return *held, alone, packed_sections(info.sections)


def blob_from_wire(wire: wire_pb2.Blob, bulk: Bulk = b"") -> tuple[BlobInfo, Bulk]:
    """The blob's description and its inline bytes (empty: to be fetched, or an empty blob), which
    are `bulk` where they were taken out of it before (`lifted.py`)."""
    if len(wire.sections) > bounds.MAX_SECTIONS:
        raise bounds.malformed(
            f"{len(wire.sections)} sections, at most {bounds.MAX_SECTIONS} are taken"
        )
    sections, length = _sections(
        tuple((s.group, s.codec, s.count, s.length) for s in wire.sections)
    )
    size = bounds.count("blob size", wire.size)
    if length != size:
        raise bounds.malformed(f"blob size {size}, its sections have {length}")
    if len(wire.sha256) not in (0, 32):
        raise bounds.malformed(f"a SHA-256 of {len(wire.sha256)} bytes")
    inline = wire.inline or bulk  # each look at it is a copy
    if len(inline) > INLINE:
        raise RemoteError(
            "FL-W103", f"{len(inline)} bytes inline, the limit is {INLINE}", "send a blob"
        )
    if len(inline) not in (0, size):
        raise bounds.malformed(f"blob size {size}, but {len(inline)} bytes inline")
    return BlobInfo(bounds.name("blob id", wire.id, BLOB_ID), size, wire.sha256, sections), inline


@functools.lru_cache(maxsize=64)  # a run's blobs have the same few
def _sections(told: tuple[tuple[str, str, int, int], ...]) -> tuple[tuple[Section, ...], int]:
    """Sections, and their bytes together."""
    sections = tuple(
        Section(
            group=bounds.name("section group", group, bounds.GROUP),
            codec=bounds.name("section codec", codec, bounds.CODEC),
            count=bounds.count("section count", count),
            length=bounds.count("section length", length),
        )
        for group, codec, count, length in told
    )
    if len({s.group for s in sections}) != len(sections):
        raise bounds.malformed("a section group stands twice")
    return sections, sum(s.length for s in sections)
