"""FedCompass where clients, links and merges do not behave: the cases of the spec's section 3.4."""

import math

import pytest

from atoll.aggregation import FedCompass
from atoll.aggregation import compass_groups as compass
from atoll.aggregation.virtual import Virtual
from atoll.protocols.errors import UsageError
from atoll.protocols.events import (
    Aggregate,
    ClientInfo,
    ClientJoined,
    ClientLeft,
    Discard,
    Merged,
    SetTimer,
    Stopping,
    TimerFired,
    Train,
    Update,
    UpdateReceived,
)

THREE = {"A": 0.1, "B": 0.25, "C": 0.8}


def three(strategy: FedCompass, **driver: float) -> Virtual:
    run = Virtual(strategy, THREE, **driver)  # type: ignore[arg-type]
    for client in THREE:
        run.join(0, client)
    return run


def waiting(strategy: FedCompass) -> Virtual:
    """B's second order takes 2.8 s instead of 7: it is there at 7.8 and waits for A until 12.

    C's first result makes version 3 at 10, between the two.
    """
    paces = THREE | {"C": 0.5}
    run = Virtual(strategy, lambda c, n: 0.1 if (c, n) == ("B", 1) else paces[c])
    for client in THREE:
        run.join(0, client)
    return run


def update(
    order: int, client: str, base: int, steps: int, started: float, current: bool = True
) -> Update:
    return Update(f"o{order}.0", f"o{order}", client, base, steps, 1, started, 1.0, {}, current)


# ---- weights


def test_staleness_at_arrival_is_the_papers_and_smaller_where_a_version_came_between() -> None:
    weights = {}
    for instant in ("aggregation", "arrival"):
        run = waiting(FedCompass(staleness_at=instant)).run(12)
        weights[instant] = run.merges[-1].weights
    assert weights["arrival"] == pytest.approx({"B": 0.3, "A": 0.3 / math.sqrt(3)})
    assert weights["aggregation"]["B"] == pytest.approx(0.3 / math.sqrt(2))


def test_shares_go_by_examples_or_are_equal() -> None:
    for weighting, share in (("samples", 0.25), ("equal", 0.5)):
        strategy = FedCompass(client_weight=weighting)  # type: ignore[arg-type]
        run = Virtual(strategy, {"a": 0.1, "b": 0.2})
        run.join(0, "a", examples=25)
        run.join(0, "b", examples=75)
        run.run(2)
        assert run.merges[0].weights == pytest.approx({"a": 0.9 * share})


def test_normalised_weights_count_each_delta_per_step() -> None:
    run = three(FedCompass(normalised=True)).run(13)
    mean = (100 + 28) / 2
    fresh = 0.3
    assert run.merges[2].weights == pytest.approx(
        {"A": mean * fresh / math.sqrt(2) / 100, "B": mean * fresh / 28}
    )
    assert run.merges[0].weights == pytest.approx({"A": fresh}), "alone it is the plain weight"


def test_results_merged_alone_go_past_the_outer_optimizer_if_so_asked() -> None:
    run = three(FedCompass(singles_plain=True)).run(23)
    assert [m.outer for m in run.merges] == [False, False, True, False, True]
    assert all(m.outer for m in three(FedCompass()).run(23).merges)


def test_shares_are_of_those_present_or_in_the_merge() -> None:
    """A is alone at 12; its share is of A and C, since B left at 8 with nothing to merge."""
    run = three(FedCompass())
    run.leave(8, "B")
    assert run.run(13).merges[-1].weights == pytest.approx({"A": 0.45 / math.sqrt(2)})
    gone = three(FedCompass())
    gone.run(13)  # A and B are merged at 12 and train on, B's next result comes at 22
    gone.leave(20, "B", brings=21)
    assert gone.run(23).merges[-1].weights == pytest.approx(
        {"B": 0.3 / math.sqrt(2), "A": 0.3 / math.sqrt(2)}
    ), "B is absent but in the merge: shares are of three"


