"""Named tensors to flat sections and back.

Everything that merges, steps or packs works on one flat float32 vector per group; names and shapes
come back only at the two ends. `payload.py` reads what the other side sent.
"""

import bisect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from atoll.protocols import codecs
from atoll.protocols.blobs import Section
from atoll.protocols.codecs import (
    FP32,
    TILE,
    Codec,
    Decoder,
    Int64,
    as_tensor,
    beside,
    encode_read,
    fitted,
)
from atoll.protocols.codecspec import Chain
from atoll.protocols.errors import ClientError
from atoll.protocols.manifest import TRAVELLING, Group, Manifest, TensorSpec

EXTRA = "extra:"
SAID = "said"  # the extra in which the numbers that an update brings lie
INT64 = Int64()


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
    named: dict[str, Tensor] = {}
    for spec, lo, hi in manifest.spans(group):
        dtype = getattr(torch, spec.dtype)
        part = flat[lo:hi].view(spec.shape)
        named[spec.name] = part if dtype == flat.dtype else part.to(dtype)
    return named


def delta(
    manifest: Manifest, base: Tensor, tensors: Mapping[str, Tensor], out: Tensor | None = None
) -> Tensor:
    """base - local over the trainable tensors, flat float32; `base` is the flat start.

    `out` may be `base` itself where the start is no longer needed. No model-sized scratch.
    """
    if out is None:
        out = torch.empty_like(base)
    for spec, start, end in manifest.spans("trainable"):
        local = _fitting(tensors, spec).reshape(-1)
        for lo in range(start, end, TILE):
            hi = min(lo + TILE, end)
            tile = local[lo - start : hi - start].to("cpu", torch.float32)
            torch.sub(base[lo:hi], tile, out=out[lo:hi])
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
    if tensor.is_complex():
        raise ClientError(
            "FL-C103",
            f"tensor {spec.name!r} is {tensor.dtype}: half of it would be lost",
            f"give real numbers, as {spec.dtype}",
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
            flat = vectors.get(name, torch.empty(0)).cpu()
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
