"""PowerSGD: each matrix as a product of two thin ones, found by one step of power iteration.

Vogels et al. 2019, https://arxiv.org/abs/1905.13727. For a matrix M (n, m): P = M Q with the Q of
the time before, made orthonormal, then Q = M^T P; both are sent, and P Q^T is what arrives. The Q
is the client's own state ("q"), so that the iteration goes on from update to update. With `+ef`, as
in the paper. Tensors of one axis, and those that would not shrink, are sent as they are, rounded.

Matrix products differ in their last bits from machine to machine, so two may pack the same values
into different bytes. What the bytes mean is computed elementwise, in one order: it has the
same bits everywhere.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atoll.protocols.codec_sparse import DTYPES, bits_of
from atoll.protocols.codecs import Decoder, all_finite, as_tensor, room
from atoll.protocols.errors import UsageError

Q = "q"
MAX_RANK = 256
SPAN = 1 << 16  # elements worked on at once


@dataclass(frozen=True, slots=True)
class Part:
    """Values [lo, hi) of the section: a matrix of `rows`, or (rank 0) values as they are."""

    lo: int
    hi: int
    at: int  # first number in the payload
    rows: int = 0
    rank: int = 0

    @property
    def cols(self) -> int:
        return (self.hi - self.lo) // self.rows

    @property
    def length(self) -> int:
        """Numbers in the payload."""
        return (self.rows + self.cols) * self.rank if self.rank else self.hi - self.lo


class PowerSGD:
    """Knows the tensors' shapes after `fit`; without, all values are one matrix, nearly square."""

    gives: ClassVar[frozenset[str]] = frozenset({"lossy", "low_rank"})
    trainable_only = True

    def __init__(
        self,
        rank: int = 4,  # of the product
        bits: int = 16,  # a number: 16 or 32
        seed: int = 0,  # of the first Q
    ) -> None:
        if type(rank) is not int or not 1 <= rank <= MAX_RANK:
            raise UsageError("FL-S102", f"powersgd rank={rank}", f"give 1 to {MAX_RANK}")
        self.rank, self.bits, self.seed = rank, bits_of("powersgd", bits, (16, 32)), seed
        self._shapes: tuple[tuple[int, ...], ...] | None = None

    @property
    def name(self) -> str:
        return f"powersgd:{self.rank}" + ("" if self.bits == 16 else f",bits={self.bits}")

    @property
    def quantised(self) -> bool:
        return self.bits < 32

    def fit(self, shapes: Sequence[tuple[int, ...]]) -> "PowerSGD":
        made = PowerSGD(self.rank, self.bits, self.seed)
        made._shapes = tuple(shapes)
        return made

    def size(self, count: int) -> int:
        return sum(part.length for part in self.parts(count)) * self.bits // 8

    def start(self, count: int) -> dict[str, Tensor]:
        """The first Q of every matrix, end to end: numbers drawn from the seed."""
        drawn = torch.Generator().manual_seed(self.seed)
        return {Q: torch.randn(self._length(count), generator=drawn)}

    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        return self.encode_from(values, self.start(values.numel()), out)[0]

    def encode_from(
        self, values: Tensor, state: Mapping[str, Tensor], out: memoryview | None = None
    ) -> tuple[memoryview, dict[str, Tensor]]:
        """Section and state; where `values` are not finite the state stays what it was."""
        out, count = room(self, values, out), values.numel()
        numbers = as_tensor(out, DTYPES[self.bits])
        before = self._remembered(state, count)
        if not all_finite(values):
            numbers.fill_(torch.nan)  # a product would spread it, or a factorisation fail
            return out, {Q: before}
        after, at = [before[:0]], 0
        for part in self.parts(count):
            own, into = values[part.lo : part.hi], numbers[part.at : part.at + part.length]
            if not part.rank:
                into.copy_(own)
                continue
            matrix, size = own.view(part.rows, part.cols), part.cols * part.rank
            q = before[at : at + size].view(part.cols, part.rank)
            p = torch.linalg.qr(matrix @ q).Q
            q = matrix.T @ p
            into[: part.rows * part.rank].copy_(p.reshape(-1))
            into[part.rows * part.rank :].copy_(q.reshape(-1))
            after.append(q.reshape(-1))
            at += size
        return out, {Q: torch.cat(after)}

    def _remembered(self, state: Mapping[str, Tensor], count: int) -> Tensor:
        """The Q of the time before; the first one where there is none, or one of another rank."""
        if Q in state and state[Q].shape == (self._length(count),):
            return state[Q]
        return self.start(count)[Q]

    def _length(self, count: int) -> int:
        """Numbers in all Q together."""
        return sum(p.cols * p.rank for p in self.parts(count) if p.rank)

    def decoder(self, payload: memoryview, count: int) -> Decoder:
        numbers, parts = as_tensor(payload, DTYPES[self.bits]), self.parts(count)

        def decode(lo: int, hi: int, out: Tensor) -> Tensor:
            for part in parts:
                start, end = max(lo, part.lo), min(hi, part.hi)
                if start < end:
                    own = numbers[part.at : part.at + part.length]
                    _read(part, own, start - part.lo, end - part.lo, out[start - lo : end - lo])
            return out[: hi - lo]

        return decode

    def parts(self, count: int) -> list[Part]:
        """How a section of `count` values is made up."""
        found: list[Part] = []
        lo = at = 0
        for shape in self._known(count):
            size = math.prod(shape)
            rows = shape[0] if len(shape) > 1 else 1
            cols = size // rows if rows else 0
            rank = min(self.rank, rows, cols)
            part = Part(lo, lo + size, at)
            if (rows + cols) * rank < size:
                part = Part(lo, lo + size, at, rows, rank)
            if size:
                found.append(part)
            lo, at = part.hi, at + part.length
        return found

    def _known(self, count: int) -> Sequence[tuple[int, ...]]:
        if self._shapes is not None and sum(map(math.prod, self._shapes)) == count:
            return self._shapes
        rows = math.isqrt(count)
        return [(rows, count // rows), (count % rows,)] if rows else []


def _read(part: Part, numbers: Tensor, lo: int, hi: int, out: Tensor) -> None:
    """Values [lo, hi) of one part."""
    if not part.rank:
        out.copy_(numbers[lo:hi])
        return
    cols = part.cols
    p = numbers[: part.rows * part.rank].view(part.rows, part.rank)
    q = numbers[part.rows * part.rank :].view(cols, part.rank).float()
    at = lo
    while at < hi:
        row, skip = divmod(at, cols)
        if skip or hi - at < cols:
            rows, width = 1, min(cols - skip, hi - at)
        else:
            rows, width = min((hi - at) // cols, max(1, SPAN // cols)), cols
        into = out[at - lo : at - lo + rows * width].view(rows, width)
        left, right = p[row : row + rows].float(), q[skip : skip + width]
        torch.mul(left[:, :1], right[:, 0], out=into)
        for j in range(1, part.rank):  # a product, then a sum: never fused, in this order
            into.add_(left[:, j : j + 1] * right[:, j])
        at += rows * width