def test_a_client_without_examples_is_never_trained_and_has_no_share() -> None:
    run = Virtual(FedCompass(), {"a": 0.1, "empty": 0.1})
    run.join(0, "empty", examples=0)
    run.join(0, "a")
    run.run(30)
    assert {o.client for o in run.orders} == {"a"}
    assert run.merges[0].weights == pytest.approx({"a": 0.9})


def test_work_of_a_client_that_comes_back_without_examples_has_weight_zero() -> None:
    strategy = FedCompass(flush_on_stop=True)
    strategy.handle(ClientJoined("a", ClientInfo(5)), 0.0)
    strategy.handle(ClientLeft("a", "gone"), 1.0)
    strategy.handle(ClientJoined("a", ClientInfo(0)), 2.0)
    assert not strategy.handle(UpdateReceived(update(0, "a", 0, 20, 0.0, current=False)), 3.0)
    assert strategy.handle(Stopping("done"), 4.0) == [Aggregate((("o0.0", 0.0),))]


# ---- who comes, goes and comes back


def test_the_first_order_waits_for_min_clients() -> None:
    strategy = FedCompass(min_clients=2)
    assert strategy.handle(ClientJoined("a", ClientInfo(1)), 0.0) == []
    both = [Train("a", 20), Train("b", 20)]
    assert strategy.handle(ClientJoined("b", ClientInfo(1)), 5.0) == both
    assert strategy.handle(ClientJoined("c", ClientInfo(1)), 6.0) == [Train("c", 20)]


def test_clients_that_know_their_speed_skip_the_warm_up_the_fastest_first() -> None:
    strategy = FedCompass(min_clients=2)
    strategy.handle(ClientJoined("slow", ClientInfo(1, 0.2)), 0.0)
    assert strategy.handle(ClientJoined("fast", ClientInfo(1, 0.1)), 0.0) == [
        SetTimer("g0", 12.0),
        Train("fast", 100),
        Train("slow", 50),
    ]


@pytest.mark.parametrize("hint", [0.0, -1.0, math.nan, math.inf])
def test_a_speed_that_cannot_be_is_not_believed(hint: float) -> None:
    strategy = FedCompass()
    assert strategy.handle(ClientJoined("a", ClientInfo(1, hint)), 0.0) == [Train("a", 20)]


def test_a_client_that_comes_back_keeps_its_measured_speed() -> None:
    run = three(FedCompass())
    run.leave(8, "B")
    run.join(9, "B", seconds_per_step=77.0)
    run.run(9)
    # g0 is due at 12: (12 - 9) / 0.25 = 12 < 20; next time at 22: (22 - 9) / 0.25 = 52
    assert [(o.client, o.steps) for o in run.orders if o.started == 9] == [("B", 52)]


def test_what_a_returned_client_brings_from_its_former_life_is_merged_once() -> None:
    run = three(FedCompass())
    run.leave(8, "B", brings=9.5)
    run.join(9, "B")
    run.run(13)
    assert run.merges[-1].at == 12
    assert list(run.merges[-1].weights) == ["B", "A"]
    assert not run.discards


def test_a_result_older_than_the_clients_newest_work_is_discarded() -> None:
    run = three(FedCompass())
    run.leave(8, "B", brings=23)  # B's new order of 52 steps comes back at 22
    run.join(9, "B")
    run.run(23)
    assert run.discards == [(23, "o4.0", "its client has had a newer order")]


def test_only_the_order_that_was_open_at_the_leave_is_owed() -> None:
    strategy = FedCompass()
    strategy.handle(ClientJoined("a", ClientInfo(1)), 0.0)
    strategy.handle(ClientLeft("a", "gone"), 1.0)
    strategy.handle(ClientJoined("a", ClientInfo(1)), 2.0)
    strategy.handle(ClientLeft("a", "gone"), 3.0)
    first = update(0, "a", 0, 20, 0.0, current=False)
    second = update(1, "a", 0, 20, 2.0, current=False)
    assert strategy.handle(UpdateReceived(first), 4.0) == [
        Discard("o0.0", "its client has had a newer order")
    ]
    assert strategy.handle(UpdateReceived(second), 4.0) == []
    assert [r.id for r in strategy.general] == ["o1.0"]


