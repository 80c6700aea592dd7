"""Payload: what the other side sent, held to the manifest before one byte is allocated for it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from atoll.protocols.blobs import Section
from atoll.protocols.codecs import TILE, Codec, Decoder, Mapped, all_finite, as_tensor, fits
from atoll.protocols.errors import RemoteError
from atoll.protocols.manifest import TRAVELLING, Manifest
from atoll.protocols.tensors import EXTRA, dtype_of, extra_sections, section_codec, sections_of

Kind = Literal["model", "update"]


@dataclass(slots=True)
class Payload:
    """The bytes of a checked blob and how to read them."""

    sections: tuple[Section, ...]
    view: memoryview
    codec: Codec
    _mapped: dict[str, Mapped] = field(default_factory=dict, compare=False, repr=False)

    def has(self, group: str) -> bool:
        for section in self.sections:  # noqa: SIM110  # any() takes three times as long
            if section.group == group:
                return True
        return False

    def decoder(self, group: str) -> Decoder:
        """Reads the section of `group`, which must be there (see `has`)."""
        mapped = self._mapped.get(group)
        if mapped is not None:
            return mapped
        section, view = self._find(group)
        made = section_codec(group, self.codec).decoder(view, section.count)
        if isinstance(made, Mapped):  # a view: what it holds is held anyway
            self._mapped[group] = made
        return made

    def section(self, group: str) -> memoryview:
        """The bytes of the section of `group`, which must be there (see `has`)."""
        return self._find(group)[1]

    def read(self, group: str) -> Tensor:
        """The whole section. May alias the bytes: never write to it."""
        decoder = self.decoder(group)
        if isinstance(decoder, Mapped):
            return decoder.values
        count = self._find(group)[0].count
        return decoder(0, count, torch.empty(count, dtype=dtype_of(group)))

    def _find(self, group: str) -> tuple[Section, memoryview]:
        at = 0
        for section in self.sections:
            if section.group == group:
                return section, self.view[at : at + section.length]
            at += section.length
        raise KeyError(group)


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
    whole = sections_of(manifest, codec)
    if extras:
        whole += extra_sections(extras)
    total = 0
    for section in sections:
        total += section.length
    if total == size and tuple(sections) == whole:
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
    scratch: Tensor | None = None
    for section in payload.sections:
        if section.group == "buffers_other":
            continue
        decoder = payload.decoder(section.group)
        if isinstance(decoder, Mapped):
            if section.count <= TILE and all_finite(decoder.values):
                continue
        elif (surely := getattr(decoder, "finite", None)) is not None and surely():
            continue
        if scratch is None:
            scratch = torch.empty(min(TILE, max(s.count for s in payload.sections)))
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
