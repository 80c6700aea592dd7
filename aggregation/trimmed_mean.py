"""Trimmed mean: of every element the mean of what is left without the lowest and the highest.

Yin et al. 2018, https://arxiv.org/abs/1803.01498. Weights are not used: they rest on numbers that
clients claim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atoll.aggregation.ranking import ranked
from atoll.aggregation.robust import Robust, check_share, least, share_of


@dataclass(frozen=True)
class TrimmedMean(Robust):
    """`trim`: the share of the updates cut off at either end (0.2), or how many of them (1, 2...).

    It must be at least the share of those who are not honest. With `trim=0` it is the plain mean.
    """

    trim: float = 0.2  # cut off at either end: a share of the updates, or how many

    coordinatewise = True
    refuses: ClassVar[frozenset[str]] = frozenset({"sparse"})  # of which the middle is 0

    def __post_init__(self) -> None:
        check_share(trim=self.trim)

    @property
    def min_results(self) -> int:
        """With fewer nothing, or everything, would be cut off."""
        return least(self.trim, 1)

    def combine(self, x: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The trimmed mean of `deltas`, of the shape of `x`."""
        n, cut = len(deltas), share_of(self.trim, len(deltas))
        out = torch.empty_like(x)
        for lo, rows in ranked(deltas, range(cut, n - cut)):
            tile = out[lo : lo + len(rows[0])].copy_(rows[0])
            for row in rows[1:]:
                tile.add_(row)
            tile.div_(len(rows))
        return out
