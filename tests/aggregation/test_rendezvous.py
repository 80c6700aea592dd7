"""Rendezvous, one peer's side: who proposes when, what is refused, and what is never done twice."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from atoll.aggregation.allreduce import Part, Plan
from atoll.aggregation.circle import LEAP
from atoll.aggregation.rendezvous import Rendezvous
from atoll.aggregation.rendezvous_events import (
    Abort,
    Admitted,
    Apply,
    BeatDue,
    Bound,
    Digested,
    Download,
    Downloaded,
    Drop,
    Get,
    Heard,
    Leaving,
    Load,
    Lost,
    MeanFailed,
    MeanMade,
    NotDownloaded,
    PeerAction,
    PeerEvent,
    Reduce,
    Removed,
    Say,
    Started,
    StepsDone,
    TrainOn,
    Wake,
)
from atoll.aggregation.rendezvous_messages import (
    Accept,
    Accepted,
    Announce,
    Ballot,
    Begin,
    Commit,
    Failed,
    Goodbye,
    Message,
    Prepare,
    Promise,
    Reduced,
    Refuse,
    Stand,
    Value,
)
from atoll.aggregation.seals import Named, left, made
from atoll.protocols import state

S = Stand(0, "s", 0.0)
PLAN = Plan(("a", "b", "c"), (1.0, 1.0, 1.0), (Part("a", 0, 4), Part("b", 4, 7), Part("c", 7, 10)))
ONE = (1, "a")


def sealed(value: Value, base: Stand = S, by: Iterable[str] = "abc") -> Value:
    """As `by` say that they have made it."""
    text = made(base.next(value))
    return replace(value, seals=tuple((p, Named(p).seal(text)) for p in by if p in value.group))


def reduced(peer: str, digest: str, ballot: Ballot = ONE, plan: Plan = PLAN) -> Reduced:
    value = Value(ballot, plan.group, plan.weights, digest)
    return Reduced("s", ballot, digest, Named(peer).seal(made(S.next(value))))


def goodbye(peer: str, stand: Stand = S, accepted: tuple[Ballot, Value] | None = None) -> Goodbye:
    return Goodbye(stand, accepted, Named(peer).seal(left(stand)))


VALUE = sealed(Value(ONE, PLAN.group, PLAN.weights, "d"))


def up(me: str, members: str = "abc", others: str = "abcq") -> Rendezvous:
    """A peer that has started at 0 and heard of all others, which are at the same model."""
    first = me in members
    machine = Rendezvous(me, 10, tuple(members) if first else (), S if first else Stand())
    for peer in others:
        machine.handle(Admitted(peer, 1.0, 100.0), 0.0)
    machine.handle(Started(), 0.0)
    for peer in members.replace(me, ""):
        machine.handle(Heard(peer, Announce(S, False, None)), 0.1) if first else None
    return machine


def hear(machine: Rendezvous, peer: str, message: Message, now: float = 1.0) -> list[PeerAction]:
    """What it does but for its announcements."""
    return quiet(machine.handle(Heard(peer, message), now))


def quiet(actions: list[PeerAction]) -> list[PeerAction]:
    return [a for a in actions if not (isinstance(a, Say) and isinstance(a.message, Announce))]


def to(message: Message, peers: str) -> list[PeerAction]:
    return [Say(peer, message) for peer in peers]


def ready(machine: Rendezvous, peers: str, now: float = 1.0) -> list[PeerAction]:
    actions: list[PeerAction] = []
    for peer in peers:
        event: PeerEvent = Heard(peer, Announce(S, True, None))
        actions += machine.handle(StepsDone("s") if peer == machine.me else event, now)
    return quiet(actions)


def reducing(machine: Rendezvous, ballot: Ballot = ONE) -> Rendezvous:
    """The proposer `a`, when its group has begun."""
    for peer in "bc":
        hear(machine, peer, Promise("s", ballot, True, None))
    assert machine.lead is not None
    assert machine.lead.phase == "reduce"
    return machine


@pytest.fixture
def a() -> Rendezvous:
    """It has proposed."""
    machine = up("a")
    assert ready(machine, "abc") == to(Prepare("s", ONE), "bc")
    return machine


@pytest.fixture
def b() -> Rendezvous:
    return up("b")


def test_whom_it_waits_for_is_known_where_too_few_are_near(b: Rendezvous) -> None:
    assert b.missing(1.0) == []
    b.handle(Heard("c", Announce(S, True, None)), 9.0)
    assert b.missing(9.0) == []  # two of three
    assert b.missing(19.0) == ["a", "c"]
    assert up("q").missing(1.0) == []  # it has no model, and knows of no members yet


# ---- a round -------------------------------------------------------------------------------


def test_the_first_proposes_when_all_are_ready_and_commits_what_a_quorum_holds(
    a: Rendezvous,
) -> None:
    assert hear(a, "b", Promise("s", ONE, True, None)) == []
    begin = hear(a, "c", Promise("s", ONE, True, None))
    plan = Plan(PLAN.group, PLAN.weights, (Part("a", 0, 4), Part("b", 4, 7), Part("c", 7, 10)))
    assert begin == [Reduce("s", ONE, plan, 11.0), *to(Begin("s", ONE, plan), "bc")]
    assert quiet(a.handle(MeanMade("s", "d", ONE), 2.0)) == []
    hear(a, "b", reduced("b", "d"))
    accept = Accept("s", ONE, VALUE, ("a", "b", "c"))
    assert hear(a, "c", reduced("c", "d")) == to(accept, "bc")
    done = hear(a, "b", Accepted("s", ONE))
    after = S.next(VALUE)
    assert done == [*to(Commit("s", VALUE), "bcq"), Apply(VALUE, used=True), TrainOn(after)]
    assert a.stand == after == Stand(1, after.chain, 3.0)
    assert a.members == ("a", "b", "c")


def test_a_long_share_is_reduced_piece_by_piece() -> None:
    machine = up("a", "ab", "ab")
    machine.size = 6 << 20
    ready(machine, "ab")
    begin = hear(machine, "b", Promise("s", ONE, True, None))
    assert isinstance(begin[0], Reduce)
    ends = [(part.reducer, part.stop >> 20) for part in begin[0].plan.parts]
    assert ends == [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("b", 5), ("b", 6)]


def test_nobody_else_proposes_while_the_first_is_near(b: Rendezvous) -> None:
    assert ready(b, "abc") == []
    later = [b.handle(BeatDue(), 0.5 * i) for i in range(2, 8)]  # a is silent since 1.0
    assert quiet(later[-2]) == [Wake(3.5)]
    assert later[-1][0] == Wake(4.0)
    # a was heard at 1.0 and is lost at 3.5; c was heard then, too, so b has no quorum any more.
    assert quiet(later[-1]) == [Wake(4.0)]
    proposed = hear(b, "c", Announce(S, True, None), 3.6)
    assert proposed == to(Prepare("s", (1, "b")), "c")


def test_the_slow_are_waited_for_until_patience_is_over() -> None:
    machine = up("a")
    assert ready(machine, "ab") == []
    for now in (2.0, 4.0, 5.9):
        hear(machine, "b", Announce(S, True, None), now)
        assert hear(machine, "c", Announce(S, False, None), now) == []
    assert quiet(machine.handle(BeatDue(), 6.0)) == [Wake(6.5), *to(Prepare("s", ONE), "bc")]
    for peer in "bc":
        begin = hear(machine, peer, Promise("s", ONE, peer == "b", None), 6.1)
    assert isinstance(begin[0], Reduce)
    assert begin[0].plan.weights == (1.0, 1.0, 0.0)


# ---- what is refused -----------------------------------------------------------------------


def test_what_a_stranger_says_is_ignored(b: Rendezvous) -> None:
    assert b.handle(Heard("z", Prepare("s", ONE)), 1.0) == []
    b.handle(Removed("c"), 1.0)
    assert b.handle(Heard("c", Prepare("s", ONE)), 1.0) == []
    assert not b.left


def test_one_that_the_roster_removes_ends(b: Rendezvous) -> None:
    b.handle(Removed("b"), 1.0)
    assert b.handle(BeatDue(), 1.0) == []


def test_a_proposal_about_another_model_is_answered_with_where_this_one_stands(
    b: Rendezvous,
) -> None:
    here = Announce(S, False, None)
    assert b.handle(Heard("a", Prepare("old", ONE)), 1.0) == [Say("a", here)]
    assert b.handle(Heard("a", Reduced("old", ONE, "d", "")), 1.0) == []


def test_a_lower_ballot_is_refused_in_every_phase(b: Rendezvous) -> None:
    promise = Promise("s", (2, "c"), False, None)
    assert hear(b, "c", Prepare("s", (2, "c"))) == [Say("c", promise)]
    refuse = [Say("a", Refuse("s", (2, "c")))]
    assert hear(b, "a", Prepare("s", ONE)) == refuse
    assert hear(b, "a", Begin("s", ONE, PLAN)) == refuse
    assert hear(b, "a", Accept("s", ONE, VALUE, ("a",))) == refuse


def test_a_vote_is_told_to_whoever_proposes_next(b: Rendezvous) -> None:
    hear(b, "a", Begin("s", ONE, PLAN))
    b.handle(MeanMade("s", "d", ONE), 1.0)
    assert hear(b, "a", Accept("s", ONE, VALUE, ("a",))) == [Say("a", Accepted("s", ONE))]
    promise = Promise("s", (2, "c"), False, (ONE, VALUE))
    assert hear(b, "c", Prepare("s", (2, "c"))) == [Say("c", promise)]


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (Plan(("a", "c"), (1.0, 1.0), PLAN.parts), "b is not in the group"),
        (Plan(PLAN.group, (1.0, 1.0), PLAN.parts), "b is not in the group"),
        (
            Plan(("b", "b"), (1.0, 1.0), PLAN.parts),
            "the group is not in order, or has no work",
        ),
        (
            Plan(PLAN.group, (0.0, 0.0, 0.0), PLAN.parts),
            "the group is not in order, or has no work",
        ),
        (Plan(PLAN.group, PLAN.weights, (Part("a", 0, 9),)), "the parts are not the whole"),
        (Plan(PLAN.group, PLAN.weights, (Part("z", 0, 10),)), "a part has no reducer in the group"),
        (Plan(("b", "z"), (1.0, 1.0), (Part("b", 0, 10),)), "z is not in the roster"),
        (
            Plan(("a", "b", "c", "q"), (1.0,) * 4, (Part("a", 0, 10),)),
            "a would reduce more than its bound",
        ),
        (
            Plan(PLAN.group, (1.0, 1.0, 1e9), PLAN.parts),
            "the weight of c is not the roster's",
        ),
        (
            Plan(PLAN.group, PLAN.weights, PLAN.parts, (1.0, 1.0)),
            "the lengths are not those of the group",
        ),
        (
            Plan(PLAN.group, PLAN.weights, PLAN.parts, (9.0, 9.0, 9.0)),
            "the length of b is not what it said",
        ),
    ],
)
def test_a_plan_that_is_wrong_is_not_carried_out(b: Rendezvous, plan: Plan, reason: str) -> None:
    failed = Failed("s", ONE, reason, (), ())
    assert hear(b, "a", Begin("s", ONE, plan)) == [Say("a", failed)]


def test_a_plan_has_the_lengths_that_were_said(b: Rendezvous, a: Rendezvous) -> None:
    b.handle(StepsDone("s", 2.5), 1.0)
    promise = Promise("s", ONE, True, None, 2.5)
    assert hear(b, "a", Prepare("s", ONE)) == [Say("a", promise)]
    hear(a, "b", promise)
    begin = hear(a, "c", Promise("s", ONE, True, None, 4.0))[-1]
    assert isinstance(begin, Say)
    assert isinstance(begin.message, Begin)
    assert begin.message.plan.lengths == (0.0, 2.5, 4.0)
    assert isinstance(hear(b, "a", begin.message)[0], Reduce)


def test_a_plan_that_is_wrong_binds_nobody(b: Rendezvous) -> None:
    """Else one who proposes nonsense again and again keeps the honest from proposing."""
    wrong = Plan(PLAN.group, (1.0, 1.0, 1e9), PLAN.parts)
    hear(b, "c", Begin("s", (7, "c"), wrong))
    assert b.promised == (0, "")
    assert hear(b, "a", Begin("s", ONE, PLAN)) == [Reduce("s", ONE, PLAN, 11.0)]


@pytest.mark.parametrize(
    ("peer", "ballot"),
    [
        pytest.param("q", (1, "q"), id="no member"),
        pytest.param("c", ONE, id="in another's name"),
        pytest.param("c", (LEAP + 1, "c"), id="counts would run out"),
    ],
)
def test_who_may_not_propose_is_not_heard(b: Rendezvous, peer: str, ballot: Ballot) -> None:
    for said in (
        Prepare("s", ballot),
        Begin("s", ballot, PLAN),
        Accept("s", ballot, VALUE, ("a",)),
    ):
        assert hear(b, peer, said) == []
    hear(b, "c", Refuse("s", (LEAP + 1, "c")))
    assert b.promised == (0, "")
    assert hear(b, "c", Prepare("s", (LEAP, "c"))) != []  # it may


def test_a_weight_above_a_whole_share_is_no_decision(b: Rendezvous) -> None:
    b.most = 1.0
    heavy = sealed(Value(ONE, PLAN.group, (1.0, 1.0, 1e9), "d"))
    assert hear(b, "c", Commit("s", heavy)) == []
    assert hear(b, "a", Accept("s", ONE, heavy, ("a",))) == []
    assert hear(b, "c", Announce(S.next(heavy), False, Commit("s", heavy))) == []
    assert b.stand == S
    assert b.owed is None
    assert hear(b, "c", Commit("s", VALUE)) == [Get("s", "d", ("c", "a"))]


def test_a_vote_that_nobody_can_have_given_is_not_proposed_again(a: Rendezvous) -> None:
    a.most = 1.0
    heavy = sealed(Value(ONE, PLAN.group, (1.0, 1.0, 1e9), "d"))
    hear(a, "b", Promise("s", ONE, True, ((1, "b"), heavy)))
    begin = hear(a, "c", Promise("s", ONE, True, None))
    assert isinstance(begin[0], Reduce)


def test_a_plan_under_way_is_not_judged_by_a_newer_roster(b: Rendezvous) -> None:
    assert hear(b, "a", Begin("s", ONE, PLAN)) == [Reduce("s", ONE, PLAN, 11.0)]
    b.handle(Admitted("c", 0.5, 100.0), 1.0)
    assert hear(b, "a", Begin("s", ONE, PLAN)) == []
    assert b.reducing == ONE


def test_a_first_model_has_no_weight_behind_it(b: Rendezvous) -> None:
    for now in (1.0, 2.0):
        assert hear(b, "c", Announce(Stand(0, "z", 1e18), False, None, "x"), now) == []
    assert b.roster["c"].stand == S


def test_a_plan_is_carried_out_once_and_its_mean_reported_again(b: Rendezvous) -> None:
    assert hear(b, "a", Begin("s", ONE, PLAN)) == [Reduce("s", ONE, PLAN, 11.0)]
    assert hear(b, "a", Begin("s", ONE, PLAN)) == []
    told = [Say("a", reduced("b", "d"))]
    assert b.handle(MeanMade("s", "d", ONE), 2.0) == told
    assert hear(b, "a", Begin("s", ONE, PLAN)) == told


def test_news_of_an_attempt_that_was_dropped_changes_nothing(b: Rendezvous) -> None:
    hear(b, "a", Begin("s", ONE, PLAN))
    dropped = hear(b, "a", Prepare("s", (2, "a")))
    assert dropped[0] == Drop("s", ONE)
    assert b.handle(MeanMade("s", "d", ONE), 2.0) == []
    assert b.handle(MeanFailed("s", "late", ONE), 2.0) == []
    assert b.handle(MeanMade("old", "d"), 2.0) == []
    assert b.handle(MeanFailed("old", "late"), 2.0) == []
    assert not b.held


def test_a_proposer_that_is_refused_gives_way(a: Rendezvous) -> None:
    hear(a, "b", Refuse("s", (5, "c")))
    assert a.lead is None
    assert hear(a, "b", Promise("s", ONE, True, None)) == []
    assert quiet(a.handle(BeatDue(), 2.4)) == [Wake(2.9)]
    hear(a, "b", Announce(S, True, None), 2.5)
    again = hear(a, "c", Announce(S, True, None), 2.5)
    assert again == []  # c's own proposal has time to end
    hear(a, "b", Refuse("s", (3, "c")), 2.6)  # an old one
    assert a.promised == (5, "c")


# ---- faults ----------------------------------------------------------------------------------


def test_a_death_in_the_reduce_begins_another_attempt_with_the_survivors(a: Rendezvous) -> None:
    reducing(a)
    hear(a, "b", Announce(S, True, None), 3.0)
    again = quiet(a.handle(BeatDue(), 3.6))  # c was heard of at 1.0
    assert again[-1] == Say("b", Prepare("s", (2, "a")))
    assert Drop("s", ONE) in again


def test_a_peer_at_whose_address_nobody_answers_is_not_waited_for(a: Rendezvous) -> None:
    reducing(a)
    again = quiet(a.handle(Lost("c"), 1.1))
    assert again[-1] == Say("b", Prepare("s", (2, "a")))
    assert a.handle(Lost("z"), 1.2) == []  # a stranger
    hear(a, "c", Announce(S, True, None), 1.3)  # but there it is
    hear(a, "b", Promise("s", (2, "a"), True, None), 1.3)
    begin = hear(a, "c", Promise("s", (2, "a"), True, None), 1.3)
    assert isinstance(begin[0], Reduce)
    assert begin[0].plan.group == ("a", "b", "c")


def test_work_that_is_not_finite_weighs_nothing_in_the_next_attempt(a: Rendezvous) -> None:
    reducing(a)
    again = hear(a, "b", Failed("s", ONE, "not finite: c", (), ("c",)))
    assert again[-2:] == to(Prepare("s", (2, "a")), "bc")
    hear(a, "b", Promise("s", (2, "a"), True, None))
    begin = hear(a, "c", Promise("s", (2, "a"), True, None))
    assert isinstance(begin[0], Reduce)
    assert begin[0].plan.weights == (1.0, 1.0, 0.0)


def test_one_that_says_so_of_all_others_weighs_nothing_itself(a: Rendezvous) -> None:
    """Its own work alone was the mean: of 653 in storms with such a liar, 233."""
    reducing(a)
    weights = []
    for count, blamed in ((1, ("b", "nobody")), (2, ("a",))):
        hear(a, "c", Failed("s", (count, "a"), "not finite", (), blamed))
        for peer in "bc":
            begin = hear(a, peer, Promise("s", (count + 1, "a"), True, None))
        assert isinstance(begin[0], Reduce)
        weights.append(begin[0].plan.weights)
    assert weights == [(1.0, 0.0, 1.0), (1.0, 1.0, 0.0)]  # first it is one word against one


def test_where_nobodys_work_is_finite_it_is_done_again(a: Rendezvous) -> None:
    reducing(a)
    hear(a, "b", Failed("s", ONE, "not finite", (), ("a", "b", "c")))
    for peer in "bc":
        hear(a, peer, Promise("s", (2, "a"), True, None))
    hear(a, "c", Failed("s", (2, "a"), "not finite", (), ("a", "c")))
    for peer in "bc":
        begin = hear(a, peer, Promise("s", (3, "a"), True, None))
    assert isinstance(begin[0], Reduce)
    assert begin[0].plan.weights == (1.0, 0.0, 0.0)
    again = a.handle(MeanFailed("s", "not finite", (3, "a"), (), ("a",)), 1.0)
    assert Abort("nobody's work is finite") in again
    assert TrainOn(S) in again
    assert not a.ready
    assert a.stand == S
    assert not a.blamed


def test_two_that_cannot_reach_each_other_are_not_in_one_group(a: Rendezvous) -> None:
    reducing(a)
    hear(a, "b", Failed("s", ONE, "still without c", ("c",), ()))
    for peer in "bc":
        begin = hear(a, peer, Promise("s", (2, "a"), True, None))
    assert isinstance(begin[0], Reduce)
    assert begin[0].plan.group == ("a", "b")


def test_a_proposer_that_the_others_miss_leaves_itself_out(a: Rendezvous) -> None:
    """It left out whoever missed it, one by one, and its own work alone was the mean."""
    reducing(a)
    hear(a, "b", Failed("s", ONE, "still without a", ("a",), ()))
    for peer in "bc":
        begun = hear(a, peer, Promise("s", (2, "a"), True, None))
    assert isinstance(begun[0], Reduce)
    assert begun[0].plan.group == ("a", "c")  # of two alone it is not known whose fault it is
    hear(a, "c", Failed("s", (2, "a"), "still without a", ("a",), ()))
    for peer in "bc":
        begun = hear(a, peer, Promise("s", (3, "a"), True, None))
    plan = a.lead.plan if a.lead else None
    assert plan is not None
    assert plan.group == ("b", "c")
    assert begun == to(Begin("s", (3, "a"), plan), "bc")
    hear(a, "b", reduced("b", "d", (3, "a"), plan))
    voting = hear(a, "c", reduced("c", "d", (3, "a"), plan))
    value = sealed(Value((3, "a"), ("b", "c"), (1.0, 1.0), "d"))
    assert voting == [
        Get("s", "d", ("b", "c")),
        *to(Accept("s", (3, "a"), value, ("b", "c")), "bc"),
    ]
    assert hear(a, "b", Accepted("s", (3, "a"))) == []
    assert hear(a, "c", Accepted("s", (3, "a"))) == to(Commit("s", value), "bcq")
    assert quiet(a.handle(MeanMade("s", "d"), 1.1)) == [
        Apply(value, used=False),
        TrainOn(S.next(value)),
    ]


def test_after_some_attempts_the_round_is_put_off_with_the_model_as_it_was(a: Rendezvous) -> None:
    for count in range(1, 5):
        reducing(a, (count, "a"))
        said = hear(a, "b", Failed("s", (count, "a"), "its disk is full", (), ()))
    assert Abort("b: its disk is full") in said
    assert (a.stand, a.lead, a.ready) == (S, None, True)
    for now in (3.0, 5.0):  # and tried again when its patience is over
        assert ready(a, "bc", now) == []
    again = ready(a, "bc", 6.0)
    assert again == [Drop("s", (4, "a")), *to(Prepare("s", (5, "a")), "bc")]


def test_digests_that_differ_are_no_mean(a: Rendezvous) -> None:
    a.patience.attempts = 1
    reducing(a)
    a.handle(MeanMade("s", "x", ONE), 1.0)
    hear(a, "b", reduced("b", "y"))
    assert hear(a, "c", reduced("c", "z")) == [Abort("the digests differ")]


def test_an_attempt_of_which_nothing_is_heard_ends(a: Rendezvous) -> None:
    a.patience.attempts = 1
    reducing(a)
    for now in (3.0, 5.0, 7.0, 9.0, 11.0, 12.4):
        for peer in "bc":
            hear(a, peer, Announce(S, True, None), now)
    assert Abort("it took too long") in a.handle(BeatDue(), 12.5)


def test_a_vote_that_does_not_come_ends_the_proposal_and_the_next_keeps_its_value(
    a: Rendezvous,
) -> None:
    reducing(a)
    a.handle(MeanMade("s", "d", ONE), 1.0)
    for peer in "bc":
        hear(a, peer, reduced(peer, "d"))
    assert a.accepted == (ONE, VALUE)
    accept = Accept("s", ONE, VALUE, ("a", "b", "c"))
    assert quiet(a.handle(BeatDue(), 1.5)) == [Wake(2.0), *to(accept, "bc")]
    for now in (3.0, 5.0, 6.0, 7.4):
        assert ready(a, "bc", now) == []
    assert ready(a, "bc", 7.5) == to(Prepare("s", (2, "a")), "bc")
    for peer in "bc":
        said = hear(a, peer, Promise("s", (2, "a"), True, None), 7.7)
    assert said == to(Accept("s", (2, "a"), VALUE, ("a", "b", "c")), "bc")


def test_no_quorum_no_proposal(a: Rendezvous) -> None:
    """Promises that do not come end it; a beat says it again before."""
    assert quiet(a.handle(BeatDue(), 1.5)) == [Wake(2.0), *to(Prepare("s", ONE), "bc")]
    a.handle(BeatDue(), 2.6)
    assert a.lead is None


def test_a_group_that_nobody_can_connect_to_does_not_begin(a: Rendezvous) -> None:
    for peer in "abc":
        a.handle(Admitted(peer, 1.0, 0.0), 1.0)
    for peer in "bc":
        hear(a, peer, Promise("s", ONE, True, None))
    assert a.lead is None


# ---- leaving, and being left behind ----------------------------------------------------------


def test_one_that_leaves_says_what_it_voted_for_and_no_more(b: Rendezvous) -> None:
    hear(b, "a", Begin("s", ONE, PLAN))
    said = b.handle(Leaving(), 1.0)
    assert said == [*to(goodbye("b"), "acq"), Drop("s", ONE)]
    assert b.handle(Heard("a", Prepare("s", (2, "a"))), 1.0) == []


def test_a_goodbye_is_kept_before_it_is_said(b: Rendezvous) -> None:
    """Killed between the two and started again it was itself: of two, each alone a quorum."""
    assert not b.bound().parted
    b.handle(Leaving(), 1.0)
    assert b.bound().parted
    with pytest.raises(AssertionError):
        Rendezvous.again("b", 8, b.bound(), b.patience)


def test_the_last_goes_on_when_the_others_have_left() -> None:
    b = up("b", "ab", "ab")
    assert ready(b, "b") == []
    said = hear(b, "a", goodbye("a"))
    assert said == [Reduce("s", (1, "b"), Plan(("b",), (1.0,), (Part("b", 0, 10),)), 11.0)]


def test_what_one_voted_for_before_it_left_is_brought_to_its_end() -> None:
    b = up("b", "ab", "ab")
    value = sealed(Value(ONE, ("a", "b"), (1.0, 1.0), "d"))
    ready(b, "b")
    assert hear(b, "a", goodbye("a", S, (ONE, value))) == [Get("s", "d", ("a",))]


def test_one_that_left_after_a_commit_still_counts_for_who_missed_it() -> None:
    """Its vote on that commit is unknown: without it, b would decide again, and differently."""
    b = up("b", "ab", "ab")
    ready(b, "b")
    assert hear(b, "a", goodbye("a", S.next(VALUE))) == []
    assert b.gone() == []


def commit(machine: Rendezvous, group: str = "abc") -> Value:
    """The next epoch: `group` has made a mean, and the machine hears of it."""
    base = machine.stand
    value = sealed(Value(ONE, tuple(group), (1.0,) * len(group), "d"), base, machine.members)
    hear(machine, "a", Commit(base.chain, value))
    machine.handle(MeanMade(base.chain, "d"), 1.0)
    assert machine.stand == base.next(value)
    return value


def test_a_thousand_comings_and_goings_leave_nothing_behind(b: Rendezvous) -> None:
    """Each goodbye was kept for ever, and written to the disk at each promise."""
    most = 0
    for i in range(1000):
        peer = f"q{i}"
        b.handle(Admitted(peer, 1.0, 100.0), 1.0)
        if i % 10 == 0:
            commit(b, "abc")
        ahead = Stand(99, "ahead", 1e9)  # nobody has to believe where it says that it stood
        hear(b, peer, goodbye(peer, ahead if i % 3 else b.stand))
        b.doubted[peer] = 9.0
        assert peer in b.farewells
        b.handle(Removed(peer), 1.0)
        most = max(most, len(b.farewells))
    kept = state.loads(Bound, state.dumps(b.bound()))
    assert kept.farewells == b.farewells
    commit(b, "abc")
    assert (b.farewells, b.doubted, sorted(b.roster)) == ({}, {}, ["a", "b", "c", "q"])
    assert most <= 10


def test_a_goodbye_is_kept_while_it_counts(b: Rendezvous) -> None:
    """c is a member, and z may have been in the group that made the next model."""
    b.handle(Admitted("z", 1.0, 100.0), 1.0)
    for peer in "cz":
        hear(b, peer, goodbye(peer))
        b.handle(Removed(peer), 1.0)
    assert sorted(b.farewells) == ["c", "z"]
    commit(b, "abz")
    assert b.gone() == ["z"]
    commit(b, "ab")
    assert b.farewells == {}


def test_an_old_goodbye_said_again_does_no_harm(b: Rendezvous) -> None:
    """Whoever has kept it, or its entry: it is nobody's vote, and goes as it came."""
    b.handle(Admitted("z", 1.0, 100.0), 1.0)
    old = goodbye("z")
    hear(b, "z", old)
    commit(b, "abc")
    b.handle(Removed("z"), 1.0)
    assert b.farewells == {}
    assert hear(b, "z", old) == []
    assert b.farewells == {}
    b.handle(Admitted("z", 1.0, 100.0), 1.0)  # by an entry that somebody still had
    before = (b.members, b.promised, b.accepted, b.missing(1.0), b.stand)
    assert hear(b, "z", old) == []
    assert (b.members, b.promised, b.accepted, b.missing(1.0), b.stand) == before
    b.handle(Removed("z"), 1.0)
    assert b.farewells == {}


