"""Quorum: any two sets that may decide share a peer, also where some have said goodbye."""

from itertools import chain, combinations

import pytest

from atoll.aggregation.quorum import quorum

MEMBERS = ("a", "b", "c", "d")
Set = tuple[str, ...]


def subsets(of: Set) -> list[Set]:
    return list(chain.from_iterable(combinations(of, n) for n in range(len(of) + 1)))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_two_quorums_always_share_a_peer(size: int) -> None:
    members = MEMBERS[:size]
    deciding = [set(s) for s in subsets(members) if quorum(s, members)]
    assert deciding
    assert all(one & other for one in deciding for other in deciding)


def test_two_who_know_of_different_goodbyes_cannot_both_decide() -> None:
    """Those who left vote no more, so only the others can be in a quorum."""
    for gone_1 in subsets(MEMBERS):
        for gone_2 in subsets(MEMBERS):
            alive = tuple(sorted(set(MEMBERS) - {*gone_1, *gone_2}))
            first = [set(s) for s in subsets(alive) if quorum(s, MEMBERS, gone_1)]
            second = [set(s) for s in subsets(alive) if quorum(s, MEMBERS, gone_2)]
            assert all(one & other for one in first for other in second), (gone_1, gone_2)


def test_half_decides_only_with_the_first_of_all() -> None:
    assert quorum(("a", "d"), MEMBERS)
    assert not quorum(("b", "c"), MEMBERS)
    assert quorum(("b",), ("a", "b"), gone=("a",))
    assert not quorum(("x", "y"), ("a",))
    assert not quorum((), ())
