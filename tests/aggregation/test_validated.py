"""Validated: who is asked, when a question ends, and what a liar can do with an answer."""

import math

import pytest

from atoll.aggregation.validated import (
    MOST,
    Action,
    Answered,
    Asked,
    Began,
    Came,
    Count,
    Done,
    Expired,
    Failed,
    Left,
    Passed,
    Refused,
    Send,
    Silent,
    Validators,
    Verdict,
    Wait,
    counted,
    gained,
    mean_loss,
)
from atoll.protocols import state

V = Verdict(1.0, 10, 1.0)
NOBODY = "0 validators answered, 2 are needed; 1 of the clients can be asked"


def among(*clients: str, most: int = 16) -> Validators:
    """A merge has begun, with these clients here."""
    machine = Validators(most, seconds=30.0)
    for client in clients:
        assert machine.handle(Came(client, True), 0.0) == []
    assert machine.handle(Began(), 0.0) == []
    return machine


def ask(machine: Validators, now: float = 100.0) -> list[Action]:
    return machine.handle(Asked(True), now)


def answer(machine: Validators, client: str, verdict: Verdict = V) -> list[Action]:
    return machine.handle(Answered(client, machine.question, verdict), 101.0)


def who(actions: list[Action]) -> list[str]:
    (done,) = actions
    assert isinstance(done, Done), done
    return [count.client for count in done.counts]


# ---- a question ----------------------------------------------------------------------------------


def test_all_who_can_are_asked_and_the_last_answer_ends_it() -> None:
    machine = among("c", "a", "b")
    machine.handle(Came("mute", False), 0.0)
    assert ask(machine) == [Wait(1, 130.0), Send("a", 1), Send("b", 1), Send("c", 1)]
    assert answer(machine, "c") == []
    assert answer(machine, "c") == []  # once counts
    assert answer(machine, "mute") == []
    assert answer(machine, "a") == []
    third = 1 / 3
    counts = tuple(Count(c, third, 1.0, 1.0) for c in "abc")
    assert answer(machine, "b") == [Done(1, counts)]
    assert ask(machine) == [Wait(2, 130.0), Send("a", 2), Send("b", 2), Send("c", 2)]
    assert machine.handle(Answered("a", 1, V), 0.0) == []  # to a question that is closed
    assert machine.handle(Expired(1), 130.0) == []


def test_more_than_wanted_are_drawn_from_anew_in_each_merge() -> None:
    machine = among(*"abcdefgh", most=3)
    drawn = []
    for _ in range(4):
        asked = [a.client for a in ask(machine) if isinstance(a, Send)]
        assert len(asked) == 3
        assert asked == sorted(asked)
        drawn.append(tuple(asked))
        machine.handle(Began(), 0.0)
    assert len(set(drawn)) > 1


def test_with_too_few_who_can_nothing_is_asked() -> None:
    machine = among("a")
    machine.handle(Came("mute", False), 0.0)
    assert ask(machine) == [Wait(1, 130.0), Failed(1, NOBODY)]


def test_how_many_are_needed_is_not_told_of_the_merge_before() -> None:
    machine = among(*"abcdef")
    ask(machine)
    for client in "bcdef":
        machine.handle(Left(client), 101.0)
    machine.handle(Began(), 102.0)
    assert ask(machine)[1:] == [Failed(2, NOBODY)]


def test_clients_that_may_come_back_are_waited_for() -> None:
    """A server that was killed in a merge makes it again, with nobody there yet."""
    machine = among("a")
    machine.handle(Silent("b"), 0.0)
    assert ask(machine) == [Wait(1, 130.0)]
    assert machine.handle(Came("b", True), 101.0) == [Send("a", 1), Send("b", 1)]
    assert answer(machine, "a") == []
    assert who(answer(machine, "b")) == ["a", "b"]


def test_until_they_have_left_or_the_time_is_up() -> None:
    machine = among("a")
    machine.handle(Silent("b"), 0.0)
    ask(machine)
    assert machine.handle(Left("b"), 110.0) == [Failed(1, NOBODY)]
    machine = among("a")
    machine.handle(Silent("b"), 0.0)
    ask(machine)
    (failed,) = machine.handle(Expired(1), 130.0)
    assert failed == Failed(1, "0 validators answered, 2 are needed; nobody else came within 30 s")
    assert machine.handle(Came("b", True), 131.0) == []  # nothing is open


