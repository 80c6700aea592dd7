"""FedAvg: cohorts, deadlines, and what becomes of those who miss them."""

import collections
import math
from collections.abc import Callable

import pytest

from atoll.aggregation import FedAvg
from atoll.aggregation.testing import check_strategy
from atoll.aggregation.virtual import Virtual
from atoll.protocols.errors import UsageError
from atoll.protocols.events import (
    Action,
    Aggregate,
    Ask,
    CancelTimer,
    ClientInfo,
    ClientJoined,
    ClientLeft,
    Discard,
    Finish,
    Merged,
    SetTimer,
    TimerFired,
    Train,
    Update,
    UpdateReceived,
)


def result(
    client: str, base: int = 0, started: float = 0.0, current: bool = True
) -> UpdateReceived:
    update = Update(f"{client}@{base}", f"o{base}", client, base, 5, 5, started, 1.0, {}, current)
    return UpdateReceived(update)


def joined(strategy: FedAvg, **examples: int) -> list[Action]:
    """What the strategy says to all that join at 0, in one list."""
    said = []
    for client, n in examples.items():
        said += strategy.handle(ClientJoined(client, ClientInfo(n)), 0.0)
    return said


# ---- a round


def test_one_client_is_the_whole_mean() -> None:
    strategy = FedAvg(steps=5)
    assert joined(strategy, a=7) == [Train("a", 5)]
    assert strategy.handle(result("a"), 1.0) == [Aggregate((("a@0", 1.0),)), Train("a", 5)]


def test_weights_go_by_examples_held_and_items_by_client() -> None:
    strategy = FedAvg(steps=5, min_clients=2)
    assert joined(strategy, a=1, b=3) == [Train("a", 5), Train("b", 5)]
    assert strategy.handle(result("b"), 1.0) == []
    said = strategy.handle(result("a"), 2.0)
    assert said == [Aggregate((("a@0", 0.25), ("b@0", 0.75))), Train("a", 5), Train("b", 5)]


def test_the_next_round_begins_in_the_same_breath_as_the_merge() -> None:
    strategy = FedAvg(steps=5, min_clients=2, weighting="equal", deadline=10.0)
    joined(strategy, a=1, b=3)
    strategy.handle(result("a"), 1.0)
    assert strategy.handle(result("b"), 2.0) == [
        CancelTimer("round-1"),
        Aggregate((("a@0", 0.5), ("b@0", 0.5))),
        Train("a", 5),
        Train("b", 5),
        SetTimer("round-2", 12.0),
    ]


def test_the_first_round_waits_for_min_clients_and_later_ones_do_not() -> None:
    strategy = FedAvg(steps=5, min_clients=3)
    assert joined(strategy, a=1, b=1) == []
    assert joined(strategy, c=1) == [Train("a", 5), Train("b", 5), Train("c", 5)]
    strategy.handle(ClientLeft("c", "gone"), 1.0)
    strategy.handle(result("a"), 1.0)
    assert strategy.handle(result("b"), 1.0)[1:] == [Train("a", 5), Train("b", 5)]


def test_who_joins_in_mid_round_is_asked_in_the_next() -> None:
    strategy = FedAvg(steps=5)
    joined(strategy, a=1)
    assert joined(strategy, b=1) == []
    assert strategy.handle(result("a"), 1.0)[1:] == [Train("a", 5), Train("b", 5)]


def test_a_client_without_examples_is_never_asked() -> None:
    strategy = FedAvg(steps=5)
    assert joined(strategy, empty=0, a=1) == [Train("a", 5)]


def test_it_finishes_after_its_rounds_and_then_does_nothing() -> None:
    strategy = FedAvg(steps=5, rounds=2)
    joined(strategy, a=1)
    strategy.handle(result("a"), 1.0)
    assert strategy.handle(result("a", 1), 2.0)[1:] == [Finish("2 rounds done")]
    assert joined(strategy, b=1) == []
    late = result("a", 1, current=False)
    assert strategy.handle(late, 3.0) == [Discard("a@1", "its round is closed")]


# ---- the cohort


