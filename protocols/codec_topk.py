"""Top-k: of every 4096 values the largest, with 12 bits for where each lies.

Aji and Heafield 2017, https://arxiv.org/abs/1704.05021; by chunks, and with two bits a value, as in
SparseLoCo (Sarfi et al. 2025, https://arxiv.org/abs/2508.15706): `topk:0.015625,bits=2` is its 64
of 4096, 145 times smaller. What is left out is lost unless `+ef` keeps it.

A section is lookup tables (2 bits only), values, places; the values of a chunk in the order of
their places. Of values of equal magnitude the first are taken, on every machine.
"""

from typing import ClassVar

import torch
from torch import Tensor

from atoll.protocols import bits12
from atoll.protocols.codec_blocks import from_planes, to_planes
from atoll.protocols.codec_sparse import DTYPES, SparseDecoder, bits_of, corrupt, fraction_of
from atoll.protocols.codecs import as_tensor, room
from atoll.protocols.halving import row_sums

CHUNK = 4096  # what 12 bits can tell apart
GROUP = 16  # chunks that share a lookup table of 2-bit values
AT_ONCE = 64  # chunks worked on where they share none: 1 MiB, so that a pass outweighs its calls
HEAP = 8  # values of which only the largest is looked at first


class TopK:
    """Of each chunk at least one value is kept. 16 bits are bf16.

    With 2 bits a value becomes the mean of its bin; the four bins span six standard deviations of
    what was kept in 16 chunks.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"lossy", "sparse"})
    trainable_only = True

    def __init__(
        self,
        fraction: float = 0.01,  # of each chunk that is kept
        bits: int = 16,  # a value: 2, 16 or 32
    ) -> None:
        self.fraction = fraction_of("topk", fraction)
        self.bits = bits_of("topk", bits, (2, 16, 32))

    @property
    def name(self) -> str:
        return f"topk:{self.fraction}" + ("" if self.bits == 16 else f",bits={self.bits}")

    @property
    def quantised(self) -> bool:
        return self.bits < 32

    def kept(self, count: int) -> int:
        """Values kept of a chunk of `count`."""
        return max(1, round(count * self.fraction))

    def size(self, count: int) -> int:
        return sum(self._lengths(count))

    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        out = room(self, values, out)
        whole = values.numel() // CHUNK
        step, kept = GROUP if self.bits == 2 else AT_ONCE, self.kept(CHUNK)
        tables, packed, places = self._parts(out, values.numel())
        rows = values[: whole * CHUNK].view(-1, CHUNK)
        for lo in range(0, whole, step):
            part, hi = rows[lo : lo + step], min(lo + step, whole)
            table = tables[0][lo // GROUP : lo // GROUP + 1]
            self._write(part, kept, table, packed[0][lo:hi], places[0][lo:hi])
        if last := values.numel() - whole * CHUNK:
            row = values[whole * CHUNK :].view(1, last)
            self._write(row, self.kept(last), tables[1], packed[1], places[1])
        return out

    def decoder(self, payload: memoryview, count: int) -> SparseDecoder:
        return SparseDecoder(_Picks(self, count, *self._parts(payload, count)))

    def _write(
        self, rows: Tensor, kept: int, table: Tensor, packed: Tensor, places: Tensor
    ) -> None:
        """Chunks of one length: what is kept of each into `packed` and `places`, a row each."""
        found = largest(rows, kept)
        values = rows.gather(1, found)
        places.copy_(bits12.pack(found))
        if self.bits == 2:
            means, codes = four_bins(values)
            table[0] = means
            packed.copy_(to_planes(codes, 2))
        else:
            packed.copy_(values)

    def _lengths(self, count: int) -> tuple[int, ...]:
        """Bytes of tables, values, places: each of whole chunks, then of the last short one."""
        whole, last = divmod(count, CHUNK)
        kept, end = self.kept(CHUNK), self.kept(last) if last else 0
        tables = (16 * -(-whole // GROUP), 16 * bool(last)) if self.bits == 2 else (0, 0)
        each = [-(-k // 4) if self.bits == 2 else k * self.bits // 8 for k in (kept, end)]
        return (*tables, whole * each[0], each[1], whole * bits12.size(kept), bits12.size(end))

    def _parts(
        self, payload: memoryview, count: int
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Tables, values and places, each of whole chunks, then of the last; a row for each."""
        at, parts = 0, []
        for length in self._lengths(count):
            parts.append(payload[at : at + length])
            at += length
        whole, last = divmod(count, CHUNK)
        kept, end = self.kept(CHUNK), self.kept(last) if last else 0
        dtype = DTYPES.get(self.bits, torch.uint8)
        widths = [-(-k // 4) if self.bits == 2 else k for k in (kept, end)]
        return (
            (
                _rows(parts[0], torch.float32, -(-whole // GROUP), 4),
                _rows(parts[1], torch.float32, 1, 4),
            ),
            (_rows(parts[2], dtype, whole, widths[0]), _rows(parts[3], dtype, 1, widths[1])),
            (
                _rows(parts[4], torch.uint8, whole, bits12.size(kept)),
                _rows(parts[5], torch.uint8, 1, bits12.size(end)),
            ),
        )


class _Picks:
    """What was kept of a tile."""

    def __init__(
        self,
        codec: TopK,
        count: int,
        tables: tuple[Tensor, Tensor],
        packed: tuple[Tensor, Tensor],
        places: tuple[Tensor, Tensor],
    ) -> None:
        self._codec, self._count = codec, count
        self._tables, self._packed, self._places = tables, packed, places

    def __call__(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        whole = self._count // CHUNK
        first, end = lo // CHUNK, -(-hi // CHUNK)
        found = [self._read(0, first, min(end, whole))] if first < whole else []
        if end > whole:
            found.append(self._read(1, 0, 1))
        places = torch.cat([f[0] for f in found])
        values = torch.cat([f[1] for f in found])
        places -= lo
        if lo % CHUNK or (hi % CHUNK and hi != self._count):
            inside = (places >= 0) & (places < hi - lo)
            places, values = places[inside], values[inside]
        return places, values

    def _read(self, part: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Chunks [first, end) of the whole ones (part 0), or the last (part 1)."""
        whole, last = divmod(self._count, CHUNK)
        length = last if part else CHUNK
        kept = self._codec.kept(length)
        places = bits12.unpack(self._places[part][first:end], kept)
        chunks = torch.arange(first, end) + (whole if part else 0)
        if bool((places[:, 1:] <= places[:, :-1]).any()) or bool((places[:, -1] >= length).any()):
            raise corrupt("top-k places are not ascending within their chunk")
        values = self._values(part, first, end, kept)
        return (places + CHUNK * chunks[:, None]).view(-1), values.reshape(-1)

    def _values(self, part: int, first: int, end: int, kept: int) -> Tensor:
        packed = self._packed[part][first:end]
        if self._codec.bits != 2:
            return packed.float()
        codes = torch.empty(end - first, 4 * packed.shape[1])
        from_planes(packed, 2, codes)
        tables = self._tables[part][first // GROUP : (end - 1) // GROUP + 1]
        mine = tables.repeat_interleave(GROUP, dim=0)[first % GROUP :][: end - first]
        return mine.gather(1, codes[:, :kept].long())


def largest(rows: Tensor, kept: int) -> Tensor:
    """Ascending int64 places of the `kept` largest magnitudes of each row, (rows, kept).

    Which of several equal ones a library takes differs from machine to machine, so rows where that
    matters are done again: the first of them. NaN counts as the largest.
    """
    sizes = rows.abs()
    heaps, rest = divmod(rows.shape[1], HEAP)
    if rest or 2 * kept > heaps:  # nearly all heaps would be looked through
        top, places = torch.topk(sizes, kept, dim=1, sorted=False)
        least = top.amin(1, keepdim=True)
        unclear = ((sizes >= least).sum(1) != kept).nonzero()[:, 0]
    else:
        places, unclear = _by_heaps(sizes.view(-1, HEAP, heaps), kept)
    if unclear.numel():
        again = sizes[unclear].nan_to_num_(nan=torch.inf)
        least = torch.topk(again, kept, dim=1).values[:, -1:]
        above, equal = again > least, again == least
        wanted = kept - above.sum(1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(1) <= wanted))
        places[unclear] = chosen.nonzero()[:, 1].view(-1, kept)
    return places.sort(dim=1).values


def _by_heaps(heaps: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """(places of `kept` largest, rows where others are as large); `heaps`: (rows, HEAP, heaps).

    The largest lie in the `kept` heaps with the largest maxima: each of these has one value at
    least that is no smaller than the smallest of the maxima, and no other heap has a larger one.
    """
    rows, each, count = heaps.shape
    maxima = heaps.amax(1)
    lead, taken = torch.topk(maxima, kept, dim=1, sorted=False)
    bound = lead.amin(1, keepdim=True)
    steps = torch.arange(0, each * count, count)
    among = (taken[:, None, :] + steps[:, None]).view(rows, each * kept)
    sizes = heaps.view(rows, each * count).gather(1, among)
    top, at = torch.topk(sizes, kept, dim=1, sorted=False)
    least = top.amin(1, keepdim=True)
    inside = (sizes >= least).sum(1) != kept
    outside = ((maxima >= bound).sum(1) != kept) & (least <= bound)[:, 0]
    return among.gather(1, at), (inside | outside).nonzero()[:, 0]


def four_bins(values: Tensor) -> tuple[Tensor, Tensor]:
    """(4 means, uint8 codes of a width that 4 divides) of a group's kept values (rows, kept).

    Bins are 1.5 standard deviations wide around the mean; a value that is not finite spoils all.
    """
    size = values.abs().amax()  # to work with numbers up to 1, whose squares have a sum
    size = torch.where(size == 0, torch.ones_like(size), size)
    flat = (values / size).reshape(1, -1)
    mean = row_sums(flat / flat.shape[1])
    centred = flat - mean
    width = 1.5 * row_sums(centred * centred / flat.shape[1]).sqrt()
    codes = (centred / torch.where(width > 0, width, torch.ones_like(width)) + 2).round_()
    codes = codes.clamp_(0, 3).nan_to_num_(nan=0).to(torch.uint8)
    means = []
    for bin_ in range(4):
        here = (codes == bin_).float()
        count = row_sums(here).clamp_(min=1)
        means.append((mean + row_sums(centred * here) / count) * size)
    codes = codes.view(values.shape)
    short = -values.shape[1] % 4
    return torch.cat(means), torch.nn.functional.pad(codes, (0, short))


def _rows(view: memoryview, dtype: torch.dtype, rows: int, width: int) -> Tensor:
    return as_tensor(view, dtype).view(rows if len(view) else 0, width)
