"""Mean: raw weights, in the order given, one update at a time."""

import pytest
import torch
from torch import Tensor

from atoll.aggregation.aggregator import aggregator
from atoll.aggregation.mean import Mean
from atoll.protocols.errors import UsageError


def total(deltas: list[Tensor], weights: list[float]) -> Tensor:
    made = torch.full_like(deltas[0], float("nan"))  # whatever lay there before
    for i, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
        Mean().add(made, delta, weight, first=i == 0)
    return made


def test_weights_are_used_as_they_are_given() -> None:
    deltas = [torch.tensor([1.0, 2.0]), torch.tensor([10.0, -4.0])]
    assert total(deltas, [0.5, 0.25]).tolist() == [3.0, 0.0]
    assert total(deltas, [2.0, 1.0]).tolist() == [12.0, 0.0]


def test_the_order_of_the_updates_is_the_order_of_the_sum() -> None:
    """(1e8 + 1) - 1e8 is 0 in float32, (1e8 - 1e8) + 1 is 1."""
    large, one = torch.tensor([1e8]), torch.tensor([1.0])
    assert total([large, one, -large], [1.0] * 3).item() == 0.0
    assert total([large, -large, one], [1.0] * 3).item() == 1.0


def test_updates_are_not_written_to() -> None:
    delta = torch.ones(3)
    total([delta, delta], [0.5, 0.5])
    assert delta.tolist() == [1.0, 1.0, 1.0]


def test_the_mean_is_found_by_name_and_says_what_it_is() -> None:
    made = aggregator("mean")
    assert (made.algebra, made.needs, made.private) == ("sum", frozenset(), True)


def test_an_object_without_algebra_is_no_aggregator() -> None:
    with pytest.raises(UsageError, match="algebra None") as caught:
        aggregator("fractions:Fraction")
    assert caught.value.code == "FL-S102"
