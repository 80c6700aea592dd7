"""The accountant: published values, and what is charged where nobody is drawn by chance."""

import importlib.util
import math

import dp_accounting
import pytest

from atoll.protocols.errors import UsageError
from atoll.server.accountant import Accountant, Sampling
from atoll.server.books import Books


@pytest.mark.parametrize(
    ("rate", "noise", "rounds", "delta", "published"),
    [
        (0.01, 1.0, 1000, 1e-5, 1.8282),
        (0.1, 1.0, 100, 1e-5, 7.0466),
        (0.1, 2.0, 100, 1e-5, 2.3374),
        (0.1, 1.0, 25, 1e-5, 3.8969),
    ],
)
def test_a_sampled_gaussian_costs_what_is_published(
    rate: float, noise: float, rounds: int, delta: float, published: float
) -> None:
    made = Accountant(noise, delta, Sampling(rate, 300))
    found = made.epsilon(Books(1.0, rounds=rounds))
    assert published <= found * 1.0001  # the interval is rounded up: never too small
    assert found == pytest.approx(published, rel=0.01)


def test_without_sampling_the_one_who_has_paid_most_counts() -> None:
    made = Accountant(2.0, 1e-5)
    books = Books(1.0, {"a": 4 / 4, "b": 1 / 4})
    assert made.epsilon(books) == dp_accounting.get_epsilon_gaussian(1.0, 1e-5)
    assert made.next(books) == pytest.approx(
        dp_accounting.get_epsilon_gaussian(1 / math.sqrt(5 / 4), 1e-5)
    )
    assert made.room(made.epsilon(books)) == pytest.approx(1.0)


def test_sampling_costs_less_than_taking_part_each_time() -> None:
    every = Accountant(1.0, 1e-5).epsilon(Books(1.0, {"a": 25.0}))
    drawn = Accountant(1.0, 1e-5, Sampling(0.1, 300)).epsilon(Books(1.0, rounds=25))
    assert drawn < 4 < 30 < every


def test_with_hardly_any_noise_drawn_clients_pay_as_all_do() -> None:
    """At z = 0.03 a round took a minute and 700 MB, and with less it never ended."""
    drawn = Accountant(0.03, 1e-5, Sampling(0.1, 300)).epsilon(Books(1.0, rounds=4))
    assert drawn == Accountant(0.03, 1e-5).epsilon(Books(1.0, {"a": 4 / 0.03**2}))


def test_nothing_costs_nothing_and_no_noise_everything() -> None:
    for sampling in (None, Sampling(0.1, 10)):
        assert Accountant(1.0, 1e-5, sampling).epsilon(Books(1.0)) == 0.0
        bare = Accountant(0.0, 1e-5, sampling)
        assert bare.next(Books(1.0)) == math.inf


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"FL-S103.*atoll\[privacy\]"):
        Accountant(1.0, 1e-5)
