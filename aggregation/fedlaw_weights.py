"""FedLAW's unknowns: a few numbers (z, s) that stand for simplex weights lambda and a scale gamma.

The model is w = gamma * sum of lambda_i * y_i over the clients' models y_i. Its loss's gradient by
z and s needs no autograd over the models: with q the gradient by w, and g_i = <q, y_i>,

    "exp"    lambda = softmax(z), gamma = exp(s)       dz_i = gamma * lambda_i * (g_i - g)
                                                       ds = gamma * g, g = sum of lambda_j * g_j
    "quad"   lambda_i = z_i^2 / sum of z^2, gamma = s^2    dz_i = 2 gamma z_i (g_i - g) / sum of z^2
                                                           ds = 2 s g

Both forms are the official code's (https://github.com/ZexiLee/ICML-2023-FedLAW); here "quad" too
starts from the sizes, z_i = sqrt(p_i), where that code starts alike for all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 1e-6  # of gamma: it stays above 0 whatever a step does


@dataclass(frozen=True, slots=True)
class Exponential:
    """ "exp": lambda = softmax(z), gamma = exp(s)."""

    def start(self, shares: Sequence[float]) -> Tensor:
        """(m + 1,) float64: z and last s, of lambda = shares and gamma = 1."""
        z = torch.tensor(shares, dtype=torch.float64).log()
        return torch.cat([z, z.new_zeros(1)])

    def values(self, theta: Tensor) -> tuple[Tensor, float]:
        """(lambda, gamma)"""
        return theta[:-1].softmax(0), math.exp(theta[-1])

    def gradient(self, theta: Tensor, g: Tensor) -> Tensor:
        """By theta, (m + 1,); `g`: (m,) inner products of q with the models."""
        shares, gamma = self.values(theta)
        mean = shares @ g
        return torch.cat([gamma * shares * (g - mean), (gamma * mean).view(1)])

    def clamp(self, theta: Tensor, most: float | None) -> None:
        """Keep gamma within (0, most], in place."""
        highest = None if most is None else math.log(most)
        theta[-1].clamp_(math.log(LEAST), highest)


@dataclass(frozen=True, slots=True)
class Quadratic:
    """ "quad": lambda = z^2 / sum of z^2, gamma = s^2."""

    def start(self, shares: Sequence[float]) -> Tensor:
        z = torch.tensor(shares, dtype=torch.float64).sqrt()
        return torch.cat([z, z.new_ones(1)])

    def values(self, theta: Tensor) -> tuple[Tensor, float]:
        squares = theta[:-1].square()
        return squares / squares.sum(), float(theta[-1]) ** 2

    def gradient(self, theta: Tensor, g: Tensor) -> Tensor:
        shares, gamma = self.values(theta)
        z, s, mean = theta[:-1], theta[-1], shares @ g
        return torch.cat([2 * gamma * z * (g - mean) / z.square().sum(), (2 * s * mean).view(1)])

    def clamp(self, theta: Tensor, most: float | None) -> None:
        theta[-1].clamp_(math.sqrt(LEAST), None if most is None else math.sqrt(most))


Form = Exponential | Quadratic
FORMS: dict[str, Form] = {"exp": Exponential(), "quad": Quadratic()}
