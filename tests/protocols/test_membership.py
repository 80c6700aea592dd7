"""Who takes part: sessions, fences, leases, and the memory of a member that left."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from atoll.protocols import state
from atoll.protocols.errors import RemoteError
from atoll.protocols.membership import Back, Joined, Left, Membership, Suspected

A, B = "01HZZZZZZZZZZZZZZZZZZZZZZA", "01HZZZZZZZZZZZZZZZZZZZZZZB"


def joined(lease: float = 10.0) -> Membership:
    members = Membership(lease)
    assert members.hello("fast", A, 0.0) == Joined("fast", 1, False, None)
    return members


def test_a_first_hello_joins_with_the_first_fence() -> None:
    members = Membership()
    decision = members.hello("fast", A, 3.0, roles=("trainer",), transports=("grpc", "libp2p"))
    assert decision == Joined("fast", 1, again=False, seconds_per_step=None)
    member = members.members["fast"]
    assert (member.standing, member.since, member.reason) == ("active", 3.0, "joined")
    assert member.transports == ("grpc", "libp2p")
    assert members.alive() == ["fast"]


def test_a_lease_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"lease=0\.0"):
        Membership(0.0)


def test_a_name_held_by_another_living_node_is_refused_for_good() -> None:
    members = joined()
    with pytest.raises(RemoteError, match="'fast' is taken by node " + A) as refused:
        members.hello("fast", B, 1.0)
    assert refused.value.code == "FL-C105"
    assert refused.value.fatal
    assert members.members["fast"].node == A
    assert members.current("fast", 1)


def test_a_name_held_by_a_suspect_is_refused_until_its_lease_could_end() -> None:
    members = joined(lease=10.0)
    members.broken("fast", 1, 4.0)
    with pytest.raises(RemoteError) as refused:
        members.hello("fast", B, 7.0)
    assert refused.value.retry_seconds == 3.0


def test_an_expected_name_is_kept_for_its_node() -> None:
    members = Membership()
    members.expect("fast", A, 0.0, "enrolled")
    members.expect("fast", B, 1.0)  # the first one to name it decides
    assert members.members["fast"].standing == "new"
    assert members.members["fast"].reason == "enrolled"
    assert (members.alive(), members.due()) == ([], None)
    with pytest.raises(RemoteError):
        members.hello("fast", B, 2.0)
    assert members.hello("fast", A, 2.0) == Joined("fast", 1, False, None)


def test_a_broken_stream_is_a_suspicion_and_not_a_leave() -> None:
    members = joined()
    assert members.broken("fast", 1, 4.0) == Suspected("fast", "its connection broke")
    assert members.broken("fast", 1, 4.5) is None
    assert members.alive() == ["fast"]
    assert members.tick(9.9) == []


def test_back_within_the_lease_is_a_new_session_of_the_same_member() -> None:
    members = joined()
    members.broken("fast", 1, 4.0, "reset by peer")
    assert members.members["fast"].reason == "reset by peer"
    assert members.hello("fast", A, 9.0) == Back("fast", 2, silent=9.0)
    assert members.members["fast"].standing == "active"


def test_a_second_hello_of_a_half_open_connection_wins_over_the_first() -> None:
    members = joined()
    assert members.hello("fast", A, 2.0) == Back("fast", 2, silent=2.0)
    assert not members.heard("fast", 1, 3.0)
    assert members.broken("fast", 1, 3.0) is None
    assert members.goodbye("fast", 1, 3.0) is None
    assert members.members["fast"].standing == "active"


def test_a_lease_ends_at_its_instant_and_not_before() -> None:
    members = joined(lease=10.0)
    members.broken("fast", 1, 4.0)
    assert members.due() == 10.0  # from when it was heard last, not from when it broke
    assert members.tick(9.999) == []
    assert members.tick(10.0) == [Left("fast", "not heard of for 10 s")]
    assert members.due() is None
    assert members.tick(99.0) == []


def test_a_silent_member_is_suspected_after_two_heartbeats_and_leaves_at_the_end() -> None:
    members = joined(lease=30.0)
    assert members.due() == 20.0
    assert members.tick(20.0) == [Suspected("fast", "silent")]
    assert members.due() == 30.0
    assert members.heard("fast", 1, 25.0)
    assert members.members["fast"].reason == "heard of again"
    assert members.due() == 45.0
    assert members.heard("fast", 1, 26.0)
    assert members.members["fast"].since == 25.0
    assert members.tick(56.0) == [Left("fast", "not heard of for 30 s")]


def test_those_whose_lease_ends_together_are_named_in_order() -> None:
    members = Membership(10.0)
    for name in ("c", "a", "b"):
        members.hello(name, A, 0.0)
    assert [d.name for d in members.tick(10.0)] == ["a", "b", "c"]


def test_goodbye_ends_it_at_once_and_the_session_with_it() -> None:
    members = joined()
    assert members.goodbye("fast", 1, 5.0) == Left("fast", "said goodbye")
    assert members.members["fast"].since == 5.0
    assert not members.heard("fast", 1, 6.0)
    assert members.goodbye("fast", 1, 6.0) is None


def test_expel_needs_no_fence() -> None:
    members = joined()
    assert members.expel("fast", 2.0, "its trainer failed") == Left("fast", "its trainer failed")
    assert members.expel("fast", 3.0, "again") is None
    assert members.expel("nobody", 3.0, "never seen") is None


def test_a_rejoin_after_leaving_remembers_the_speed() -> None:
    members = joined()
    members.learned("fast", 0.25)
    members.goodbye("fast", 1, 5.0)
    assert members.hello("fast", A, 50.0) == Joined("fast", 2, again=True, seconds_per_step=0.25)


def test_another_node_under_a_freed_name_gets_the_next_fence_and_no_memory() -> None:
    members = joined()
    members.learned("fast", 0.25)
    members.goodbye("fast", 1, 5.0)
    assert members.hello("fast", B, 50.0) == Joined("fast", 2, again=False, seconds_per_step=None)
    assert not members.heard("fast", 1, 51.0)


def test_a_restart_gives_every_living_lease_one_whole_term() -> None:
    members = joined(lease=10.0)
    members.hello("slow", B, 3.0)
    members.hello("gone", B, 3.0)
    members.goodbye("gone", 1, 4.0)
    members.restart(1000.0)
    assert members.alive() == ["fast", "slow"]
    assert members.members["gone"].reason == "said goodbye"
    assert members.due() == 1010.0
    assert members.hello("slow", B, 1009.0) == Back("slow", 2, silent=9.0)
    assert members.tick(1010.0) == [Left("fast", "not heard of for 10 s")]


def test_a_dump_is_loaded_as_it_was() -> None:
    members = joined()
    members.expect("later", B, 1.0)
    members.learned("fast", 0.5)
    assert state.loads(Membership, state.dumps(members)) == members


class Sessions(RuleBasedStateMachine):
    """Against plain dicts: who is alive, since when heard, and how often it said hello."""

    def __init__(self) -> None:
        super().__init__()
        self.members = Membership(8.0)
        self.now = 0.0
        self.heard: dict[str, float] = {}  # the living
        self.node: dict[str, str] = {}
        self.hellos: dict[str, int] = {}

    names = st.sampled_from(["a", "b"])
    nodes = st.sampled_from([A, B])

    @rule(seconds=st.sampled_from([0.0, 1.0, 3.0, 8.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def tick(self) -> None:
        left = [d.name for d in self.members.tick(self.now) if isinstance(d, Left)]
        over = sorted(n for n, at in self.heard.items() if self.now >= at + 8.0)
        assert left == over
        for name in over:
            del self.heard[name]

    @rule(name=names, node=nodes)
    def hello(self, name: str, node: str) -> None:
        if name in self.heard and self.node[name] != node:
            with pytest.raises(RemoteError):
                self.members.hello(name, node, self.now)
            return
        self.hellos[name] = self.hellos.get(name, 0) + 1
        decision = self.members.hello(name, node, self.now)
        if name in self.heard:
            assert decision == Back(name, self.hellos[name], self.now - self.heard[name])
        else:
            again = self.node.get(name) == node
            assert decision == Joined(name, self.hellos[name], again, None)
        self.heard[name], self.node[name] = self.now, node

    @precondition(lambda self: self.hellos)
    @rule(name=names, behind=st.integers(0, 2), what=st.sampled_from(["heard", "broken", "bye"]))
    def message(self, name: str, behind: int, what: str) -> None:
        fence = self.hellos.get(name, 0) - behind
        valid = name in self.heard and behind == 0
        if what == "heard":
            assert self.members.heard(name, fence, self.now) == valid
            if valid:
                self.heard[name] = self.now
        elif what == "broken":
            assert self.members.broken(name, fence, self.now) is None or valid
        else:
            assert (self.members.goodbye(name, fence, self.now) is not None) == valid
            if valid:
                del self.heard[name]

    @rule()
    def restart(self) -> None:
        self.members.restart(self.now)
        self.heard = dict.fromkeys(self.heard, self.now)

    @rule()
    def dump_and_load(self) -> None:
        self.members = state.loads(Membership, state.dumps(self.members))

    @invariant()
    def the_living_are_the_living(self) -> None:
        assert self.members.alive() == sorted(self.heard)

    @invariant()
    def due_is_never_later_than_the_first_end(self) -> None:
        due = self.members.due()
        first = min((at + 8.0 for at in self.heard.values()), default=math.inf)
        assert (math.inf if due is None else due) <= first
        assert (due is None) == (not self.heard)


Sessions.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
test_sessions_agree_with_plain_dicts = Sessions.TestCase
