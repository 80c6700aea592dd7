"""Proxy: a loss that a server can measure itself, as a rule sees it; nothing of models or data.

What is behind it (`atoll.client.flat`) holds the model over one flat vector and a few labelled
examples. A rule fills `vector`, and asks.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Proxy(Protocol):
    """All losses are means over examples, at the model in `vector`. Deterministic."""

    vector: Tensor  # (elements,) float32, the trainable tensors end to end: write into it
    examples: int
    limit: int | None  # steps in one merge, at most; None: as many as the rule wants

    def begin(self, buffers: Mapping[str, Tensor]) -> None:
        """A merge begins: the flat buffers that the new model will have, by group."""

    def loss(self) -> float:
        """Over all examples; may be NaN or Inf."""

    def gradient(self, at: Tensor) -> tuple[float, Tensor]:
        """Loss of the examples `at` (indices, int64), and its gradient by `vector`.

        The gradient is overwritten by the next.
        """

    def settle(self) -> Tensor:
        """The flat float buffers of the model in `vector`, as its examples give them."""
