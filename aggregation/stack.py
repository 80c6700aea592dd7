"""Stack: the updates of one merge as rows of a matrix that nobody holds.

A rule that needs whole vectors (how far are two updates apart, how long is one) needs only their
inner products: they are added up block by block in one pass over the bytes, and every later
iteration is over a few numbers. Sums are in float64, of blocks of CHUNK elements in their order,
so they have the same bits however the blocks were spread over threads.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

CHUNK = 1 << 14  # elements of a row in one block: K rows of it lie in the L2 cache

Kernel = Callable[[Tensor], Tensor]  # of a block (rows, elements), float64


class Stack(Protocol):
    """Rows: the updates in their order, and after them the rule's memory, if it has one."""

    def __len__(self) -> int:
        """How many rows."""

    def squares(self) -> Tensor:
        """(rows,) float64: the squared norm of each. One pass, cheap."""

    def gram(self) -> Tensor:
        """(rows, rows) float64: the inner product of every two. One pass, rows^2 * elements."""


def squares_of(block: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(block, dim=1)
    return norms.square()


def gram_of(block: Tensor) -> Tensor:
    return block @ block.T


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

    def mix(self, coefficients: Sequence[float]) -> Tensor:
        """The sum of coefficient * row, float32. Rows with 0 are not touched."""
        total = torch.zeros_like(self._rows[0])
        for row, coefficient in zip(self._rows, coefficients, strict=True):
            if coefficient:
                total.add_(row, alpha=coefficient)
        return total

    def _total(self, kernel: Kernel, total: Tensor) -> Tensor:
        for lo in range(0, self._rows[0].numel(), CHUNK):
            total += kernel(torch.stack([row[lo : lo + CHUNK].double() for row in self._rows]))
        return total
