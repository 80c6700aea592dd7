"""Part mean: a reducer's sum, its refusal of what is not finite, and its limit on one peer."""

import math

import pytest
import torch

from atoll.aggregation.part_mean import part_mean

PARTS = [torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5.0]), torch.tensor([300.0, 400.0])]


def test_the_mean_is_weighted() -> None:
    mean, bad = part_mean(PARTS[:2], [48.0, 16.0])
    assert bad == ()
    assert mean.tolist() == pytest.approx([(48 * 3) / 64, (48 * 4 + 16 * 5) / 64])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_input_that_is_not_finite_is_named(value: float) -> None:
    mean, bad = part_mean([PARTS[0], torch.tensor([1.0, value])], [1.0, 1.0])
    assert bad == (1,)
    assert mean.tolist() == [0.0, 0.0]


def test_no_part_is_longer_than_so_many_medians() -> None:
    """Norms 5, 5 and 500: the third is shortened to 2 * 5, its direction kept."""
    mean, _ = part_mean(PARTS, [1.0, 1.0, 1.0], most=2.0)
    assert mean.tolist() == pytest.approx([(3 + 0 + 6) / 3, (4 + 5 + 8) / 3])


def test_of_two_the_median_is_between_them_and_a_zero_part_stays_zero() -> None:
    mean, _ = part_mean([torch.zeros(2), PARTS[0]], [1.0, 1.0], most=1.0)
    assert mean.tolist() == pytest.approx([3 / 4, 4 / 4])  # 5 shortened to the median 2.5


def test_the_order_is_kept_and_the_inputs_are() -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(1000, generator=generator) * 10.0**i for i in range(5)]
    before = [part.clone() for part in parts]
    one, _ = part_mean(parts, [1.0] * 5, most=3.0)
    other, _ = part_mean(parts, [1.0] * 5, most=3.0)
    assert torch.equal(one, other)
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))
