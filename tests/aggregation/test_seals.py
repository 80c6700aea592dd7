"""Seals: what a member may claim of what the run has decided, and what those believe who were not
there."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from atoll.aggregation.allreduce import Part, Plan
from atoll.aggregation.rendezvous import Rendezvous
from atoll.aggregation.rendezvous_events import (
    Admitted,
    Digested,
    Download,
    Downloaded,
    Get,
    Heard,
    Load,
    MeanMade,
    PeerAction,
    Reduce,
    Say,
    Started,
    StepsDone,
    TrainOn,
)
from atoll.aggregation.rendezvous_messages import (
    Accept,
    Announce,
    Begin,
    Commit,
    Goodbye,
    Left,
    Message,
    Path,
    Promise,
    Reduced,
    Stand,
    Step,
    Value,
    Whence,
)
from atoll.aggregation.seals import (
    KEPT,
    NAMES,
    Named,
    fair,
    left,
    made,
    proved,
    sound,
    worth_keeping,
)

S = Stand(0, "s", 0.0)
ME = Named("b")  # whoever looks


def value_of(
    group: str, base: Stand, by: str | None = None, digest: str = "d", gone: Sequence[Left] = ()
) -> Value:
    """A mean of `group`, sealed by those in `by`."""
    value = Value((1, group[0]), tuple(group), (1.0,) * len(group), digest)
    text = made(base.next(value))
    seals = tuple((p, Named(p).seal(text)) for p in (group if by is None else by))
    return replace(value, seals=seals, gone=tuple(gone))


def steps_of(*groups: str, base: Stand = S, digest: str = "d") -> tuple[Step, ...]:
    """As the run made them, each group all of it."""
    found = []
    for group in groups:
        value = value_of(group, base, digest=digest)
        found.append(Step(base.next(value), Commit(base.chain, value)))
        base = base.next(value)
    return tuple(found)


def goes(peer: str, stand: Stand = S) -> Left:
    return Left(peer, stand, Named(peer).seal(left(stand)))


def up(me: str, members: str = "abcd", others: str = "abcdq", stand: Stand = S) -> Rendezvous:
    machine = Rendezvous(me, 8, tuple(members), stand if me in members else Stand())
    for peer in others:
        machine.handle(Admitted(peer, 1.0, 100.0), 0.0)
    machine.handle(Started(), 0.0)
    return machine


def hear(machine: Rendezvous, peer: str, message: Message, now: float = 1.0) -> list[PeerAction]:
    """What it does but for its own announcements."""
    said = machine.handle(Heard(peer, message), now)
    return [a for a in said if not (isinstance(a, Say) and isinstance(a.message, Announce))]


def at(step: Step, bits: str = "f") -> Announce:
    return Announce(step.stand, False, step.last, bits)


# ---- what counts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "counts"), [("abc", True), ("ab", True), ("cd", False), ("d", False), ("", False)]
)
def test_a_mean_counts_that_a_quorum_of_the_former_group_has_made(by: str, counts: bool) -> None:
    value = value_of("abcdq", S, by)
    assert sound(value, S.next(value), "abcd", ME) is counts


def test_nobody_seals_for_another() -> None:
    value = value_of("abcd", S, "d")
    forged = replace(value, seals=tuple((p, value.seals[0][1]) for p in "abcd"))
    assert not sound(forged, S.next(forged), "abcd", ME)
    other = replace(value_of("abcd", S), digest="x")  # nor is a seal for one mean one for another
    assert not sound(other, S.next(other), "abcd", ME)


def test_who_left_before_by_its_own_word_is_not_counted() -> None:
    """Else a commit of those who are left would be none for whoever has not heard the goodbyes."""
    alone = value_of("c", S, gone=[goes("a"), goes("b")])
    assert sound(alone, S.next(alone), "abc", ME)
    for gone in ([goes("a")], [goes("a"), Left("b", S, "forged")], [goes("a"), goes("z")]):
        assert not sound(replace(alone, gone=tuple(gone)), S.next(alone), "abc", ME)
    later = Stand(9, "t", 99.0)  # it left after that: it counted then
    value = replace(alone, gone=(goes("a", later), goes("b", later)))
    assert not sound(value, S.next(value), "abc", ME)


def test_a_weight_above_a_whole_share_is_not_fair() -> None:
    assert fair(value_of("ab", S), 1.0)
    assert not fair(value_of("ab", S), 0.5)
    assert not fair(Value((1, "a"), ("a",), (0.0,), "d"), 1.0)


# ---- a path ----------------------------------------------------------------------------------


def test_a_path_leads_from_group_to_group() -> None:
    steps = steps_of("abcd", "abc", "abc", "acq", "q")
    found = proved(steps, S, "abcd", ME, 1.0)
    assert list(found) == [step.stand.chain for step in steps[:4]]
    assert found[steps[3].stand.chain] == steps[:4]


def test_one_leaps_over_what_the_same_members_made() -> None:
    steps = steps_of("abcd", "abc", "abc", "abc", "abq", "abq")
    kept = worth_keeping(steps)
    assert kept == (steps[0], steps[1], steps[4], steps[5])
    for i, step in enumerate(steps[:-1]):
        found = proved(kept, step.stand, step.last.value.group, ME, 1.0)
        assert steps[-1].stand.chain in found, f"from {i}"


def test_what_does_not_fit_together_is_no_path() -> None:
    good, bad = steps_of("abcd", "abc")
    for torn in (
        replace(good, stand=replace(good.stand, heavy=1e9)),
        replace(good, last=Commit("else", good.last.value)),
    ):
        assert proved([torn, bad], S, "d", ME, 1.0) == {}
    assert proved([good], good.stand, "abcd", ME, 1.0) == {}  # no better than what is here
    assert proved([good], S, "abcd", ME, 0.5) == {}  # heavier than a share may be


def test_of_many_steps_those_are_kept_that_fit_into_a_letter() -> None:
    turns = worth_keeping(steps_of(*["ab", "bc"] * KEPT))
    assert len(turns) == KEPT
    crowd = "".join(map(chr, range(200, 200 + NAMES // 2)))
    many = steps_of(crowd, crowd[1:], crowd)
    assert worth_keeping(many) == many[1:]
    huge = steps_of("".join(map(chr, range(200, 201 + NAMES))))
    assert worth_keeping(huge) == huge


# ---- a member's claims -----------------------------------------------------------------------


def test_a_commit_that_no_quorum_has_made_is_none() -> None:
    """One member gave out a mean of its own as decided, and served it."""
    false = value_of("abcd", S, "d")
    b = up("b")
    for peer in "abcd":
        hear(b, peer, Announce(S, False, None)) if peer != "b" else None
    assert hear(b, "d", Commit("s", false)) == []
    assert hear(b, "d", Accept("s", (1, "d"), false, ("d",))) == []
    after = Announce(S.next(false), False, Commit("s", false), "f")
    assert hear(b, "d", after) == [Say("d", Whence(0.0))]
    assert hear(b, "d", Path((Step(S.next(false), Commit("s", false)),))) == []
    assert (b.stand, b.owed, b.accepted, b.loading) == (S, None, None, None)
    assert b.roster["d"].stand == S, "and it still is where it was"
    true = value_of("abcd", S)
    assert hear(b, "d", Commit("s", true)) == [Get("s", "d", ("d", "a", "c"))]


@pytest.mark.parametrize("how", ["a promise", "a goodbye"])
def test_a_vote_for_what_no_quorum_has_made_is_none(how: str) -> None:
    a, false = up("a"), value_of("abcd", S, "d")
    for peer in "bcd":
        hear(a, peer, Announce(S, True, None))
    a.handle(StepsDone("s"), 1.0)
    claimed = ((9, "d"), false)
    if how == "a goodbye":
        hear(a, "d", Goodbye(S, claimed, goes("d").seal))
    for peer in "bcd":
        told = Promise("s", (1, "a"), True, claimed if how == "a promise" else None)
        said = hear(a, peer, told)
        if a.lead is not None and a.lead.phase == "reduce":
            break
    assert isinstance(said[0], Reduce)


def test_a_mean_is_reported_with_a_seal_or_not_at_all() -> None:
    a = up("a", "abc", "abc")
    for peer in "bc":
        hear(a, peer, Announce(S, True, None))
    a.handle(StepsDone("s"), 1.0)
    assert hear(a, "c", Reduced("s", (1, "a"), "d", "")) == []  # nobody has begun
    for peer in "bc":
        begun = hear(a, peer, Promise("s", (1, "a"), True, None))
    assert isinstance(begun[0], Reduce)
    value = Value((1, "a"), tuple("abc"), (1.0,) * 3, "d")
    seals = {p: Named(p).seal(made(S.next(value))) for p in "abc"}
    assert hear(a, "c", Reduced("s", (1, "a"), "d", seals["b"])) == []
    a.handle(MeanMade("s", "d", (1, "a")), 1.0)
    assert hear(a, "c", Reduced("s", (1, "a"), "d", "")) == []
    said = hear(a, "b", Reduced("s", (1, "a"), "d", seals["b"]))
    assert said == []  # it waits for c
    said = hear(a, "c", Reduced("s", (1, "a"), "d", seals["c"]))
    whole = replace(value, seals=tuple(seals.items()))
    assert said == [Say(p, Accept("s", (1, "a"), whole, ("a", "b", "c"))) for p in "bc"]


def test_a_goodbye_is_believed_with_its_seal_alone() -> None:
    b = up("b")
    hear(b, "d", Goodbye(S, None, goes("c").seal))
    assert b.gone() == []
    hear(b, "d", Goodbye(S, None, goes("d").seal))
    assert b.gone() == ["d"]


def test_what_those_decide_who_are_left_says_who_left() -> None:
    c = up("c", "abc", "abc")
    c.handle(StepsDone("s"), 1.0)
    for peer in "ab":
        said = hear(c, peer, Goodbye(S, None, goes(peer).seal))
    plan = Plan(("c",), (1.0,), (Part("c", 0, 8),))
    assert said == [Reduce("s", (1, "c"), plan, 11.0)]
    c.handle(MeanMade("s", "d", (1, "c")), 1.0)
    assert c.last is not None
    assert c.last.value.gone == (goes("a"), goes("b"))
    assert sound(c.last.value, c.stand, "abc", ME)


# ---- who is behind ---------------------------------------------------------------------------


def test_one_far_behind_asks_for_the_path_and_downloads_what_it_leads_to() -> None:
    steps = steps_of("abcd", "ac", "acq", "cq")
    b = up("b")
    hear(b, "d", Announce(S, False, None))
    assert hear(b, "q", at(steps[-1])) == [Say("q", Whence(0.0))]
    assert hear(b, "q", Path(steps[3:])) == []  # from nowhere
    assert hear(b, "q", Path(steps)) == [Download(steps[-1].stand, ("q",), "f")]
    found = b.handle(Downloaded(steps[-1].stand.chain), 2.0)
    assert [a for a in found if not isinstance(a, Say)] == [
        Load(steps[-1].stand),
        TrainOn(steps[-1].stand),
    ]
    assert (b.members, b.history) == (("c", "q"), steps)
    assert hear(b, "d", Whence(steps[1].stand.heavy)) == [Say("d", Path(steps[2:]))]


def test_a_path_that_nobody_claims_any_more_is_no_matter() -> None:
    b = up("b")
    assert hear(b, "q", Path(steps_of("abcd", "ab"))) == []
    assert hear(b, "q", Path(())) == []


def test_where_no_path_is_left_most_of_those_near_are_believed() -> None:
    """And one alone is not, whatever it says in others' names."""
    end = steps_of("xyz", base=Stand(700, "t", 900.0))[0]
    b = up("b", "abcd", "abcdxyz")
    hear(b, "a", Announce(S, False, None))
    asks = [Say("x", Whence(0.0))]
    assert hear(b, "x", at(end)) == asks
    assert hear(b, "x", Path((end,))) == []
    assert hear(b, "x", at(end)) == asks
    hear(b, "y", at(end), 3.6)  # a and the others are not near any more
    assert b.handle(Heard("x", at(end)), 3.7)[-1] == Download(end.stand, ("x",), "f")


