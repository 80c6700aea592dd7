"""Outer optimizers: the step that the global model takes along an averaged delta.

Pure functions over flat vectors. delta = base - local, so it is fed as a gradient: x -= lr * delta.
Momentum and Nesterov are torch's SGD bit by bit (FedAvgM: Hsu et al. 2019,
https://arxiv.org/abs/1909.06335; DiLoCo: https://arxiv.org/abs/2311.08105 is `Nesterov()`); the
adaptive ones are Reddi et al. 2021, https://arxiv.org/abs/2003.00295, which torch's cannot give:
v starts at tau squared and nothing is bias-corrected.

Everything is elementwise, so a model can be stepped tile by tile, in any order, with the same bits.
State is named flat tensors, because it is stored, served and sent to peers.
"""

import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atoll.aggregation.checks import finite, positive, share
from atoll.protocols import slots
from atoll.protocols.codecs import TILE
from atoll.protocols.errors import UsageError

BUILTIN: Mapping[str, str] = {
    "sgd": "atoll.aggregation.outer:Sgd",
    "average": "atoll.aggregation.outer:Sgd",
    "momentum": "atoll.aggregation.outer:Momentum",
    "nesterov": "atoll.aggregation.outer:Nesterov",
    "adam": "atoll.aggregation.outer:Adam",
    "yogi": "atoll.aggregation.outer:Yogi",
    "adagrad": "atoll.aggregation.outer:Adagrad",
}

STEPS = "steps"  # the one scalar of a state: steps taken so far, int64 of shape (1,)


