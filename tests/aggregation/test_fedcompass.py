"""FedCompass against the spec's worked examples T1 to T14; one minute or second is one unit."""

import itertools
import math
import random
from collections.abc import Callable

import pytest

from atoll.aggregation import FedCompass
from atoll.aggregation.compass_groups import turn
from atoll.aggregation.testing import check_strategy, restart
from atoll.aggregation.virtual import Virtual

FIGURE_1 = {"c1": 0.1, "c2": 0.2, "c3": 0.25, "c4": 0.4, "c5": 0.5}
THREE = {"A": 0.1, "B": 0.25, "C": 0.8}


def run(strategy: FedCompass, paces: dict[str, float], **changed: dict[int, float]) -> Virtual:
    """All join at 0; `changed` gives a client another pace for its n-th order (from 0)."""
    driver = Virtual(strategy, lambda c, n: changed.get(c, {}).get(n, paces[c]))
    for client in paces:
        driver.join(0, client)
    return driver


def orders(driver: Virtual, at: float) -> dict[str, int]:
    return {o.client: o.steps for o in driver.orders if o.started == pytest.approx(at)}


def merges(driver: Virtual, after: float = -1.0) -> list[tuple[float, str, tuple[int, ...]]]:
    return [
        (round(m.at, 6), " ".join(m.weights), m.staleness) for m in driver.merges if m.at > after
    ]


def times(strategy: FedCompass, now: float) -> list[float]:
    """Expected and latest arrival of the open groups, one after the other."""
    return [at for g in strategy.groups(now) for at in (g.expected, g.latest)]


# ---- T1: the paper's figure 1


def test_t1_five_clients_become_one_group() -> None:
    driver = run(FedCompass(smoothing=1.0), FIGURE_1).run(43)
    assert merges(driver) == [
        (2, "c1", (0,)),
        (4, "c2", (1,)),
        (5, "c3", (2,)),
        (8, "c4", (3,)),
        (10, "c5", (4,)),
        (12, "c1 c2 c3", (4, 3, 2)),
        (22, "c4 c5 c1 c2 c3", (2, 1, 0, 0, 0)),
        (32, "c1 c2 c3 c4 c5", (0, 0, 0, 0, 0)),
        (42, "c1 c2 c3 c4 c5", (0, 0, 0, 0, 0)),
    ]
    assert [orders(driver, t) for t in (0, 2, 4, 5)] == [
        dict.fromkeys(FIGURE_1, 20),
        {"c1": 100},
        {"c2": 40},
        {"c3": 28},
    ]
    assert [orders(driver, t) for t in (8, 10)] == [{"c4": 35}, {"c5": 24}]
    assert orders(driver, 12) == {"c1": 100, "c2": 50, "c3": 40}
    for t in (22, 32, 42):
        assert orders(driver, t) == {"c1": 100, "c2": 50, "c3": 40, "c4": 25, "c5": 20}


def test_t1_times_of_the_groups_are_those_of_the_figure() -> None:
    strategy = FedCompass(smoothing=1.0)
    driver = run(strategy, FIGURE_1).run(11)
    assert [g[:3] for g in strategy.groups(11)] == [
        ("g0", ["c1", "c2", "c3"], []),
        ("g1", ["c4", "c5"], []),
    ]
    assert times(strategy, 11) == pytest.approx([12, 14, 22, 24.8])
    driver.run(22)
    assert times(strategy, 22) == pytest.approx([32, 34])


def test_groups_tell_who_waits_and_leave_out_those_whose_time_is_over() -> None:
    strategy = FedCompass(smoothing=1.0)
    run(strategy, FIGURE_1, c3={1: 0.2}).run(11)
    assert strategy.groups(11)[0].arrived == ["c3"]
    assert [g.name for g in strategy.groups(14.1)] == ["g1"]


# ---- T2: three clients, two groups


def test_t2_two_groups_take_turns_and_the_slow_one_is_met_every_second_time() -> None:
    driver = run(FedCompass(), THREE).run(73)
    fresh, one, three = 0.3, 0.3 / math.sqrt(2), 0.15
    assert merges(driver) == [
        (2, "A", (0,)),
        (5, "B", (1,)),
        (12, "A B", (1, 0)),
        (16, "C", (3,)),
        (22, "A B", (1, 1)),
        (32, "C A B", (1, 0, 0)),
        (42, "A B", (0, 0)),
        (52, "C A B", (1, 0, 0)),
        (62, "A B", (0, 0)),
        (72, "C A B", (1, 0, 0)),
    ]
    weights = [list(m.weights.values()) for m in driver.merges[:6]]
    expected = [[fresh], [one], [one, fresh], [three], [one, one], [one, fresh, fresh]]
    assert weights == [pytest.approx(w) for w in expected]
    assert [orders(driver, t) for t in (2, 5, 12, 16, 22)] == [
        {"A": 100},
        {"B": 28},
        {"A": 100, "B": 40},
        {"C": 20},
        {"A": 100, "B": 40},
    ]
    assert orders(driver, 32) == {"A": 100, "B": 40, "C": 25}


