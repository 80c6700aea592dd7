"""The client's session machine: what it does next, and what it never does."""

import math
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.client.session import HELD, Session
from atoll.client.session_events import (
    Acknowledge,
    Action,
    Answered,
    Asked,
    Complain,
    Connect,
    Deliver,
    Dropped,
    Ended,
    Event,
    Failed,
    Fetched,
    Finished,
    Greet,
    Interrupt,
    Lost,
    Ordered,
    Quit,
    Received,
    Rejected,
    Settle,
    Started,
    Tick,
    Told,
    Wake,
    Welcomed,
    Work,
)
from atoll.protocols import state
from atoll.protocols.events import Then


def online(*results: tuple[str, str], **options: float) -> Session:
    """A session that has just been welcomed at 0 s."""
    session = Session("seed", **options)  # type: ignore[arg-type]
    for event in (Started(results), Tick(0.0), Welcomed()):
        session.handle(event, 0.0)
    return session


def say(session: Session, *events: Event, now: float = 1.0) -> list[Action]:
    return [action for event in events for action in session.handle(event, now)]


def again(session: Session, now: float = 1.0) -> list[Action]:
    """The connection is lost and made again."""
    lost = say(session, Lost("cut"), now=now)
    (connect,) = [a for a in lost if isinstance(a, Connect)]
    return [*lost, *say(session, Tick(connect.at), Welcomed(), now=connect.at)]


def test_a_session_connects_greets_and_delivers_what_lies_in_the_outbox() -> None:
    session = Session()
    assert session.handle(Started((("o1", "o1.0"), ("o2", "o2.0"))), 5.0) == [Connect(5.0)]
    assert session.handle(Tick(5.0), 5.0) == [Greet(("o2", "o1"))]
    assert session.handle(Welcomed(), 5.0) == [Deliver("o1.0"), Deliver("o2.0")]


def test_an_order_is_trained_and_its_result_delivered_and_settled_once_told() -> None:
    session = online()
    assert say(session, Ordered("o1")) == [Work("o1")]
    assert say(session, Fetched("o1"), Finished("o1", "o1.0")) == [Deliver("o1.0")]
    assert say(session, Received("o1.0")) == []
    told = say(session, Told("o1", "o1.0", "used"))
    assert told == [Settle("o1.0", "used"), Acknowledge("o1.0")]
    assert say(session, Told("o1", "o1.0", "used")) == [Acknowledge("o1.0")]
    assert say(session, Received("o1.0")) == []
    assert (session.outbox, session.received, session.training) == ({}, set(), None)


def test_an_order_in_hand_is_not_begun_again() -> None:
    session = online()
    say(session, Ordered("o1"))
    assert say(session, Ordered("o1")) == []
    say(session, Fetched("o1"), Finished("o1", "o1.0"))
    assert say(session, Ordered("o1")) == []


def test_a_lost_connection_does_not_stop_training_once_the_model_is_here() -> None:
    session = online()
    say(session, Ordered("o1"), Fetched("o1"))
    assert again(session)[1:] == [Greet(("o1",))]
    assert say(session, Finished("o1", "o1.0")) == [Deliver("o1.0")]


def test_an_order_whose_model_was_on_its_way_is_given_up_with_the_connection() -> None:
    """It used to stay in the hello, so that the server waited for work nobody did."""
    session = online()
    say(session, Ordered("o1"))
    lost = again(session)
    assert lost[0] == Interrupt("o1", "drop")
    assert lost[2:] == [Greet(())]
    assert say(session, Ordered("o1")) == []  # until the former attempt has ended
    assert say(session, Dropped("o1")) == [Work("o1")]


def test_an_order_that_was_heard_after_the_loss_is_not_held() -> None:
    """It lay in the queue behind the loss; its model can no longer be fetched."""
    session = online()
    say(session, Lost("an upload broke"))
    assert say(session, Ordered("o1")) == [Work("o1")]
    assert say(session, Tick(session.due)) == [Greet(())]


def test_an_order_sent_again_is_not_trained_again_when_it_turns_out_finished() -> None:
    session = online()
    say(session, Ordered("o1"))
    again(session)
    say(session, Ordered("o1"))
    assert say(session, Finished("o1", "o1.0")) == [Deliver("o1.0")]
    assert session.training is None