def test_where_no_path_is_left_a_quorum_of_those_who_made_this_model_are_believed() -> None:
    end = steps_of("x", base=Stand(700, "t", 900.0))[0]
    b = up("b", "ab", "abcdx")
    for peer in "cdx":
        hear(b, peer, Announce(S, False, None))
    assert hear(b, "a", at(end)) == [
        Download(end.stand, ("a",), "f")
    ]  # of two the first  # of two the first


def test_a_newcomer_believes_most_of_those_who_have_a_model() -> None:
    end, false = steps_of("abc")[0], steps_of("d", base=Stand(8, "t", 1e9))[0]
    q = up("q")
    hear(q, "a", at(end))
    q.loading = None
    assert hear(q, "d", at(false)) == [Say("d", Whence(-1.0))]
    assert hear(q, "b", at(end, "")) == [Download(end.stand, ("a",), "f")]


def test_a_newcomer_that_knows_the_founders_goes_from_the_first_model_on() -> None:
    q = up("q", "a", "abcq")
    q.members, q.root = ("a",), S
    steps = steps_of("a", "ab", "ab", "bc")
    assert hear(q, "c", at(steps[-1])) == [Say("c", Whence(-1.0))]
    found = hear(q, "c", Path(worth_keeping(steps)))
    assert found == []  # of two the first decides, and a has not sealed the last
    steps = steps_of("ab", "abc", "bc")
    assert hear(q, "c", at(steps[-1])) == [Say("c", Whence(-1.0))]
    assert hear(q, "c", Path(steps)) == [Download(steps[-1].stand, ("c",), "f")]


