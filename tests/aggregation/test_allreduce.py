"""AllReduce, one peer's side: what it fetches, reduces, says, and when it gives up."""

import hashlib
import math

import pytest

from atoll.aggregation.allreduce import (
    AllReduce,
    Arrived,
    Beat,
    Combine,
    Combined,
    Done,
    Fail,
    Go,
    Gone,
    Missed,
    Part,
    PartReady,
    Plan,
    Pull,
    Tell,
)

PLAN = Plan(("a", "b", "c"), (1.0, 3.0, 0.0), (Part("a", 0, 4), Part("b", 4, 6)))
ORDER = (("a", 1.0), ("b", 3.0))


@pytest.fixture
def a() -> AllReduce:
    machine = AllReduce("a", PLAN, deadline=10.0)
    assert machine.handle(Go(), 0.0) == [Pull("b", "input", 0)]
    return machine


def test_a_reducer_fetches_sums_in_order_and_tells_all(a: AllReduce) -> None:
    assert a.handle(Arrived("b", "input", 0), 1.0) == [Combine(0, ORDER)]
    ready = PartReady("a", 0, "x")
    assert a.handle(Combined(0, "x"), 1.1) == [Tell("b", ready), Tell("c", ready)]
    assert a.handle(PartReady("b", 1, "y"), 1.2) == [Pull("b", "result", 1)]
    digest = hashlib.sha256(b"x y").hexdigest()
    assert a.handle(Arrived("b", "result", 1, "y"), 1.3) == [Done(digest)]
    assert a.over
    assert a.handle(Beat(), 99.0) == []


def test_one_of_weight_0_reduces_nothing_and_has_the_same_digest() -> None:
    c = AllReduce("c", PLAN, deadline=10.0)
    assert c.handle(Go(), 0.0) == []
    assert c.waits_for() == ["a", "b"]
    assert c.handle(Beat(), 0.5) == [Pull("a", "result", 0), Pull("b", "result", 1)]
    assert c.handle(Arrived("b", "result", 1, "y"), 1.0) == []
    done = c.handle(Arrived("a", "result", 0, "x"), 1.0)
    assert done == [Done(hashlib.sha256(b"x y").hexdigest())]


def test_a_reducer_that_is_the_only_contributor_begins_at_once() -> None:
    plan = Plan(("a", "b"), (2.0, 0.0), (Part("a", 0, 4),))
    a = AllReduce("a", plan, deadline=10.0)
    assert a.handle(Go(), 0.0) == [Combine(0, (("a", 2.0),))]
    assert a.handle(Combined(0, "x"), 0.1)[-1] == Done(hashlib.sha256(b"x").hexdigest())


def test_a_fetch_that_missed_is_tried_again_at_the_beat_and_one_under_way_is_not(
    a: AllReduce,
) -> None:
    assert a.handle(Beat(), 0.5) == [Pull("b", "result", 1)]  # the input is under way
    assert a.handle(Missed("b", "input", 0), 0.6) == []
    assert a.handle(Beat(), 1.0) == [Pull("b", "input", 0)]


def test_what_arrives_twice_or_was_never_asked_for_changes_nothing(a: AllReduce) -> None:
    assert a.handle(Arrived("z", "input", 0), 1.0) == []
    assert a.handle(Arrived("b", "input", 7), 1.0) == []
    assert a.handle(Arrived("b", "input", 0), 1.0) == [Combine(0, ORDER)]
    assert a.handle(Arrived("b", "input", 0), 1.0) == []
    assert a.handle(PartReady("b", 9, "x"), 1.0) == []
    assert a.handle(PartReady("c", 1, "x"), 1.0) == []  # it does not reduce that part
    a.handle(Combined(0, "x"), 1.0)
    assert a.handle(PartReady("a", 0, "x"), 1.1) == []  # it is here


def test_an_input_that_is_not_finite_ends_the_attempt_and_names_its_peer(a: AllReduce) -> None:
    a.handle(Arrived("b", "input", 0), 1.0)
    assert a.handle(Combined(0, "", ("b",)), 1.1) == [Fail("not finite: b", spoiled=("b",))]


def test_a_lost_peer_ends_the_attempt_if_it_is_waited_for(a: AllReduce) -> None:
    assert a.handle(Gone("c"), 1.0) == []
    assert a.handle(Gone("b"), 1.0) == [Fail("b is lost", missing=("b",))]


def test_a_deadline_names_who_was_waited_for(a: AllReduce) -> None:
    assert a.handle(Beat(), 10.0) == [Fail("still without b", missing=("b",))]


def test_a_result_that_differs_from_what_was_said_ends_the_attempt(a: AllReduce) -> None:
    a.handle(PartReady("b", 1, "y"), 1.0)
    reason = "part 1 has another digest than b said"
    assert a.handle(Arrived("b", "result", 1, "z"), 1.1) == [Fail(reason, missing=("b",))]


def test_a_plan_of_one_needs_nobody() -> None:
    plan = Plan(("a",), (2.0,), (Part("a", 0, 4),))
    a = AllReduce("a", plan, deadline=10.0)
    assert a.handle(Go(), 0.0) == [Combine(0, (("a", 2.0),))]
    assert a.waits_for() == []


LENGTHS = Plan(PLAN.group, PLAN.weights, PLAN.parts, (3.0, 5.0, 99.0))


def test_how_long_a_mean_may_be_goes_by_the_median_of_those_who_weigh_something() -> None:
    assert LENGTHS.longest(10.0) == pytest.approx(40.0 * math.sqrt(2 / 2 + 1))
    assert PLAN.longest(10.0) == math.inf  # nobody said anything
    assert Plan(PLAN.group, PLAN.weights, PLAN.parts, (0.0,) * 3).longest(10.0) == math.inf


def test_a_mean_that_is_longer_than_any_can_be_is_not_believed_and_its_reducer_is_named() -> None:
    c = AllReduce("c", LENGTHS, 10.0, longest=4.0)
    assert c.handle(Arrived("a", "result", 0, "x", 3.0), 1.0) == []
    failed = c.handle(Arrived("b", "result", 1, "y", 3.5), 1.0)
    assert failed == [Fail("b gives a mean of length 4.61, at most 4", missing=("b",))]
    c = AllReduce("c", LENGTHS, 10.0, longest=4.0)
    c.handle(Arrived("a", "result", 0, "x", 2.4), 1.0)
    assert isinstance(c.handle(Arrived("b", "result", 1, "y", 3.2), 1.0)[0], Done)  # 4
