"""Accountant: the epsilon of a run, by Google's `dp-accounting`.

Where everybody may take part whenever it likes, nothing is hidden by chance: each client pays for
the versions that hold its work, and the run's epsilon is that of the client that has paid most.
Where a strategy draws each client with probability q in secret, all pay alike for every round, and
less (amplification by sampling): the privacy loss distribution of the drawn Gaussian, composed.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

from atoll.aggregation.gaussian import check_delta, mu_of
from atoll.server.books import Books
from atoll.server.dp import accounting

INTERVAL = 3e-3  # of the discretised loss; always rounded up, so epsilon is never too small
# With less noise being drawn hides next to nothing, and to compute it takes minutes and gigabytes:
# then all pay as if they were in every round, which is never too little.
DRAWN_LEAST = 0.1


@dataclass(frozen=True)
class Sampling:
    """Each of `population` clients takes part in a round with probability `rate`, in secret."""

    rate: float
    population: int


class Accountant:
    """`noise`: standard deviation of a release in units of what one client can move it."""

    def __init__(self, noise: float, delta: float, sampling: Sampling | None = None) -> None:
        """UsageError FL-S103 where `dp-accounting` is not installed, FL-S102 for a bad delta."""
        check_delta(delta)
        self.noise, self.delta, self.sampling = noise, delta, sampling
        self._dp = _dp_accounting()
        self._rounds = functools.lru_cache(8)(self._sampled)

    @property
    def cost(self) -> float:
        """What a client pays at most for one version, in mu^2."""
        return 1 / self.noise**2 if self.noise else math.inf

    def epsilon(self, books: Books) -> float:
        """Of the client that has paid most."""
        if self.sampling is not None:
            return float(self._rounds(books.rounds))
        return self._gaussian(max(books.spent.values(), default=0.0))

    def next(self, books: Books) -> float:
        """What `epsilon` will be if that client takes part once more."""
        if self.sampling is not None:
            return float(self._rounds(books.rounds + 1))
        return self._gaussian(max(books.spent.values(), default=0.0) + self.cost)

    def room(self, epsilon: float) -> float:
        """The most that one client may pay, in mu^2, for `epsilon` to hold. Without sampling."""
        return mu_of(epsilon, self.delta) ** 2 * (1 - 1e-12)

    def _gaussian(self, squared: float) -> float:
        if squared == 0:
            return 0.0
        if math.isinf(squared):
            return math.inf
        return float(self._dp.get_epsilon_gaussian(1 / math.sqrt(squared), self.delta))

    def _sampled(self, rounds: int) -> float:
        assert self.sampling is not None
        if rounds == 0:
            return 0.0
        if self.noise < DRAWN_LEAST:
            return self._gaussian(rounds * self.cost)
        from dp_accounting.pld import PLDAccountant

        drawn = self._dp.PoissonSampledDpEvent(
            self.sampling.rate, self._dp.GaussianDpEvent(self.noise)
        )
        accountant = PLDAccountant(value_discretization_interval=INTERVAL)
        accountant.compose(drawn, rounds)
        return float(accountant.get_epsilon(self.delta))


def _dp_accounting() -> Any:
    accounting()
    import dp_accounting

    return dp_accounting