def test_work_finished_without_a_server_is_delivered_at_the_next_welcome() -> None:
    session = online()
    say(session, Ordered("o1"), Fetched("o1"))
    (connect,) = say(session, Lost("cut"))
    assert isinstance(connect, Connect)
    assert say(session, Finished("o1", "o1.0")) == []
    assert say(session, Tick(connect.at)) == [Greet(("o1",))]
    assert say(session, Welcomed()) == [Deliver("o1.0")]


def test_a_result_is_delivered_again_after_a_reconnection_even_if_it_was_received() -> None:
    """The server may have been killed between the bytes and the journal."""
    session = online(("o1", "o1.0"))
    say(session, Received("o1.0"))
    assert again(session)[-1] == Deliver("o1.0")


def test_a_new_order_stops_the_former_and_waits_for_its_end() -> None:
    session = online()
    say(session, Ordered("o1"))
    assert say(session, Ordered("o2")) == [Interrupt("o1", "drop")]
    assert say(session, Ordered("o2"), Ordered("o3")) == []
    assert say(session, Dropped("o1")) == [Work("o3")]


def test_an_order_that_waits_can_be_dropped() -> None:
    session = online()
    say(session, Ordered("o1"), Ordered("o2"), Asked("o2", "drop"))
    assert say(session, Dropped("o1")) == []


@pytest.mark.parametrize("then", ["continue", "send"])
def test_an_ask_reaches_the_order_in_training_alone(then: Then) -> None:
    session = online()
    assert say(session, Asked("o1", then)) == []
    say(session, Ordered("o1"))
    assert say(session, Asked("o1", then)) == [Interrupt("o1", then)]
    assert say(session, Asked("o1", "drop")) == [Interrupt("o1", "drop")]
    assert say(session, Asked("o1", then), Asked("o1", "drop")) == []  # it is stopping


def test_a_snapshot_is_delivered_and_training_goes_on() -> None:
    session = online()
    say(session, Ordered("o1"), Fetched("o1"))
    assert say(session, Finished("o1", "o1.0.s1", final=False)) == [Deliver("o1.0.s1")]
    assert session.training == "o1"


def test_a_failure_is_told_to_the_server_unless_nobody_waits_for_the_order() -> None:
    session = online()
    say(session, Ordered("o1"))
    assert say(session, Failed("o1", "FL-C104", "no")) == [Complain("o1", "FL-C104", "no")]
    say(session, Ordered("o2"), Ordered("o3"))
    assert say(session, Failed("o2", "FL-C104", "no")) == [Work("o3")]
    say(session, Fetched("o3"), Lost("cut"))
    assert say(session, Failed("o3", "FL-C104", "no")) == []  # it will be sent again, and told then
    assert say(session, Failed("o9", "FL-C104", "no"), Dropped("o9"), Fetched("o9")) == []


def test_a_client_that_is_sent_away_for_its_failure_ends_with_it_and_not_with_its_echo() -> None:
    """A spent privacy budget ended with FL-C104, exit 78, and "mend that": FL-C107 is 77."""
    session = online()
    spent = Failed("o1", "FL-C107", "budget spent", "leave the run")
    echo = Rejected("FL-C104", "order o1 was given up: FL-C107: budget spent", "mend", "", True)
    say(session, Ordered("o1"), spent)
    assert say(session, echo) == [Quit("budget spent", "FL-C107", "leave the run")]
    session = online()  # one that it went on after explains nothing
    say(session, Ordered("o1"), spent, Ordered("o2"))
    assert say(session, echo)[-1] == Quit(echo.message, "FL-C104", "mend")


def test_backoff_is_bounded_jittered_and_starts_anew_after_a_welcome() -> None:
    waits: dict[str, list[float]] = {}
    for seed in "abc":
        session = Session(seed, base_seconds=0.5, cap_seconds=8.0)
        session.handle(Started(), 0.0)
        for failure in range(60):
            session.handle(Tick(session.due), 0.0)
            (connect,) = session.handle(Lost("no answer"), 0.0)
            assert isinstance(connect, Connect)
            assert 0.0 <= connect.at <= min(8.0, 0.5 * 2**failure)
            waits.setdefault(seed, []).append(connect.at)
        assert max(waits[seed]) > 6.0  # it does use the room it has
        say(session, Tick(session.due), Welcomed())
        (connect,) = session.handle(Lost("cut"), 0.0)
        assert isinstance(connect, Connect)
        assert connect.at <= 0.5
    assert waits["a"] != waits["b"] != waits["c"]


