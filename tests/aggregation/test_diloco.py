"""DiLoCo's rounds: steps by speed, weights by examples seen, and where the schedule stands."""

import pytest

from atoll.aggregation import dylu
from atoll.aggregation.diloco import DiLoCo
from atoll.protocols import state
from atoll.protocols.errors import UsageError
from atoll.protocols.events import (
    Action,
    Aggregate,
    ClientInfo,
    ClientJoined,
    Train,
    Update,
    UpdateReceived,
)


def joined(strategy: DiLoCo, name: str, pace: float | None) -> list[Action]:
    return strategy.handle(ClientJoined(name, ClientInfo(100, pace, ())), 0.0)


def trains(actions: list[Action]) -> dict[str, int]:
    return {a.client: a.steps for a in actions if isinstance(a, Train)}


def update(client: str, steps: int, examples: int, seconds: float, base: int = 0) -> UpdateReceived:
    made = Update(
        f"{client}.{base}", f"o{client}{base}", client, base, steps, examples, 0.0, seconds,
        {}, True, True,
    )  # fmt: skip
    return UpdateReceived(made)


def test_local_steps_follow_speed() -> None:
    """The worked case: speeds 8, 8, 4, 4, 2 and H = 100."""
    shares = [dylu.share(speed, 8) for speed in (8, 8, 4, 4, 2)]
    assert [dylu.local_steps(100, share) for share in shares] == [100, 100, 50, 50, 25]


def test_steps_have_a_floor_and_shares_are_eighths() -> None:
    assert dylu.local_steps(20, 1 / 8) == 5
    assert dylu.local_steps(3, 1 / 8) == 3  # no more than there are
    assert [dylu.share(speed, 1.0) for speed in (1e-9, 0.06, 0.19, 0.93, 0.94, 50.0)] == [
        1 / 8, 1 / 8, 2 / 8, 7 / 8, 1, 1,
    ]  # fmt: skip


def test_in_a_round_the_fastest_runs_all_steps() -> None:
    strategy = DiLoCo(steps=100, min_clients=5)
    for name, pace in zip("abcd", (1 / 8, 1 / 8, 1 / 4, 1 / 4), strict=True):
        assert joined(strategy, name, pace) == []
    assert trains(joined(strategy, "e", 1 / 2)) == {"a": 100, "b": 100, "c": 50, "d": 50, "e": 25}


def test_whose_speed_is_not_known_runs_all_steps_and_is_measured() -> None:
    strategy = DiLoCo(steps=40, min_clients=2)
    joined(strategy, "a", 1.0)
    assert trains(joined(strategy, "b", None)) == {"a": 40, "b": 40}
    strategy.handle(update("a", 40, 320, 40.0), 1.0)
    assert trains(strategy.handle(update("b", 40, 320, 160.0), 2.0)) == {"a": 40, "b": 10}
    assert strategy.speeds == {"a": 1.0, "b": 0.25}


def test_a_speed_is_a_running_mean_and_work_of_no_time_says_nothing_of_it() -> None:
    strategy = DiLoCo(steps=10)
    joined(strategy, "a", 1.0)
    strategy.handle(update("a", 10, 80, 5.0), 1.0)
    assert strategy.speeds["a"] == pytest.approx(1.0 + 0.3 * (2.0 - 1.0))
    strategy.handle(update("a", 10, 80, 0.0, base=1), 2.0)
    assert strategy.speeds["a"] == pytest.approx(1.3)


def test_weights_are_the_examples_of_the_round() -> None:
    strategy = DiLoCo(steps=40, min_clients=2)
    joined(strategy, "a", 1.0)
    joined(strategy, "b", 4.0)
    strategy.handle(update("b", 10, 80, 40.0), 1.0)
    [merge] = [
        a for a in strategy.handle(update("a", 40, 320, 40.0), 2.0) if isinstance(a, Aggregate)
    ]
    assert merge.items == (("a.0", 0.8), ("b.0", 0.2))


def test_an_order_names_the_step_of_the_run() -> None:
    strategy = DiLoCo(steps=40, dylu=False)
    [first] = joined(strategy, "a", 3.0)
    assert first == Train("a", 40, {"run_step": 0.0})
    [_, second] = strategy.handle(update("a", 40, 320, 120.0), 2.0)
    assert second == Train("a", 40, {"run_step": 40.0})


def test_without_dylu_all_run_the_same_steps() -> None:
    strategy = DiLoCo(steps=40, dylu=False, min_clients=2)
    joined(strategy, "a", 1.0)
    assert trains(joined(strategy, "b", 8.0)) == {"a": 40, "b": 40}


def test_its_memory_is_dumped_and_loaded() -> None:
    strategy = DiLoCo(steps=40)
    joined(strategy, "a", 2.0)
    again = state.loads(DiLoCo, state.dumps(strategy))
    assert again == strategy
    assert again.speeds == {"a": 0.5}


def test_fewer_than_one_step_cannot_be_asked() -> None:
    with pytest.raises(UsageError, match="min_steps=0"):
        DiLoCo(min_steps=0)
