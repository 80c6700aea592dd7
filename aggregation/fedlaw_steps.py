"""FedLAW's optimizers, over a few float64 numbers, and its learning rates; fresh in every merge.

Adam with the official code's betas, and SGD with momentum 0.9. What is not learned now has a
gradient of 0.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

HALVED_EVERY = 20  # epochs


@dataclass
class Adam:
    """Kingma and Ba 2015, https://arxiv.org/abs/1412.6980; beta1 as the official FedLAW code's."""

    betas: tuple[float, float] = (0.5, 0.999)
    eps: float = 1e-8
    _steps: int = field(default=0, init=False)
    _mean: Tensor = field(default_factory=lambda: torch.zeros(()), init=False)
    _square: Tensor = field(default_factory=lambda: torch.zeros(()), init=False)

    def step(self, theta: Tensor, gradient: Tensor, rate: float) -> None:
        """In place."""
        (first, second), self._steps = self.betas, self._steps + 1
        self._mean = first * self._mean + (1 - first) * gradient
        self._square = second * self._square + (1 - second) * gradient.square()
        size = (self._square / (1 - second**self._steps)).sqrt() + self.eps
        theta -= rate * (self._mean / (1 - first**self._steps)) / size


@dataclass
class Momentum:
    """SGD with heavy-ball momentum, fresh in every merge."""

    beta: float = 0.9
    _velocity: Tensor = field(default_factory=lambda: torch.zeros(()), init=False)

    def step(self, theta: Tensor, gradient: Tensor, rate: float) -> None:
        """In place."""
        self._velocity = self.beta * self._velocity + gradient
        theta -= rate * self._velocity


OPTIMIZERS = {"adam": Adam, "sgd": Momentum}


def halving(rate: float, epoch: int) -> float:
    """Halved every 20 epochs."""
    return rate * 0.5 ** (epoch // HALVED_EVERY)


def cosine(rate: float, epoch: int, period: int = 100) -> float:
    """From `rate` to 0 over `period` epochs."""
    return rate * (1 + math.cos(math.pi * epoch / period)) / 2