def test_a_client_looks_for_its_server_while_that_holds_its_place() -> None:
    """A server that had been down for a minute, and then had two versions to go, was over before
    its clients looked again: they waited for ever. With a lease of 20 s they lost their orders."""
    for lease, most in ((20.0, 10.0), (1e-9, 0.2), (0.0, 30.0), (math.nan, 30.0)):
        longest = 0.0
        session = online()
        session.handle(Welcomed(lease), 0.0)
        for _ in range(60):
            (connect,) = session.handle(Lost("no answer"), 0.0)
            assert isinstance(connect, Connect)
            longest = max(longest, connect.at)
            session.handle(Tick(session.due), 0.0)
        assert 0.9 * most < longest <= most


def test_a_server_that_names_a_time_is_not_asked_before() -> None:
    session = online()
    (connect,) = session.handle(Ended("restarting", done=False, retry_seconds=7.0), 1.0)
    assert isinstance(connect, Connect)
    assert connect.at >= 8.0
    (connect,) = session.handle(Rejected("FL-W109", "full", "wait", "", False, 50.0), 8.0)
    assert isinstance(connect, Connect)
    assert connect.at >= 58.0


def test_only_the_newest_of_two_ticks_counts() -> None:
    """Two losses of one connection made two ticks; the first came before its time."""
    session = online()
    say(session, Lost("cut"))
    first = session.due
    say(session, Lost("cut"))
    assert first != session.due
    assert say(session, Tick(first)) == []
    assert say(session, Tick(session.due)) == [Greet(())]
    assert say(session, Tick(session.due)) == []


def test_a_client_without_a_server_gives_up_in_the_end() -> None:
    session = online(give_up_seconds=10.0)
    say(session, Ordered("o1"), Fetched("o1"), Lost("cut"), now=100.0)
    assert session.phase == "offline"
    say(session, Tick(session.due), Lost("no answer"), now=109.0)
    stop, quit_ = say(session, Lost("no answer"), now=110.0)
    assert stop == Interrupt("o1", "drop")
    assert isinstance(quit_, Quit)
    assert quit_.code == "FL-C101"
    assert "10 s: no answer" in quit_.reason
    assert say(session, Lost("x"), Ordered("o2"), Finished("o1", "o1.0"), Tick(session.due)) == []


def test_patience_is_not_overshot_by_a_back_off() -> None:
    """The last wait ends when patience does, and then nothing more is tried."""
    session = online(give_up_seconds=10.0, cap_seconds=1000.0, base_seconds=1000.0)
    (connect,) = say(session, Lost("cut"), now=100.0)
    assert isinstance(connect, Connect)
    assert connect.at == 110.0
    (left,) = say(session, Tick(110.0), now=110.002)
    assert isinstance(left, Quit)
    assert (left.code, left.reason) == ("FL-C101", "no server for 10 s: cut")


def test_patience_is_not_overshot_by_an_attempt_that_hears_nothing() -> None:
    """A host that swallows packets kept a client for 40 s that was given 3."""
    session = Session("x", give_up_seconds=3.0)
    assert say(session, Started(), now=0.0) == [Connect(0.0)]
    assert say(session, Tick(0.0), now=0.0) == [Wake(3.0), Greet(())]
    (left,) = say(session, Tick(3.0), now=3.0)
    assert isinstance(left, Quit)
    assert (left.code, left.reason) == ("FL-C101", "no server for 3 s: no answer")


def test_a_server_that_answered_is_not_given_up_while_the_trainer_is_made() -> None:
    session = Session("x", give_up_seconds=3.0)
    say(session, Started(), Tick(0.0), now=0.0)
    assert say(session, Answered(), now=1.0) == []
    assert say(session, Tick(3.0), now=3.0) == say(session, Tick(4.0), now=4.0) == []
    say(session, Lost("its machine is off"), now=60.0)  # data were loaded for a minute
    assert session.phase == "over"