def test_a_peer_that_missed_the_end_fetches_the_mean_and_applies_it(b: Rendezvous) -> None:
    after = S.next(VALUE)
    assert hear(b, "c", Commit("old", VALUE)) == []
    assert hear(b, "c", Announce(after, False, Commit("s", VALUE))) == [Get("s", "d", ("c", "a"))]
    assert b.handle(MeanFailed("s", "nobody has it"), 1.0) == []
    assert hear(b, "a", Commit("s", VALUE)) == [Get("s", "d", ("a", "c"))]
    assert quiet(b.handle(MeanMade("s", "d"), 1.1)) == [Apply(VALUE, used=True), TrainOn(after)]
    assert b.handle(StepsDone("s"), 1.2) == []  # of the former model


def test_a_vote_waits_for_the_mean(b: Rendezvous) -> None:
    assert hear(b, "a", Accept("s", ONE, VALUE, ("a", "c"))) == [Get("s", "d", ("a", "c"))]
    assert b.handle(MeanMade("s", "d"), 1.1) == [Say("a", Accepted("s", ONE))]


BEFORE = Stand(5, "base", 15.0)
LAST = Commit("base", sealed(VALUE, BEFORE))
FAR = BEFORE.next(LAST.value)


def far(bits: str = "f") -> Announce:
    return Announce(FAR, False, LAST, bits)


