"""Random-k: of every so many values one, drawn from a seed that both sides know, so no places.

Konecny et al. 2016, https://arxiv.org/abs/1610.05492 (random mask); Stich et al. 2018,
https://arxiv.org/abs/1809.07599 (with error feedback). One value of each run of 1 / fraction values
is drawn by a hash of (seed, draw, run): each is as likely as any other, runs are independent, and
any tile can be read by itself.

The draw stands in the section. It is a checksum of the values, so every update draws anew and
nothing has to be remembered; clients that are given the same draw as state send the same places.
"""

import math
import zlib
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from atoll.protocols.codec_sparse import DTYPES, SparseDecoder, bits_of, fraction_of
from atoll.protocols.codecs import all_finite, as_bytes, as_tensor, room
from atoll.protocols.errors import UsageError

DRAW = "draw"
MASK = (1 << 32) - 1
HEAD = 8  # bytes of the draw


class RandomK:
    """Unbiased: a value that is sent stands for its run. With `+ef`, or down, for itself."""

    gives: ClassVar[frozenset[str]] = frozenset({"lossy", "sparse"})
    trainable_only = True

    def __init__(
        self,
        fraction: float = 0.01,  # that is sent; 1 / fraction is rounded to a whole number
        bits: int = 16,  # a value: 16 or 32
        seed: int = 0,  # the same on both sides: it is part of the codec's name
        unbiased: bool = True,  # a value stands for its run; with +ef, or down, for itself
    ) -> None:
        self.fraction = fraction_of("randomk", fraction)
        self.every = round(1 / self.fraction)
        self.bits = bits_of("randomk", bits, (16, 32))
        self.unbiased = unbiased
        if type(seed) is not int or not 0 <= seed <= MASK:
            raise UsageError("FL-S102", f"randomk seed={seed}", "give a number below 2^32")
        self.seed = seed

    @property
    def name(self) -> str:
        more = "" if self.bits == 16 else f",bits={self.bits}"
        return f"randomk:{self.fraction}{more}" + (f",seed={self.seed}" if self.seed else "")

    @property
    def gain(self) -> float:
        """How much longer than the values, L2, those are as a rule that come out."""
        return math.sqrt(self.every) if self.unbiased else 1.0

    @property
    def quantised(self) -> bool:
        return self.bits < 32

    def contractive(self) -> "RandomK":
        return RandomK(self.fraction, self.bits, self.seed, unbiased=False)

    def size(self, count: int) -> int:
        return HEAD + self.runs(count) * self.bits // 8 if count else 0

    def runs(self, count: int) -> int:
        return -(-count // self.every)

    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        return self.encode_from(values, {}, out)[0]

    def encode_from(
        self, values: Tensor, state: Mapping[str, Tensor], out: memoryview | None = None
    ) -> tuple[memoryview, dict[str, Tensor]]:
        """Section and state; `state` {} draws by the values, {"draw": number} by that, and on."""
        out, count = room(self, values, out), values.numel()
        draw = int(state[DRAW]) if DRAW in state else _checksum(values)
        after = {DRAW: torch.tensor([draw + 1])} if DRAW in state else {}
        if not count:
            return out, after
        out[:HEAD] = draw.to_bytes(HEAD, "little")
        places = self.places(draw, 0, self.runs(count), count)
        sent = values[places]
        if self.unbiased:
            sent = sent * self._widths(0, self.runs(count), count).to(sent)
        if not all_finite(values):
            sent = torch.full_like(sent, torch.nan)  # it might not have been drawn
        as_tensor(out[HEAD:], DTYPES[self.bits]).copy_(sent)
        return out, after

    def decoder(self, payload: memoryview, count: int) -> SparseDecoder:
        draw = int.from_bytes(payload[:HEAD], "little")
        values = as_tensor(payload[HEAD:], DTYPES[self.bits])

        def picks(lo: int, hi: int) -> tuple[Tensor, Tensor]:
            first, end = lo // self.every, self.runs(hi)
            places, sent = self.places(draw, first, end, count) - lo, values[first:end].float()
            inside = (places >= 0) & (places < hi - lo)
            return places[inside], sent[inside]

        return SparseDecoder(picks)

    def places(self, draw: int, first: int, end: int, count: int) -> Tensor:
        """Which value of each of the runs [first, end) is sent, int64, ascending."""
        runs = torch.arange(first, end)
        key = _mix(_mix(self.seed ^ _mix(draw & MASK)) ^ (draw >> 32 & MASK))
        drawn = _mix_all((runs & MASK) ^ _mix_all((runs >> 32) ^ key))
        return runs * self.every + drawn % self._widths(first, end, count)

    def _widths(self, first: int, end: int, count: int) -> Tensor:
        """Values in each of the runs: the last may be short."""
        return (count - torch.arange(first, end) * self.every).clamp_(max=self.every)


def _checksum(values: Tensor) -> int:
    """Of some of them, which is enough to tell two updates apart."""
    some = values[::61].clone(memory_format=torch.contiguous_format)
    return zlib.crc32(as_bytes(some))


def _mix(number: int) -> int:
    """A hash of 32 bits (Wellons 2018, lowbias32, https://nullprogram.com/blog/2018/07/31/)."""
    number = (number ^ number >> 16) * 0x7FEB352D & MASK
    number = (number ^ number >> 15) * 0x846CA68B & MASK
    return number ^ number >> 16


def _mix_all(numbers: Tensor) -> Tensor:
    """`_mix` of int64 numbers below 2^32; what overflows is masked away."""
    numbers = (numbers ^ numbers >> 16) * 0x7FEB352D & MASK
    numbers = (numbers ^ numbers >> 15) * 0x846CA68B & MASK
    return numbers ^ numbers >> 16