def test_a_newcomer_believes_one_alone_when_there_is_nobody_else_for_long() -> None:
    end = steps_of("x", base=Stand(700, "t", 900.0))[0]
    q = up("q", "abcd", "qx")
    for now in (1.0, 20.4):
        assert hear(q, "x", at(end), now) == [Say("x", Whence(-1.0))]
    assert hear(q, "x", at(end), 20.6) == [Download(end.stand, ("x",), "f")]


def test_a_newcomer_that_made_the_first_model_itself_has_none_of_the_run() -> None:
    """It counted itself among those who have one, and others that had just come: where the founder
    was long gone it never believed the one member that was left."""
    end = steps_of("x", base=Stand(700, "t", 900.0))[0]
    q = up("q", "a", "qrx")
    q.stand = q.root = S
    hear(q, "r", Announce(S, False, None), 20.4)  # has just come as well
    assert hear(q, "x", at(end), 20.4) == [Say("x", Whence(0.0))]
    assert hear(q, "x", at(end), 20.6) == [Download(end.stand, ("x",), "f")]
    a = up("a", "a", "aqx")  # the founder decides itself what follows
    assert hear(a, "x", at(end), 20.6) == [Say("x", Whence(0.0))]
    q = up("q", "a", "aqx")
    q.stand = q.root = S
    hear(q, "a", Announce(S, False, None), 20.4)  # is there, and has decided nothing
    assert hear(q, "x", at(end), 20.6) == [Say("x", Whence(0.0))]


