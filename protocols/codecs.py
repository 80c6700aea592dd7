"""Codecs: how a section of float values is packed into bytes, and read back tile by tile.

A codec turns a flat float32 vector into little-endian bytes once, and gives a decoder that hands
out any tile of it, so that a merge over many updates never unpacks a whole one. `fp32` is the
mapped bytes themselves; each lossy codec has a file of its own, `codec_*.py`. What a user may write
is `codecspec.py`'s affair, and what becomes of the part that a codec loses is `feedback.py`'s.
"""

import functools
import math
import sys
import typing
import warnings
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from atoll.protocols import slots
from atoll.protocols.codecspec import BUILTIN, Chain, known, parse
from atoll.protocols.errors import UsageError

assert sys.byteorder == "little", "sections are little-endian and are mapped, not converted"

with warnings.catch_warnings():  # torch warns once that a tensor over read-only bytes is writable
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)

TILE = 1 << 20  # elements; half of it costs 3 % more, tiles that fit the L2 cache 10-70 %
FAINT = 1e-25  # of a sum of squares in fp32, below which too much of it may have been lost


class Decoder(Protocol):
    """Elements [lo, hi) of one section as values; they may lie in `out` or in the bytes themselves.

    `out` is scratch of at least hi - lo elements. Never write to what is returned. Bytes that no
    encoder made are RemoteError FL-W105, here or when the decoder is made.

    May have `accumulate(lo, hi, total, weight, spare)`, which adds weight * values to `total`
    without laying them out first; `spare` is scratch. See `accumulate` below. And `finite()`: True
    where no value can be NaN or Inf; False says nothing.
    """

    def __call__(self, lo: int, hi: int, out: Tensor) -> Tensor: ...


class Codec(Protocol):
    """How float32 values become bytes. What it remembers, if anything, its caller keeps for it.

    May declare what a mix of parts has to know (`atoll.protocols.facts`): `gives` "lossy",
    "sparse", "sign", "low_rank". And, False where it does not:

    - `trainable_only`: it packs trainable tensors; buffers and extras beside them go as fp32, where
      a zero for a running variance or a control variate would be a lie
    - `variable`: `size` is the most bytes a section can have, not what it has
    - `quantised`: what it writes has few values, so that zstd may find something

    and may have

    - `fit(shapes)`: the same codec, for tensors of these shapes laid end to end
    - `start(count)`: named tensors that it remembers from one encoding to the next, and
      `encode_from(values, state, out) -> (bytes, state)`; `encode` then starts afresh every time
    - `encode_read(read, count, out)`: `encode` of values that a `Decoder` reads, tile by tile from
      the front
    - `contractive()`: the same codec for use with error feedback and in chains of models, where it
      is to leave out, but not to make up for what it left out
    """

    @property
    def name(self) -> str:
        """As it stands in a section, e.g. "bf16"."""

    def size(self, count: int) -> int:
        """Bytes of a section of `count` values."""

    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        """Flat float32 `values` as bytes; into `out`, of exactly `size(count)` bytes, if given.

        They lie on the CPU, wherever they were trained (see `tensors.flatten` and `delta`), so that
        the same values give the same bytes. NaN and Inf are not hidden: they come back as
        something that is not finite.
        """

    def decoder(self, payload: memoryview, count: int) -> Decoder:
        """A reader of `count` values in `payload`, whose length was checked before."""


class Fp32:
    """The values as they are: no copy when encoding a contiguous vector, none when decoding."""

    name = "fp32"

    def size(self, count: int) -> int:
        return 4 * count

    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        if out is None:
            return as_bytes(values)
        out[:] = as_bytes(values)
        return out

    def decoder(self, payload: memoryview, count: int) -> Decoder:
        return Mapped(as_tensor(payload, torch.float32))


FP32 = Fp32()


class _Half:
    """Two bytes a value, rounded to nearest even.

    A finite value beyond the range becomes the largest finite one: one exploded element costs its
    own size, where refusing would cost the client its whole work and Inf would cost the run its
    model. NaN and Inf stay what they are, so that the check for them still sees them.
    """

    name: str
    dtype: torch.dtype
    gives: typing.ClassVar[frozenset[str]] = frozenset({"lossy"})

    def size(self, count: int) -> int:
        return 2 * count

    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        out = room(self, values, out, align=1)
        halves = torch.frombuffer(out, dtype=self.dtype) if len(out) else values.to(self.dtype)
        for lo in range(0, values.numel(), TILE):
            tile = values[lo : lo + TILE]
            half = halves[lo : lo + TILE].copy_(tile)
            if not all_finite(half):
                overflown = torch.isinf(half) & torch.isfinite(tile)
                limit = torch.finfo(self.dtype).max
                half[overflown] = torch.copysign(torch.tensor(limit), tile[overflown]).to(half)
        return out

    def decoder(self, payload: memoryview, count: int) -> Decoder:
        return _Widened(as_tensor(payload, self.dtype))


class Fp16(_Half):
    """IEEE half: 11 significant bits, up to 65504, below 6e-8 zero."""

    name = "fp16"
    dtype = torch.float16


class Bf16(_Half):
    """bfloat16: 8 significant bits, the range of float32."""

    name = "bf16"
    dtype = torch.bfloat16


class Int64:
    """What `buffers_other` travels as. Not a choice: counters are not rounded."""

    name = "int64"

    def size(self, count: int) -> int:
        return 8 * count

    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        data = as_bytes(values)
        if out is None:
            return data
        out[:] = data
        return out

    def decoder(self, payload: memoryview, count: int) -> Decoder:
        return Mapped(as_tensor(payload, torch.int64))


