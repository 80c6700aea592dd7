"""FedBuff: the buffer's arithmetic, who trains when, and FedAsync as its smallest case."""

import math
from collections.abc import Callable

import pytest

from atoll.aggregation import FedBuff, fedasync
from atoll.aggregation.testing import check_strategy
from atoll.aggregation.virtual import Virtual
from atoll.protocols.errors import UsageError
from atoll.protocols.events import (
    Action,
    Aggregate,
    CancelTimer,
    ClientInfo,
    ClientJoined,
    ClientLeft,
    Discard,
    SetTimer,
    Stopping,
    TimerFired,
    Train,
    Update,
    UpdateReceived,
)


def result(name: str, client: str, base: int = 0, current: bool = True) -> UpdateReceived:
    return UpdateReceived(Update(name, "o", client, base, 5, 5, 0.0, 1.0, {}, current))


def joined(strategy: FedBuff, **examples: int) -> list[Action]:
    said = []
    for client, n in examples.items():
        said += strategy.handle(ClientJoined(client, ClientInfo(n)), 0.0)
    return said


# ---- the sum


def test_the_papers_step_by_hand() -> None:
    """K = 3, deltas 1, 2, 3 with staleness 0, 3, 8: 1 + 2/2 + 3/3 = 3, over K is a step of 1."""
    strategy = FedBuff(size=3, steps=5)
    joined(strategy, a=1, b=1, c=1)
    strategy.handle(result("x", "a", base=8), 1.0)
    strategy.handle(result("y", "b", base=5), 2.0)
    said = strategy.handle(result("z", "c", base=0), 3.0)
    assert isinstance(said[0], Aggregate)
    assert [u for u, _ in said[0].items] == ["x", "y", "z"], "in order of arrival"
    weights = [w for _, w in said[0].items]
    assert weights == pytest.approx([1 / 3, 0.5 / 3, 1 / 9])
    assert sum(w * d for w, d in zip(weights, (1, 2, 3), strict=True)) == pytest.approx(1.0)
    assert said[1:] == [Train("c", 5)]


def test_with_size_one_it_is_fedasync_in_delta_form() -> None:
    run = Virtual(fedasync(alpha=0.6, steps=1), {"a": 1.0, "b": 3.0})
    run.join(0, "a")
    run.join(0, "b")
    run.run(12)
    for merge in run.merges:
        (u,) = merge.staleness
        assert list(merge.weights.values()) == pytest.approx([0.6 / math.sqrt(u + 1)])
    assert len(run.merges) == 12 + 4


def test_one_client_alone_is_never_stale_and_equal_clients_are_by_one_less_than_their_number() -> (
    None
):
    for n in (1, 4):
        run = Virtual(FedBuff(size=1, steps=1), {f"c{i}": 1.0 for i in range(n)})
        for i in range(n):
            run.join(0, f"c{i}")
        run.run(10)
        assert {m.staleness for m in run.merges[n:]} == {(n - 1,)}


def test_a_buffer_of_all_equal_clients_who_wait_for_it_is_fedavg() -> None:
    """Without the wait the first of them train on before the version of their round exists."""
    for unique, staleness in ((True, (0, 0, 0, 0)), (False, (1, 1, 1, 0))):
        strategy = FedBuff(size=4, steps=1, unique_per_buffer=unique, staleness="constant")
        run = Virtual(strategy, dict.fromkeys("abcd", 1.0))
        for client in "abcd":
            run.join(0, client)
        run.run(10)
        assert len(run.merges) == 10
        assert {m.staleness for m in run.merges[1:]} == {staleness}
        assert all(list(m.weights.values()) == [0.25] * 4 for m in run.merges)


def test_shares_by_examples_keep_the_sum() -> None:
    strategy = FedBuff(size=2, weighting="examples", staleness="constant")
    joined(strategy, a=1, b=3)
    strategy.handle(result("x", "a"), 1.0)
    said = strategy.handle(result("y", "b"), 1.0)
    assert said[0] == Aggregate((("x", 0.25), ("y", 0.75)))