def test_a_joiner_downloads_the_best_model_and_asks_another_where_that_fails() -> None:
    q = up("q")
    q.members = tuple("abc")
    assert hear(q, "a", far("")) == []  # nobody says yet what it must hash to
    assert hear(q, "a", far()) == [Download(FAR, ("a",), "f")]
    assert hear(q, "b", far()) == []  # it is on its way
    assert q.handle(Downloaded("else"), 1.1) == []  # nobody asked for it
    assert q.handle(NotDownloaded("else"), 1.1) == []
    q.handle(NotDownloaded(FAR.chain, ("a",)), 1.2)
    assert hear(q, "a", far()) == []  # not again so soon
    assert hear(q, "b", far(), 1.3) == [Download(FAR, ("b",), "f")]
    q.handle(BeatDue(), 21.3)  # too long
    assert hear(q, "a", far(), 21.4) == [Download(FAR, ("a",), "f")]
    assert quiet(q.handle(Downloaded(FAR.chain), 22.0)) == [Load(FAR), TrainOn(FAR)]
    assert (q.stand, q.members, q.last, q.bits) == (FAR, VALUE.group, LAST, "f")


def test_a_founder_gives_the_first_model_to_one_that_has_none() -> None:
    q = up("q")
    q.members, q.root = ("a",), S
    assert hear(q, "a", Announce(S, False, None, "f")) == [Download(S, ("a",), "f")]
    assert quiet(q.handle(Downloaded("s"), 1.1)) == [Load(S), TrainOn(S)]
    assert q.members == ("a",)


