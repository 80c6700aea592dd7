"""SGD as `torch.optim.SGD` computes it, bit for bit, without its cost at start and at each step."""

from collections.abc import Iterable

from torch import Tensor, nn

from atoll.client.stepping import Stepping


class SGD(Stepping):
    """`buf = momentum * buf + g` from the second step on, `w -= lr * buf`, g = grad + decay * w."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, weight_decay)
        self.momentum = momentum

    def move(self, p: Tensor, grad: Tensor) -> None:
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