def test_a_newcomer_is_never_one_mean_away() -> None:
    """It applied the mean of one that said its model came from none, as the newcomer's own."""
    q = up("q", "abcd", "aq")
    value = value_of("a", Stand())
    q.members = ("a",)
    assert hear(q, "a", Commit("", value)) == []
    after = Stand().next(value)
    assert hear(q, "a", Announce(after, False, Commit("", value), "f")) == [
        Download(after, ("a",), "f")
    ]


def test_a_seal_of_one_that_is_near_is_its_word() -> None:
    """Those who made a model are not all at it yet: some are at the one before, or on the way."""
    end, false = steps_of("abc")[0], steps_of("d", base=Stand(8, "t", 1e9))[0]
    q = up("q")
    hear(q, "a", Announce(S, False, None))
    hear(q, "d", at(false))
    q.loading = None
    assert hear(q, "b", at(end)) == [Download(end.stand, ("b",), "f")]


# ---- two branches ----------------------------------------------------------------------------


def test_of_two_branches_the_heavier_is_taken_by_who_can_see_that_both_are_the_runs() -> None:
    """None is made while members keep to the rules; a proposer that lies can have two honest means
    decided, by two quorums that have only it in common."""
    (root,) = steps_of("abcd")
    ours = steps_of("ab", base=root.stand, digest="x")[0]
    theirs = steps_of("acd", "cd", "cd", base=root.stand, digest="y")
    b = up("b", "abcd")
    b.stand, b.members, b.history = ours.stand, ("a", "b"), (root, ours)
    b.handle(Digested(ours.stand.chain, "o"), 1.0)
    hear(b, "a", at(ours, "o"))
    assert hear(b, "c", at(theirs[-1])) == [Say("c", Whence(root.stand.heavy))]
    said = hear(b, "c", Path(theirs))
    assert said == [Download(theirs[-1].stand, ("c",), "f")]
    b.handle(Downloaded(theirs[-1].stand.chain), 2.0)
    assert b.history == worth_keeping((root, *theirs))


def test_one_that_once_was_the_whole_run_makes_no_other_past() -> None:
    first = steps_of("d", "abcd")
    false = steps_of(*"ddddddd", base=first[0].stand, digest="y")
    b = up("b", "abcd")
    b.stand, b.history = first[1].stand, first
    assert hear(b, "d", at(false[-1])) == [Say("d", Whence(first[0].stand.heavy))]
    assert hear(b, "d", Path(false)) == []
    assert b.loading is None


def test_begin_is_not_answered_with_a_seal_for_another_plan() -> None:
    """A proposer that says one ballot twice gets the seal of what was really made."""
    b = up("b", "ab", "ab")
    plan = Plan(("a", "b"), (1.0, 1.0), (Part("a", 0, 4), Part("b", 4, 8)))
    hear(b, "a", Begin("s", (1, "a"), plan))
    b.handle(MeanMade("s", "d", (1, "a")), 1.0)
    other = replace(plan, weights=(1.0, 0.0))
    (said,) = hear(b, "a", Begin("s", (1, "a"), other))
    assert isinstance(said, Say)
    assert isinstance(said.message, Reduced)
    value = Value((1, "a"), plan.group, plan.weights, "d")
    assert said.message.seal == Named("b").seal(made(S.next(value)))
