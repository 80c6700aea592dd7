"""Who counts in c: the ledger, overlapping orders, lost disks, and the numbers of a merge."""

import math

import pytest
import torch

from atoll.aggregation.control import CHANGE, CONTROL, Control, Ledger
from atoll.aggregation.direction import DIRECTION, Direction, DirectionTurn, guarded
from atoll.aggregation.dynamic import Dynamic
from atoll.aggregation.half import Half, Numbers, Work, extras_of, generation, told, told_to
from atoll.protocols.errors import ServerError


def work(client: str, commits: int = 0, life: int = 7, epoch: int = 0, **more: float) -> Work:
    said = {"steps": 5.0, "lr": 0.1, "life": float(life), "epoch": float(epoch)}
    return Work(f"{client}.{commits}", client, 0.5, {**said, "commits": float(commits), **more})


def test_a_change_counts_once_for_the_state_it_rests_on() -> None:
    ledger = Ledger({}, known=4)
    assert ledger.take([work("a"), work("b"), work("a")]) == [True, True, False]
    after = Ledger(ledger.closed(), known=4)
    assert after.take([work("a", 1), work("b", 0), work("c")]) == [True, False, True]
    assert after.closed()["commits/a"] == 2
    assert after.closed()["commits/b"] == 1


def test_changes_that_rest_on_nothing_count_each() -> None:
    ledger = Ledger({}, known=2)
    assert ledger.take([work("a"), work("a")], overlapping=True) == [True, True]


def test_another_life_resets_all_and_an_older_epoch_counts_for_nothing() -> None:
    first = Ledger({}, known=2)
    first.take([work("a"), work("b")])
    lost = Ledger(first.closed(), known=2)
    assert lost.take([work("b", 1), work("a", 0, life=8)]) == [False, False]
    assert lost.reset
    numbers = lost.closed()
    assert numbers["epoch"] == 1
    assert not [name for name in numbers if name.startswith(("life/", "commits/"))]
    anew = Ledger(numbers, known=2)
    assert anew.take([work("b", 1, epoch=0), work("a", 0, life=8, epoch=1)]) == [False, True]
    assert not anew.reset


def test_the_servers_own_states_take_a_change_by_the_same_rule_and_are_never_lost() -> None:
    said = {"steps": 5.0, "lr": 0.1}

    def own(client: str, commits: int) -> Work:
        return Work(f"{client}.{commits}", client, 0.5, {**said, "commits": float(commits)})

    half = Control(table=True)
    first = half.begin([own("a", 0), own("b", 0), own("a", 0)], {}, 4)
    assert first.rows == [True, True, False]
    assert first.sums == {f"extra:{CHANGE}": [0.25, 0.25, 0.0]}
    second = half.begin([own("a", 1), own("b", 0)], first.numbers, 4)
    assert second.rows == [True, False]
    assert second.stats == {"variates_skipped": 1.0}
    assert (generation(second.numbers, "a"), generation(second.numbers, "c")) == (2, 0)
    assert told_to(second.numbers, "b") == {"commits": 1.0}
    assert not any(name.startswith("life/") for name in second.numbers)


def turn(half: Half, works: list[Work], former: Numbers, known: int, dc: float) -> torch.Tensor:
    """c after one merge, from c = 1."""
    plan = half.begin(works, former, known)
    [(section, weights)] = plan.sums.items()
    assert section == f"extra:{CHANGE}"
    state = {CONTROL: torch.ones(3), DIRECTION: torch.zeros(3)}
    sums = {section: torch.full((3,), dc) * sum(weights)}
    plan.tile(torch.zeros(3), torch.ones(3), sums, state)
    return state[CONTROL]


def test_c_stays_a_mean_when_clients_join_and_is_zero_after_a_loss() -> None:
    half = Control()
    former = {"clients": 2.0, "epoch": 0.0, "life/a": 7.0, "commits/a": 1.0}
    assert turn(half, [work("a", 1)], former, 2, dc=4).tolist() == [3.0] * 3  # 1 + 4/2
    assert turn(half, [work("a", 1)], former, 4, dc=4).tolist() == [1.5] * 3  # 2/4 + 4/4
    assert turn(half, [work("a", 0, life=8)], former, 2, dc=4).tolist() == [0.0] * 3
    stats = half.begin([work("a", 0, life=8)], former, 2).stats
    assert stats == {"state_lost": 1.0, "variates_skipped": 1.0}


def test_directions_of_one_length_need_no_scaling_others_do() -> None:
    even = DirectionTurn([work("a"), work("b")], {}, former=False)
    assert (even.scales, even.gamma) == (None, 0.5)
    uneven = DirectionTurn([work("a", steps=2), work("b", steps=6)], {}, former=False)
    assert uneven.gamma == pytest.approx(0.4)
    assert uneven.scales == pytest.approx([2.0, 2 / 3])
    idle = DirectionTurn([work("a", steps=0), work("b")], {}, former=False)
    assert (idle.scales, idle.gamma) == ([0.0, 1.0], 0.5)


def test_small_weights_move_the_direction_by_their_share() -> None:
    """A late update of weight 0.25: g := 0.75 g + 0.25 u."""
    said = {"steps": 5.0, "lr": 0.1}
    plan = Direction().begin([Work("x", "a", 0.25, said)], {}, 2)
    state = {DIRECTION: torch.full((2,), 4.0)}
    plan.tile(torch.zeros(2), torch.full((2,), 0.25 * 0.5 * 8), {}, state)  # u = 8
    assert state[DIRECTION].tolist() == pytest.approx([5.0, 5.0])


def test_updates_of_no_steps_leave_the_direction() -> None:
    plan = Direction().begin([Work("x", "a", 1.0, {"steps": 0.0, "lr": 0.1})], {}, 1)
    state = {DIRECTION: torch.ones(2)}
    plan.tile(torch.zeros(2), torch.zeros(2), {}, state)
    assert state[DIRECTION].tolist() == [1.0, 1.0]


def test_the_guard_wants_a_few_norms_before_it_judges() -> None:
    numbers: Numbers = {"gamma": 0.5}
    for _ in range(4):
        numbers = guarded(1.0, numbers)
    numbers = guarded(50.0, numbers)  # the median of four decides nothing
    for _ in range(9):
        numbers = guarded(1.0, numbers)
    assert len([n for n in numbers if n.startswith("norm/")]) == 9
    assert guarded(9.9, numbers)["norm/8"] == pytest.approx(19.8)
    with pytest.raises(ServerError, match="FL-S210"):
        guarded(10.1, numbers)
    assert Direction().after(math.inf, numbers) is numbers


def test_what_travels_follows_from_the_half() -> None:
    extras = extras_of(Control(momentum=True), 10)
    assert extras.down == {"direction": 10, "control": 10}
    assert extras.up == {"dc": 10, "said": 5}
    assert extras.own == extras_of(None, 10).own == {}
    kept = extras_of(Control(table=True), 10)
    assert (kept.down, kept.up, kept.own) == (
        {"control": 10}, {"dc": 10, "said": 3}, {"variate": 10},
    )  # fmt: skip
    assert extras_of(None, 10).up == extras_of(None, 10).down == {}
    assert extras_of(Dynamic(), 10).down == {}
    assert told({"gamma": 0.5, "life/a": 3.0}) == {"gamma": 0.5}
    with pytest.raises(TypeError, match="begin"):
        Half()  # type: ignore[abstract]
