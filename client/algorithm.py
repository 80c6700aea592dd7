"""Local algorithms: the client's half of a method, as hooks around the local step.

    before_order  the model holds what the order is trained from; keep anchors here
    transform_grad  gradients of the step's batch lie in `p.grad`; change them in place
    after_step    the optimizer has stepped

Gradients are clipped after `transform_grad`, so that what is stepped is what is bounded.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from atoll.client.trainer import Task
from atoll.protocols import slots
from atoll.protocols.errors import UsageError

BUILTIN = {
    "plain": "atoll.client.algorithm:Plain",
    "fedprox": "atoll.client.algorithm:FedProx",
}

Params = Mapping[str, nn.Parameter]  # the trainable ones
Again = Callable[[], Tensor]  # gradients of the same batch at the parameters as they are now; loss


class LocalAlgorithm:
    """Base of all local algorithms. The hooks do nothing here."""

    def before_order(self, params: Params, task: Task) -> None:
        """An order begins; `task.extra` has the strategy's numbers."""

    def transform_grad(self, params: Params, again: Again) -> None:
        """Change the gradients of this step; `again()` recomputes them, e.g. at moved weights."""

    def after_step(self, params: Params) -> None:
        """The step is done."""


class Plain(LocalAlgorithm):
    """Nothing but the optimizer's steps."""


class FedProx(LocalAlgorithm):
    """A pull back to the received model: gradient + mu * (w - w_received).

    Li et al. 2020, https://arxiv.org/abs/1812.06127. `mu` = 0 is plain training bit for bit; a
    strategy may send another `mu` with an order.
    """

    def __init__(
        self,
        mu: float = 0.1,  # how strong the pull is
    ) -> None:
        if not (math.isfinite(mu) and mu >= 0):
            raise UsageError("FL-S102", f"fedprox: mu={mu}", "give mu of at least 0")
        self.mu = mu
        self._mu = mu  # of this order
        self._anchor: list[Tensor] = []

    def before_order(self, params: Params, task: Task) -> None:
        self._mu = task.extra.get("mu", self.mu)
        self._anchor = [p.detach().clone() for p in params.values()] if self._mu else []

    def transform_grad(self, params: Params, again: Again) -> None:
        if not self._mu:
            return
        with torch.no_grad():
            for p, anchor in zip(params.values(), self._anchor, strict=True):
                if p.grad is not None:
                    p.grad.add_(p - anchor, alpha=self._mu)


def local_algorithm(spec: str) -> LocalAlgorithm:
    """The algorithm that `spec` names: `plain`, `fedprox:mu=0.1`, or `module:object`."""
    made = slots.resolve("local algorithm", spec, BUILTIN)
    if not isinstance(made, LocalAlgorithm):
        raise UsageError(
            "FL-S103", f"{spec!r} is {type(made).__name__}", "subclass atoll.client.LocalAlgorithm"
        )
    return made
