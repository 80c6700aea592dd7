"""Refusals: our errors on the wire, as a message or in the metadata of a call, and back."""

import math
import re
from collections.abc import Iterable

from google.protobuf.message import DecodeError

from atoll.protocols import bounds, wire_pb2
from atoll.protocols.errors import CATALOGUE, AtollError, RefusedError, RemoteError

# What gRPC says around the reason for which there is no connection.
_AROUND = re.compile(r"^failed to connect to all addresses; last error: [A-Z_]+: (ipv[46]:\S+: )?")
ERROR_KEY = "atoll-error-bin"  # trailing metadata of a refused call


def error_to_wire(error: AtollError, order: str = "") -> wire_pb2.Refusal:
    retry = error.retry_seconds if isinstance(error, RemoteError) else None
    return wire_pb2.Refusal(
        code=error.code,
        message=bounds.text(error.message),
        hint=bounds.text(error.hint),
        fatal=retry is None,
        retry_seconds=retry or 0.0,
        order=order,
    )


def error_from_wire(wire: wire_pb2.Refusal) -> RefusedError:
    """What the other side told us; an unknown code stays readable as FL-S100."""
    seconds = wire.retry_seconds
    patience = seconds if math.isfinite(seconds) and 0 <= seconds <= 3600 else 3600.0
    known = wire.code in CATALOGUE
    return RefusedError(
        wire.code if known else "FL-S100",
        ("" if known else f"{bounds.text(wire.code, 16)}: ") + bounds.text(wire.message),
        bounds.text(wire.hint),
        retry_seconds=None if wire.fatal else patience,
    )


def error_metadata(error: AtollError) -> tuple[tuple[str, bytes], ...]:
    """Trailing metadata for a refused call."""
    return ((ERROR_KEY, error_to_wire(error).SerializeToString()),)


def error_from_metadata(metadata: Iterable[tuple[str, str | bytes]] | None) -> RefusedError | None:
    """The refusal in a call's trailing metadata, None where there is none that can be read."""
    for key, value in metadata or ():
        if key == ERROR_KEY and isinstance(value, bytes):
            try:
                return error_from_wire(wire_pb2.Refusal.FromString(value))
            except DecodeError:
                return None
    return None


def plainly(status: str, details: str) -> str:
    """Why a call failed, of gRPC's status and what it says: "Connection refused"."""
    told = bounds.text(details.strip(), 300)
    reason = _AROUND.sub("", told)
    return reason if reason != told else f"{status}: {told}"