def test_a_cohort_is_drawn_uniformly_without_replacement() -> None:
    drawn: collections.Counter[str] = collections.Counter()
    run = Virtual(FedAvg(steps=1, cohort=3), {f"c{i}": 1.0 for i in range(10)})
    for i in range(10):
        run.join(0, f"c{i}")
    run.run(events=6000)
    for order in run.orders[1:]:
        drawn[order.client] += 1
    rounds = len(run.merges)
    assert {len(m.weights) for m in run.merges[1:]} == {3}
    spread = math.sqrt(rounds * 0.3 * 0.7)
    assert all(abs(n - rounds * 0.3) < 4 * spread for n in drawn.values()), drawn


def test_the_draw_is_a_function_of_seed_and_round() -> None:
    def cohorts(seed: int) -> list[str]:
        run = Virtual(FedAvg(steps=1, cohort=3, seed=seed), {f"c{i}": 1.0 for i in range(9)})
        for i in range(9):
            run.join(0, f"c{i}")
        run.run(events=200)
        return [o.client for o in run.orders]

    assert cohorts(1) == cohorts(1)
    assert cohorts(1) != cohorts(2)


@pytest.mark.parametrize(
    ("strategy", "asked"),
    [
        (FedAvg(min_clients=10), 10),
        (FedAvg(min_clients=10, cohort=4), 4),
        (FedAvg(min_clients=10, cohort=40), 10),
        (FedAvg(min_clients=10, fraction=0.3), 3),
        (FedAvg(min_clients=10, fraction=0.01, min_results=2), 2),
        (FedAvg(min_clients=10, cohort=4, over_select=1.3), 6),
        (FedAvg(min_clients=10, cohort=5, over_select=1.2), 6),
        (FedAvg(min_clients=10, cohort=9, over_select=1.3), 10),
        (FedAvg(min_clients=30, cohort=25, over_select=1.12), 28),  # 28.000000000000004 in floats
    ],
)
def test_so_many_are_asked(strategy: FedAvg, asked: int) -> None:
    assert len(joined(strategy, **{f"c{i}": 1 for i in range(strategy.min_clients)})) == asked


def test_with_over_selection_the_first_results_make_the_version_and_the_rest_drop_theirs() -> None:
    strategy = FedAvg(steps=5, cohort=2, over_select=1.5, min_clients=3)
    joined(strategy, a=1, b=1, c=1)
    strategy.handle(result("c"), 1.0)
    said = strategy.handle(result("a"), 2.0)
    assert said[:2] == [Ask("b", "drop"), Aggregate((("a@0", 0.5), ("c@0", 0.5)))]
    assert len(said[2:]) == 3
    dropped = strategy.handle(result("b", current=False), 2.5)
    assert dropped == [Discard("b@0", "its round is closed")]


# ---- the deadline


def test_the_deadline_leaves_the_straggler_out_and_shares_sum_to_one() -> None:
    strategy = FedAvg(steps=5, deadline=10.0, min_clients=3)
    assert joined(strategy, a=1, b=3, c=96)[-1] == SetTimer("round-1", 10.0)
    strategy.handle(result("a"), 1.0)
    strategy.handle(result("b"), 10.0)
    assert strategy.handle(TimerFired("round-1"), 10.0)[:2] == [
        Ask("c", "drop"),
        Aggregate((("a@0", 0.25), ("b@0", 0.75))),
    ]


def test_a_round_with_too_few_results_is_extended_once_and_then_fails() -> None:
    strategy = FedAvg(steps=5, deadline=10.0, min_clients=2, min_results=2)
    joined(strategy, a=1, b=1)
    strategy.handle(result("a"), 1.0)
    assert strategy.handle(TimerFired("round-1"), 10.0) == [SetTimer("round-1", 20.0)]
    assert strategy.handle(TimerFired("round-1"), 20.0) == [
        Ask("b", "drop"),
        Discard("a@0", "round 1 failed: too few results"),
        Train("a", 5),
        Train("b", 5),
        SetTimer("round-2", 30.0),
    ]
    assert strategy.merges == 0


def test_an_extended_round_that_gets_its_minimum_merges() -> None:
    strategy = FedAvg(steps=5, deadline=10.0, min_clients=3, min_results=2)
    joined(strategy, a=1, b=1, c=1)
    strategy.handle(result("a"), 1.0)
    strategy.handle(TimerFired("round-1"), 10.0)
    assert strategy.handle(result("b"), 15.0) == [], "one more may come until 20"
    said = strategy.handle(TimerFired("round-1"), 20.0)
    assert said[1] == Aggregate((("a@0", 0.5), ("b@0", 0.5)))


