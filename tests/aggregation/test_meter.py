"""Meter: what a line's transfers tell of it, and that a swarm shares its work by that."""

import math
from collections import Counter

import pytest

from atoll.aggregation.circle import Patience
from atoll.aggregation.meter import LEAST, Meter, Transfer, rate
from atoll.aggregation.rendezvous import Rendezvous
from atoll.aggregation.rendezvous_events import (
    Admitted,
    Apply,
    Heard,
    PeerAction,
    PeerEvent,
    Reduce,
    Started,
    StepsDone,
)
from atoll.aggregation.rendezvous_messages import Announce, Promise, Stand
from atoll.aggregation.shares import assumed, shares, split
from atoll.p2p.virtual import Swarm
from atoll.p2p.world import PeerModel

MB = 1 << 20


def full(meter: Meter, up: float, down: float, round_: int, size: float = 8 * MB) -> float:
    """A round with one transfer each way at those rates."""
    at = 100.0 * round_
    meter.gave(size, at, at + size / up)
    meter.took(size, at, at + size / down)
    return meter.turn()


def test_a_line_is_as_fast_as_its_slower_direction_and_says_so_once() -> None:
    meter = Meter()
    assert [full(meter, 3e6, 9e6, i) for i in range(5)] == pytest.approx([0, 3e6, 0, 0, 0])
    assert full(meter, 9e6, 3e6, 6) == 0  # the medians are 3e6 and 9e6 still


def test_one_round_alone_changes_nothing_and_many_do() -> None:
    meter = Meter()
    said = [full(meter, 4e6 if i != 3 else 4e8, 4e8, i) for i in range(8)]
    assert said == pytest.approx([0, 4e6, 0, 0, 0, 0, 0, 0])
    said = [full(meter, 2e6, 4e8, i) for i in range(8, 12)]
    assert [s for s in said if s] == pytest.approx([2e6])


def test_too_little_tells_nothing() -> None:
    meter = Meter()
    for i in range(2 * LEAST):
        assert full(meter, 1e6, 1e6, i, size=meter.tiny - 1) == 0
        assert full(meter, 1e6, 1e6, i, size=meter.tiny) == 0  # a round of one such is no round
        meter.gave(9 * MB, 5.0, 5.0)  # out of a buffer
        assert meter.turn() == 0
        meter.took(9 * MB, 5.0, 6.0)  # and nothing up
        assert meter.turn() == 0


def test_what_is_on_its_way_side_by_side_adds_up() -> None:
    two = [Transfer(10.0, 0.0, 10.0), Transfer(10.0, 0.0, 10.0)]
    assert rate(two) == 2.0
    assert rate([Transfer(10.0, 0.0, 10.0), Transfer(10.0, 20.0, 30.0)]) == 1.0


def test_a_round_with_a_newcomer_of_a_large_model_is_reckoned_at_once() -> None:
    """Every piece that is given is a transfer: 14,000 of them, of 56 GB, took 8 s of the loop."""
    pieces = [Transfer(4 * MB, 0.01 * i, 0.01 * i + 0.04) for i in range(14_000)]
    assert rate(pieces) == pytest.approx(400 * MB)


def test_a_slow_partner_hides_no_fast_line_and_a_burst_makes_none() -> None:
    slow, fast = Transfer(10.0, 0.0, 10.0), Transfer(10.0, 0.0, 0.1)
    assert rate([slow, fast]) == 101.0
    burst = Transfer(2.0, 3.0, 3.001)
    assert rate([slow, burst]) == 1.0


@pytest.mark.parametrize(
    ("claims", "found"),
    [
        ((100.0, 210.0, 430.0), (0.476, 1.0, 2.048)),
        ((100.0, 190.0, 101.0, 380.0), (1.0, 1.0, 1.0, 3.76)),
        ((math.inf, 0.0, math.inf), (1.0, 0.0, 1.0)),
        ((math.inf, 0.0, 50.0), (1.0, 0.0, 1.0)),
        ((1e-320, 12.5e6, 12.5e6), (1e-3, 1.0, 1.0)),
        ((1e308, 1e308, 1e-320, 5.0), (1e3, 1e3, 1e-3, 1.0)),
    ],
)
def test_whatever_is_claimed_there_are_shares(
    claims: tuple[float, ...], found: tuple[float, ...]
) -> None:
    """A member that said 1e-320 bytes a second ended its proposer, by a division by zero."""
    assert assumed(claims) == pytest.approx(found, rel=1e-2)
    assert sum(split(1000, shares(assumed(claims)))) == 1000


@pytest.mark.parametrize("claim", [1e-320, 1e308, math.inf])
def test_a_proposer_plans_whatever_bandwidths_were_claimed(claim: float) -> None:
    start = Stand(0, "s", 0.0)
    a = Rendezvous("a", 1000, ("a", "b", "c"), start)
    for peer, bandwidth in (("a", 12.5e6), ("b", claim), ("c", claim)):
        a.handle(Admitted(peer, 1.0, bandwidth), 0.0)
    a.handle(Started(), 0.0)
    for peer in "bc":
        a.handle(Heard(peer, Announce(start, True, None)), 6.0)
    a.handle(StepsDone("s"), 6.0)
    said: list[PeerAction] = []
    for peer in "bc":
        said = a.handle(Heard(peer, Promise("s", (1, "a"), True, None)), 6.0)
    assert isinstance(said[0], Reduce)


def test_unequal_lines_are_measured_get_unequal_shares_and_make_shorter_rounds() -> None:
    """One line is a fifth of the others': by the closed form it moves the vector once each way, and
    reduces nothing, where in equal shares it would be one and a half."""
    size, slow = 120, 20.0
    peers = [PeerModel(p, link=slow if p == "d" else 5 * slow) for p in "abcd"]
    began: list[float] = []
    took: list[float] = []
    held: list[Counter[str]] = []

    def hear(now: float, name: str, event: PeerEvent, actions: list[PeerAction]) -> None:
        for action in actions:
            if isinstance(action, Reduce) and name == action.ballot[1]:
                began.append(now)
                lengths = dict.fromkeys("abcd", 0)
                held.append(Counter(lengths))
                for part in action.plan.parts:
                    held[-1][part.reducer] += part.stop - part.start
            if isinstance(action, Apply) and name == "a":
                took.append(now - began[-1])

    patience = Patience(reduce=60.0)
    swarm = Swarm(peers, seed=1, size=size, piece=5, patience=patience, listen=hear)
    assert swarm.run(8).good
    assert held[0] == dict.fromkeys("abcd", size // 4)
    assert held[-1]["d"] == 0
    assert max(held[-1].values()) < size / 2 + 4
    assert max(took[-3:]) < 0.85 * took[0], took
