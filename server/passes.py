"""Passes: reading many updates block by block in several threads, with the sums in one order."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from atoll.aggregation.stack import CHUNK, MEAN, Kernel, dots_with, gram_of, squares_of
from atoll.protocols.codecs import TILE, Decoder

Area = dict[str, Tensor]


class NotFiniteError(Exception):
    """What was read, or would be written, is not a number somewhere."""


class Crew:
    """Threads that share out the blocks of a pass; each has a work area, kept for the next."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._areas: list[Area] = [{} for _ in range(threads)]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def spread(self, starts: range, work: Callable[[int, Area], None]) -> None:
        """Every block once, in threads where there are several; the first error is raised."""
        todo = deque(starts)

        def run(area: Area) -> None:
            torch.get_num_threads()  # asking sets it in this thread: else a product takes all cores
            while True:
                try:
                    start = todo.popleft()
                except IndexError:
                    return
                try:
                    work(start, area)
                except BaseException:
                    todo.clear()
                    raise

        if len(starts) == 1:
            torch.get_num_threads()  # as above
            work(starts[0], self._areas[0])
            return
        helpers = min(self._threads, len(starts)) - 1
        if helpers < 1:
            run(self._areas[0])
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads - 1, "merge")
        others = [self._pool.submit(run, area) for area in self._areas[1 : helpers + 1]]
        try:
            run(self._areas[0])
        finally:
            for other in others:
                other.exception()  # wait: nobody may write into a draft that is rewound
        for other in others:
            other.result()


class Reading:
    """A `Stack` over encoded updates: K blocks of them are in memory, never K updates."""

    def __init__(self, crew: Crew, decoders: Sequence[Decoder], count: int) -> None:
        """`count`: elements of each row."""
        self._crew, self._decoders, self._count = crew, decoders, count
        self._gram: Tensor | None = None

    def __len__(self) -> int:
        return len(self._decoders)

    def squares(self) -> Tensor:
        """NotFiniteError where an update holds NaN or Inf."""
        if self._gram is not None:
            return self._gram.diagonal().clone()
        return _finite(self._total(squares_of, torch.zeros(len(self), dtype=torch.float64)))

    def gram(self) -> Tensor:
        """NotFiniteError where an update holds NaN or Inf."""
        if self._gram is None:
            zeros = torch.zeros(len(self), len(self), dtype=torch.float64)
            self._gram = _finite(self._total(gram_of, zeros))
        return self._gram.clone()

    def dots(self, vector: Tensor) -> Tensor:
        """NotFiniteError where an update, or `vector`, holds NaN or Inf."""
        zeros = torch.zeros(len(self), dtype=torch.float64)
        return _finite(self._total(dots_with(vector), zeros))

    def mix(self, coefficients: Sequence[float], out: Tensor) -> Tensor:
        terms = [(d, c) for d, c in zip(self._decoders, coefficients, strict=True) if c]
        if not terms:
            return out.zero_()

        def work(lo: int, area: Area) -> None:
            hi = min(lo + TILE, self._count)
            spare = scratch(area, "decoded", hi - lo)
            for i, (decode, coefficient) in enumerate(terms):
                MEAN.add(out[lo:hi], decode(lo, hi, spare), coefficient, first=i == 0)

        self._crew.spread(range(0, self._count, TILE), work)
        return out

    def _total(self, kernel: Kernel, zeros: Tensor) -> Tensor:
        total = InOrder(zeros)
        rows = len(self)

        def work(lo: int, area: Area) -> None:
            hi = min(lo + CHUNK, self._count)
            block = scratch(area, "block", rows * (hi - lo), torch.float64).view(rows, hi - lo)
            spare = scratch(area, "decoded", hi - lo)
            for row, decode in zip(block, self._decoders, strict=True):
                row.copy_(decode(lo, hi, spare))
            total.add(lo // CHUNK, kernel(block, lo))

        self._crew.spread(range(0, self._count, CHUNK), work)
        return total.value


class InOrder:
    """A sum whose terms are added in the order of their places, whenever they come."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._lock = threading.Lock()
        self._next = 0
        self._early: dict[int, Tensor] = {}

    def add(self, place: int, term: Tensor) -> None:
        """Each place from 0 on, once, from any thread."""
        with self._lock:
            self._early[place] = term
            while self._next in self._early:
                self.value += self._early.pop(self._next)
                self._next += 1


def scratch(area: Area, name: str, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A work area of this thread's, kept from block to block."""
    if name not in area or area[name].numel() < size:
        area[name] = torch.empty(size, dtype=dtype)
    return area[name][:size]


def zeros(lo: int, hi: int, out: Tensor) -> Tensor:
    """A decoder of nothing but zeros."""
    return out[: hi - lo].zero_()


def _finite(sums: Tensor) -> Tensor:
    if not bool(torch.isfinite(sums).all()):
        raise NotFiniteError
    return sums
