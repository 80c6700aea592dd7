"""What Gaussian noise protects, against dp-accounting and published numbers."""

import math

import dp_accounting
import pytest

from atoll.aggregation.gaussian import delta_of, epsilon_of, mu_of
from atoll.protocols.errors import UsageError


@pytest.mark.parametrize("mu", [0.05, 0.3, 1.0, 4.0, 40.0, 300.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_epsilon_is_dp_accountings(mu: float, delta: float) -> None:
    expected = dp_accounting.get_epsilon_gaussian(1 / mu, delta)
    assert epsilon_of(mu, delta) == pytest.approx(expected, rel=1e-9)
    assert mu_of(epsilon_of(mu, delta), delta) == pytest.approx(mu, rel=1e-9)


def test_published_numbers() -> None:
    """One Gaussian with z = 1 at 1e-5: 4.3772; a hundred with z = 10 are the same; epsilon 1 at
    1e-5 needs z = 3.73063 (Balle and Wang's analytic Gaussian mechanism)."""
    assert epsilon_of(1.0, 1e-5) == pytest.approx(4.3772, abs=5e-5)
    assert epsilon_of(math.sqrt(100 * 0.1**2), 1e-5) == pytest.approx(4.3772, abs=5e-5)
    assert 1 / mu_of(1.0, 1e-5) == pytest.approx(3.73063, abs=5e-6)
    assert epsilon_of(math.sqrt(1 / 4 + 1 / 9), 1e-5) == pytest.approx(2.4492, abs=5e-5)


def test_its_ends() -> None:
    assert (epsilon_of(0.0, 1e-5), epsilon_of(math.inf, 1e-5)) == (0.0, math.inf)
    assert (delta_of(1.0, 0.0), delta_of(1.0, math.inf)) == (0.0, 1.0)
    assert epsilon_of(1e-6, 1e-5) == 0.0  # delta alone covers it


def test_without_epsilon_delta_is_the_distance_of_the_two_distributions() -> None:
    """delta(0) = 2 Phi(mu/2) - 1."""
    assert delta_of(0.0, 1.0) == pytest.approx(math.erf(0.5 / math.sqrt(2)), rel=1e-12)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_that_is_no_probability_is_refused(delta: float) -> None:
    with pytest.raises(UsageError, match="FL-S102"):
        epsilon_of(1.0, delta)
