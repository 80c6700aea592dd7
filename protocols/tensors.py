"""Named tensors to flat sections and back, and the strict reading of what the other side sent.

Everything that merges, steps or packs works on one flat float32 vector per group; names and shapes
come back only at the two ends. What arrives is checked against the manifest before one byte is
allocated for it.
"""

import bisect
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from atoll.protocols import codecs
from atoll.protocols.blobs import Section
from atoll.protocols.codecs import (
    TILE,
    Codec,
    Decoder,
    Fp32,
    Int64,
    all_finite,
    as_tensor,
    beside,
    encode_read,
    fits,
    fitted,
)
from atoll.protocols.codecspec import Chain
from atoll.protocols.errors import ClientError, RemoteError
from atoll.protocols.manifest import TRAVELLING, Group, Manifest, TensorSpec

Kind = Literal["model", "update"]
EXTRA = "extra:"
SAID = "said"  # the extra in which the numbers that an update brings lie
INT64 = Int64()
FP32 = Fp32()


def dtype_of(group: str) -> torch.dtype:
    """What a flat section of `group` holds."""
    return torch.int64 if group == "buffers_other" else torch.float32


def flatten(
    manifest: Manifest, tensors: Mapping[str, Tensor], group: Group, out: Tensor | None = None
) -> Tensor:
    """The tensors of `group` laid end to end, float32 (`buffers_other`: int64), on the CPU.

    Raises ClientError FL-C103 naming the tensor that is missing or has another shape.
    """
    if out is None:
        out = torch.empty(manifest.counts[group], dtype=dtype_of(group))
    for spec, lo, hi in manifest.spans(group):
        out[lo:hi].view(spec.shape).copy_(_fitting(tensors, spec))
    return out


def unflatten(manifest: Manifest, group: Group, flat: Tensor) -> dict[str, Tensor]:
    """The tensors of `group` by name: views of `flat` where the model's dtype is flat's own."""
    return {
        spec.name: flat[lo:hi].view(spec.shape).to(getattr(torch, spec.dtype))
        for spec, lo, hi in manifest.spans(group)
    }


def delta(
    manifest: Manifest, base: Tensor, tensors: Mapping[str, Tensor], out: Tensor | None = None
) -> Tensor:
    """base - local over the trainable tensors, flat float32; `base` is the flat start.

    `out` may be `base` itself where the start is no longer needed. No model-sized scratch.
    """
    if out is None:
        out = torch.empty_like(base)
    read = Difference(manifest, base, tensors)
    for lo in range(0, base.numel(), TILE):
        hi = min(lo + TILE, base.numel())
        read(lo, hi, out[lo:hi])
    return out


