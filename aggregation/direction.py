"""Direction: the server's half of FedAvg-M (= FedCM) and FedAvg-M-VR.

Cheng, Huang, Wu, Yuan 2024, https://arxiv.org/abs/2306.16504. The mean direction of the clients'
last steps, in gradient units, is sent with the model and is a part of every local step:

    u_i = delta_i / (eta_i K_i)         a client's mean direction
    g  := sum w_i u_i                   kept, and sent
    x  := x - gamma g,  gamma = mean of eta_i K_i

so with equal steps x moves by the plain weighted mean of the deltas, and with unequal ones by the
mean of directions (as FedNova). The weights are the strategy's. Where they sum to less than 1, as a
late update's do, g moves by that share only: g := (1 - sum w) g + sum w_i u_i. An update of 0 steps
counts for nothing. The server step may be any outer optimizer's; what is sent stays g.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from atoll.aggregation.half import Half, Numbers, State, Turn, Work
from atoll.protocols.errors import ServerError

DIRECTION = "direction"  # g
FORMER = "former"  # the model of the version before: of the -VR forms
WHOLE = 1 - 1e-9  # weights that sum to so much are all
GROWS = 10.0  # times its running median that a diverging direction's norm is
REMEMBERED = 9  # norms of the median; fewer than half of them decide nothing


class DirectionTurn(Turn):
    """Scales deltas to one length of path, and keeps their mean."""

    def __init__(self, works: Sequence[Work], numbers: Numbers, former: bool) -> None:
        paths = [w.said["lr"] * w.said["steps"] for w in works]
        even = len(set(paths)) == 1
        walked = sum(path > 0 for path in paths)
        self.gamma = paths[0] if even else math.fsum(paths) / walked
        scales = [self.gamma / path if path > 0 else 0.0 for path in paths]
        super().__init__({**numbers, "gamma": self.gamma}, None if even else scales)
        total = math.fsum(w.weight for w in works)
        self.share = 1.0 if total > WHOLE else total  # of the new direction
        self.total = max(1.0, total)
        self.former = former

    def tile(self, anchor: Tensor, delta: Tensor, sums: Mapping[str, Tensor], state: State) -> None:
        if self.gamma > 0:
            direction = state[DIRECTION].mul_(1 - self.share)
            direction.add_(delta, alpha=1 / (self.gamma * self.total))
        if self.former:
            state[FORMER].copy_(anchor)


@dataclass(frozen=True)
class Direction(Half):
    """`former`: the model before is kept and sent too (-VR), and a diverging run is ended."""

    former: bool = False

    @property
    def vectors(self) -> tuple[str, ...]:
        return (DIRECTION, FORMER) if self.former else (DIRECTION,)

    @property
    def down(self) -> tuple[str, ...]:
        return self.vectors

    @property
    def says(self) -> tuple[str, ...]:
        return ("steps", "lr")

    def begin(self, works: Sequence[Work], former: Numbers, known: int) -> Turn:
        return DirectionTurn(works, former, self.former)

    def after(self, delta_norm: float, numbers: Numbers) -> Numbers:
        return guarded(delta_norm, numbers) if self.former else numbers


def guarded(delta_norm: float, numbers: Numbers) -> Numbers:
    """Remember the norm; ServerError FL-S210 where it is GROWS times the median of the last."""
    norm = delta_norm / numbers["gamma"] if numbers.get("gamma") else 0.0
    kept = [numbers[f"norm/{i}"] for i in range(REMEMBERED) if f"norm/{i}" in numbers]
    if len(kept) > REMEMBERED // 2 and norm > GROWS * statistics.median(kept) > 0:
        raise ServerError(
            "FL-S210",
            f"the mean direction has norm {norm:.3g}, {GROWS:g} times its median of "
            f"{statistics.median(kept):.3g}: the -VR form diverges",
            "lower lr or steps (lr * steps * curvature must stay below about 1), or take the "
            "form without -vr",
        )
    kept = [*kept, norm][-REMEMBERED:]
    return {**numbers, **{f"norm/{i}": value for i, value in enumerate(kept)}}