def test_a_download_that_is_no_better_than_what_is_here_is_not_taken(b: Rendezvous) -> None:
    assert hear(b, "a", far()) == [Download(FAR, ("a",), "f")]
    b.stand = Stand(7, "own", 20.0)
    assert b.handle(Downloaded(FAR.chain), 1.1) == []
    assert b.stand.chain == "own"


@pytest.mark.parametrize(("bits", "then"), [("", []), ("f", []), ("x", [Load(FAR), TrainOn(FAR)])])
def test_a_download_of_a_model_that_a_mean_brought_meanwhile_is_taken_for_its_bits(
    b: Rendezvous, bits: str, then: list[PeerAction]
) -> None:
    """It counted as healed, and what had been trained from it was begun anew."""
    assert hear(b, "a", far()) == [Download(FAR, ("a",), "f")]
    b.stand, b.bits = FAR, bits
    assert quiet(b.handle(Downloaded(FAR.chain), 1.1)) == then
    assert b.bits == bits.replace("x", "f")


def test_where_a_peer_stands_must_follow_from_the_commit_that_it_names(b: Rendezvous) -> None:
    for claim in (Stand(6, FAR.chain, 99.0), Stand(6, "z", FAR.heavy)):
        assert b.handle(Heard("a", Announce(claim, False, LAST, "f")), 1.0) == []
    assert b.handle(Heard("a", Announce(FAR, False, None, "f")), 1.0) == []
    assert b.roster["a"].stand == S


