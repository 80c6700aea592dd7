"""Median: of every element the middle value, whatever almost half of the clients send.

Yin et al. 2018, https://arxiv.org/abs/1803.01498. Weights are not used: they rest on numbers that
clients claim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atoll.aggregation.ranking import ranked
from atoll.aggregation.robust import Robust


@dataclass(frozen=True)
class Median(Robust):
    """Per element; of an even number of updates, the mean of the two in the middle."""

    min_results = 3  # the median of two is their mean, and protects from nothing
    coordinatewise = True
    refuses: ClassVar[frozenset[str]] = frozenset({"sparse"})  # of which the middle is 0

    def combine(self, x: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The median of `deltas`, of the shape of `x`."""
        n = len(deltas)
        out = torch.empty_like(x)
        for lo, rows in ranked(deltas, range((n - 1) // 2, n // 2 + 1)):
            tile = out[lo : lo + len(rows[0])]
            torch.add(rows[0], rows[-1], out=tile)
            tile.mul_(0.5)
        return out