def test_a_slow_merge_does_not_eat_the_next_rounds_deadline() -> None:
    strategy = FedAvg(steps=5, deadline=10.0)
    joined(strategy, a=1)
    assert strategy.handle(result("a"), 1.0)[-1] == SetTimer("round-2", 11.0)
    assert strategy.handle(Merged(1, ("a@0",)), 8.0) == [SetTimer("round-2", 18.0)]
    assert strategy.handle(TimerFired("round-2"), 11.0) == []
    assert FedAvg().handle(Merged(1, ()), 8.0) == []


def test_a_round_that_was_extended_while_it_waited_for_its_version_may_be_extended_again() -> None:
    strategy = FedAvg(steps=5, deadline=10.0)
    joined(strategy, a=1)
    strategy.handle(result("a"), 1.0)
    assert strategy.handle(TimerFired("round-2"), 11.0) == [SetTimer("round-2", 21.0)]
    strategy.handle(Merged(1, ("a@0",)), 12.0)
    assert strategy.handle(TimerFired("round-2"), 22.0) == [SetTimer("round-2", 32.0)]


@pytest.mark.parametrize("deadline", [None, 10.0])
@pytest.mark.parametrize("timer", ["round-0", "round-1", "elsewhere"])
def test_a_timer_that_is_not_due_changes_nothing(timer: str, deadline: float | None) -> None:
    strategy = FedAvg(deadline=deadline)
    assert strategy.handle(TimerFired(timer), 1.0) == []
    joined(strategy, a=1)
    assert strategy.handle(TimerFired(timer), 1.0) == []


# ---- those who leave


def test_when_every_missing_client_is_dead_the_round_ends_at_once() -> None:
    strategy = FedAvg(steps=5, min_clients=2)
    joined(strategy, a=1, b=1)
    strategy.handle(result("a"), 1.0)
    said = strategy.handle(ClientLeft("b", "lease ended"), 2.0)
    assert said == [Aggregate((("a@0", 1.0),)), Train("a", 5)]


def test_when_all_are_dead_the_round_fails_and_the_next_waits_for_clients() -> None:
    strategy = FedAvg(steps=5, min_results=2)
    joined(strategy, a=1, b=1)
    assert strategy.handle(ClientLeft("a", "gone"), 1.0) == []
    assert strategy.handle(ClientLeft("b", "gone"), 1.0) == []
    assert not strategy.open
    assert joined(strategy, c=1) == []
    assert joined(strategy, a=1) == [Train("a", 5), Train("c", 5)]


def test_a_client_back_in_mid_round_brings_its_result_in_time() -> None:
    strategy = FedAvg(steps=5, min_clients=3)
    joined(strategy, a=1, b=1, c=1)
    strategy.handle(ClientLeft("b", "gone"), 1.0)
    assert joined(strategy, b=1) == [], "its next order comes in the next round"
    assert strategy.handle(result("b", current=False), 2.0) == []
    strategy.handle(result("a"), 3.0)
    third = 1 / 3
    assert strategy.handle(result("c"), 3.0)[0] == Aggregate(
        (("a@0", third), ("b@0", third), ("c@0", third))
    )


def test_what_is_brought_from_a_former_round_is_late() -> None:
    strategy = FedAvg(steps=5, min_clients=2)
    joined(strategy, a=1, b=1)
    strategy.handle(ClientLeft("b", "gone"), 1.0)
    strategy.handle(result("a"), 2.0)
    joined(strategy, b=1)
    late = strategy.handle(result("b", current=False), 3.0)
    assert late == [Discard("b@0", "its round is closed")]


def test_a_former_orders_result_is_late_also_if_its_client_left_this_round_too() -> None:
    strategy = FedAvg(steps=5, cohort=2, over_select=1.5, min_clients=3)
    joined(strategy, a=1, b=1, c=1)
    strategy.handle(result("a"), 1.0)
    strategy.handle(result("b"), 2.0)
    strategy.handle(ClientLeft("c", "gone"), 3.0)
    late = strategy.handle(result("c", current=False), 4.0)
    assert late == [Discard("c@0", "its round is closed")]