def test_a_client_that_leaves_while_it_waits_leaves_its_result_in_the_group() -> None:
    run = waiting(FedCompass())
    run.leave(9, "B")
    run.run(13)
    assert list(run.merges[-1].weights) == ["B", "A"]
    assert "B" not in {o.client for o in run.orders if o.started >= 9}


def test_a_group_whose_last_member_leaves_is_gone_with_its_timer() -> None:
    strategy = FedCompass()
    run = Virtual(strategy, {"a": 0.1})
    run.join(0, "a")
    run.leave(5, "a")
    run.run(6)
    assert (strategy.groups(6), run.timers) == ([], {})


def test_a_late_client_that_leaves_lets_its_closed_group_go() -> None:
    strategy = FedCompass()
    run = Virtual(strategy, lambda c, n: math.inf if (c, n) == ("B", 1) else THREE[c])
    for client in THREE:
        run.join(0, client)
    run.leave(15, "B")
    run.run(14.5)
    assert list(strategy.closed) == ["g0"]
    assert run.timers["g0 silent"] == 62.0  # made at 2, and 60 s is longer than 3 * (14 - 2)
    run.run(15)
    assert not strategy.closed
    assert "g0 silent" not in run.timers


def test_one_of_several_missing_members_comes_back_and_the_others_are_still_expected() -> None:
    strategy = FedCompass()
    run = Virtual(strategy, lambda c, n: 0.5 if n == 1 and c != "A" else 0.1)
    for client in "ABC":
        run.join(0, client)
    run.leave(30, "B")
    run.run(30)
    assert strategy.closed["g0"].pending == {"C"}


def test_a_client_silent_for_too_long_counts_as_absent_until_it_is_heard() -> None:
    strategy = FedCompass(dead_after=20.0)
    pace = {("B", 1): 2.0}  # its 28 steps end at 61
    run = Virtual(strategy, lambda c, n: pace.get((c, n), THREE[c]))
    for client in THREE:
        run.join(0, client)
    run.run(15)
    assert run.timers["g0 silent"] == 22.0  # made at 2
    assert strategy.present == 3
    run.run(60)
    assert strategy.present == 2
    assert max(run.merges[-1].weights.values()) == pytest.approx(0.45)
    run.run(61)
    assert strategy.present == 3
    assert [r.client for r in strategy.general] == ["B"]


def test_a_silent_client_that_then_leaves_is_counted_out_once() -> None:
    strategy = FedCompass(dead_after=20.0)
    run = Virtual(strategy, lambda c, n: math.inf if (c, n) == ("B", 1) else THREE[c])
    for client in THREE:
        run.join(0, client)
    run.leave(40, "B", brings=41)
    run.run(41)
    assert strategy.present == 2
    assert [r.client for r in strategy.general] == ["B"]


# ---- deadlines


def test_a_deadline_nobody_met_makes_no_version_if_there_is_nothing_to_add() -> None:
    strategy = FedCompass(smoothing=1.0)
    run = Virtual(strategy, lambda c, n: 0.1 * 1.5**n)
    run.join(0, "a")
    run.run(15)
    assert len(run.merges) == 1
    assert not strategy.open


def test_an_update_after_the_deadline_whose_timer_is_slow_is_late() -> None:
    strategy = FedCompass()
    strategy.handle(ClientJoined("a", ClientInfo(1, 0.1)), 0.0)  # g0 due at 10, latest 12
    said = strategy.handle(UpdateReceived(update(0, "a", 0, 100, 0.0)), 12.5)
    assert [a for a in said if isinstance(a, Aggregate)] == []
    assert [a for a in said if isinstance(a, Train)] == [Train("a", 100)]
    assert [r.id for r in strategy.general] == ["o0.0"]
    assert not strategy.closed