def test_t2_times_of_the_groups() -> None:
    strategy = FedCompass()
    driver = run(strategy, THREE).run(16)
    assert times(strategy, 16) == pytest.approx([22, 24, 32, 35.2])
    driver.run(32)
    assert times(strategy, 32) == pytest.approx([42, 44, 52, 56])


def test_t2_the_weights_move_a_scalar_model_as_worked_out_by_hand() -> None:
    driver = run(FedCompass(), THREE).run(12)
    deltas = [{"A": 3.0}, {"B": 1.5}, {"A": 2.0, "B": 1.0}]
    w, seen = 10.0, []
    for merge, delta in zip(driver.merges, deltas, strict=True):
        w -= sum(weight * delta[client] for client, weight in merge.weights.items())
        seen.append(w)
    assert seen == pytest.approx([9.1, 8.781802, 8.057538], abs=1e-6)


# ---- T3 to T5: a client changes its pace


@pytest.mark.parametrize(("smoothing", "steps"), [(1.0, 50), (0.9, 48)])
def test_t3_a_client_that_speeds_up_waits_once_and_then_gets_more_steps(
    smoothing: float, steps: int
) -> None:
    driver = run(FedCompass(smoothing=smoothing), FIGURE_1, c3={1: 0.2, 2: 0.2}).run(12)
    assert merges(driver, after=10) == [(12, "c3 c1 c2", (2, 4, 3))]
    assert orders(driver, 12)["c3"] == steps


def test_t4_a_mild_slow_down_is_waited_for() -> None:
    driver = run(FedCompass(smoothing=1.0), FIGURE_1, c3={1: 0.3}).run(13.5)
    assert merges(driver, after=10) == [(13.4, "c1 c2 c3", (4, 3, 2))]
    assert orders(driver, 13.4) == {"c1": 86, "c2": 43, "c3": 28}


def test_t5_a_strong_slow_down_is_late_and_joins_the_next_merge() -> None:
    strategy = FedCompass(smoothing=1.0)
    driver = run(strategy, FIGURE_1, c3={1: 0.4, 2: 0.4}).run(16.3)
    assert merges(driver, after=10) == [(14, "c1 c2", (4, 3))]
    assert orders(driver, 14) == {"c1": 80, "c2": 40}
    assert orders(driver, 16.2) == {"c3": 39}
    assert strategy.groups(16.3)[-1].expected == pytest.approx(31.8)
    assert not strategy.closed, "its last missing member is back"
    driver.run(22.1)
    assert merges(driver, after=15) == [(22, "c3 c4 c5 c1 c2", (3, 2, 1, 0, 0))]


# ---- T6, T7: where FedCompass is FedAvg


def test_t6_equal_clients_are_synchronous() -> None:
    driver = run(FedCompass(), dict.fromkeys("abcd", 0.15)).run(60)
    assert merges(driver)[:6] == [
        (3, "a", (0,)),
        (3, "b", (1,)),
        (3, "c", (2,)),
        (3, "d", (3,)),
        (18, "a b c d", (3, 2, 1, 0)),
        (33, "a b c d", (0, 0, 0, 0)),
    ]
    assert {driver.orders[i].steps for i in range(4, 16)} == {100}
    for merge in driver.merges[5:]:
        assert list(merge.weights.values()) == pytest.approx([0.9 / 4] * 4)


def test_t7_one_group_without_staleness_is_the_mean_by_examples() -> None:
    driver = Virtual(FedCompass(alpha=1.0), {"a": 0.1, "b": 0.1, "c": 0.1})
    for client, examples in {"a": 10, "b": 30, "c": 60}.items():
        driver.join(0, client, examples)
    driver.run(30)
    assert driver.merges[-1].staleness == (0, 0, 0)
    assert driver.merges[-1].weights == pytest.approx({"a": 0.1, "b": 0.3, "c": 0.6})


# ---- T8 to T10: death, lateness, joining


def test_t8_a_client_that_leaves_is_not_waited_for() -> None:
    driver = run(FedCompass(), THREE)
    driver.leave(8, "B")
    assert merges(driver.run(13), after=5) == [(12, "A", (1,))]
    assert "g0" not in driver.timers


def test_t8_an_undetected_death_costs_one_deadline_and_no_more() -> None:
    strategy = FedCompass()
    driver = run(strategy, THREE, B={1: math.inf}).run(15)
    assert merges(driver, after=5) == [(14, "A", (1,))]
    assert strategy.groups(15)[0].expected == pytest.approx(24)
    driver.run(200)
    assert all("B" not in m.weights for m in driver.merges if m.at > 5)
    waits = [b.at - a.at for a, b in itertools.pairwise(driver.merges) if a.at > 24]
    assert max(waits) <= 10 + 1e-9, "A's full order is 10 s: nobody waits for B again"


