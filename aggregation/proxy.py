"""Proxy: a loss that a server can learn by, as a rule sees it; nothing of models or data.

What is behind it holds the model over one flat vector and a few labelled examples
(`atoll.client.flat`), or asks clients that do (`atoll.aggregation.asking`). A rule fills `vector`,
and asks.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

ASKED = "validators"  # in a merge's stats: others were asked, so it cannot be learned again


class InterruptedMergeError(Exception):
    """The server stops: the version is made when it starts again."""


class Proxy(Protocol):
    """All losses are means over examples, at the model in `vector`. Deterministic, but where others
    are asked."""

    vector: Tensor  # (elements,) float32, the trainable tensors end to end: write into it
    limit: int | None  # steps in one merge, at most; None: as many as the rule wants

    @property
    def examples(self) -> int | None:
        """None: each loss is over all of them, wherever they lie."""

    def begin(self, buffers: Mapping[str, Tensor]) -> None:
        """A merge begins: the flat buffers that the new model will have, by group."""

    def loss(self) -> float:
        """Over all examples; may be NaN or Inf, and is NaN where nobody could tell it."""

    def gradient(self, at: Tensor) -> tuple[float, Tensor]:
        """Loss of the examples `at` (indices, int64), and its gradient by `vector`.

        The gradient is overwritten by the next.
        """

    def gain(self, before: float, after: float) -> float:
        """How much the loss fell between two calls of `loss`, over the same examples."""

    def told(self) -> Mapping[str, float]:
        """For the stats of the merge; has `ASKED` where others were asked."""

    def settle(self) -> Tensor | None:
        """The flat float buffers of the model in `vector`, as its examples give them; None: it
        cannot say."""

    def interrupt(self) -> None:
        """From any thread: let whoever waits for a loss go, by InterruptedMergeError."""
