"""SGD as `torch.optim.SGD` computes it, bit for bit, without its cost at start and at each step.

Making any of torch's optimizers imports its compiler (0.9 s, sympy among it, in each client
process), and their profiler hooks are a fifth of a step of a small model.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class SGD:
    """`buf = momentum * buf + g` from the second step on, `w -= lr * buf`, g = grad + decay * w.

    `state` and `param_groups` lie as torch's, so that a GradScaler and whoever keeps optimizer
    state treat both alike.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        self.params = list(params)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.param_groups = [{"params": self.params}]
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradients; a parameter without one stays."""
        for p in self.params:
            grad = p.grad
            if grad is None:
                continue
            if self.weight_decay:
                grad = grad.add(p, alpha=self.weight_decay)
            if self.momentum:
                grad = self._buffered(p, grad)
            p.add_(grad, alpha=-self.lr)

    def _buffered(self, p: Tensor, grad: Tensor) -> Tensor:
        kept = self.state.get(p)
        if kept is None:
            self.state[p] = {"momentum_buffer": grad.clone()}
            return self.state[p]["momentum_buffer"]
        return kept["momentum_buffer"].mul_(self.momentum).add_(grad)