class Difference:
    """`delta`, tile by tile: a `Decoder`."""

    def __init__(self, manifest: Manifest, base: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Raises ClientError FL-C103 naming the tensor that is missing or has another shape."""
        spans = list(manifest.spans("trainable"))
        self._base, self._ends = base, [hi for _, _, hi in spans]
        self._locals = [(lo, _fitting(tensors, spec).reshape(-1)) for spec, lo, _ in spans]

    def __call__(self, lo: int, hi: int, out: Tensor) -> Tensor:
        out = out[: hi - lo]
        at, k = lo, bisect.bisect_right(self._ends, lo)
        while at < hi:
            start, local = self._locals[k]
            end = min(hi, self._ends[k])
            tile = local[at - start : end - start].to("cpu", torch.float32)
            torch.sub(self._base[at:end], tile, out=out[at - lo : end - lo])
            at, k = end, k + 1
        return out


def _fitting(tensors: Mapping[str, Tensor], spec: TensorSpec) -> Tensor:
    if spec.name not in tensors:
        raise ClientError(
            "FL-C103",
            f"tensor {spec.name!r} {spec.shape} is missing",
            "the model must be the run's: same names, same shapes",
        )
    tensor = tensors[spec.name]
    if tuple(tensor.shape) != spec.shape:
        raise ClientError(
            "FL-C103",
            f"tensor {spec.name!r} is {tuple(tensor.shape)}, the run expects {spec.shape}",
            "the model must be the run's: same names, same shapes",
        )
    return tensor.detach()


def as_flat(view: memoryview) -> Tensor:
    """Writable bytes as the flat float32 vector they hold."""
    return as_tensor(view, torch.float32)


def group_of(section: Section) -> Group:
    """The group a travelling section holds."""
    assert section.group in TRAVELLING, section.group
    return section.group


# ---- packing -------------------------------------------------------------------------------


def codec_for(manifest: Manifest, spec: str | Chain) -> Codec:
    """The codec that `spec` names, for a model of this manifest. Raises as `codecs.codec`."""
    return fit_to(manifest, codecs.codec(spec))


def fit_to(manifest: Manifest, codec: Codec) -> Codec:
    """`codec` for a model of this manifest: some want to know the shapes."""
    return fitted(codec, [t.shape for t in manifest.tensors if t.group == "trainable"])


def section_codec(group: str, codec: Codec) -> Codec:
    """What packs a section of `group` in a run whose codec is `codec`."""
    if group == "trainable":
        return codec
    if group.startswith(EXTRA):  # both sides must count exactly the same of it
        return FP32
    return INT64 if group == "buffers_other" else beside(codec)


def sections_of(
    manifest: Manifest, codec: Codec, groups: Collection[str] = TRAVELLING
) -> tuple[Section, ...]:
    """The sections in which `groups` travel: in the order of TRAVELLING, empty ones left out.

    Under a codec whose sections vary in length, the longest that they can be.
    """
    if groups is TRAVELLING and codec.name in manifest.plans:
        return manifest.plans[codec.name]
    made = []
    for group in TRAVELLING:
        count = manifest.counts[group]
        if group in groups and count:
            packs = section_codec(group, codec)
            made.append(Section(group, packs.name, count, packs.size(count)))
    if groups is TRAVELLING:
        manifest.plans[codec.name] = tuple(made)
    return tuple(made)


def extra_sections(extras: Mapping[str, int]) -> tuple[Section, ...]:
    """The sections of named extras with their counts, in their order."""
    return tuple(
        Section(EXTRA + name, FP32.name, count, FP32.size(count)) for name, count in extras.items()
    )


def extra_groups(
    extras: Mapping[str, int],
    vectors: Mapping[str, Tensor],
    said: Mapping[str, float],
    says: Sequence[str],
) -> dict[str, Tensor]:
    """What travels beside a delta, by section; the numbers `says` make up the section of SAID.

    ClientError FL-C103 where a vector or a number is missing or has another size.
    """
    found: dict[str, Tensor] = {}
    for name, count in extras.items():
        if name == SAID:
            missing = [number for number in says if number not in said]
            flat = torch.tensor([] if missing else [said[number] for number in says])
        else:
            flat = vectors.get(name, torch.empty(0))
        if flat.numel() != count:
            raise ClientError(
                "FL-C103",
                f"the trainer gave {flat.numel()} values of {name!r}, the run's local algorithm "
                f"asks for {count}",
                "train with the run's local algorithm",
            )
        found[EXTRA + name] = flat
    return found


def pack(
    manifest: Manifest,
    groups: Mapping[Group, Tensor] | Mapping[str, Tensor],
    codec: Codec,
    out: memoryview | None = None,
    extras: Mapping[str, int] | None = None,
    read: Decoder | None = None,
) -> tuple[tuple[Section, ...], memoryview]:
    """Flat vectors as the bytes of a blob: its sections, and the bytes.

    `read`: gives the trainable values in place of `groups`, to a codec that has `encode_read`.

    `out`, if given, is exactly as long as `sections_of`; under a codec whose sections vary in
    length, the bytes are the part of it that was needed. One fp32 section alone is not copied.
    """
    flats = cast("Mapping[str, Tensor]", groups)
    sections = sections_of(manifest, codec, flats) + extra_sections(extras or {})
    if out is None and len(sections) == 1 and sections[0].codec in ("fp32", "int64"):
        group = sections[0].group
        return sections, section_codec(group, codec).encode(flats[group])
    size = sum(s.length for s in sections)
    out = memoryview(bytearray(size)) if out is None else out
    assert len(out) == size, "out must be exactly as long as the sections"
    at, made = 0, []
    for section in sections:
        flat = flats[section.group]
        assert flat.numel() == section.count, f"{section.group}: {flat.numel()} values"
        packs = section_codec(section.group, codec)
        place = out[at : at + section.length]
        if read is not None and section.group == "trainable":
            used = encode_read(packs, read, section.count, place)
        else:
            used = packs.encode(flat, place)
        made.append(replace(section, length=len(used)))
        at += len(used)
    return tuple(made), out if at == size else out[:at]


# ---- strict reading ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Payload:
    """The bytes of a checked blob and how to read them."""

    sections: tuple[Section, ...]
    view: memoryview
    codec: Codec

    def has(self, group: str) -> bool:
        return any(s.group == group for s in self.sections)

    def decoder(self, group: str) -> Decoder:
        """Reads the section of `group`, which must be there (see `has`)."""
        count = next((s.count for s in self.sections if s.group == group), 0)
        return section_codec(group, self.codec).decoder(self.section(group), count)

    def section(self, group: str) -> memoryview:
        """The bytes of the section of `group`, which must be there (see `has`)."""
        at = 0
        for section in self.sections:
            if section.group == group:
                return self.view[at : at + section.length]
            at += section.length
        raise KeyError(group)

    def surely_finite(self) -> bool:
        """A quick look, for one small float32 section: its squares have a sum. False says nothing.

        Three times as fast as a tensor made for it.
        """
        if len(self.sections) != 1 or self.sections[0].count > TILE or self.codec.name != "fp32":
            return False
        if self.sections[0].group == "buffers_other":
            return False
        values = np.frombuffer(self.view, np.float32)
        with np.errstate(all="ignore"):
            return math.isfinite(np.dot(values, values))

    def read(self, group: str) -> Tensor:
        """The whole section. May alias the bytes: never write to it."""
        count = next(s.count for s in self.sections if s.group == group)
        return self.decoder(group)(0, count, torch.empty(count, dtype=dtype_of(group)))


def parse(
    manifest: Manifest,
    sections: Sequence[Section],
    view: memoryview,
    codec: Codec,
    kind: Kind,
    extras: Mapping[str, int] | None = None,
) -> Payload:
    """A blob from the other side, checked. Raises RemoteError FL-W104; allocates nothing."""
    check(manifest, sections, len(view), codec, kind, extras)
    return Payload(tuple(sections), view, codec)


def check(
    manifest: Manifest,
    sections: Sequence[Section],
    size: int,
    codec: Codec,
    kind: Kind,
    extras: Mapping[str, int] | None = None,
) -> None:
    """Whether `sections` can be a `kind` of this manifest in `size` bytes. RemoteError FL-W104.

    A model has every group that is not empty; an update may leave buffers out. `extras` are the
    extra sections that must be there, with their counts. Needs no bytes, so an upload is refused
    unsent.
    """
    whole = sections_of(manifest, codec) + extra_sections(extras or {})
    if tuple(sections) == whole and sum(s.length for s in sections) == size:
        return  # all there, in order: nearly every blob
    allowed = {f"{EXTRA}{name}": count for name, count in (extras or {}).items()}
    seen: set[str] = set()
    for section in sections:
        _check_section(manifest, section, codec, allowed)
        if section.group in seen:
            raise _mismatch(f"section {section.group!r} stands twice")
        seen.add(section.group)
    order = [*TRAVELLING, *allowed]
    if [s.group for s in sections] != sorted(seen, key=order.index):
        raise _mismatch(f"sections stand as {[s.group for s in sections]}, expected {order}")
    for group in TRAVELLING if kind == "model" else TRAVELLING[:1]:
        if manifest.counts[group] and group not in seen:
            raise _mismatch(f"section {group!r} of {manifest.counts[group]} values is missing")
    for name, count in allowed.items():
        if name not in seen:
            raise _mismatch(f"section {name!r} of {count} values is missing")
    total = sum(s.length for s in sections)
    if total != size:
        raise _mismatch(f"the sections are {total} bytes, the payload is {size}")


def read_extras(
    sections: Sequence[Section], view: memoryview, expected: Mapping[str, int]
) -> dict[str, Tensor]:
    """The vectors of a blob of extras by name, over its bytes. RemoteError FL-W104 where one is
    not expected, or has another size."""
    if sum(s.length for s in sections) != len(view):
        raise _mismatch(f"extras of {len(view)} bytes, their sections say otherwise")
    found, at = {}, 0
    for section in sections:
        name = section.group.removeprefix(EXTRA)
        count = expected.get(name)
        if count is None or section not in extra_sections({name: count}):
            raise _mismatch(f"section {section} is none of the extras {dict(expected)}")
        found[name] = as_tensor(view[at : at + section.length], torch.float32)
        at += section.length
    return found


def _check_section(
    manifest: Manifest, section: Section, codec: Codec, allowed: Mapping[str, int]
) -> None:
    name = section.group
    if name in TRAVELLING:
        expected = manifest.counts[name]
    elif name in allowed:
        expected = allowed[name]
    else:
        raise _mismatch(f"section {name!r} is not one of {[*TRAVELLING, *allowed]}")
    packs = section_codec(name, codec)
    if section.codec != packs.name:
        raise _mismatch(f"section {name!r} is packed as {section.codec!r}, expected {packs.name!r}")
    if section.count != expected or not expected:
        raise _mismatch(
            f"section {name!r} has {section.count} values, expected {expected}"
            + _tensors_of(manifest, name)
        )
    if not fits(packs, expected, section.length):
        raise _mismatch(
            f"section {name!r} of {expected} {packs.name} values has {section.length} bytes, "
            f"expected {packs.size(expected)}"
        )


def _tensors_of(manifest: Manifest, group: str) -> str:
    names = [t.name for t in manifest.tensors if t.group == group]
    return f" ({names[0]!r} to {names[-1]!r})" if names else ""


def _mismatch(what: str) -> RemoteError:
    return RemoteError("FL-W104", what, "send the tensors of the run's manifest, in its order")


# ---- finite values -------------------------------------------------------------------------


def finite(manifest: Manifest, payload: Payload) -> None:
    """Raises RemoteError FL-W106 naming the first NaN or Inf: tensor, index and value. One read."""
    if payload.surely_finite():
        return
    largest = max((s.count for s in payload.sections), default=0)
    scratch = torch.empty(min(TILE, largest))
    for section in payload.sections:
        if section.group == "buffers_other":
            continue
        decoder = payload.decoder(section.group)
        surely = getattr(decoder, "finite", None)
        if surely is not None and surely():
            continue
        for at, tile in tiles(decoder, section.count, scratch):
            if not all_finite(tile):
                first = int((~torch.isfinite(tile)).nonzero()[0])
                raise RemoteError(
                    "FL-W106",
                    f"{place(manifest, section.group, at + first)} is {float(tile[first])}",
                    "the training diverged: lower the learning rate or clip gradients",
                )


def tiles(decoder: Decoder, count: int, scratch: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each tile of a section with the index of its first element; a tile ends with the next."""
    for lo in range(0, count, TILE):
        yield lo, decoder(lo, min(lo + TILE, count), scratch)


def place(manifest: Manifest, group: str, index: int) -> str:
    """Which element of which tensor `index` of a flat section is, e.g. "tensor 'fc.bias'[3]"."""
    if group in TRAVELLING:
        for spec, lo, hi in manifest.spans(group):
            if lo <= index < hi:
                return f"tensor {spec.name!r}{_unravel(index - lo, spec.shape)}"
    return f"section {group!r}[{index}]"


def _unravel(index: int, shape: tuple[int, ...]) -> list[int]:
    where = []
    for i in range(len(shape)):
        inner = math.prod(shape[i + 1 :])
        where.append(index // inner)
        index %= inner
    return where