def test_t9_a_client_that_is_always_late_is_merged_within_one_deadline() -> None:
    strategy = FedCompass(smoothing=1.0)
    driver = Virtual(strategy, lambda c, n: 0.1 * 1.5**n)
    driver.join(0, "a")
    driver.run(400)
    arrivals = [o.started + o.seconds for o in driver.orders if not o.open]
    assert arrivals[:3] == pytest.approx([2.0, 17.0, 39.5])
    assert [m.at for m in driver.merges][:3] == pytest.approx([2.0, 35.0, 66.5])
    used = [f"{o.id}.0" for o in driver.orders if not o.open]
    held = [r.id for r in strategy.general]
    assert sorted(driver.settled | set(held)) == sorted(used)
    assert len(held) <= 1


def test_t10_a_client_that_joins_in_the_middle_draws_the_others_to_its_group() -> None:
    driver = Virtual(FedCompass(), THREE | {"D": 0.2})
    for client in THREE:
        driver.join(0, client)
    driver.join(7, "D")
    driver.run(12)
    assert merges(driver, after=5)[0] == (11, "D", (0,))
    assert orders(driver, 11) == {"D": 55}
    assert orders(driver, 12) == {"A": 100, "B": 40}


# ---- T11 to T14: properties


def test_t11_few_groups_remain() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        paces = {f"c{i:02}": rng.uniform(0.05, 2.0) for i in range(12)}
        strategy = FedCompass()
        run(strategy, paces).run(600)
        ratio = max(paces.values()) / min(paces.values())
        bound = max(1, math.ceil(math.log(ratio) / math.log(100 / 20))) + 1
        assert len(strategy.open) <= bound, f"seed {seed}"


def variants() -> list[tuple[Callable[[], FedCompass], int]]:
    return [
        (lambda: FedCompass(2, 10), 40),
        (lambda: FedCompass(2, 10, staleness_at="arrival", client_weight="equal"), 30),
        (lambda: FedCompass(2, 10, time_model="two_part", normalised=True, min_clients=3), 30),
        (lambda: FedCompass(5, 5, slack=1.0, dead_after=1.0, singles_plain=True), 30),
    ]


@pytest.mark.parametrize(("make", "seeds"), variants())
def test_t12_invariants_hold_in_made_up_histories(
    make: Callable[[], FedCompass], seeds: int
) -> None:
    check_strategy(make, seeds, steps=(make().min_steps, make().max_steps))


def test_t12_who_is_in_time_waits_no_longer_than_the_latest_arrival() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        strategy = FedCompass()
        paces = {f"c{i}": rng.uniform(0.05, 1.0) for i in range(6)}
        noise = {c: {n: p * rng.uniform(0.5, 2.0) for n in range(200)} for c, p in paces.items()}
        noisy = run(strategy, paces, **noise)
        for i in range(6):
            noisy.leave(30.0 * i + 40.0, f"c{i}")
            noisy.join(30.0 * i + 55.0, f"c{i}")
        for _ in range(200):
            noisy.run(events=1)
            for group in strategy.open.values():
                assert group.pending, f"seed {seed}: an open group without pending members"
                assert noisy.now <= group.latest, f"seed {seed}: a deadline was missed"
                known = [strategy.members[c] for c in (*group.pending, *group.arrived)]
                fastest = min(turn(member, 100) for member in known)
                assert group.turn in (0.0, fastest), f"seed {seed}: not the fastest member's turn"
            assert all(g.pending for g in strategy.closed.values()), f"seed {seed}"
            timers = {t.removesuffix(" silent") for t in noisy.timers}
            assert timers == {*strategy.open, *strategy.closed}, f"seed {seed}: a timer is left"
        assert strategy.version == len(noisy.merges)


def test_t13_with_one_number_of_steps_it_is_fedasync() -> None:
    """Periods of 7, 16 and 39: none ends within one step of another before 7 * 16."""
    driver = run(FedCompass(20, 20), {"a": 7 / 20, "b": 16 / 20, "c": 39 / 20}).run(111)
    assert len(driver.merges) == 111 // 7 + 111 // 16 + 111 // 39
    assert {len(m.staleness) for m in driver.merges} == {1}


def test_t14_the_same_clients_give_the_same_log_also_through_a_restart_in_the_middle() -> None:
    plain = run(FedCompass(), THREE).run(60)
    again = run(FedCompass(), THREE).run(13)
    again.strategy = restart(again.strategy)
    again.run(60)
    assert again.log == plain.log
    assert again.strategy == plain.strategy
