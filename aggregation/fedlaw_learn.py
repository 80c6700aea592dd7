"""FedLAW's loop: learn lambda and gamma of one merge by the loss on the server's proxy data.

A step builds w (one pass over the updates), takes the loss and its gradient q by w (one ordinary
backward), and the inner products of q with the updates (a second pass): two vectors of the model's
size in memory, whatever the number of updates. The rows of the stack are the deltas D_i = x - y_i
and, last, the model x itself, so y_i = x - D_i and <q, y_i> = <q, x> - <q, D_i>.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.aggregation.fedlaw_steps import OPTIMIZERS, cosine, halving
from atoll.aggregation.fedlaw_weights import FORMS
from atoll.aggregation.proxy import Proxy
from atoll.aggregation.stack import Stack

AVERAGED_AFTER = 5  # epochs of the two-stage form, from which on z is averaged
AVERAGED_RATE = 0.05


@dataclass(frozen=True, slots=True)
class How:
    """The settings of the learning; `FedLaw` has them as its parameters."""

    shares: bool = True  # lambda is learned
    scale: bool = True  # gamma is learned
    epochs: int = 20
    lr: float = 0.005
    batch: int = 128
    optimizer: str = "adam"
    form: str = "exp"
    two_stage: bool = False
    gamma_max: float | None = None
    tolerance: float = 0.0
    max_models: int = 64
    seed: int = 0


class Learned(NamedTuple):
    """What a merge is made with, and the loss before and after."""

    shares: list[float]  # of each update, sum 1
    gamma: float
    before: float  # proxy loss of the weighted mean
    after: float  # of what was learned
    guarded: bool  # it was no better, or not finite: the shares are the mean's, gamma is 1


def learn(stack: Stack, proxy: Proxy, start: Sequence[float], how: How) -> Learned:
    """From `start`, the updates' weights (sum 1, those with 0 take no part)."""
    mixture = Mixture(stack, proxy, start, how)
    mixture.build()
    before = proxy.loss()
    stages = _two_stages if how.two_stage else _one_stage
    finite = stages(mixture, how)
    mixture.build()
    after = proxy.loss() if finite else math.nan
    if not math.isfinite(after) or proxy.gain(before, after) < -how.tolerance:
        return Learned(list(start), 1.0, before, after, True)
    shares, gamma = mixture.values()
    return Learned(shares, gamma, before, after, False)


class Mixture:
    """The unknowns of one merge and the model they make, in `proxy.vector`."""

    def __init__(self, stack: Stack, proxy: Proxy, start: Sequence[float], how: How) -> None:
        self._stack, self._proxy, self._form = stack, proxy, FORMS[how.form]
        self._most = how.gamma_max
        self.limit = -1 if proxy.limit is None else proxy.limit  # steps; below 0: no limit
        self._optimizer = OPTIMIZERS[how.optimizer]()
        weights = torch.tensor(start, dtype=torch.float64)
        there = weights.nonzero().flatten()
        groups = torch.tensor_split(there, min(how.max_models, len(there)))
        # (groups, updates): what part of its group each update is; updates of 0 are in none
        self._parts = torch.zeros(len(groups), len(start), dtype=torch.float64)
        for row, members in zip(self._parts, groups, strict=True):
            row[members] = weights[members] / weights[members].sum()
        self.theta = self._form.start([float(weights[members].sum()) for members in groups])
        self._form.clamp(self.theta, self._most)
        self._built: Tensor | None = None

    def values(self) -> tuple[list[float], float]:
        """(share of each update, gamma)"""
        shares, gamma = self._form.values(self.theta)
        return (shares @ self._parts).tolist(), gamma

    def build(self) -> None:
        """w = gamma * (x - sum of lambda_i D_i), where it is not built yet."""
        if self._built is not None and torch.equal(self._built, self.theta):
            return
        shares, gamma = self.values()
        self._stack.mix([*(-gamma * share for share in shares), gamma], self._proxy.vector)
        self._built = self.theta.clone()

    def step(self, at: Tensor, rate: float, learned: Tensor) -> bool:
        """One step on the examples `at`; False where the loss or its gradient is not finite."""
        self.build()
        loss, q = self._proxy.gradient(at)
        if not math.isfinite(loss) or not bool(q.isfinite().all()):
            return False
        dots = self._stack.dots(q)
        models = dots[-1] - self._parts @ dots[:-1]  # <q, y> of each group's model
        gradient = self._form.gradient(self.theta, models)
        self._optimizer.step(self.theta, gradient * learned, rate)
        self._form.clamp(self.theta, self._most)
        return True

    def batches(self, how: How, epoch: int) -> Iterator[Tensor]:
        """Indices of an epoch's batches, shuffled by (seed, epoch) alone."""
        generator = torch.Generator().manual_seed((how.seed << 20) + epoch)
        n = self._proxy.examples
        if n is None:  # all of them, wherever they lie
            yield torch.empty(0, dtype=torch.int64)
            return
        pieces: tuple[Tensor, ...] = torch.split(torch.randperm(n, generator=generator), how.batch)
        if len(pieces) > 1 and len(pieces[-1]) == 1:
            pieces = pieces[:-1]  # one example has no batch statistics
        yield from pieces

    def mask(self, shares: bool, scale: bool) -> Tensor:
        mask = torch.full_like(self.theta, float(shares))
        mask[-1] = float(scale)
        return mask


def _one_stage(mixture: Mixture, how: How) -> bool:
    mask, left = mixture.mask(how.shares, how.scale), mixture.limit
    for epoch in range(how.epochs):
        for at in mixture.batches(how, epoch):
            if left == 0:
                return True
            if not mixture.step(at, halving(how.lr, epoch), mask):
                return False
            left -= 1
    return True


def _two_stages(mixture: Mixture, how: How) -> bool:
    """The official code's "SWA" form: lambda first, averaged over its iterates; then gamma."""
    half, mask = how.epochs // 2, mixture.mask(True, False)
    passed: list[Tensor] = []
    for epoch in range(half):
        rate = cosine(how.lr, epoch) if epoch <= AVERAGED_AFTER else AVERAGED_RATE
        for at in mixture.batches(how, epoch):
            if not mixture.step(at, rate, mask):
                return False
        if epoch > AVERAGED_AFTER:
            passed.append(mixture.theta.clone())
    if passed:
        mixture.theta = torch.stack(passed).mean(dim=0)
    mask = mixture.mask(False, True)
    for epoch in range(half, how.epochs):
        for at in mixture.batches(how, epoch):
            if not mixture.step(at, halving(how.lr, epoch - half), mask):
                return False
    return True
