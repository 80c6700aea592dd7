"""Items: the updates that a merge is given, what they hold, and which of them cannot be used."""

from collections.abc import Iterable
from dataclasses import dataclass

from atoll.aggregation.half import Half
from atoll.protocols.errors import RemoteError
from atoll.protocols.manifest import Manifest
from atoll.protocols.payload import Payload, finite
from atoll.protocols.tensors import EXTRA, SAID


@dataclass(slots=True)
class UpdateBytes:
    """One update as it came, checked by `payload.parse`."""

    id: str
    payload: Payload
    client: str = ""


Item = tuple[UpdateBytes, float]  # an update and its raw weight


def said(half: Half, payload: Payload) -> dict[str, float]:
    """The numbers that an update brought."""
    return dict(zip(half.says, payload.read(EXTRA + SAID).tolist(), strict=True))


def spoilt(manifest: Manifest, items: Iterable[Item]) -> dict[str, str]:
    """Which updates hold NaN, Inf or corrupt bytes, each with the reason. Reads all of them."""
    found: dict[str, str] = {}
    for update, _ in items:
        try:
            finite(manifest, update.payload)
        except RemoteError as error:
            found[update.id] = error.message
    return found
