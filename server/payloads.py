"""Payloads: what the journal keeps of an update, as a row of its table, and back."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atoll.protocols import state
from atoll.protocols.blobs import BlobInfo, Bulk, Section
from atoll.protocols.frames import checksums
from atoll.server.redo import Place, RedoLog


@dataclass(slots=True)
class Payload:
    """The bytes of an update, as received: here when small, else in the update store's file."""

    id: str
    info: BlobInfo  # without SHA-256 where there is `data`: its CRC tells whether it is whole
    data: Bulk | None


def row_of(payload: Payload, run: str, place: Place | None) -> list[Any]:
    """id, run, info, segment, offset; the last two None where its bytes lie in the update store."""
    info = payload.info
    told = state.dumps_values(
        {
            "id": info.id,
            "size": info.size,
            "sha256": info.sha256.hex(),
            "crcs": checksums(memoryview(payload.data or b"")),
            "sections": info.sections,
        }
    )
    if place is None:
        return [payload.id, run, told, None, None]
    return [payload.id, run, told, place.segment, place.offset]


def kept(row: Sequence[Any], log: RedoLog) -> Payload:
    """The payload of a row; `data` is empty where a power cut took it."""
    update, _, text, segment, offset = row
    plain = json.loads(text)
    plain["sha256"] = bytes.fromhex(plain["sha256"])
    crcs = plain.pop("crcs")
    sections = tuple(state.load(Section, s) for s in plain.pop("sections"))
    info = BlobInfo(**plain, sections=sections)
    data = log.read(Place(segment, offset), info.size) if segment is not None else None
    if data is not None and checksums(memoryview(data)) != crcs:
        data = b""
    return Payload(str(update), info, data)
