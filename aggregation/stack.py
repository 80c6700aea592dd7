"""Stack: the updates of one merge as rows of a matrix that nobody holds.

A rule that needs whole vectors (how far are two updates apart, how long is one) needs only their
inner products: they are added up block by block in one pass over the bytes, and every later
iteration is over a few numbers. Sums are in float64, of blocks of CHUNK elements in their order,
so they have the same bits however the blocks were spread over threads.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from atoll.aggregation.mean import Mean

MEAN = Mean()
CHUNK = 1 << 14  # elements of a row in one block: K rows of it lie in the L2 cache

Kernel = Callable[[Tensor, int], Tensor]  # of a float64 block, (rows, elements), and where it lies


class Stack(Protocol):
    """Rows: the updates in their order, then the rule's memory or the model, if it has asked."""

    def __len__(self) -> int:
        """How many rows."""

    def squares(self) -> Tensor:
        """(rows,) float64: the squared norm of each. One pass, cheap."""

    def gram(self) -> Tensor:
        """(rows, rows) float64: the inner product of every two. One pass, rows^2 * elements."""

    def dots(self, vector: Tensor) -> Tensor:
        """(rows,) float64: the inner product of each with `vector`, float32. One pass."""

    def mix(self, coefficients: Sequence[float], out: Tensor) -> Tensor:
        """The sum of coefficient * row, into `out`, float32. Rows with 0 are not read."""


class Reported(list[float]):
    """Coefficients of a rule that has more to tell: `stats` of the merge, `rows` of each update."""

    def __init__(
        self,
        coefficients: Iterable[float],
        stats: Mapping[str, float],
        rows: Mapping[str, Sequence[float]],
    ) -> None:
        super().__init__(coefficients)
        self.stats = stats
        self.rows = rows


def squares_of(block: Tensor, lo: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(block, dim=1)
    return norms.square()


def gram_of(block: Tensor, lo: int) -> Tensor:
    return block @ block.T


def dots_with(vector: Tensor) -> Kernel:
    def dots_of(block: Tensor, lo: int) -> Tensor:
        return block @ vector[lo : lo + block.shape[1]].double()

    return dots_of


class Rows:
    """A stack of vectors that lie in memory: for peers, whose cohorts are small, and for tests."""

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self._rows = [row.reshape(-1) for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def squares(self) -> Tensor:
        return self._total(squares_of, torch.zeros(len(self), dtype=torch.float64))

    def gram(self) -> Tensor:
        return self._total(gram_of, torch.zeros(len(self), len(self), dtype=torch.float64))

    def dots(self, vector: Tensor) -> Tensor:
        return self._total(dots_with(vector), torch.zeros(len(self), dtype=torch.float64))

    def mix(self, coefficients: Sequence[float], out: Tensor | None = None) -> Tensor:
        total = torch.empty_like(self._rows[0]) if out is None else out
        terms = [(r, c) for r, c in zip(self._rows, coefficients, strict=True) if c]
        for i, (row, coefficient) in enumerate(terms):
            MEAN.add(total, row, coefficient, first=i == 0)
        return total if terms else total.zero_()

    def _total(self, kernel: Kernel, total: Tensor) -> Tensor:
        for lo in range(0, self._rows[0].numel(), CHUNK):
            rows = [row[lo : lo + CHUNK].double() for row in self._rows]
            total += kernel(torch.stack(rows), lo)
        return total
