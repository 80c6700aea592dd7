"""Your own aggregator: the mean of those updates that point the way most of them do.

    python own_aggregator.py                               in virtual time
    fl-server demo --aggregator own_aggregator:Agreeing    in real processes

`check_aggregator(Agreeing)` of atoll.aggregation tries it on 200 generated merges.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from atoll.aggregation.stack import Stack


class Agreeing:
    algebra: ClassVar[Literal["set"]] = "set"  # a rule over all updates of a version
    needs: ClassVar[frozenset[str]] = frozenset()
    private: ClassVar[bool] = False  # it must see single updates
    min_results: ClassVar[int] = 3  # with fewer the engine takes the mean

    def coefficients(self, stack: Stack, weights: Sequence[float]) -> Sequence[float]:
        """One for each update, out of their inner products: no vector is held in memory."""
        w = torch.tensor(weights, dtype=torch.float64)
        w[stack.gram() @ w < 0] = 0.0  # against the weighted mean
        return [float(share) for share in w / w.sum()]


if __name__ == "__main__":
    from atoll.aggregation import FedAvg
    from atoll.server import Training, simulate

    clients = dict.fromkeys("abcd", 0.1)
    learning = Training.of(list(clients), aggregation="own_aggregator:Agreeing")
    print(simulate(FedAvg(rounds=4, min_clients=4), clients, learning=learning))