def codec(spec: str | Chain) -> Codec:
    """The codec that packs in the chain `spec`. Raises UsageError FL-S101, FL-S102 or FL-S103.

    Only for names from our own configuration: a text from the other side goes through
    `codecspec.from_remote` first, since `module:object` would import what a stranger wrote.
    """
    chain = known(parse(spec) if isinstance(spec, str) else spec)
    found: object = slots.find("codec", chain.name, BUILTIN)
    if callable(found):
        made = functools.partial(found, *chain.args) if chain.args else found
        found = slots.call("codec", chain.text, made, dict(chain.params))
    elif chain.args or chain.params:
        raise UsageError(
            "FL-S102", f"codec {chain.text!r} takes no parameters", f"write {chain.name}"
        )
    if not all(hasattr(found, part) for part in ("name", "size", "encode", "decoder")):
        raise UsageError(
            "FL-S102",
            f"codec {chain.text!r} is a {type(found).__name__}",
            "a codec has name, size, encode and decoder: see atoll.protocols.codecs.Codec",
        )
    made_codec = typing.cast("Codec", found)
    if chain.feedback is not None:
        made_codec = contracted(made_codec)
    if chain.own:
        from atoll.protocols.codec_own import Own

        made_codec = Own(made_codec, chain.text)
    if chain.zstd is None:
        return made_codec
    from atoll.protocols.codec_zstd import pressed  # it is built on this file

    return pressed(made_codec, chain.zstd)


def fitted(one: Codec, shapes: Sequence[tuple[int, ...]]) -> Codec:
    """`one` for tensors of these shapes laid end to end, where it wants to know them."""
    fit = getattr(one, "fit", None)
    return one if fit is None else typing.cast("Codec", fit(shapes))


def beside(one: Codec) -> Codec:
    """What packs the buffers and extras that travel beside trainable tensors packed by `one`."""
    return FP32 if getattr(one, "trainable_only", False) else one


def fits(one: Codec, count: int, length: int) -> bool:
    """Whether `length` bytes can be a section of `count` values."""
    most = one.size(count)
    return length == most or (0 < length < most and getattr(one, "variable", False))


def accumulate(
    decode: Decoder, lo: int, hi: int, total: Tensor, weight: float, spare: Tensor
) -> None:
    """total += weight * values of [lo, hi); `spare` is scratch of at least hi - lo elements.

    Straight into the sum where the decoder can. Every element is rounded in the same way whatever
    the tile, but perhaps not as by decoding first: see `tensors.apply` for bits that must be equal.
    """
    straight = getattr(decode, "accumulate", None)
    if straight is None:
        total.add_(decode(lo, hi, spare), alpha=weight)
    else:
        straight(lo, hi, total, weight, spare)


def reads(one: Codec) -> bool:
    """Whether values need not lie anywhere for `one` to pack them: see `encode_read`."""
    return hasattr(one, "encode_read")


def contracted(one: Codec) -> Codec:
    """The same codec where what it leaves out is sent later: it must not make up for it, too."""
    contractive = getattr(one, "contractive", None)
    return one if contractive is None else typing.cast("Codec", contractive())


def encode_read(one: Codec, read: Decoder, count: int, out: memoryview) -> memoryview:
    """What `one`, which `reads`, makes of `count` values that `read` gives tile by tile."""
    packed = typing.cast("typing.Any", one).encode_read(read, count, out)
    return typing.cast("memoryview", packed)


def room(one: Codec, values: Tensor, out: memoryview | None, align: int = 4) -> memoryview:
    """Where to encode `values`: `out`, which begins at a multiple of `align`, or new bytes."""
    size = one.size(values.numel())
    if out is None:
        return memoryview(bytearray(size))
    assert len(out) == size, "out must be exactly size(count) bytes"
    aligned = not size or np.frombuffer(out, np.uint8).ctypes.data % align == 0
    assert aligned, "out must be aligned: `as_tensor` would write into a copy"
    return out


def as_bytes(values: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    assert values.is_contiguous(), "only a contiguous tensor lies in memory as it travels"
    data: typing.Any = values.reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def as_tensor(view: memoryview, dtype: torch.dtype) -> Tensor:
    """A flat tensor over these bytes, without a copy where they are aligned.

    Where `view` is read-only, so is the tensor, although torch cannot know it: never write to it.
    """
    if len(view) == 0:
        return torch.empty(0, dtype=dtype)
    values = torch.frombuffer(view, dtype=dtype)
    if values.data_ptr() % dtype.itemsize:  # int64 after an odd number of float32
        return torch.frombuffer(bytearray(view), dtype=dtype)
    return values


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or Inf. One read: elements are looked at only if the sum is not."""
    return math.isfinite(values.sum(dtype=torch.float32)) or bool(torch.isfinite(values).all())


def square(values: Tensor) -> float:
    """Their squared L2 norm; not finite where one of them is not. fp32, flat, a tile of some.

    One read in fp32, which is as quick as `all_finite`; in float64 where that is no measure: of
    values whose squares are too large for it, or too small.
    """
    found = float(torch.dot(values, values))
    if FAINT < found < math.inf:
        return found
    wide = values.double()
    return float(torch.dot(wide, wide))


class Mapped:
    """A decoder of values that lie in the bytes themselves."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._count = values.numel()

    def __call__(self, lo: int, hi: int, out: Tensor) -> Tensor:
        whole = lo == 0 and hi == self._count  # to cut nothing off costs as much as to cut
        return self.values if whole else self.values[lo:hi]


class _Widened:
    def __init__(self, values: Tensor) -> None:
        self._values = values

    def __call__(self, lo: int, hi: int, out: Tensor) -> Tensor:
        return out[: hi - lo].copy_(self._values[lo:hi])
