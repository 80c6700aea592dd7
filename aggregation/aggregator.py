"""Aggregator: how many updates become one. A streaming sum, or a rule over the whole set.

They see tiles: flat float32 views of the same elements [lo, hi) of every update, never a model.
A rule that needs whole vectors is shown their norms and inner products instead, and answers with
coefficients: its result is a weighted sum of the updates, so memory stays that of a sum. What calls
them (`server/merge.py`, the averagers of peers) keeps the order of the updates, so the same updates
with the same weights give the same bits.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Protocol, Self, TypeGuard

from torch import Tensor

from atoll.aggregation.proxy import Proxy
from atoll.aggregation.stack import Stack
from atoll.protocols import slots
from atoll.protocols.errors import UsageError

BUILTIN: Mapping[str, str] = {
    "mean": "atoll.aggregation.mean:Mean",
    "median": "atoll.aggregation.median:Median",
    "trimmed-mean": "atoll.aggregation.trimmed_mean:TrimmedMean",
    "krum": "atoll.aggregation.krum:Krum",
    "multi-krum": "atoll.aggregation.krum:MultiKrum",
    "rfa": "atoll.aggregation.rfa:GeometricMedian",
    "geometric-median": "atoll.aggregation.rfa:GeometricMedian",
    "centered-clipping": "atoll.aggregation.centered_clipping:CenteredClipping",
    "norm-clipping": "atoll.aggregation.norm_clipping:NormClipping",
    "fedlaw": "atoll.aggregation.fedlaw:FedLaw",
}


class SumAggregator(Protocol):
    """`algebra = "sum"`: an update is folded in and forgotten. Weights are the strategy's, raw."""

    algebra: ClassVar[Literal["sum"]]
    private: ClassVar[bool]  # True: works without seeing single updates (secure aggregation)

    @property
    def needs(self) -> frozenset[str]:
        """What else it wants; nothing, in general."""

    def add(self, total: Tensor, delta: Tensor, weight: float, *, first: bool) -> None:
        """Fold `delta` into `total`, in place; `first`: `total` holds nothing yet."""


class SetAggregator(Protocol):
    """`algebra = "set"`: a rule over all updates at once: a TileRule or a StackRule.

    It is shown the updates whose weight is not 0. Weights come normalised to 1; the engine
    multiplies the result by min(1, sum of the raw ones), so a strategy's damping survives. A
    client's model, where one is needed, is x - delta.

    May have `robust = True`: buffers too are merged by their median, not by their mean.
    """

    algebra: ClassVar[Literal["set"]]
    private: ClassVar[bool]

    @property
    def needs(self) -> frozenset[str]:
        """What else it wants: see `atoll.protocols.facts`."""

    @property
    def min_results(self) -> int:
        """With fewer updates the engine takes the weighted mean instead, and says so."""


class TileRule(SetAggregator, Protocol):
    """A rule over values, e.g. a median."""

    coordinatewise: bool  # False: `combine` is given whole vectors, K models in memory

    def combine(self, x: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The delta to apply, of the shape of `x`. Must not write to its arguments."""


class StackRule(SetAggregator, Protocol):
    """A rule whose result is a weighted sum of the updates, e.g. the one with most neighbours.

    May have `memory = True`: the result of the last merge (zeros at first), before damping, is one
    more row of the stack, after the updates. It lies in each version, beside the outer state.
    May have `anchored = True`: the model that is merged into is the last row of the stack (FedLAW).
    May answer with `stack.Reported`, and its `stats` and `rows` are told.
    """

    def coefficients(self, stack: Stack, weights: Sequence[float]) -> Sequence[float]:
        """One for each row of `stack`; rows that get 0 are not read again."""


Aggregator = SumAggregator | TileRule | StackRule


def by_stack(rule: SetAggregator) -> TypeGuard[StackRule]:
    """Whether it answers with coefficients."""
    return hasattr(rule, "coefficients")


def by_tiles(rule: SetAggregator) -> TypeGuard[TileRule]:
    """Whether it answers with values."""
    return hasattr(rule, "combine")


def remembers(rule: Aggregator) -> bool:
    """Whether the last merge's result is one more row of its stack."""
    return bool(getattr(rule, "memory", False))


def anchored(rule: Aggregator) -> bool:
    """Whether the model itself is the last row of its stack."""
    return bool(getattr(rule, "anchored", False))


class Learner(StackRule, Protocol):
    """A rule that learns by examples of the server's own.

    Once it has them, its `proxy` is told the new model's buffers before a merge and, where
    `buffers` is "recompute", asked for its BatchNorm statistics after it.
    """

    proxy: Proxy | None
    buffers: str

    @property
    def learns(self) -> bool:
        """Whether proxy data are of use to it as it is set."""

    def with_proxy(self, proxy: Proxy) -> Self:
        """The same rule, with what it learns by."""


class AskingRule(Learner, Protocol):
    """A learner that can do with the word of clients, the validators, in place of proxy data."""

    panel: int  # validators that it asks in a merge, at most
    deadline: float  # seconds that their answers may take
    seed: int

    @property
    def asks(self) -> bool:
        """Whether it asks them, where there are no proxy data."""

    def again(self, told: Mapping[str, float], updates: Sequence[str]) -> Sequence[float]:
        """What `coefficients` gave in a merge of these updates whose stats were `told`."""


def is_learner(rule: Aggregator) -> TypeGuard[Learner]:
    return hasattr(rule, "with_proxy")


def is_asking(rule: Aggregator) -> TypeGuard[AskingRule]:
    """Whether it is to ask validators, if it is given no proxy data."""
    return is_learner(rule) and bool(getattr(rule, "asks", False))


def aggregator(spec: str) -> Aggregator:
    """The aggregator that `spec` names. Raises UsageError FL-S101, FL-S102 or FL-S103."""
    found = slots.resolve("aggregator", spec, BUILTIN)
    algebra = getattr(found, "algebra", None)
    methods = {"sum": ("add",), "set": ("combine", "coefficients")}.get(str(algebra), ())
    if not any(hasattr(found, method) for method in methods):
        raise UsageError(
            "FL-S102",
            f"aggregator {spec!r} has algebra {algebra!r} and none of its methods",
            'declare algebra = "sum" with add(), or "set" with combine() or coefficients()',
        )
    return found  # type: ignore[return-value]  # a user's own class is held to the protocol by use
