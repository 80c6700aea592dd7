"""Centered clipping: the mean of the updates, each clipped to a ball around the last merge's.

Karimireddy et al. 2021, https://arxiv.org/abs/2012.10333: an attacker moves the result by at most
radius / n, and the centre, which remembers, makes that harmless in the long run. The centre is kept
in every version beside the outer optimizer's state. As a point among updates and centre it is a few
coefficients, so distances follow from inner products, measured once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from atoll.aggregation.checks import at_least, positive
from atoll.aggregation.robust import Robust, distances, middle, shares, within
from atoll.aggregation.stack import Stack


@dataclass(frozen=True)
class CenteredClipping(Robust):
    """`radius` of the ball, in the length of a delta; None: the median distance, found anew in
    each iteration. `iterations`: 1 is enough where clients send momenta, 3 where they do not.
    `weighted` False: all updates count alike, and nobody gains by claiming many examples.
    """

    radius: float | None = None  # of the ball; None: the median distance
    iterations: int = 3  # 1 is enough where clients send momenta
    weighted: bool = False  # by the strategy's weights; False: all alike

    memory: ClassVar[bool] = True  # the last row of the stack is the last merge's result

    def __post_init__(self) -> None:
        positive(radius=self.radius)
        at_least(1, iterations=self.iterations)

    @property
    def min_results(self) -> int:
        """A given radius holds for a single update; a median of two is nobody's."""
        return 3 if self.radius is None else 1

    def coefficients(self, stack: Stack, weights: Sequence[float]) -> list[float]:
        """Of the updates, and last of the centre; their sum is 1."""
        gram = stack.gram()
        share = shares(weights, self.weighted)
        centre = torch.zeros(len(stack), dtype=torch.float64)
        centre[-1] = 1.0
        for _ in range(self.iterations):
            apart = distances(gram, centre)[:-1]
            pull = share * within(apart, self.radius or middle(apart))
            centre *= 1 - pull.sum()
            centre[:-1] += pull
        return centre.tolist()