def test_a_client_that_was_never_in_the_run_does_not_wait_for_ever() -> None:
    """It may have come after the end: who was in the run before waits for its server."""
    session = Session("x", first_seconds=60.0, base_seconds=1000.0, cap_seconds=1000.0)
    say(session, Started(), Tick(1.0), Lost("refused"))
    assert session.due == 61.0
    (left,) = say(session, Tick(61.0), now=61.0)
    assert isinstance(left, Quit)
    assert left.code == "FL-C101"
    assert "its run is over" in left.hint
    for known in (online(first_seconds=60.0), Session("x", first_seconds=60.0)):
        say(known, Started((("o1", "o1.0"),)) if known.phase != "online" else Ended("", False))
        say(known, Tick(known.due), Lost("refused"), now=1e6)
        assert known.phase == "offline"


def test_the_end_of_the_run_stops_training_and_quits_well() -> None:
    session = online()
    say(session, Ordered("o1"), Ordered("o2"))
    assert say(session, Ended("target reached", done=True)) == [Quit("target reached")]
    assert say(session, Dropped("o1")) == []
    session = online()
    say(session, Ordered("o1"))
    ended = say(session, Ended("target reached", done=True))
    assert ended == [Interrupt("o1", "drop"), Quit("target reached")]


def test_a_refused_order_loses_its_results_and_nothing_else() -> None:
    session = online(("o1", "o1.0"), ("o1", "o1.0.s1"), ("o2", "o2.0"))
    say(session, Received("o1.0"))
    settled = say(session, Rejected("FL-W102", "closed", "drop it", "o1", True))
    assert settled == [Settle("o1.0", "discarded"), Settle("o1.0.s1", "discarded")]
    assert session.outbox == {"o2.0": "o2"}
    assert session.received == set()


def test_a_client_that_is_refused_for_good_quits_with_that_error() -> None:
    session = online()
    quit_ = say(session, Rejected("FL-C105", "name taken", "choose another", "", True))
    assert quit_ == [Quit("name taken", "FL-C105", "choose another")]


def test_a_hello_names_the_newest_orders_first_and_no_more_than_it_may() -> None:
    results = tuple((f"o{i}", f"o{i}.0") for i in range(100))
    session = online(*results)
    say(session, Ordered("o100"), Fetched("o100"))
    held = session.holding()
    assert held == ("o100", *(f"o{i}" for i in range(99, 100 - HELD, -1)))
    assert len(held) == HELD


def test_the_state_of_a_session_survives_being_written_down() -> None:
    session = online(("o1", "o1.0"))
    say(session, Ordered("o2"), Fetched("o2"), Received("o1.0"), Lost("cut"))
    assert state.loads(Session, state.dumps(session)) == session


# ---- random histories ----------------------------------------------------------------------


