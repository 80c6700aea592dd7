"""RFA: the geometric median, the point whose summed distances to all updates are least.

Pillutla et al. 2022, https://arxiv.org/abs/1912.13445: Weiszfeld's iteration, smoothed. Each point
on the way is a weighted mean of the updates, so all distances follow from inner products: they are
measured once, and an iteration costs nothing. The paper's few iterations are not enough against an
update of length 1e30 (each halves its pull), so here they go on until they stand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from atoll.aggregation.checks import at_least, positive
from atoll.aggregation.robust import Robust, distances, shares
from atoll.aggregation.stack import Stack

STANDS = 1e-6  # it moved by less than this share of its length


@dataclass(frozen=True)
class GeometricMedian(Robust):
    """Safe while those who are not honest hold less than half of the weight.

    `iterations`: at most; 0 is the weighted mean. `floor`: distances below it count as it is.
    `weighted` False: all updates count alike, and nobody gains by claiming many examples.
    """

    iterations: int = 1000  # at most; 0: the weighted mean
    floor: float = 1e-6  # distances below it count as it is
    weighted: bool = True  # by the strategy's weights; False: all alike

    min_results = 3  # between two updates no point is better than another

    def __post_init__(self) -> None:
        at_least(0, iterations=self.iterations)
        positive(floor=self.floor)

    def coefficients(self, stack: Stack, weights: Sequence[float]) -> list[float]:
        """How much of each update is in the median; their sum is 1."""
        start = point = shares(weights, self.weighted)
        gram = stack.gram()
        for _ in range(self.iterations):
            pull = start / distances(gram, point).clamp(min=self.floor)
            last, point = point, pull / pull.sum()
            moved = point - last
            if moved @ gram @ moved <= STANDS**2 * (point @ gram @ point):
                break
        return point.tolist()
