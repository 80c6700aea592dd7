"""Sent: a version of the model on its way down, whole or as what is to be added to one before.

An order brings one to be trained from, an evaluation one to be judged; both say it in the same
fields. `chains.py` says what the differences are. As in `messages.py`, whatever is wrong is
RemoteError FL-W101 with the value.
"""

from dataclasses import dataclass

from atoll.protocols import bounds, wire_pb2
from atoll.protocols.blobs import BlobInfo, Bulk
from atoll.protocols.blobwire import blob_from_wire, blob_to_wire, packed_blob
from atoll.protocols.packed import MORE, Parts, around, nested

ORDER_FIELD = 3  # ServerMessage.order
MODEL_FIELD = 5  # Order.model
BEFORE = around(MORE, ORDER_FIELD, MODEL_FIELD)  # a model's bytes: most orders follow an outcome


@dataclass(slots=True)
class Sent:
    """`model`: None where it comes as differences."""

    version: int
    model: BlobInfo | None
    inline: Bulk = b""  # of the model; empty: to be fetched
    base: str = ""  # `base_encoding` of wire.proto; empty: `model` is all of it
    differences: tuple[tuple[BlobInfo, Bulk], ...] = ()  # each with its bytes, if inline

    @property
    def here(self) -> bool:
        """Whether nothing has to be fetched."""
        if self.model is not None:
            return len(self.inline) > 0
        return all(inline for _, inline in self.differences)


def sent_to_order(sent: Sent) -> wire_pb2.Order:
    """The fields of an order that say how its model comes; the same for all who hold the same."""
    return wire_pb2.Order(
        model=None if sent.model is None else blob_to_wire(sent.model, sent.inline),
        base_encoding=sent.base,
        differences=[blob_to_wire(info, inline) for info, inline in sent.differences],
    )


def packed_sent(sent: Sent) -> Parts:
    """`sent_to_order`, serialized: the bytes of a model that it has whole are not copied."""
    if sent.model is None:
        return (sent_to_order(sent).SerializeToString(),)
    base = wire_pb2.Order(base_encoding=sent.base).SerializeToString()
    return *nested(MODEL_FIELD, *packed_blob(sent.model, sent.inline, BEFORE)), base


def sent_to_evaluate(sent: Sent) -> wire_pb2.Evaluate:
    return wire_pb2.Evaluate(
        version=sent.version,
        model=None if sent.model is None else blob_to_wire(sent.model, sent.inline),
        base_encoding=sent.base,
        differences=[blob_to_wire(info, inline) for info, inline in sent.differences],
    )


def sent_from_wire(wire: wire_pb2.Order | wire_pb2.Evaluate, bulk: Bulk = b"") -> Sent:
    """How the model of an order, or of a version to be judged, comes."""
    base = bounds.name("base_encoding", wire.base_encoding, bounds.BASE)
    version = bounds.count("version", wire.version)
    _, at, held = base.partition("@")
    if not at:
        if wire.differences:
            raise bounds.malformed(f"{len(wire.differences)} differences to no base")
        return Sent(version, *blob_from_wire(wire.model, bulk), base)
    if wire.HasField("model") or int(held) + len(wire.differences) != version:
        raise bounds.malformed(
            f"version {version} as {len(wire.differences)} differences to {base}"
        )
    if len(wire.differences) > bounds.MAX_DIFFERENCES:
        raise bounds.malformed(
            f"{len(wire.differences)} differences, at most {bounds.MAX_DIFFERENCES} are taken"
        )
    return Sent(version, None, b"", base, tuple(map(blob_from_wire, wire.differences)))