class Outer(ABC):
    """Base of all outer optimizers: write `vectors` and `kernel`, `step` comes with it."""

    in_place: ClassVar[bool] = False  # True: `kernel` may be given `delta` as its `out`

    @property
    def vectors(self) -> Mapping[str, float]:
        """The state's vectors, each as long as the model, and what they are filled with at first.

        Empty: no state at all, and none is stored.
        """
        return {}

    @abstractmethod
    def kernel(
        self, anchor: Tensor, delta: Tensor, state: Mapping[str, Tensor], steps: int, out: Tensor
    ) -> None:
        """One tile of a step: the new anchor into `out`, `state` changed in place.

        `steps` counts from 1. `anchor` is read only, `delta` may be used up; `out` aliases neither,
        unless `in_place`.
        """

    def step(
        self,
        anchor: Tensor,
        delta: Tensor,
        state: Mapping[str, Tensor] | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The next anchor and state; `state` None or empty: the first step.

        Writes to none of its arguments but `out`, which may be `anchor` itself. Scratch is two
        tiles, whatever the model.
        """
        new = {name: v.clone() for name, v in (state or self.initial(anchor)).items()}
        out = torch.empty_like(anchor) if out is None else out
        if STEPS in new:
            new[STEPS] += 1
        steps = int(new[STEPS]) if STEPS in new else 1
        total = anchor.numel()
        used, made = torch.empty_like(anchor[:TILE]), torch.empty_like(anchor[:TILE])
        for lo in range(0, total, TILE):
            hi = min(lo + TILE, total)
            g = used[: hi - lo].copy_(delta[lo:hi])
            views = {name: new[name][lo:hi] for name in self.vectors}
            self.kernel(anchor[lo:hi], g, views, steps, made[: hi - lo])
            out[lo:hi] = made[: hi - lo]
        return out, new

    def initial(self, anchor: Tensor) -> dict[str, Tensor]:
        """The state before the first step."""
        state = {name: torch.full_like(anchor, at) for name, at in self.vectors.items()}
        return {**state, STEPS: torch.zeros(1, dtype=torch.int64)} if state else {}


@dataclass(frozen=True)
class Sgd(Outer):
    """x -= lr * delta. With lr 1 (`average`) the plain average of FedAvg."""

    in_place: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/1602.05629"
    lr: float = 1.0  # server step size

    def __post_init__(self) -> None:
        positive(lr=self.lr)
        finite(lr=self.lr)

    def kernel(
        self, anchor: Tensor, delta: Tensor, state: Mapping[str, Tensor], steps: int, out: Tensor
    ) -> None:
        torch.add(anchor, delta, alpha=-self.lr, out=out)


@dataclass(frozen=True)
class Momentum(Outer):
    """v = momentum * v + delta;  x -= lr * v."""

    in_place: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/1909.06335"
    lr: float = 1.0  # server step size
    momentum: float = 0.9  # share of the last step that is taken again

    def __post_init__(self) -> None:
        positive(lr=self.lr)
        finite(lr=self.lr)
        share(momentum=self.momentum)

    @property
    def vectors(self) -> Mapping[str, float]:
        return {"momentum": 0.0}

    def kernel(
        self, anchor: Tensor, delta: Tensor, state: Mapping[str, Tensor], steps: int, out: Tensor
    ) -> None:
        v = state["momentum"].mul_(self.momentum).add_(delta)
        torch.add(anchor, v, alpha=-self.lr, out=out)


@dataclass(frozen=True)
class Nesterov(Momentum):
    """v = momentum * v + delta;  x -= lr * (delta + momentum * v). The defaults are DiLoCo's."""

    paper: ClassVar[str] = "https://arxiv.org/abs/2311.08105"
    lr: float = 0.7  # server step size

    def kernel(
        self, anchor: Tensor, delta: Tensor, state: Mapping[str, Tensor], steps: int, out: Tensor
    ) -> None:
        v = state["momentum"].mul_(self.momentum).add_(delta)
        torch.add(anchor, delta.add_(v, alpha=self.momentum), alpha=-self.lr, out=out)


@dataclass(frozen=True)
class Adam(Outer):
    """m = b1 m + (1-b1) delta;  v = b2 v + (1-b2) delta^2;  x -= lr * m / (sqrt(v) + tau).

    `flower` starts v at 0 and, here, multiplies lr by sqrt(1-b2^(t+1)) / (1-b1^(t+1)) in round t,
    counted from 1, as Flower's FedAdam does. `v0` None: tau squared, or 0 with `flower`.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2003.00295"
    lr: float = 0.01  # server step size: about how far an element moves in one version
    beta1: float = 0.9  # how long the mean of deltas remembers
    beta2: float = 0.99  # how long the mean of their squares remembers
    tau: float = 1e-3  # added to the root; large: steps as of plain averaging, small: as of signs
    v0: float | None = None  # what v starts at; None: tau squared, or 0 with `flower`
    flower: bool = False  # start and correct bias as Flower does

    def __post_init__(self) -> None:
        positive(lr=self.lr, tau=self.tau)
        finite(lr=self.lr, tau=self.tau)
        share(beta1=self.beta1, beta2=self.beta2)

    @property
    def vectors(self) -> Mapping[str, float]:
        v0 = (0.0 if self.flower else self.tau**2) if self.v0 is None else self.v0
        return {"m": 0.0, "v": v0}

    def kernel(
        self, anchor: Tensor, delta: Tensor, state: Mapping[str, Tensor], steps: int, out: Tensor
    ) -> None:
        m = state["m"].mul_(self.beta1).add_(delta, alpha=1 - self.beta1)
        square = delta.mul_(delta)
        self.second_moment(state["v"], square, out)
        root = torch.sqrt(state["v"], out=square).add_(self.tau)
        torch.addcdiv(anchor, m, root, value=-self.lr * self.correction(steps), out=out)

    def second_moment(self, v: Tensor, square: Tensor, scratch: Tensor) -> None:
        """Take delta^2 into v, in place."""
        v.mul_(self.beta2).add_(square, alpha=1 - self.beta2)

    def correction(self, steps: int) -> float:
        if not self.flower:
            return 1.0
        bias1, bias2 = 1 - self.beta1 ** (steps + 1), 1 - self.beta2 ** (steps + 1)
        return float(bias2**0.5 / bias1)


@dataclass(frozen=True)
class Yogi(Adam):
    """Adam with v = v - (1-b2) delta^2 sign(v - delta^2): v changes slowly also when it falls.

    `flower`: v starts at 0; Flower's FedYogi corrects no bias.
    """

    def second_moment(self, v: Tensor, square: Tensor, scratch: Tensor) -> None:
        """Take delta^2 into v, in place."""
        sign = torch.sub(v, square, out=scratch).sign_()
        v.addcmul_(square, sign, value=-(1 - self.beta2))

    def correction(self, steps: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Adagrad(Adam):
    """Adam with v = v + delta^2. `beta2` is not used; `flower` as for Yogi."""

    lr: float = 0.1  # server step size
    beta1: float = 0.0  # how long the mean of deltas remembers; 0: not at all

    def second_moment(self, v: Tensor, square: Tensor, scratch: Tensor) -> None:
        """Take delta^2 into v, in place."""
        v.add_(square)

    def correction(self, steps: int) -> float:
        return 1.0


def outer(spec: str) -> Outer:
    """The outer optimizer that `spec` names. Raises UsageError FL-S101, FL-S102 or FL-S103."""
    found = slots.resolve("outer", spec, BUILTIN)
    if not all(hasattr(found, part) for part in ("vectors", "kernel", "step")):
        raise UsageError(
            "FL-S102",
            f"outer {spec!r} is a {type(found).__name__}",
            "subclass atoll.aggregation.outer.Outer",
        )
    return typing.cast("Outer", found)
