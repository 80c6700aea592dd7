"""Packing: what training made of a model, as the bytes of an update, and what they leave out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from atoll.client.trainer import Tensors
from atoll.protocols import feedback, tensors
from atoll.protocols.blobs import Section
from atoll.protocols.codecs import TILE, Codec, all_finite, encode_read, reads
from atoll.protocols.codecspec import ErrorFeedback
from atoll.protocols.feedback import State
from atoll.protocols.manifest import Manifest
from atoll.protocols.payload import Payload
from atoll.protocols.tensors import Difference


@dataclass(slots=True)
class Made:
    """What is to be sent: a model and what it was trained from, and the algorithm's extras."""

    base: Payload
    tensors: Tensors  # after training
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # by section
    protect: Callable[[Tensor], object] | None = None  # makes a delta private, in place


@dataclass(slots=True)
class Packed:
    sections: tuple[Section, ...]
    view: memoryview
    after: State  # of the client's error feedback, and of its codec
    finite: bool = False  # it is a delta alone, and no value of it is NaN or Inf


def pack(
    manifest: Manifest,
    made: Made,
    extras: tuple[Section, ...],
    up: Codec,
    rule: ErrorFeedback | None,
    state: State,
    room: Callable[[int], memoryview],
) -> Packed:
    """Delta, buffers and extras, in bytes that `room` gives; an fp32 delta is computed in place.

    Only the delta carries a residual: buffers are values, of which nothing is left to send later.
    """
    planned = tensors.sections_of(manifest, up) + extras
    size = sum([s.length for s in planned])
    varies = getattr(up, "variable", False)
    view = memoryview(bytearray(size)) if varies else room(size)
    at, sections, after, sure = 0, [], state, False
    for section in planned:
        part = view[at : at + section.length]
        codec = tensors.section_codec(section.group, up)
        if section.group != "trainable":
            used = codec.encode(_beside(manifest, made, section), part)
        elif codec.name == "fp32":
            delta = _delta(manifest, made, tensors.as_flat(part))
            used, sure = part, section.count <= TILE and all_finite(delta)
        elif rule is None and made.protect is None and reads(codec):
            difference = Difference(manifest, made.base.read("trainable"), made.tensors)
            used = encode_read(codec, difference, section.count, part)
        else:
            sent = feedback.send(codec, rule, _delta(manifest, made), state, part)
            used, after = sent.payload, sent.state
        exact = len(used) == section.length
        sections.append(section if exact else replace(section, length=len(used)))
        at += len(used)
    if varies:
        packed = room(at)
        packed[:] = view[:at]
        view = packed
    return Packed(tuple(sections), view, after, sure and len(planned) == 1)


def _delta(manifest: Manifest, made: Made, out: Tensor | None = None) -> Tensor:
    delta = tensors.delta(manifest, made.base.read("trainable"), made.tensors, out)
    if made.protect is not None:
        made.protect(delta)
    return delta


def _beside(manifest: Manifest, made: Made, section: Section) -> Tensor:
    """Extras and buffers. Buffers cannot be protected: then the server's go back."""
    if section.group in made.extras:
        return made.extras[section.group]
    group = tensors.group_of(section)
    if made.protect is not None:
        return made.base.read(group)
    return tensors.flatten(manifest, made.tensors, group)
