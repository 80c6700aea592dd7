"""Shares and their split: the numbers of DeDLOC's closed form, and what must hold for any group."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.aggregation.shares import PIECE, at_most, cut, longest, shares, split


@pytest.mark.parametrize(
    ("bandwidths", "fractions"),
    [
        ((100, 100, 100, 100), (0.25, 0.25, 0.25, 0.25)),
        ((1000, 100, 100, 100), (0.5, 1 / 6, 1 / 6, 1 / 6)),  # unbounded: (1, 0, 0, 0)
        ((400, 200, 100, 100), (0.5, 0.5, 0, 0)),  # unbounded: (0.75, 0.25, 0, 0)
        ((200, 100, 100, 0), (2 / 3, 1 / 6, 1 / 6, 0)),  # unbounded: (0.75, 0.125, 0.125, 0)
        ((300, 100), (1, 0)),  # of two, one may reduce all
        ((100, 100, 0, 0), (0.5, 0.5, 0, 0)),
        ((5,), (1,)),
    ],
)
def test_shares_are_those_of_the_closed_form(
    bandwidths: tuple[float, ...], fractions: tuple[float, ...]
) -> None:
    assert shares(bandwidths) == pytest.approx(fractions)


@given(st.lists(st.floats(0.5, 1000), min_size=2, max_size=8))
def test_no_other_shares_within_the_bound_are_faster(bandwidths: list[float]) -> None:
    """The time of a round is that of the slowest: max over peers of (1 + (n - 2) f) / b."""
    n, ours, bound = len(bandwidths), shares(bandwidths), at_most(bandwidths)

    def time(fractions: list[float]) -> float:
        return max((1 + (n - 2) * f) / b for f, b in zip(fractions, bandwidths, strict=True))

    def possible(seconds: float) -> bool:
        """All of the vector fits into what each can reduce by then."""
        most = [min(bound, (seconds * b - 1) / (n - 2)) if n > 2 else bound for b in bandwidths]
        return min(seconds * b for b in bandwidths) >= 1 and sum(most) >= 1

    assert sum(ours) == pytest.approx(1)
    assert max(ours) <= bound + 1e-9
    assert possible(time(ours) * (1 + 1e-9))
    if n > 2:
        assert not possible(time(ours) * (1 - 1e-6))


@given(st.lists(st.floats(0.5, 1000), min_size=2, max_size=7), st.floats(1, 1e12))
def test_a_claimed_bandwidth_buys_at_most_two_shares_of_those_who_can_reduce(
    others: list[float], claim: float
) -> None:
    fractions = shares([claim, *others, 0.0])
    assert max(fractions) <= (2 / (1 + len(others)) if len(others) > 1 else 1) + 1e-9
    assert fractions[-1] == 0


@given(st.lists(st.sampled_from([0.0, 1.0, 7.0, 1e9]), min_size=1, max_size=8), st.integers(1, 999))
def test_what_a_leader_splits_is_within_what_its_group_allows(
    bandwidths: list[float], total: int
) -> None:
    """Also where parts of less than an element were given to others."""
    if any(bandwidths):
        assert max(split(total, shares(bandwidths))) <= longest(total, bandwidths)


def test_a_group_that_nobody_can_connect_to_has_no_shares() -> None:
    with pytest.raises(ValueError, match="nobody in the group"):
        shares((0, 0))


@pytest.mark.parametrize(
    ("total", "fractions", "parts"),
    [
        (1000, (0.75, 0.25, 0, 0), [750, 250, 0, 0]),
        (7, (0.5, 0.3, 0.2), [4, 2, 1]),
        (10, (1 / 3, 1 / 3, 1 / 3), [4, 3, 3]),
    ],
)
def test_elements_are_split_as_hagenbach_and_bischoff_do(
    total: int, fractions: tuple[float, ...], parts: list[int]
) -> None:
    assert split(total, fractions) == parts


def test_a_part_that_is_too_small_goes_to_the_others() -> None:
    assert split(100, (0.6, 0.37, 0.03), least=5) == [62, 38, 0]
    assert split(3, (0.4, 0.3, 0.3), least=50) == [3, 0, 0]


@given(st.integers(1, 5000), st.lists(st.floats(0.01, 1), min_size=1, max_size=6))
def test_every_element_has_one_owner(total: int, raw: list[float]) -> None:
    assert sum(split(total, [f / sum(raw) for f in raw])) == total


@pytest.mark.parametrize(
    ("count", "number"),
    [(1, 1), (PIECE, 1), (2 * PIECE - 1, 1), (3 * PIECE + 1, 3), (100 * PIECE + 3, 4)],
)
def test_a_share_is_cut_in_pieces_that_are_worth_their_messages(count: int, number: int) -> None:
    found = cut(count)
    assert (len(found), sum(found)) == (number, count)
    assert max(found) - min(found) <= 1