def test_an_announcement_that_was_overtaken_changes_nothing(b: Rendezvous) -> None:
    hear(b, "a", far())
    b.handle(Heard("a", Announce(S, False, None)), 1.1)
    assert b.roster["a"].stand == FAR


# ---- other bits of one model -----------------------------------------------------------------


def test_what_a_models_values_hash_to_is_said_once(b: Rendezvous) -> None:
    said = b.handle(Digested("s", "x"), 1.0)
    assert said == to(Announce(S, False, None, "x"), "acq")
    assert b.handle(Digested("s", "x"), 1.0) == []
    assert b.handle(Digested("old", "y"), 1.0) == []


def test_the_light_side_of_one_model_loads_that_of_the_heavy_and_trains_anew() -> None:
    b = up("b")
    b.handle(Digested("s", "x"), 1.0)
    b.handle(StepsDone("s"), 1.0)
    assert hear(b, "a", Announce(S, False, None, "x")) == []
    b.handle(Admitted("c", 3.0, 100.0), 1.0)
    assert hear(b, "c", Announce(S, False, None, "y")) == [Download(S, ("c",), "y")]
    assert quiet(b.handle(Downloaded("s"), 1.2)) == [Load(S)]  # its work is done: it counts
    assert b.bits == "y"


def test_the_heavy_side_of_one_model_keeps_it(b: Rendezvous) -> None:
    b.handle(Digested("s", "x"), 1.0)
    hear(b, "a", Announce(S, False, None, "x"))
    assert hear(b, "c", Announce(S, False, None, "y")) == []
    assert b.bits == "x"


