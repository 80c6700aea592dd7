"""Krum: the update whose nearest neighbours are nearest, or the mean of the best few.

Blanchard et al. 2017, https://papers.nips.cc/paper/6617: an attacker far from the others has a bad
score, and one near to them does no harm. Weights are not used: they rest on numbers that clients
claim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.aggregation.checks import at_least
from atoll.aggregation.robust import Robust, check_share, least, share_of
from atoll.aggregation.stack import Stack


@dataclass(frozen=True)
class MultiKrum(Robust):
    """The mean of the `m` updates with the best scores; None: all but f.

    `f`: how many are not honest, as a share (0.2) or a whole number (1, 2...); of n updates,
    2f + 3 <= n.
    """

    f: float = 0.2  # who are not honest: a share of the updates, or how many
    m: int | None = None  # how many of the best are averaged; None: all but f

    def __post_init__(self) -> None:
        check_share(f=self.f)
        at_least(1, m=self.m)

    @property
    def min_results(self) -> int:
        """With fewer, f attackers could be each other's nearest neighbours, and win."""
        return least(self.f, 3)

    def coefficients(self, stack: Stack, weights: Sequence[float]) -> list[float]:
        """1/m for the chosen, 0 for the others. Of equal scores the first counts as better."""
        n, f = len(stack), share_of(self.f, len(stack))
        chosen = scores(stack.gram(), f).argsort(stable=True)[: self.m or n - f].tolist()
        return [1 / len(chosen) if i in chosen else 0.0 for i in range(n)]


@dataclass(frozen=True)
class Krum(MultiKrum):
    """The one update with the best score: safest, but nobody else's work counts.

    `f`: how many are not honest, as a share (0.2) or a whole number (1, 2...); of n updates,
    2f + 3 <= n.
    """

    m: int | None = 1  # how many of the best are averaged


def scores(gram: Tensor, f: int) -> Tensor:
    """(n,) the sum of each one's squared distances to its n - f - 2 nearest others.

    Oneself is left out by index: a twin at distance 0 is a neighbour like any other.
    """
    n = len(gram)
    assert n >= 2 * f + 3, f"of {n} updates at most {(n - 3) // 2} may be bad, not {f}"
    squares = gram.diagonal()
    apart = (squares[:, None] + squares - gram - gram.T).clamp(min=0)
    apart.fill_diagonal_(torch.inf)
    return apart.sort(dim=1).values[:, : n - f - 2].sum(dim=1)
