"""The staleness functions against their formulas and FedAsync's own numbers."""

import itertools
import math

import pytest

from atoll.aggregation.staleness import constant, discount, hinge, polynomial
from atoll.protocols.errors import UsageError


def test_constant_does_not_care() -> None:
    assert [constant()(u) for u in (0, 1, 100)] == [1.0, 1.0, 1.0]


def test_polynomial_with_alpha_06_gives_the_numbers_of_fedasync() -> None:
    weights = [0.6 * polynomial(0.5)(u) for u in (0, 1, 3, 8)]
    assert weights == pytest.approx([0.6, 0.6 / math.sqrt(2), 0.3, 0.2])


def test_hinge_with_alpha_06_gives_the_numbers_of_fedasync() -> None:
    weights = [0.6 * hinge(10, 4)(u) for u in (0, 4, 5, 6)]
    assert weights == pytest.approx([0.6, 0.6, 0.6 / 11, 0.6 / 21])


@pytest.mark.parametrize(
    ("spec", "at_8"),
    [
        ("constant", 1.0),
        ("polynomial", 1 / 3),
        ("polynomial:1", 1 / 9),
        ("polynomial:0", 1.0),
        ("hinge", 1 / 41),
        ("hinge:2:6", 1 / 5),
    ],
)
def test_a_function_is_named_in_text(spec: str, at_8: float) -> None:
    assert discount(spec)(8) == pytest.approx(at_8)


@pytest.mark.parametrize(
    "spec",
    [
        "polynomial:-0.5",
        "polynomial:nan",
        "polynomial:inf",
        "polynomial:x",
        "polynomial:1:2",
        "hinge:-1:4",
        "hinge:10:-4",
        "constant:1",
        "exponential",
        "",
    ],
)
def test_what_is_unknown_or_amplifies_is_refused(spec: str) -> None:
    with pytest.raises(UsageError) as refused:
        discount(spec)
    assert refused.value.code == "FL-S102"
    assert refused.value.hint


@pytest.mark.parametrize("spec", ["constant", "polynomial:0.5", "hinge:10:4"])
def test_fresh_work_counts_in_full_and_older_work_never_more(spec: str) -> None:
    factors = [discount(spec)(u) for u in range(50)]
    assert factors[0] == 1.0
    assert all(0.0 < later <= earlier for earlier, later in itertools.pairwise(factors))
