"""DP-FedAvg: each client drawn for itself, empty rounds too, divided by how many are expected."""

import pytest

from atoll.aggregation.dp_fedavg import DpFedAvg
from atoll.aggregation.testing import check_strategy
from atoll.protocols.errors import UsageError
from atoll.protocols.events import (
    Action,
    Aggregate,
    Ask,
    CancelTimer,
    ClientInfo,
    ClientJoined,
    ClientLeft,
    Finish,
    SetTimer,
    TimerFired,
    Train,
    Update,
    UpdateReceived,
)


def join(strategy: DpFedAvg, *clients: str) -> list[Action]:
    return [a for c in clients for a in strategy.handle(ClientJoined(c, ClientInfo(5)), 0.0)]


def bring(strategy: DpFedAvg, client: str, now: float = 1.0) -> list[Action]:
    update = Update(f"u-{client}", f"o-{client}", client, 0, 5, 5, 0.0, 1.0)
    return strategy.handle(UpdateReceived(update), now)


def test_who_is_drawn_depends_on_nobody_else() -> None:
    """2,000 draws at q = 0.3: 600 expected, 5 standard deviations are 102."""
    strategy = DpFedAvg(fraction=0.3)
    drawn = 0
    for strategy.round in range(200):
        drawn += sum(strategy.draws(f"c{i}") for i in range(10))
    assert abs(drawn - 600) < 102
    other = DpFedAvg(fraction=0.3, secret="another")
    both = [(strategy.draws(f"c{i}"), other.draws(f"c{i}")) for i in range(200)]
    assert 0.3 < sum(a == b for a, b in both) / 200 < 0.8


def test_a_round_counts_by_how_many_are_expected() -> None:
    strategy = DpFedAvg(population=8, fraction=1.0, min_clients=3, steps=7, rounds=1)
    assert join(strategy, "b", "a") == []
    assert join(strategy, "c") == [Train("a", 7), Train("b", 7), Train("c", 7)]
    assert bring(strategy, "c") == bring(strategy, "a") == []
    assert strategy.handle(ClientLeft("b", "gone"), 2.0) == [
        Aggregate((("u-a", 1 / 8), ("u-c", 1 / 8))), Finish("1 rounds done"),
    ]  # fmt: skip
    assert join(strategy, "d") == []
    assert strategy.handle(TimerFired("round-1"), 3.0) == []


def test_who_is_late_is_dropped_and_missed() -> None:
    strategy = DpFedAvg(population=2, fraction=1.0, min_clients=2, steps=7, deadline=10.0, rounds=2)
    assert join(strategy, "a", "b") == [Train("a", 7), Train("b", 7), SetTimer("round-1", 10.0)]
    bring(strategy, "b")
    assert strategy.handle(TimerFired("round-1"), 9.0) == []
    said = strategy.handle(TimerFired("round-1"), 10.0)
    assert said[:2] == [Ask("a", "drop"), Aggregate((("u-b", 0.5),))]
    bring(strategy, "b", 12.0)
    assert bring(strategy, "a", 12.0)[0] == CancelTimer("round-2")


def test_a_round_in_which_nobody_is_drawn_makes_a_version_too() -> None:
    strategy = DpFedAvg(population=1, fraction=1e-9, rounds=2)
    assert join(strategy, "a") == [SetTimer("round-1", 0.0)]
    assert strategy.handle(TimerFired("round-1"), 0.0) == [
        Aggregate(()), SetTimer("round-2", 0.0),
    ]  # fmt: skip
    assert strategy.handle(TimerFired("round-2"), 0.0) == [Aggregate(()), Finish("2 rounds done")]


def test_without_clients_there_are_no_rounds() -> None:
    strategy = DpFedAvg(population=4, fraction=1.0)
    join(strategy, "a")
    assert strategy.handle(ClientLeft("a", "gone"), 1.0) == [Aggregate(())]
    assert join(strategy, "b") == [Train("b", 50)]
    assert strategy.handle(ClientJoined("c", ClientInfo(0)), 1.0) == []
    assert strategy.handle(ClientLeft("c", "gone"), 1.0) == []


@pytest.mark.parametrize("deadline", [None, 3.0])
def test_invariants_hold_in_made_up_histories(deadline: float | None) -> None:
    check_strategy(
        lambda: DpFedAvg(population=6, fraction=0.6, steps=5, deadline=deadline, rounds=9), 60
    )


def test_what_it_says_of_itself() -> None:
    strategy = DpFedAvg(population=40, fraction=0.25)
    assert strategy.sampling == (0.25, 40)
    assert strategy.merge_sizes(7) == (0, 7)
    for wrong in ({"population": 0}, {"fraction": 0.0}, {"fraction": 1.5}, {"deadline": 0.0}):
        with pytest.raises(UsageError, match="FL-S102"):
            DpFedAvg(**wrong)
