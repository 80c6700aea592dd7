"""Stepping: what our own optimizers share; torch's would import its compiler.

Making any of torch's optimizers costs 1.5 s and 68 MB in each process (sympy among it), and their
profiler hooks are a fifth of a step of a small model.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Stepping(ABC):
    """Base of the optimizers: write `move`.

    `state` and `param_groups` lie as torch's, so that a GradScaler and whoever keeps optimizer
    state treat both alike.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        self.params = list(params)
        self.lr, self.weight_decay = lr, weight_decay
        self.param_groups = [{"params": self.params}]
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradients; a parameter without one stays."""
        for p in self.params:
            if p.grad is not None:
                self.move(p, p.grad)

    @abstractmethod
    def move(self, p: Tensor, grad: Tensor) -> None:
        """Change `p` in place, and its state; `grad` is read only."""
