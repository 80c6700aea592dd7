"""Asking: a proxy whose examples lie with clients: each loss is a question to the validators.

The first loss of a merge and its first gradient are of the same model, and so one question. A merge
of s steps is s questions with a gradient and one without. Once a question had too few answers
nothing more is asked in that merge, and every loss is NaN.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from atoll.aggregation.proxy import ASKED
from atoll.aggregation.validated import Count, gained, mean_loss
from atoll.protocols.codecs import TILE

STEPS = 5  # in a merge: each is an exchange with all validators


@dataclass(frozen=True, slots=True)
class Answer:
    """One validator's, with how much it counts; `gradient`: (elements,) where it was asked for."""

    count: Count
    gradient: Tensor | None


class Asker(Protocol):
    """Whoever carries the questions. Called in the thread that merges."""

    def begin(self) -> None:
        """A merge begins."""

    def ask(
        self, model: Tensor, buffers: Mapping[str, Tensor], gradient: bool
    ) -> Sequence[Answer] | None:
        """What the validators say of a model, (elements,), which nobody writes to any more. None:
        too few of them did. InterruptedMergeError where the server stops."""

    def done(self) -> None:
        """The answers have been read."""

    def interrupt(self) -> None:
        """Let a question go that is waited for, and every later one."""


class Asking:
    """A `Proxy` (see `atoll.aggregation.proxy`) of `count` elements."""

    examples = None

    def __init__(self, count: int, asker: Asker) -> None:
        self.vector = torch.empty(count)
        self.limit: int | None = STEPS
        self._asker = asker
        self._gradient = torch.zeros(count)
        self._buffers: Mapping[str, Tensor] = {}
        self._of: Tensor | None = None  # the model of the last question
        self._first: Sequence[Count] = ()
        self._last: Sequence[Count] = ()
        self._failed = False
        self._has_gradient = False

    def begin(self, buffers: Mapping[str, Tensor]) -> None:
        self._buffers = {group: values.clone() for group, values in buffers.items()}
        self._of, self._first, self._last = None, (), ()
        self._failed = self._has_gradient = False
        self._asker.begin()

    def loss(self) -> float:
        first = not self._first and not self._failed
        loss = self._ask(gradient=first)
        if first:
            self._first = self._last
        return loss

    def gradient(self, at: Tensor) -> tuple[float, Tensor]:
        return self._ask(gradient=True), self._gradient

    def gain(self, before: float, after: float) -> float:
        return gained(self._first, self._last)

    def told(self) -> Mapping[str, float]:
        return {ASKED: float(len(self._last))}

    def settle(self) -> Tensor | None:
        return None

    def interrupt(self) -> None:
        self._asker.interrupt()

    def _ask(self, gradient: bool) -> float:
        """The mean loss; the mean gradient lies in `_gradient` then."""
        if self._failed:
            return math.nan
        known = self._of is not None and torch.equal(self._of, self.vector)
        if not known or (gradient and not self._has_gradient):
            self._of = self.vector.clone()
            answers = self._asker.ask(self._of, self._buffers, gradient)
            self._failed, self._has_gradient = answers is None, gradient
            self._last = [answer.count for answer in answers or ()]
            if gradient:
                self._mean(answers or ())
            del answers  # a file that nobody reads can be overwritten by the next
            self._asker.done()
        if self._failed:
            return math.nan
        return mean_loss(self._last)

    def _mean(self, answers: Sequence[Answer]) -> None:
        """Tile by tile, the answers in their order: theirs may be mapped files."""
        for lo in range(0, self._gradient.numel(), TILE):
            total = self._gradient[lo : lo + TILE].zero_()
            for answer in answers:
                assert answer.gradient is not None, "it was asked for"
                factor = answer.count.weight * answer.count.scale
                total.add_(answer.gradient[lo : lo + TILE], alpha=factor)
