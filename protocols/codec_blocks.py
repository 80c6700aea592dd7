"""Blocks: what the codecs share that write a few bits a value and one scale for a block of values.

A section is the scales of all blocks, then their codes. Codes of less than a byte lie in planes:
the first 1/n of a block in the lowest bits of its bytes, the next in the bits above, so that
reading and writing run along memory. The last block is as short as what is left, rounded up to 8
values.

Reading and writing work tile by tile in one core's cache. Elementwise operations that IEEE rounds
exactly, maxima, and sums by halving: so the bytes of the same values, and the values of the same
bytes, are the same on every machine.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from atoll.protocols.codecs import Decoder, all_finite, as_tensor, room
from atoll.protocols.errors import UsageError

# Elements worked on at once: 1 MiB, so that a pass outweighs its calls. Packing int8 takes 2.4
# copies with it, 3.7 with a quarter of it, 2.1 with four times as much.
SPAN = 1 << 18
LONGEST = 1 << 16  # block
TINY = 2.0**-110  # a block with no larger value is packed as zeros: its scale would have no digits
LARGEST = 256.0  # no level is larger


class BlockCodec(ABC):
    """`block`: values that share a scale, 8 to 65536, a multiple of 8."""

    kind: ClassVar[str]
    bits: ClassVar[int]  # 1, 2, 4 or 8 a value
    default: ClassVar[int]  # block, left out of the name
    gives: ClassVar[frozenset[str]] = frozenset({"lossy"})
    trainable_only = True
    quantised = True

    def __init__(self, block: int) -> None:
        self.block = block
        if type(self.block) is not int or self.block % 8 or not 8 <= self.block <= LONGEST:
            raise UsageError(
                "FL-S102",
                f"{self.kind} block={block}",
                f"give a multiple of 8 from 8 to {LONGEST}",
            )

    @property
    def name(self) -> str:
        return self.kind + ("" if self.block == self.default else f":block={self.block}")

    def size(self, count: int) -> int:
        whole, last = divmod(count, self.block)
        values = whole * self.block + _padded(last)
        return 4 * (whole + bool(last)) + values * self.bits // 8

    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        out = room(self, values, out)
        return self._encode(lambda lo, hi, _: values[lo:hi], values.numel(), out, torch.empty(0))

    def encode_read(self, read: Decoder, count: int, out: memoryview) -> memoryview:
        """Encode `count` values that `read` gives tile by tile, so that they need not lie anywhere.

        Same bytes as `encode`.
        """
        return self._encode(read, count, out, torch.empty(min(SPAN, count)))

    def _encode(self, read: Decoder, count: int, out: memoryview, spare: Tensor) -> memoryview:
        """`spare` is what `read` gets as scratch."""
        scales, codes, tail = self._parts(out, count)
        scratch = torch.empty(min(SPAN, count))
        step = max(1, SPAN // self.block)
        for lo in range(0, len(codes), step):
            hi = min(lo + step, len(codes))
            rows = read(lo * self.block, hi * self.block, spare).view(hi - lo, self.block)
            area = scratch[: rows.numel()].view(hi - lo, -1)
            self.write(rows, scales[lo:hi], codes[lo:hi], area, self.block)
        if tail.numel():
            row = torch.zeros(1, tail.shape[1] * 8 // self.bits)
            last = read(len(codes) * self.block, count, spare)
            row[0, : last.numel()] = last
            self.write(row, scales[-1:], tail, torch.empty_like(row), last.numel())
        return out

    def decoder(self, payload: memoryview, count: int) -> "BlockDecoder":
        return BlockDecoder(self, *self._parts(payload, count))

    @abstractmethod
    def write(
        self, rows: Tensor, scales: Tensor, codes: Tensor, spare: Tensor, filled: int
    ) -> None:
        """Blocks of values, one a row, into scales and codes; `spare` is scratch like `rows`.

        Of each row the first `filled` are values, the rest are zeros.
        """

    @abstractmethod
    def levels(self, codes: Tensor, out: Tensor) -> None:
        """What the codes mean before the scale, into `out`, a row for each block."""

    def _parts(self, payload: memoryview, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scales; codes of whole blocks, a row each; codes of the last short block, 0 or 1 row."""
        whole, last = divmod(count, self.block)
        head = 4 * (whole + bool(last))
        middle = head + whole * self.block * self.bits // 8
        return (
            as_tensor(payload[:head], torch.float32),
            as_tensor(payload[head:middle], torch.uint8).view(whole, self.block * self.bits // 8),
            as_tensor(payload[middle:], torch.uint8).view(
                -1, max(1, _padded(last) * self.bits // 8)
            ),
        )


class BlockDecoder:
    """Tiles of a section, and tiles of it added to a sum without lying anywhere in between."""

    def __init__(self, codec: BlockCodec, scales: Tensor, codes: Tensor, tail: Tensor) -> None:
        self._codec, self._scales, self._codes, self._tail = codec, scales, codes, tail

    def __call__(self, lo: int, hi: int, out: Tensor) -> Tensor:
        out = out[: hi - lo]
        for codes, scales, at, skip, take in self._pieces(lo, hi):
            width = codes.shape[1] * 8 // self._codec.bits
            into = out[at : at + take]
            whole = take == len(codes) * width
            rows = into.view(len(codes), width) if whole else out.new_empty(len(codes), width)
            self._codec.levels(codes, rows)
            rows.mul_(scales[:, None])
            if not whole:
                into.copy_(rows.view(-1)[skip : skip + take])
        return out

    def accumulate(self, lo: int, hi: int, total: Tensor, weight: float, spare: Tensor) -> None:
        """total += weight * values of [lo, hi)."""
        for codes, scales, at, skip, take in self._pieces(lo, hi):
            size = codes.numel() * 8 // self._codec.bits
            area = spare[:size] if size <= spare.numel() else spare.new_empty(size)
            rows = area.view(len(codes), -1)
            self._codec.levels(codes, rows)
            # not addcmul: whether it rounds once or twice depends on where the tile ends
            total[at : at + take].add_(rows.mul_((scales * weight)[:, None]).view(-1)[skip:][:take])

    def finite(self) -> bool:
        """Whether no value is NaN or Inf, by a look at the scales alone; False: perhaps one is."""
        return all_finite(self._scales * LARGEST)

    def _pieces(self, lo: int, hi: int) -> Iterator[tuple[Tensor, Tensor, int, int, int]]:
        """(codes, scales, place in the tile, values to skip, values to take), block by block
        where only a part of it is wanted, else many blocks at once.
        """
        block, whole = self._codec.block, len(self._codes)
        step, at = max(1, SPAN // block), lo
        while at < hi:
            row, skip = divmod(at, block)
            if row == whole:
                take, codes = hi - at, self._tail
            elif skip or hi - at < block:
                take, codes = min(block - skip, hi - at), self._codes[row : row + 1]
            else:
                rows = min((hi - at) // block, step, whole - row)
                take, codes = rows * block, self._codes[row : row + rows]
            yield codes, self._scales[row : row + len(codes)], at - lo, skip, take
            at += take


def scales_of(rows: Tensor, spare: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """(absmax / levels, levels / absmax) of each row, both 0 where no value is above TINY."""
    largest = torch.abs(rows, out=spare).amax(1)
    largest.masked_fill_(largest < TINY, 0)
    factors = torch.where(largest == 0, largest, levels / largest)
    return largest.div_(levels), factors


def to_planes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (rows, width) below 2^bits as bytes (rows, width * bits / 8)."""
    planes = codes.view(len(codes), 8 // bits, -1)
    made = planes[:, 0].clone()
    for i in range(1, 8 // bits):
        made |= planes[:, i] << (bits * i)
    return made


def from_planes(packed: Tensor, bits: int, out: Tensor) -> None:
    """What `to_planes` packed, as numbers into `out` (rows, width)."""
    planes = out.view(len(packed), 8 // bits, -1)
    for i in range(8 // bits):
        planes[:, i].copy_((packed >> (bits * i)) & ((1 << bits) - 1))


def _padded(last: int) -> int:
    return -(-last // 8) * 8