def test_scaling_all_paces_changes_only_the_times() -> None:
    histories = []
    for scale in (1.0, 4.0):
        run = Virtual(FedBuff(size=3, steps=1), {"a": scale, "b": 1.5 * scale, "c": 3.25 * scale})
        for client in "abc":
            run.join(0, client)
        run.run(events=100)
        histories.append([(m.at / scale, m.weights) for m in run.merges])
    assert histories[0] == histories[1]


# ---- who trains


def test_nobody_waits_for_the_buffer() -> None:
    strategy = FedBuff(size=10, steps=5)
    assert joined(strategy, a=1, b=1) == [Train("a", 5), Train("b", 5)]
    assert strategy.handle(result("x", "a"), 1.0) == [Train("a", 5)]


def test_a_client_without_examples_is_never_asked() -> None:
    assert joined(FedBuff(steps=5), empty=0) == []


def test_only_so_many_train_at_once_and_all_get_their_turn() -> None:
    run = Virtual(FedBuff(size=2, steps=1, concurrency=3), {f"c{i}": 1.0 for i in range(8)})
    for i in range(8):
        run.join(0, f"c{i}")
    run.run(30)
    assert {len([o for o in run.orders if o.started == t]) for t in range(30)} == {3}
    assert len({o.client for o in run.orders}) == 8


def test_another_client_takes_the_place_of_one_that_left() -> None:
    strategy = FedBuff(steps=5, concurrency=1)
    assert joined(strategy, a=1, b=1) == [Train("a", 5)]
    assert strategy.handle(ClientLeft("a", "gone"), 1.0) == [Train("b", 5)]


def test_a_client_waits_for_the_merge_of_its_result_if_so_asked() -> None:
    strategy = FedBuff(size=2, steps=5, unique_per_buffer=True)
    joined(strategy, a=1, b=1, c=1)
    assert strategy.handle(result("x", "a"), 1.0) == []
    said = strategy.handle(result("y", "b"), 2.0)
    assert said[1:] == [Train("a", 5), Train("b", 5)]


def test_where_all_wait_for_a_buffer_that_cannot_fill_it_is_merged() -> None:
    strategy = FedBuff(size=3, steps=5, unique_per_buffer=True)
    joined(strategy, a=1, b=1)
    strategy.handle(result("x", "a"), 1.0)
    third = 1 / 3
    said = strategy.handle(result("y", "b"), 2.0)
    assert said == [Aggregate((("x", third), ("y", third))), Train("a", 5), Train("b", 5)]


def test_no_client_is_in_one_buffer_twice_also_with_old_work() -> None:
    strategy = FedBuff(size=3, steps=5, unique_per_buffer=True)
    joined(strategy, a=1, b=1)
    strategy.handle(ClientLeft("a", "gone"), 1.0)
    joined(strategy, a=1)
    assert strategy.handle(result("x", "a", current=False), 2.0) == []
    assert strategy.handle(result("y", "a"), 3.0) == [
        Discard("y", "its client is in this buffer already"),
        Train("a", 5),
    ]


# ---- what is too old, what waits too long, what is left


def test_what_is_too_stale_is_discarded_and_its_client_goes_on() -> None:
    strategy = FedBuff(size=1, steps=5, max_staleness=1)
    joined(strategy, a=1, b=1)
    for n in range(2):
        strategy.handle(result(f"x{n}", "a", base=n), n + 1.0)
    assert strategy.handle(result("y", "b", base=0), 3.0) == [
        Discard("y", "2 versions stale, 1 allowed"),
        Train("b", 5),
    ]


def test_late_work_of_a_client_that_was_away_is_used_like_any_other() -> None:
    strategy = FedBuff(size=2, steps=5)
    joined(strategy, a=1, b=1)
    strategy.handle(ClientLeft("a", "gone"), 1.0)
    assert strategy.handle(result("x", "a", current=False), 2.0) == []
    said = strategy.handle(result("y", "b"), 3.0)
    assert said == [Aggregate((("x", 0.5), ("y", 0.5))), Train("b", 5)]