@dataclass
class World:
    """A server, a trainer and a line as unkind as they may be, and what must hold meanwhile."""

    rng: random.Random
    session: Session = field(default_factory=lambda: Session("x", give_up_seconds=1e9))
    now: float = 0.0
    made: int = 0
    open: str | None = None  # the server's open order
    working: str | None = None  # in the trainer
    dropping: bool = False  # the trainer was told to
    begun: list[str] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)  # updates ever in the outbox
    settled: set[str] = field(default_factory=set)
    server_has: set[str] = field(default_factory=set)  # results, durable
    undecided: set[str] = field(default_factory=set)
    untold: dict[str, str] = field(default_factory=dict)  # update -> fate, until acknowledged
    connected: bool = False
    ticks: list[float] = field(default_factory=list)

    def hear(self, event: Event) -> None:
        for action in self.session.handle(event, self.now):
            self.do(action)

    def do(self, action: Action) -> None:
        match action:
            case Connect(at):
                assert self.now <= at <= self.now + 40.0
                self.connected = False
                self.ticks.append(at)
            case Wake(at):
                assert at >= 1e9
            case Greet(holding):
                assert not self.connected
                mine = {u.split(".")[0] for u in self.finished - self.settled}
                assert set(holding) <= mine | {self.working}
                self.greeted = holding
            case Work(order):
                assert self.working is None, "two orders in training at once"
                assert f"{order}.0" not in self.finished, "trained what it had finished"
                self.working, self.dropping, self.fetched = order, False, False
                self.begun.append(order)
            case Interrupt(order, then):
                assert order == self.working
                self.dropping |= then == "drop"
            case Deliver(update):
                assert self.connected, "delivered to nobody"
                assert update in self.finished - self.settled
                if self.rng.random() < 0.8:
                    self.received.append(update)
            case Acknowledge(update):
                if self.connected:
                    self.untold.pop(update, None)
            case Settle(update, _):
                assert update in self.finished - self.settled, "settled twice"
                self.settled.add(update)
            case _:
                raise AssertionError(f"unexpected {action}")

    # ---- what may happen next

    received: list[str] = field(default_factory=list)
    greeted: tuple[str, ...] = ()
    fetched: bool = False

    def step(self) -> None:
        self.now += self.rng.random()
        choices = [self.tick, self.work, self.decide, self.order, self.order, self.receive]
        choices += [self.cut] if self.rng.random() < 0.3 else []
        self.rng.choice(choices)()

    def tick(self) -> None:
        if self.ticks:
            at = self.ticks.pop(0)
            self.now = max(self.now, at)
            self.hear(Tick(at))
        elif self.session.phase == "connecting":
            if self.rng.random() < 0.5:
                self.hear(Lost("no answer"))
                return
            self.connected = True
            self.hear(Welcomed())
            for update, fate in list(self.untold.items()):
                self.hear(Told(update.split(".")[0], update, fate))
            if self.open is not None and self.open not in self.greeted:
                self.hear(Ordered(self.open))

    def cut(self) -> None:
        self.connected = False
        self.received.clear()
        self.hear(Lost("cut"))

    def order(self) -> None:
        """The server gives a new order, with or without a word about the former one."""
        if self.session.phase == "over":
            return
        former = self.open
        self.open = f"o{self.made}"
        self.made += 1
        if self.connected and former is not None and self.rng.random() < 0.5:
            self.hear(Asked(former, "drop"))
        if self.connected:
            self.hear(Ordered(self.open))

    def work(self) -> None:
        if self.working is None:
            return
        order = self.working
        if not self.fetched and (self.connected or self.dropping):
            self.fetched = True
            self.hear(Fetched(order))
            return
        if not self.fetched:
            return  # its bytes cannot come
        self.working = None
        if self.dropping and self.rng.random() < 0.7:
            self.hear(Dropped(order))
        else:
            self.finished.add(f"{order}.0")
            self.hear(Finished(order, f"{order}.0"))

    def receive(self) -> None:
        """The bytes of a result are durable at the server, which may have them already."""
        if self.received and self.connected:
            update = self.received.pop(0)
            if update not in self.server_has:
                self.undecided.add(update)
                self.server_has.add(update)
                if update == f"{self.open}.0":
                    self.open = None
            self.hear(Received(update))

    def decide(self) -> None:
        if self.undecided:
            update = self.rng.choice(sorted(self.undecided))
            self.undecided.discard(update)
            self.untold[update] = self.rng.choice(["used", "discarded", "superseded"])
            if self.connected:
                self.hear(Told(update.split(".")[0], update, self.untold[update]))

    def calm(self) -> None:
        """Nothing goes wrong any more: everything comes to its end."""
        self.rng.random = lambda: 0.99  # type: ignore[method-assign]
        for _ in range(200 + 4 * self.made):
            for go in (self.tick, self.work, self.receive, self.decide):
                go()
            if self.connected and not self.session.received.issuperset(self.session.outbox):
                self.received += [u for u in self.session.outbox if u not in self.server_has]


@given(st.integers(0, 1 << 32))
def test_over_random_histories_nothing_is_trained_twice_or_lost(seed: int) -> None:
    world = World(random.Random(seed))
    world.hear(Started())
    for _ in range(120):
        world.step()
    world.calm()
    assert world.open is None, f"seed {seed}: {world.open} waits for work that nobody does"
    assert world.finished == world.settled, f"seed {seed}"
    assert not world.session.outbox
    assert not world.untold
    assert world.session.training is None