def test_of_two_sides_of_one_weight_one_is_chosen_by_all_alike() -> None:
    for me, other, mine, its in (("b", "c", "x", "y"), ("c", "b", "y", "x")):
        machine = up(me, "bc", "bc")
        machine.handle(Digested("s", mine), 1.0)
        said = hear(machine, other, Announce(S, False, None, its))
        assert said == ([Download(S, ("c",), "y")] if me == "b" else [])
        if me == "b":
            loaded = quiet(machine.handle(Downloaded("s"), 1.2))
            assert loaded == [Load(S), TrainOn(S)]


# ---- a memory --------------------------------------------------------------------------------


def again(machine: Rendezvous, others: str = "abc") -> Rendezvous:
    """Killed, and there once more with what was on its disk."""
    kept = state.loads(Bound, state.dumps(machine.bound()))
    back = Rendezvous.again(machine.me, machine.size, kept, machine.patience)
    for peer in others:
        back.handle(Admitted(peer, 1.0, 100.0), 50.0)
    return back


def test_a_peer_that_comes_back_keeps_its_promise_and_ends_what_it_had_begun(
    b: Rendezvous,
) -> None:
    hear(b, "a", Begin("s", ONE, PLAN))
    back = again(b)
    ended = Say("a", Failed("s", ONE, "b was started anew", (), ()))
    assert quiet(back.handle(Started(), 50.0)) == [Wake(50.5), TrainOn(S), ended]
    assert hear(back, "a", Begin("s", ONE, PLAN), 50.1) == [ended]  # its work is another now
    assert hear(back, "c", Prepare("s", (0, "c")), 50.1) == [Say("c", Refuse("s", ONE))]
    assert isinstance(hear(back, "c", Begin("s", (2, "c"), PLAN), 50.2)[0], Reduce)