def test_a_buffer_without_arrivals_is_merged_after_its_time() -> None:
    strategy = FedBuff(size=4, steps=5, max_age=10.0)
    joined(strategy, a=1, b=1)
    said = strategy.handle(result("x", "a"), 1.0)
    assert said == [SetTimer("buffer", 11.0), Train("a", 5)]
    said = strategy.handle(result("y", "a"), 5.0)
    assert said == [SetTimer("buffer", 15.0), Train("a", 5)]
    assert strategy.handle(TimerFired("buffer"), 11.0) == []
    assert strategy.handle(TimerFired("elsewhere"), 15.0) == []
    said = strategy.handle(TimerFired("buffer"), 15.0)
    assert said == [CancelTimer("buffer"), Aggregate((("x", 0.25), ("y", 0.25)))]
    assert strategy.handle(TimerFired("buffer"), 25.0) == []


def test_when_the_last_client_leaves_the_buffer_is_merged() -> None:
    strategy = FedBuff(size=4, steps=5)
    joined(strategy, a=1)
    strategy.handle(result("x", "a"), 1.0)
    assert strategy.handle(ClientLeft("a", "gone"), 2.0) == [Aggregate((("x", 0.25),))]


@pytest.mark.parametrize("flush", [True, False])
def test_a_stop_merges_the_buffer_if_so_asked(flush: bool) -> None:
    strategy = FedBuff(size=4, steps=5, flush_on_stop=flush)
    joined(strategy, a=1)
    assert strategy.handle(Stopping("time is up"), 1.0) == []
    strategy.handle(result("x", "a"), 1.0)
    last = [Aggregate((("x", 0.25),))] if flush else []
    assert strategy.handle(Stopping("time is up"), 2.0) == last


def test_killing_a_client_blocks_nobody() -> None:
    run = Virtual(FedBuff(size=2, steps=1), {"a": 1.0, "b": 1.0})
    run.join(0, "a")
    run.join(0, "b")
    run.leave(5.5, "b")
    run.run(20)
    assert [o.client for o in run.orders if o.started > 5] == ["a"] * 15


def test_work_of_a_client_that_comes_back_without_examples_has_weight_zero() -> None:
    strategy = FedBuff(size=1, steps=5, weighting="examples")
    joined(strategy, a=1)
    strategy.handle(ClientLeft("a", "gone"), 1.0)
    joined(strategy, a=0)
    said = strategy.handle(result("x", "a", current=False), 2.0)
    assert said == [Aggregate((("x", 0.0),))]


# ---- always


def variants() -> list[tuple[Callable[[], FedBuff], int]]:
    return [
        (lambda: FedBuff(3, 2), 40),
        (lambda: FedBuff(1, 2, max_staleness=2, staleness="hinge:10:4"), 30),
        (lambda: FedBuff(3, 2, unique_per_buffer=True, max_age=2.0), 30),
        (lambda: FedBuff(2, 2, concurrency=2, weighting="examples"), 30),
    ]


@pytest.mark.parametrize(("make", "seeds"), variants())
def test_invariants_hold_in_made_up_histories(make: Callable[[], FedBuff], seeds: int) -> None:
    check_strategy(make, seeds, steps=(2, 2))


@pytest.mark.parametrize(
    "parameters",
    [
        {"size": 0},
        {"steps": 0},
        {"lr": 0.0},
        {"staleness": "polynomial:-0.5"},
        {"max_staleness": -1},
        {"max_age": 0.0},
        {"weighting": "heavy"},
        {"concurrency": 0},
        {"lr": float("inf")},
    ],
)
def test_parameters_that_cannot_be_are_refused(parameters: dict[str, float]) -> None:
    with pytest.raises(UsageError) as refused:
        FedBuff(**parameters)  # type: ignore[arg-type]
    assert refused.value.code == "FL-S102"