@pytest.mark.parametrize("timer", ["g0", "g0 silent", "g7", "g7 silent", "elsewhere"])
def test_a_timer_that_is_not_due_changes_nothing(timer: str) -> None:
    strategy = FedCompass()
    three(strategy).run(13)
    assert strategy.handle(TimerFired("g1"), 13.0) == []
    assert strategy.handle(TimerFired(timer), 13.0) == []


def test_a_reaper_that_is_not_due_changes_nothing() -> None:
    strategy = FedCompass()
    run = Virtual(strategy, lambda c, n: math.inf if (c, n) == ("B", 1) else THREE[c])
    for client in THREE:
        run.join(0, client)
    run.run(15)
    assert strategy.handle(TimerFired("g0 silent"), 15.0) == []
    assert list(strategy.closed) == ["g0"]


# ---- what is not the client's slowness


def test_groups_wait_for_the_version_their_orders_wait_for() -> None:
    """With no slack at all, a merge of 2 s would make every member late."""
    strategy = FedCompass(slack=1.0)
    run = three(strategy, merging=2.0)
    run.run(60)
    assert strategy.members["A"].pace == pytest.approx(0.1)
    assert [round(m.at, 6) for m in run.merges if "A" in m.weights][:2] == [2.0, 14.0]
    assert not strategy.closed, "nobody was late"


def test_a_merge_too_short_to_matter_moves_no_timer() -> None:
    strategy = FedCompass()
    strategy.handle(ClientJoined("a", ClientInfo(1)), 0.0)
    strategy.handle(UpdateReceived(update(0, "a", 0, 20, 0.0)), 2.0)
    assert strategy.handle(Merged(1, ("o0.0",)), 2.05) == []  # g0 spans 12 s
    assert strategy.handle(Merged(1, ("o0.0",)), 2.25) == [SetTimer("g0", 14.25)]


def test_a_run_may_begin_at_a_later_version() -> None:
    run = Virtual(FedCompass(), THREE, version=7)
    for client in THREE:
        run.join(0, client)
    run.run(13)
    assert [m.version for m in run.merges] == [8, 9, 10]
    assert run.merges[1].weights == pytest.approx({"B": 0.3 / math.sqrt(2)})


def test_two_part_time_tells_transfer_from_steps() -> None:
    strategy = FedCompass(time_model="two_part")
    run = three(strategy, overhead=3.0)
    run.run(100)
    for client, pace in THREE.items():
        assert strategy.members[client].pace == pytest.approx(pace)
        assert strategy.members[client].overhead == pytest.approx(3.0)
    # A: first order 20 * 0.1 + 3 = 5; g0 is due at 5 + 3 + 100 * 0.1 = 18, latest 5 + 1.2 * 13.
    # B: first order at 8; (18 - 8 - 3) / 0.25 = 28 steps.
    assert [(o.client, o.steps) for o in run.orders if o.started == 8.0] == [("B", 28)]
    assert "B" in run.merges[2].weights
    assert run.merges[2].at == pytest.approx(18.0)


def test_plain_time_folds_transfer_into_the_pace() -> None:
    strategy = FedCompass()
    three(strategy, overhead=3.0).run(5)
    assert strategy.members["A"].pace == pytest.approx(5.0 / 20)


@pytest.mark.parametrize("claimed", [-1.0, 99.0, math.nan])
def test_a_training_time_that_cannot_be_is_not_believed(claimed: float) -> None:
    member = compass.Member(1)
    compass.observe_two_part(member, 10.0, claimed, 20, 0.9)
    assert (member.pace, member.overhead) == (0.5, 0.0)