# ---- who does not answer -------------------------------------------------------------------------


def test_who_is_late_takes_no_part_in_the_rest_of_the_merge() -> None:
    machine = among("a", "b", "c")
    ask(machine)
    answer(machine, "a")
    answer(machine, "b")
    assert who(machine.handle(Expired(1), 130.0)) == ["a", "b"]
    assert ask(machine)[1:] == [Send("a", 2), Send("b", 2)]
    machine.handle(Began(), 0.0)
    assert ask(machine)[1:] == [Send("a", 3), Send("b", 3), Send("c", 3)]


def test_below_the_quorum_the_time_that_is_up_ends_the_merges_learning() -> None:
    machine = among("a", "b", "c", "d", "e")
    ask(machine)
    answer(machine, "a")
    answer(machine, "b")
    (failed,) = machine.handle(Expired(1), 130.0)
    assert failed == Failed(
        1, "2 validators answered, 3 are needed; c, d, e: no answer within 30 s"
    )


def test_a_killed_one_is_not_waited_for_when_there_are_enough() -> None:
    """Its stream breaks at once, its lease lasts for long."""
    machine = among("a", "b", "c")
    ask(machine)
    assert machine.handle(Silent("c"), 101.0) == []
    assert answer(machine, "a") == []
    assert who(answer(machine, "b")) == ["a", "b"]
    machine = among("a", "b", "c")
    ask(machine)
    answer(machine, "a")
    answer(machine, "b")
    assert who(machine.handle(Silent("c"), 101.0)) == ["a", "b"]
    ask(machine)
    (failed,) = machine.handle(Passed("a"), 102.0)
    told = "a: no finite loss of the model; c: its connection broke"
    assert failed == Failed(2, f"0 validators answered, 2 are needed; {told}")


def test_one_that_is_back_is_asked_again() -> None:
    machine = among("a", "b")
    ask(machine)
    machine.handle(Silent("a"), 101.0)
    assert answer(machine, "b") == []  # two are needed
    assert machine.handle(Came("a", True), 102.0) == [Send("a", 1)]
    machine.handle(Silent("a"), 103.0)
    told = "1 validator answered, 2 are needed; a: declines"
    assert machine.handle(Came("a", False), 104.0) == [Failed(1, told)]  # not willing any more


def test_a_silent_one_of_the_panel_is_not_asked_before_it_is_back() -> None:
    machine = among("a", "b", "c")
    ask(machine)
    for client in "abc":
        answer(machine, client)
    machine.handle(Silent("b"), 101.0)
    assert ask(machine)[1:] == [Send("a", 2), Send("c", 2)]
    assert machine.handle(Came("b", True), 102.0) == [Send("b", 2)]


def test_who_leaves_or_is_refused_makes_the_answers_fewer() -> None:
    machine = among("a", "b", "c", "d")
    ask(machine)
    answer(machine, "a")
    assert machine.handle(Refused("b", "NaN"), 101.0) == []
    assert machine.handle(Left("c"), 101.0) == []
    assert who(answer(machine, "d")) == ["a", "d"]
    machine.handle(Began(), 0.0)
    assert ask(machine)[1:] == [Send("a", 2), Send("d", 2)]  # b is not asked until it comes anew
    machine.handle(Answered("a", 2, V), 0.0)
    assert machine.handle(Left("d"), 0.0) == [
        Failed(2, "1 validator answered, 2 are needed; b: NaN; d: left")
    ]
    machine.handle(Came("b", True), 0.0)
    machine.handle(Began(), 0.0)
    assert ask(machine)[1:] == [Send("a", 3), Send("b", 3)]
    machine.handle(Refused("b", "NaN"), 0.0)
    machine.handle(Left("b"), 0.0)
    assert not machine.refused  # of clients that are gone nothing stays


