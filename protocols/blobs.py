"""Blobs: bulk bytes addressed by id, made of sections, one tensor group each.

Stdlib only. What the sections mean is the manifest's and the codecs' affair (`tensors.py`), how
they travel is `frames.py`'s.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

CHUNK = 1 << 20  # bytes a chunk carries; measured: 64-256 KiB lose clearly, 1-4 MiB are equal
INLINE = 256 << 10  # payloads up to this size travel inside Order and Result
BLOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-/:+=,]{0,127}")

Bulk = bytes | memoryview  # read only


@dataclass(frozen=True, slots=True)
class Section:
    """One tensor group of a blob, packed."""

    group: str  # "trainable", "buffers_float", "buffers_other", "extra:NAME"
    codec: str  # "fp32", "fp16", "bf16"; "int64" for buffers_other
    count: int  # elements before the codec
    length: int  # bytes; sections lie end to end


@dataclass(slots=True)
class BlobInfo:
    """What a blob is, without its bytes."""

    id: str
    size: int  # bytes
    sha256: bytes  # 32 bytes, or empty where it is not known yet
    sections: tuple[Section, ...]


@dataclass(slots=True)
class Blob:
    """Bytes that can be served: sealed, never rewritten while anyone holds this."""

    info: BlobInfo
    view: memoryview  # of unsigned bytes, read only
    crcs: Sequence[int]  # CRC-32 of each CHUNK of the view
