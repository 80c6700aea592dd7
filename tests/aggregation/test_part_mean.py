"""Part mean: a reducer's sum, its refusal of what is not finite, and its limit on one peer."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.aggregation.allreduce import Part, Plan
from atoll.aggregation.part_mean import TILE, norm, part_mean

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


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-16, 1.0, 1e15, 3e38])
def test_a_length_is_that_of_any_values(value: float) -> None:
    """Their squares may be too large or too small for fp32."""
    many = 2 * TILE + 7
    part = torch.full((many,), value)
    assert norm(part) == pytest.approx(float(part[0]) * math.sqrt(many), rel=1e-4)
    part[TILE + 1] = math.nan
    assert norm(part) == math.inf


def longest_and_found(
    rows: list[list[float]], weights: list[float], most: float
) -> tuple[float, float]:
    """How long the mean may be by its plan, each element being a part, and how long it is."""
    vectors = torch.tensor(rows)
    count = vectors.shape[1]
    parts = [part_mean([v[i : i + 1] for v in vectors], weights, most)[0] for i in range(count)]
    names = tuple(map(str, range(len(rows))))
    cut = tuple(Part("0", i, i + 1) for i in range(count))
    lengths = tuple(float(torch.linalg.vector_norm(v, dtype=torch.float64)) for v in vectors)
    return Plan(names, tuple(weights), cut, lengths).longest(most), float(torch.cat(parts).norm())


def test_an_honest_mean_of_parts_is_not_refused_for_its_length() -> None:
    """In each part one of the short ones is as long as the median, in each another: a mean of root
    three times the limit was refused, again and again, and its reducer named."""
    rows = [[1e3] * 3, [1e3] * 3, [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]
    longest, found = longest_and_found(rows, [1e6, 1.0, 1.0, 1.0, 1.0], most=2.0)
    assert found == pytest.approx(2 * math.sqrt(3), rel=1e-4)
    assert found <= longest


LENGTH = st.sampled_from([0.0, 1.0, 1.5, 40.0, 1e4])


@settings(max_examples=30)
@given(
    st.integers(1, 7).flatmap(
        lambda n: st.lists(st.lists(LENGTH, min_size=4, max_size=4), min_size=n, max_size=n)
    ),
    st.integers(0, 6),
)
def test_no_mean_of_parts_is_longer_than_its_plan_allows(
    rows: list[list[float]], heavy: int
) -> None:
    weights = [1e4 if i == heavy else 1.0 for i in range(len(rows))]
    longest, found = longest_and_found(rows, weights, most=3.0)
    assert found <= longest * (1 + 1e-6)