def test_a_peer_that_comes_back_stands_by_its_vote(b: Rendezvous) -> None:
    hear(b, "a", Begin("s", ONE, PLAN))
    b.handle(MeanMade("s", "d", ONE), 1.0)
    hear(b, "a", Accept("s", ONE, VALUE, ("a",)))
    back = again(b)
    back.handle(Started(), 50.0)
    promise = Promise("s", (2, "c"), False, (ONE, VALUE))
    assert hear(back, "c", Prepare("s", (2, "c")), 50.1) == [Say("c", promise)]
    applied = quiet(back.handle(Heard("c", Commit("s", VALUE)), 50.2))
    assert isinstance(applied[0], Apply)  # that mean lies there


def test_a_proposer_that_comes_back_counts_on_from_its_last_ballot(a: Rendezvous) -> None:
    reducing(a)
    back = again(a)
    assert quiet(back.handle(Started(), 50.0)) == [Wake(50.5), TrainOn(S)]
    for peer in "bc":
        hear(back, peer, Announce(S, True, None), 50.1)
    assert quiet(back.handle(StepsDone("s"), 50.2)) == to(Prepare("s", (2, "a")), "bc")


def test_an_attempt_that_failed_here_is_not_begun_twice(b: Rendezvous) -> None:
    hear(b, "a", Begin("s", ONE, PLAN))
    failed = Say("a", Failed("s", ONE, "still without c", ("c",), ()))
    assert b.handle(MeanFailed("s", "still without c", ONE, ("c",)), 2.0) == [failed]
    assert hear(b, "a", Begin("s", ONE, PLAN)) == [failed]


