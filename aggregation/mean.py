"""Mean: the weighted sum of deltas, streaming: one total and one update in memory at a time.

McMahan et al. 2017, https://arxiv.org/abs/1602.05629. Weights are used as they are given: FedAvg's
sum to 1, FedAsync's and FedCompass's need not, and that is their damping.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor


class Mean:
    """total = sum over updates, in their order, of weight * delta."""

    algebra: ClassVar[Literal["sum"]] = "sum"
    needs: ClassVar[frozenset[str]] = frozenset()
    private: ClassVar[bool] = True

    def add(self, total: Tensor, delta: Tensor, weight: float, *, first: bool) -> None:
        """Fold `delta` into `total`, in place; `first`: `total` holds nothing yet."""
        if first:
            torch.mul(delta, weight, out=total)
        else:
            total.add_(delta, alpha=weight)