def test_who_has_no_number_to_say_is_asked_again_in_the_next_merge() -> None:
    machine = among("a", "b", "c")
    ask(machine)
    answer(machine, "a")
    assert machine.handle(Passed("b"), 101.0) == []
    assert who(answer(machine, "c")) == ["a", "c"]
    assert ask(machine)[1:] == [Send("a", 2), Send("c", 2)]
    machine.handle(Began(), 0.0)
    assert ask(machine)[1:] == [Send("a", 3), Send("b", 3), Send("c", 3)]


def test_why_a_merge_goes_unjudged_names_all_who_do_not_judge_it() -> None:
    """Who had no number to say, left or was late was only missing in the count."""
    machine = among(*"abcdefgh")
    ask(machine)
    machine.handle(Refused("a", "FL-D105: 3 examples"), 101.0)
    machine.handle(Left("b"), 101.0)
    for client in "cd":
        machine.handle(Passed(client), 101.0)
    machine.handle(Silent("e"), 101.0)
    for client in "fgh":
        answer(machine, client)
    (failed,) = machine.handle(Expired(1), 130.0)
    assert failed == Failed(
        1,
        "3 validators answered, 4 are needed; a: FL-D105: 3 examples; b: left; "
        "c, d: no finite loss of the model; e: no answer within 30 s",
    )
    machine.handle(Began(), 0.0)
    ask(machine)
    for client in "cd":
        answer(machine, client)
    assert machine.handle(Left("f"), 101.0) == machine.handle(Left("g"), 101.0) == []
    (failed,) = machine.handle(Left("h"), 101.0)
    told = "2 validators answered, 3 are needed; a: FL-D105: 3 examples; f, g, h: left"
    assert failed == Failed(2, told)


def test_of_many_only_some_are_named() -> None:
    machine = among(*"abcdefgh")
    ask(machine)
    for client in "hgfed":
        said = machine.handle(Passed(client), 101.0)
    told = "0 validators answered, 4 are needed; d, e, f and 2 more: no finite loss of the model"
    assert said == [Failed(1, told)]


def test_its_state_is_plain_data() -> None:
    machine = among("a", "b")
    ask(machine)
    assert state.load(Validators, state.dump(machine)) == machine


# ---- how much an answer counts -------------------------------------------------------------------


def test_answers_count_by_their_examples() -> None:
    counts = counted({"b": Verdict(2.0, 20, 1.0), "a": Verdict(1.0, 10, 2.0)})
    told = [(c.client, c.weight, c.scale) for c in counts]
    assert told == [("a", 1 / 3, 0.5), ("b", 2 / 3, 1.0)]  # of two the shorter is the middle one
    assert mean_loss(counts) == pytest.approx(5 / 3)


def test_a_liar_gets_the_middle_ones_length_and_three_times_its_weight() -> None:
    honest = {f"h{i}": Verdict(1.0, 10, 2.0) for i in range(4)}
    counts = counted({**honest, "liar": Verdict(1e300, 1 << 53, 1e20)})
    liar = counts[-1]
    assert liar.weight == pytest.approx(MOST / (4 + MOST))
    assert liar.scale * 1e20 == pytest.approx(2.0)
    assert [c.scale for c in counts[:-1]] == [1.0] * 4
    assert mean_loss(counts) == pytest.approx((4 + MOST * MOST) / (4 + MOST))


def test_where_the_middle_one_has_no_slope_nobody_has() -> None:
    counts = counted({"a": Verdict(0.0, 10, 0.0), "b": Verdict(0.0, 10, 5.0)})
    assert [c.scale for c in counts] == [1.0, 0.0]


def test_the_loss_is_compared_validator_by_validator() -> None:
    """One that left in the middle, whose data were hard, made no progress."""
    before = counted(
        {"a": Verdict(1.0, 10, 0), "b": Verdict(1.2, 10, 0), "gone": Verdict(9, 10, 0)}
    )
    after = counted({"a": Verdict(0.9, 10, 0), "b": Verdict(1.3, 10, 0)})
    assert gained(before, after) == pytest.approx(0.0)
    assert gained((), after) == -math.inf
    liar = counted({**{c: Verdict(0.9, 10, 0) for c in "abcd"}, "e": Verdict(1e9, 10, 0)})
    was = counted({c: Verdict(1.0, 10, 0) for c in "abcde"})
    assert gained(was, liar) == pytest.approx((4 * 0.1 - 0.1) / 5)