def test_a_new_pace_is_mixed_with_the_old() -> None:
    member = compass.Member(1, pace=0.25, overhead=1.0)
    compass.observe_two_part(member, 7.0, 4.0, 20, 0.9)
    assert member.pace == pytest.approx(0.9 * 0.2 + 0.1 * 0.25)
    assert member.overhead == pytest.approx(0.9 * 3.0 + 0.1 * 1.0)


def test_an_order_that_took_no_time_or_no_steps_does_not_divide_by_zero() -> None:
    member = compass.Member(1)
    compass.observe(member, 0.0, 0, 0.9)
    assert member.pace == compass.INSTANT


def test_steps_forgive_the_noise_of_floats() -> None:
    assert math.floor((1.4 + 15 - 1.4) / 0.15) == 99
    assert compass.whole_steps(1.4 + 15 - 1.4, 0.15) == 100


def test_among_equals_the_newest_group_is_joined() -> None:
    twins = {n: compass.Group(10.0, 12.0, 0.0, 0) for n in ("g0", "g1")}
    member = compass.Member(1, pace=0.2)
    assert compass.joinable(twins, member, 0.0, 20, 100) == ("g1", 50)
    assert compass.joinable(twins, member, 8.0, 20, 100) is None


def test_a_group_past_its_expected_time_is_no_measure_for_a_new_one() -> None:
    old = compass.Group(10.0, 12.0, 0.0, 0, pending={"a"})
    members = {"a": compass.Member(1, pace=0.1), "b": compass.Member(1, pace=0.3)}
    assert compass.steps_of_new_group([old], members, members["b"], 11.0, 20, 100) == 100
    assert compass.steps_of_new_group([old], members, members["b"], 9.0, 20, 100) == 36


# ---- the end


def test_a_stop_merges_all_that_waits_if_so_asked() -> None:
    strategy = FedCompass(flush_on_stop=True)
    waiting(strategy).run(9)
    (last,) = strategy.handle(Stopping("time is up"), 9.0)
    assert isinstance(last, Aggregate)
    assert dict(last.items) == pytest.approx({"o4.0": 0.3})
    assert strategy.handle(Stopping("time is up"), 9.0) == []


def test_a_stop_leaves_what_waits_if_not_asked() -> None:
    strategy = FedCompass()
    waiting(strategy).run(9)
    assert strategy.handle(Stopping("time is up"), 9.0) == []
    assert [len(g.buffer) for g in strategy.open.values()] == [1]


def test_a_run_that_goes_on_after_a_stop_takes_up_those_who_waited() -> None:
    strategy = FedCompass(flush_on_stop=True)
    for client, pace in (("a", 0.1), ("b", 0.2)):
        strategy.handle(ClientJoined(client, ClientInfo(1, pace)), 0.0)
    strategy.handle(UpdateReceived(update(0, "a", 0, 100, 0.0)), 10.0)
    assert len(strategy.handle(Stopping("time is up"), 10.5)) == 1
    said = strategy.handle(ClientLeft("b", "gone"), 11.0)
    assert [a for a in said if isinstance(a, Train)] == [Train("a", 100)]
    assert not [a for a in said if isinstance(a, Aggregate)]


@pytest.mark.parametrize(
    "parameters",
    [
        {"min_steps": 0},
        {"min_steps": 50, "max_steps": 20},
        {"slack": 0.9},
        {"smoothing": 0.0},
        {"smoothing": 1.1},
        {"alpha": 0.0},
        {"staleness_exponent": -0.5},
        {"staleness_at": "never"},
        {"client_weight": "heavy"},
        {"time_model": "three_part"},
        {"dead_after": 0.0},
        {"min_clients": 0},
        {"slack": math.inf},
    ],
)
def test_parameters_that_cannot_be_are_refused(parameters: dict[str, float]) -> None:
    with pytest.raises(UsageError) as refused:
        FedCompass(**parameters)  # type: ignore[arg-type]
    assert refused.value.code == "FL-S102"
