"""Aggregator: how many updates become one. A streaming sum, or a rule over the whole set.

Both see tiles: flat float32 views of the same elements [lo, hi) of every update, never a model.
What calls them (`server/merge.py`, the averagers of peers) keeps the order of the updates, so the
same updates with the same weights give the same bits.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from atoll.protocols import slots
from atoll.protocols.errors import UsageError

BUILTIN: Mapping[str, str] = {"mean": "atoll.aggregation.mean:Mean"}


class SumAggregator(Protocol):
    """`algebra = "sum"`: an update is folded in and forgotten. Weights are the strategy's, raw."""

    algebra: ClassVar[Literal["sum"]]
    needs: ClassVar[frozenset[str]]  # what else it wants: "proxy_data"
    private: ClassVar[bool]  # True: works without seeing single updates (secure aggregation)

    def add(self, total: Tensor, delta: Tensor, weight: float, *, first: bool) -> None:
        """Fold `delta` into `total`, in place; `first`: `total` holds nothing yet."""


class SetAggregator(Protocol):
    """`algebra = "set"`: a rule over all updates at once, e.g. a median.

    Weights come normalised to 1; the engine multiplies the result by min(1, sum of the raw ones),
    so a strategy's damping survives. A client's model, where one is needed, is x - delta.
    """

    algebra: ClassVar[Literal["set"]]
    needs: ClassVar[frozenset[str]]
    private: ClassVar[bool]
    min_results: int  # below it the engine takes the weighted mean instead, and says so
    coordinatewise: bool  # False: needs whole vectors (distances between updates), not tiles

    def combine(self, x: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The delta to apply, of the shape of `x`. Must not write to its arguments."""


Aggregator = SumAggregator | SetAggregator


def aggregator(spec: str) -> Aggregator:
    """The aggregator that `spec` names. Raises UsageError FL-S101, FL-S102 or FL-S103."""
    found = slots.resolve("aggregator", spec, BUILTIN)
    algebra = getattr(found, "algebra", None)
    if algebra not in ("sum", "set"):
        raise UsageError(
            "FL-S102",
            f"aggregator {spec!r} has algebra {algebra!r}",
            'declare algebra = "sum" with add(), or "set" with combine()',
        )
    return found  # type: ignore[return-value]  # a user's own class is held to the protocol by use