def test_the_last_of_all_leaves_without_a_goodbye_and_may_come_back_as_itself() -> None:
    b = up("b", "ab", "abq")
    hear(b, "a", goodbye("a"))
    assert b.handle(Leaving(), 2.0) == []
    assert (b.left, b.parted) == (True, False)


def test_the_first_mean_waits_for_as_many_as_the_run_wants() -> None:
    machine = up("a", "a", "abc")
    machine.patience.first = 3
    assert ready(machine, "ab") == []
    assert quiet(machine.handle(BeatDue(), 20.0)) == [Wake(20.5)]
    for peer in "bc":
        said = hear(machine, peer, Announce(S, True, None), 20.1)
    assert said == to(Prepare("s", ONE), "bc")


def test_one_whose_work_is_not_finite_counts_among_the_first(a: Rendezvous) -> None:
    """Else the first mean would be waited for without end."""
    a.patience.first = 3
    reducing(a)
    again = hear(a, "b", Failed("s", ONE, "not finite: c", (), ("c",)))
    assert again[-2:] == to(Prepare("s", (2, "a")), "bc")


def test_a_peer_is_dumped_and_loaded_in_the_middle_of_a_round(a: Rendezvous) -> None:
    """A promise that is forgotten could be broken: a peer may come back only with its state."""
    reducing(a)
    again = state.loads(Rendezvous, state.dumps(a))
    assert again == a
    assert again.handle(MeanMade("s", "d", ONE), 1.0) == a.handle(MeanMade("s", "d", ONE), 1.0)
