"""Dynamic: the server's half of FedDyn, dynamic regularisation.

Acar et al. 2021, https://arxiv.org/abs/2111.04263. With delta = base - local and N all clients:

    h := h + alpha/N sum delta_i           over the updates of this version
    x := x - (sum w_i delta_i + h / alpha)

h is the mean over all clients of their own lambda_i := lambda_i + alpha delta_i, which they keep
themselves (`client/keep.py`); the ledger is SCAFFOLD's (`control.py`). Nothing but the model goes
down, nothing but the delta up, and both sides count the delta as it was decoded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from atoll.aggregation.control import STANDING, Ledger
from atoll.aggregation.half import Half, Numbers, State, Turn, Work

DRIFT = "drift"  # h
DELTA = "trainable"  # the section of an update in which its delta lies


class DynamicTurn(Turn):
    """One merge: h takes in the deltas that the ledger counts, and the step goes along it too."""

    def __init__(self, works: Sequence[Work], former: Numbers, known: int, alpha: float) -> None:
        ledger = Ledger(former, known)
        counted = ledger.take(works, overlapping=True)
        super().__init__(ledger.closed())
        self.alpha = alpha
        self.sums = {DELTA: [alpha * yes / ledger.clients for yes in counted]}
        self.shrink = 0.0 if ledger.reset else ledger.before / ledger.clients
        if ledger.reset:
            self.stats["state_lost"] = 1.0

    def tile(self, anchor: Tensor, delta: Tensor, sums: Mapping[str, Tensor], state: State) -> None:
        drift = state[DRIFT].mul_(self.shrink).add_(sums[DELTA])
        delta.add_(drift, alpha=1 / self.alpha)


@dataclass(frozen=True)
class Dynamic(Half):
    """`alpha`: how strongly clients are held to the server's model, as on the clients' side."""

    alpha: float = 0.1

    @property
    def vectors(self) -> tuple[str, ...]:
        return (DRIFT,)

    @property
    def says(self) -> tuple[str, ...]:
        return STANDING

    def begin(self, works: Sequence[Work], former: Numbers, known: int) -> Turn:
        return DynamicTurn(works, former, known, self.alpha)
