"""Norm clipping: the mean of the updates, none longer than a limit.

Sun et al. 2019, https://arxiv.org/abs/1911.07963: cheap, honest updates lose nothing, and nobody
can shout. It does not stop those who push a little in the wrong direction, round after round.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from atoll.aggregation.checks import positive
from atoll.aggregation.robust import Robust, middle, shares, within
from atoll.aggregation.stack import Stack


@dataclass(frozen=True)
class NormClipping(Robust):
    """`limit` of a delta's length; None: the median length of those that are merged.

    `weighted` False: all updates count alike, and nobody gains by claiming many examples.
    """

    limit: float | None = None  # of a delta's length; None: the median length
    weighted: bool = False  # by the strategy's weights; False: all alike

    def __post_init__(self) -> None:
        positive(limit=self.limit)

    @property
    def min_results(self) -> int:
        """A given limit holds for a single update; a median of two is nobody's."""
        return 3 if self.limit is None else 1

    def coefficients(self, stack: Stack, weights: Sequence[float]) -> list[float]:
        """Each one's share, made smaller where it is too long."""
        lengths = stack.squares().sqrt()
        limit = self.limit or middle(lengths)
        return (shares(weights, self.weighted) * within(lengths, limit)).tolist()
