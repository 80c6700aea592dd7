"""Local algorithms: the client's half of a method, as hooks around the local step.

    before_order    the model holds what the order is trained from; keep anchors here
    view_weights    other values that the forward pass is to see, e.g. quantised or masked ones
    transform_grad  gradients of the step's batch lie in `p.grad`; change them in place
    after_step      the optimizer has stepped
    measure         an order's steps are done: what to send beside the delta, and what to keep

Gradients are clipped after `transform_grad`, so that what is stepped is what is bounded; for a
method that `steers`, weight decay and clipping come before it, so that what is sent to others is
the gradient that all mean. The server's half, where there is one, is `server_half`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from atoll.aggregation.half import Half
from atoll.client.keep import Rule
from atoll.client.trainer import Task, Tensors
from atoll.protocols import slots
from atoll.protocols.errors import UsageError

BUILTIN = {
    "plain": "atoll.client.algorithm:Plain",
    "fedprox": "atoll.client.algorithm:FedProx",
    "fedavg-m": "atoll.client.momentum:FedAvgM",
    "fedavg-m-vr": "atoll.client.momentum:FedAvgMVR",
    "scaffold": "atoll.client.scaffold:Scaffold",
    "scaffold-m": "atoll.client.scaffold:ScaffoldM",
    "scaffold-m-vr": "atoll.client.scaffold:ScaffoldMVR",
    "feddyn": "atoll.client.feddyn:FedDyn",
}

Params = Mapping[str, nn.Parameter]  # the trainable ones


class Again(Protocol):
    """Gradients of the same batch once more, into `p.grad`; returns the loss."""

    def __call__(self, at: Sequence[Tensor] | None = None) -> Tensor:
        """At the parameters as they are now, or at those values, one for each parameter.

        Of an algorithm that `reevaluates`: with the same dropout, and no running statistic moves.
        """


@dataclass(frozen=True, slots=True)
class Measured:
    """What an order came to, besides the model. Only what the server's half asks for is sent."""

    extras: Tensors = field(default_factory=dict)  # `Half.up`, flat float32
    said: Mapping[str, float] = field(default_factory=dict)  # `Half.says`
    state: Mapping[str, Tensors] = field(default_factory=dict)  # for the keep, by kind
    metrics: Mapping[str, float] = field(default_factory=dict)


class LocalAlgorithm:
    """Base of all local algorithms. The hooks do nothing here."""

    steers: ClassVar[bool] = False  # weight decay and clipping come before `transform_grad`
    reevaluates: ClassVar[bool] = False  # it calls `again` at other weights

    @property
    def rules(self) -> Mapping[str, Rule]:
        """Kinds of private state, and what becomes of each when an outcome is known."""
        return {}

    def server_half(self) -> Half | None:
        """What the server does and sends for it."""
        return None

    def before_order(self, params: Params, task: Task) -> None:
        """An order begins; `task.extra` has the strategy's numbers, `task.extras` vectors."""

    def view_weights(self, params: Params) -> Sequence[Tensor] | None:
        """Values, one for each parameter, that the forward pass sees in their place; the gradients
        at them are stepped on the parameters themselves. None: as they are."""
        return None

    def transform_grad(self, params: Params, again: Again) -> None:
        """Change the gradients of this step; `again()` recomputes them, e.g. at moved weights."""

    def after_step(self, params: Params) -> None:
        """The step is done."""

    def measure(self, params: Params, task: Task, steps: int, lr: float) -> Measured:
        """After `steps` steps of size `lr`, at an order's end or for a snapshot."""
        return Measured()


def count(params: Params) -> int:
    return sum(p.numel() for p in params.values())


def split(flat: Tensor, params: Params) -> list[Tensor]:
    """A flat trainable vector as one tensor for each parameter, on its device, in its dtype."""
    found, at = [], 0
    for p in params.values():
        found.append(flat[at : at + p.numel()].view(p.shape).to(p.device, p.dtype))
        at += p.numel()
    assert at == flat.numel(), f"{flat.numel()} values for {at}"
    return found


def flat_like(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors in the order of the parameters as one flat vector, float32, on the CPU."""
    return torch.cat([t.detach().reshape(-1).to("cpu", torch.float32) for t in tensors])


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
