"""Adam and AdamW as `torch.optim` computes them, bit for bit, without what these cost at start.

Kingma and Ba 2015, https://arxiv.org/abs/1412.6980; Loshchilov and Hutter 2019,
https://arxiv.org/abs/1711.05101.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from atoll.client.stepping import Stepping

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch's defaults


class Adam(Stepping):
    """`w -= lr * m' / (sqrt(v') + eps)`, m' and v' without their bias.

    `decoupled`: AdamW's weight decay, of the weights themselves and not through the gradient.
    `warm`: own steps over which lr rises to what it should be. Whoever has no moments yet in the
    middle of a run, as a newcomer, would take steps of full length along one batch's signs.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        warm: int = 0,
    ) -> None:
        super().__init__(params, lr, weight_decay)
        self.decoupled, self.warm = decoupled, warm

    def move(self, p: Tensor, grad: Tensor) -> None:
        state = self.state.get(p)
        if state is None:
            zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            state = self.state[p] = {"step": torch.tensor(0.0), **zeros}
        state["step"] += 1
        step, m, v = state["step"].item(), state["exp_avg"], state["exp_avg_sq"]
        lr = self.lr * min(1.0, step / self.warm) if self.warm else self.lr
        if self.decoupled:
            p.mul_(1 - lr * self.weight_decay)
        elif self.weight_decay:
            grad = grad.add(p, alpha=self.weight_decay)
        m.lerp_(grad, 1 - BETA1)
        v.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        root = (v.sqrt() / math.sqrt(1 - BETA2**step)).add_(EPS)
        p.addcdiv_(m, root, value=-lr / (1 - BETA1**step))
