"""check_aggregator: every built-in rule holds, and a bad one is found for what it does."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor

from atoll.aggregation.aggregator import aggregator
from atoll.aggregation.mean import Mean
from atoll.aggregation.median import Median
from atoll.aggregation.norm_clipping import NormClipping
from atoll.aggregation.robust import Robust
from atoll.aggregation.stack import Stack
from atoll.aggregation.testing import check_aggregator
from atoll.server import catalogue

NEED_MORE = {  # name -> how it is made here, where its name alone is not enough
    "fedlaw": "fedlaw:no_proxy=coherence",
}


@pytest.mark.parametrize("name", [part.names[0] for part in catalogue.parts("aggregator")])
def test_every_built_in_rule_holds_to_all(name: str) -> None:
    check_aggregator(lambda: aggregator(NEED_MORE.get(name, name)), cases=60)


def test_a_rule_holds_also_where_one_update_is_enough() -> None:
    check_aggregator(lambda: NormClipping(limit=0.5), cases=60)


class Twice(Mean):
    def add(self, total: Tensor, delta: Tensor, weight: float, *, first: bool) -> None:
        super().add(total, delta, 2 * weight, first=first)


class Hides(Mean):
    def add(self, total: Tensor, delta: Tensor, weight: float, *, first: bool) -> None:
        super().add(total, delta.nan_to_num(0, 0, 0), weight, first=first)


class Keeps(Mean):
    def add(self, total: Tensor, delta: Tensor, weight: float, *, first: bool) -> None:
        total.add_(delta, alpha=weight)  # on top of whatever lay there


class Halved(Mean):
    def add(self, total: Tensor, delta: Tensor, weight: float, *, first: bool) -> None:
        super().add(total, delta / delta.norm().clamp(min=1), weight, first=first)


class Writes(Median):
    def combine(self, x: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        deltas[0].zero_()
        return super().combine(x, deltas, weights)


class First(Median):
    def combine(self, x: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return deltas[0].clone()


class Stacks(Median):
    def combine(self, x: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return torch.stack(list(deltas)).sort(dim=0).values[len(deltas) // 2]


class Short(Median):
    def combine(self, x: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return torch.zeros(len(x) + 1)


class Long(Median):
    def combine(self, x: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return super().combine(x, deltas, weights).double()


class Nothing(Median):
    def combine(self, x: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return None  # type: ignore[return-value]


class Broken(Median):
    def combine(self, x: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return super().combine(x, deltas, weights) / 0


class Drawn(Median):
    def combine(self, x: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return super().combine(x, deltas, weights) + torch.rand_like(x)


class Miscounts(Robust):
    min_results: ClassVar[int] = 1

    def coefficients(self, stack: Stack, weights: Sequence[float]) -> Sequence[float]:
        return [1.0]


class Counts(Median):
    """Damps more with every merge: a restart begins it anew."""

    seen: int = 0

    def combine(self, x: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        self.seen += 1
        return super().combine(x, deltas, weights) / self.seen


class Raises(Median):
    def combine(self, x: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        raise ZeroDivisionError


class Neither:
    algebra: ClassVar[Literal["set"]] = "set"
    min_results = 1


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Twice, "moves the model by more than"),
        (Hides, "is hidden by the sum"),
        (Keeps, "moves the model by more than|other bits|tiles"),
        (Halved, "the tiles change the result"),
        (Writes, "it writes to what it is given"),
        (First, "the order of the updates changes the result"),
        (Stacks, "it makes a tensor of 2359296 elements"),
        (Short, "it gives"),
        (Long, r"it gives torch\.float64"),
        (Nothing, r"combine\(\) gave NoneType"),
        (Broken, "it makes what is not finite"),
        (Drawn, "the same merge gives other bits"),
        (Counts, "it remembers a former merge"),
        (Raises, r"it raises ZeroDivisionError\(\)"),
        (Miscounts, "1 numbers for"),
        (Neither, "has combine.* or coefficients"),
    ],
)
def test_a_rule_that_does_what_it_must_not_is_found(make: Callable[[], object], why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        check_aggregator(make, cases=60)  # type: ignore[arg-type]