def test_work_of_a_client_that_comes_back_without_examples_has_weight_zero() -> None:
    strategy = FedAvg(steps=5, min_clients=2)
    joined(strategy, a=1, b=1)
    strategy.handle(ClientLeft("b", "gone"), 1.0)
    joined(strategy, b=0)
    strategy.handle(result("b", current=False), 2.0)
    said = strategy.handle(ClientLeft("a", "gone"), 3.0)
    assert said == [Aggregate((("b@0", 0.0),))]


# ---- late work that is wanted


def test_stale_work_joins_the_next_merge_with_a_smaller_share() -> None:
    strategy = FedAvg(steps=5, deadline=10.0, min_clients=2, late="stale", rounds=2)
    joined(strategy, a=1, b=1)
    strategy.handle(result("a"), 1.0)
    said = strategy.handle(TimerFired("round-1"), 10.0)
    assert said == [Aggregate((("a@0", 1.0),)), Train("a", 5), SetTimer("round-2", 20.0)]
    assert strategy.handle(result("b"), 12.0) == [], "free again, and asked in round 3"
    stale = 1 / math.sqrt(2)
    said = strategy.handle(result("a", 1, 10.0), 13.0)
    assert isinstance(said[1], Aggregate)
    assert dict(said[1].items) == pytest.approx(
        {"a@1": 1 / (1 + stale), "b@0": stale / (1 + stale)}
    )


def test_a_straggler_that_leaves_may_still_bring_its_work() -> None:
    strategy = FedAvg(steps=5, deadline=10.0, min_clients=2, late="stale")
    joined(strategy, a=1, b=1)
    strategy.handle(result("a"), 1.0)
    strategy.handle(TimerFired("round-1"), 10.0)
    strategy.handle(ClientLeft("b", "gone"), 11.0)
    assert strategy.handle(result("b", current=False), 12.0) == []
    assert [u.id for u in strategy.carried] == ["b@0"]


def test_a_stragglers_result_begins_the_round_that_waited_for_it() -> None:
    strategy = FedAvg(steps=5, deadline=10.0, min_clients=2, min_results=1, late="stale")
    joined(strategy, a=1, b=1)
    strategy.handle(result("a"), 1.0)
    strategy.handle(TimerFired("round-1"), 10.0)
    strategy.handle(ClientLeft("a", "gone"), 11.0)
    assert strategy.handle(result("b"), 12.0) == [Train("b", 5), SetTimer("round-3", 22.0)]


def test_stragglers_are_told_to_drop_when_the_run_finishes() -> None:
    strategy = FedAvg(steps=5, deadline=10.0, min_clients=2, late="stale", rounds=1)
    joined(strategy, a=1, b=1)
    strategy.handle(result("a"), 1.0)
    said = strategy.handle(TimerFired("round-1"), 10.0)
    assert said[1:] == [Ask("b", "drop"), Finish("1 rounds done")]


# ---- always


def variants() -> list[tuple[Callable[[], FedAvg], int]]:
    return [
        (lambda: FedAvg(3), 40),
        (lambda: FedAvg(3, cohort=3, over_select=1.4, deadline=4.0, rounds=9), 30),
        (lambda: FedAvg(3, fraction=0.5, deadline=3.0, min_results=2, late="stale"), 30),
    ]


@pytest.mark.parametrize(("make", "seeds"), variants())
def test_invariants_hold_in_made_up_histories(make: Callable[[], FedAvg], seeds: int) -> None:
    check_strategy(make, seeds, steps=(3, 3))


@pytest.mark.parametrize(
    "parameters",
    [
        {"steps": 0},
        {"cohort": 0},
        {"cohort": 2, "min_results": 3},
        {"cohort": 2, "fraction": 0.5},
        {"fraction": 0.0},
        {"fraction": 1.1},
        {"over_select": 0.9},
        {"over_select": math.nan},
        {"over_select": math.inf},  # the run began, and failed on its first client
        {"deadline": math.inf},
        {"deadline": 0.0},
        {"min_results": 0},
        {"min_clients": 0},
        {"rounds": 0},
        {"late": "never"},
        {"staleness": "polynomial:-1"},
        {"weighting": "heavy"},
    ],
)
def test_parameters_that_cannot_be_are_refused(parameters: dict[str, float]) -> None:
    with pytest.raises(UsageError) as refused:
        FedAvg(**parameters)  # type: ignore[arg-type]
    assert refused.value.code == "FL-S102"
    assert refused.value.hint
