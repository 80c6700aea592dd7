"""FedAvg-M and FedAvg-M-VR: every local step goes partly in the direction of all clients' last.

Cheng, Huang, Wu, Yuan, ICLR 2024, https://arxiv.org/abs/2306.16504 (FedAvg-M is FedCM, Xu et al.
2021, https://arxiv.org/abs/2106.10874). With G(y) the gradient at y, after weight decay and
clipping, and g the mean direction that came with the model x (`atoll.aggregation.direction`):

    FedAvg-M        d = beta G(y) + (1 - beta) g
    FedAvg-M-VR     d = G(y) + (1 - beta) (g - G(x_prev))      same batch, the model before x

Mind the constant: `beta` weighs the fresh gradient, 1 is FedAvg bit for bit. Before the first merge
g is 0, so the first round moves only beta as far; `warm` trains it with beta = 1.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from atoll.aggregation.direction import DIRECTION, FORMER, Direction
from atoll.aggregation.half import Half
from atoll.client.algorithm import Again, LocalAlgorithm, Measured, Params, count, split
from atoll.client.trainer import Task
from atoll.protocols.errors import UsageError


class Steering(LocalAlgorithm):
    """What all methods share whose direction is beta * G(y) + a vector fixed for the order."""

    steers: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"plain_sgd"})

    beta: float
    warm: bool

    def mix(self, beta: float, warm: bool = False) -> None:
        """To be called first. UsageError FL-S102."""
        if not (math.isfinite(beta) and 0 < beta <= 1):
            raise UsageError(
                "FL-S102", f"beta={beta}", "give more than 0, at most 1; 1 is no momentum"
            )
        self.beta, self.warm = beta, warm
        self._beta = beta  # of this order
        self._fixed: list[Tensor] = []  # what is added to beta * G(y)

    def before_order(self, params: Params, task: Task) -> None:
        first = "gamma" not in task.extra
        self._beta = 1.0 if self.warm and first else task.extra.get("beta", self.beta)
        self._fixed = split(self.fixed(task).expand(count(params)), params)

    def fixed(self, task: Task) -> Tensor:
        """The vector of this order, flat, or one number for all of it."""
        return task.vector(DIRECTION) * (1 - self._beta)

    def transform_grad(self, params: Params, again: Again) -> None:
        grads = gradients(params)
        if self._beta != 1:
            torch._foreach_mul_(grads, self._beta)
        torch._foreach_add_(grads, self._fixed)

    def measure(self, params: Params, task: Task, steps: int, lr: float) -> Measured:
        return Measured(said={"steps": float(steps), "lr": lr})


class FedAvgM(Steering):
    """Momentum over rounds in every local step; for runs in which most clients take part."""

    gives: ClassVar[frozenset[str]] = frozenset({"server_momentum"})

    def __init__(
        self,
        beta: float = 0.1,  # weight of the fresh gradient, 1: no momentum; try 0.2, 0.5
        warm: bool = False,  # before the first merge g is 0: train that round with beta = 1
    ) -> None:
        self.mix(beta, warm)

    def server_half(self) -> Half:
        return Direction()


class FedAvgMVR(Steering):
    """Experimental: FedAvg-M with variance reduction, which diverges unless steps are small."""

    reevaluates: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"plain_sgd", "rounds"})
    gives: ClassVar[frozenset[str]] = frozenset({"server_momentum"})

    def __init__(
        self,
        beta: float = 0.1,  # weight of the fresh gradient, 1: no momentum; try 0.2, 0.5
        warm: bool = False,  # before the first merge g is 0: train that round with beta = 1
    ) -> None:
        self.mix(beta, warm)
        self._former: list[Tensor] = []

    def server_half(self) -> Half:
        return Direction(former=True)

    def before_order(self, params: Params, task: Task) -> None:
        super().before_order(params, task)
        self._former = former(params, task) if self._beta != 1 else []

    def transform_grad(self, params: Params, again: Again) -> None:
        recursive(params, again, self._former, self._beta, self._fixed)


def former(params: Params, task: Task) -> list[Tensor]:
    """The model before the one that the order starts from; before the first merge: that one."""
    if "gamma" in task.extra:
        return split(task.vector(FORMER), params)
    return [p.detach().clone() for p in params.values()]


def recursive(
    params: Params, again: Again, at: list[Tensor], beta: float, fixed: list[Tensor]
) -> None:
    """d = G(y) + fixed - (1 - beta) G(at), G at both of the same batch; `at` empty: without."""
    grads = gradients(params)
    if at:
        fresh = [grad.clone() for grad in grads]
        again(at)
        grads = gradients(params)
        torch._foreach_mul_(grads, -(1 - beta))
        torch._foreach_add_(grads, fresh)
    torch._foreach_add_(grads, fixed)


def gradients(params: Params) -> list[Tensor]:
    """Of all parameters; zeros where a batch used one not at all."""
    found = []
    for p in params.values():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        found.append(p.grad)
    return found
