"""The book of a run: orders, versions, updates and outcomes, and what a driver must do."""

import math

import pytest

from atoll.aggregation.strategy import Strategy
from atoll.protocols import state
from atoll.protocols.events import (
    Action,
    Aggregate,
    Ask,
    CancelTimer,
    ClientInfo,
    ClientJoined,
    ClientLeft,
    Discard,
    Evaluated,
    Event,
    Finish,
    Merged,
    SetTimer,
    Stopping,
    Then,
    TimerFired,
    Train,
    Update,
    UpdateReceived,
)
from atoll.server.run import (
    FORMER,
    Arm,
    Deliver,
    Disarm,
    Effect,
    Fate,
    Interrupt,
    Merge,
    Order,
    Outcome,
    Run,
    Stop,
    StrategyError,
    Tell,
)


class Says(Strategy):
    """Says what it is told to say next, and remembers what it heard."""

    def __init__(self) -> None:
        self.next: list[Action] = []
        self.heard: list[Event] = []

    def handle(self, event: Event, now: float) -> list[Action]:
        self.heard.append(event)
        said, self.next = self.next, []
        return said


class Book:
    """A run whose strategy is told what to say at each event."""

    def __init__(self) -> None:
        self.says = Says()
        self.run = Run(self.says)

    def hear(self, event: Event, now: float, *actions: Action) -> list[Effect]:
        self.says.next = list(actions)
        heard, said, effects = self.run.handle(event, now)
        assert said in ([], list(actions))
        self.last = heard
        return effects

    def join(self, client: str, now: float = 0.0, *actions: Action) -> list[Effect]:
        return self.hear(ClientJoined(client, ClientInfo(1)), now, *actions)

    def bring(
        self, order: str, client: str, now: float, *actions: Action, final: bool = True
    ) -> list[Effect]:
        update = f"{order}.0" if final else f"{order}.0s1"
        return self.hear(UpdateReceived(result(update, order, client, final)), now, *actions)


def result(update: str, order: str, client: str, final: bool = True) -> Update:
    """As a driver knows it: base, start and whether it is current are the run's to fill in."""
    return Update(update, order, client, -1, 5, 160, -1.0, 2.5, {"loss": 0.5}, final=final)


def told(client: str, update: str, fate: Fate, version: int, reason: str) -> Tell:
    return Tell(client, Outcome(update.split(".")[0], update, fate, version, reason))


@pytest.fixture
def book() -> Book:
    book = Book()
    effects = book.join("a", 0.0, Train("a", 5))
    assert effects == [Deliver(Order("o0", "a", 0, 5, {}, 0.0))]
    return book


# ---- orders ----------------------------------------------------------------------------------


def test_the_update_that_the_strategy_hears_is_completed_from_the_book(book: Book) -> None:
    assert book.bring("o0", "a", 3.0) == []
    assert isinstance(book.last, UpdateReceived)
    update = book.last.update
    assert (update.base, update.started, update.current, update.final) == (0, 0.0, True, True)
    assert (update.steps, update.examples, update.train_seconds) == (5, 160, 2.5)
    assert update.metrics == {"loss": 0.5}
    assert book.says.heard[-1] == book.last
    assert book.run.open == {}


def test_orders_are_numbered_in_the_order_in_which_they_are_said(book: Book) -> None:
    effects = book.join("b", 1.0, Train("b", 7, {"lr": 0.1}))
    assert effects == [Deliver(Order("o1", "b", 0, 7, {"lr": 0.1}, 1.0))]
    assert book.run.made == 2


def test_an_order_said_behind_a_merge_waits_until_its_version_exists(book: Book) -> None:
    effects = book.bring("o0", "a", 3.0, Aggregate((("o0.0", 1.0),)), Train("a", 5))
    assert effects == [Merge(1, (("o0.0", 1.0),), "main", True, {"o0.0": "a"})]
    assert book.run.open["a"].started is None
    effects = book.hear(Merged(1, ("o0.0",)), 4.5)
    assert effects == [
        told("a", "o0.0", "used", 1, ""),
        Deliver(Order("o1", "a", 1, 5, {}, 4.5)),
    ]
    book.bring("o1", "a", 9.0)
    assert isinstance(book.last, UpdateReceived)
    assert (book.last.update.base, book.last.update.started) == (1, 4.5)


def test_an_order_that_was_dropped_before_its_version_existed_is_never_delivered(
    book: Book,
) -> None:
    effects = book.bring(
        "o0", "a", 3.0, Aggregate((("o0.0", 1.0),)), Train("a", 5), Ask("a", "drop")
    )
    assert effects == [Merge(1, (("o0.0", 1.0),), "main", True, {"o0.0": "a"})]  # nobody to ask
    assert book.hear(Merged(1, ("o0.0",)), 4.0) == [told("a", "o0.0", "used", 1, "")]
    assert book.run.order("a", "o1") is None  # and nothing of it can arrive


def test_of_a_client_that_waits_twice_only_the_open_order_is_delivered(book: Book) -> None:
    book.bring("o0", "a", 3.0, Aggregate((("o0.0", 1.0),)), Train("a", 5), Ask("a", "drop"))
    book.hear(Evaluated(0, {}), 3.0, Train("a", 9))
    effects = book.hear(Merged(1, ("o0.0",)), 4.0)
    assert effects[1:] == [Deliver(Order("o2", "a", 1, 9, {}, 4.0))]


def test_an_order_of_a_later_version_is_not_delivered_with_an_earlier_one(book: Book) -> None:
    book.join("b", 0.0, Train("b", 5))
    book.bring("o0", "a", 3.0, Aggregate((("o0.0", 1.0),)), Train("a", 5), Ask("a", "drop"))
    book.bring("o1", "b", 3.0, Aggregate((("o1.0", 1.0),)), Train("a", 6))
    assert book.hear(Merged(1, ("o0.0",)), 4.0) == [told("a", "o0.0", "used", 1, "")]
    effects = book.hear(Merged(2, ("o1.0",)), 5.0)
    assert effects[1:] == [Deliver(Order("o3", "a", 2, 6, {}, 5.0))]


def test_ask_reaches_the_client_and_only_drop_closes_its_order(book: Book) -> None:
    order = book.run.open["a"]
    asked: tuple[Then, ...] = ("continue", "send")
    for then in asked:
        assert book.hear(Evaluated(0, {}), 1.0, Ask("a", then)) == [Interrupt(order, then)]
        assert book.run.open == {"a": order}
        assert order.asked  # from now on fewer steps are right
        order.asked = False
    assert book.hear(Evaluated(0, {}), 1.0, Ask("a", "drop")) == [Interrupt(order, "drop")]
    assert book.run.open == {}


def test_a_snapshot_leaves_the_order_open(book: Book) -> None:
    effects = book.bring("o0", "a", 2.0, Discard("o0.0s1", "not used"), final=False)
    assert effects == [told("a", "o0.0s1", "discarded", 0, "not used")]
    assert isinstance(book.last, UpdateReceived)
    assert (book.last.update.final, book.last.update.current) == (False, True)
    assert "a" in book.run.open


def test_work_of_a_closed_order_is_late_and_is_taken_once(book: Book) -> None:
    book.hear(ClientLeft("a", "gone"), 1.0)
    book.join("a", 2.0, Train("a", 5))
    assert book.run.expects("a", "o0", "o0.0") == "send"
    book.bring("o0", "a", 3.0, Discard("o0.0", "too late"))
    assert isinstance(book.last, UpdateReceived)
    assert (book.last.update.current, book.last.update.started) == (False, 0.0)
    assert book.run.open["a"].id == "o1"
    assert book.run.former == {}
    assert book.run.order("a", "o0") is None


def test_a_snapshot_of_a_closed_order_does_not_use_it_up(book: Book) -> None:
    book.hear(ClientLeft("a", "gone"), 1.0)
    book.bring("o0", "a", 2.0, Discard("o0.0s1", "no"), final=False)
    assert book.run.expects("a", "o0", "o0.0") == "send"


def test_only_so_many_closed_orders_are_remembered(book: Book) -> None:
    for _ in range(FORMER):
        book.hear(Evaluated(0, {}), 1.0, Ask("a", "drop"), Train("a", 5))
    assert book.run.order("a", "o0") is not None
    book.hear(Evaluated(0, {}), 1.0, Ask("a", "drop"), Train("a", 5))
    assert book.run.order("a", "o0") is None
    assert book.run.order("a", "o1") is not None
    assert book.run.expects("a", "o0", "o0.0") == "unknown"


def test_a_result_whose_order_was_forgotten_on_its_way_is_told_so(book: Book) -> None:
    heard = len(book.says.heard)
    effects = book.bring("o9", "a", 1.0)
    assert effects == [told("a", "o9.0", "discarded", 0, "its order is too old")]
    assert len(book.says.heard) == heard


def test_forgetting_one_former_order_keeps_the_others(book: Book) -> None:
    book.hear(Evaluated(0, {}), 1.0, Ask("a", "drop"), Train("a", 5))
    book.hear(Evaluated(0, {}), 1.0, Ask("a", "drop"))
    book.bring("o1", "a", 2.0, Discard("o1.0", "no"))
    assert [order.id for order in book.run.former["a"]] == ["o0"]


def test_an_order_of_another_client_is_not_ones_own(book: Book) -> None:
    assert book.run.order("b", "o0") is None
    assert book.run.expects("b", "o0", "o0.0") == "unknown"


# ---- updates ---------------------------------------------------------------------------------


def test_a_result_that_is_here_is_not_wanted_again(book: Book) -> None:
    assert book.run.expects("a", "o0", "o0.0") == "send"
    book.bring("o0", "a", 3.0)
    assert book.run.expects("a", "o0", "o0.0") == "have"  # held
    book.hear(Evaluated(0, {}), 3.0, Aggregate((("o0.0", 1.0),)))
    assert book.run.expects("a", "o0", "o0.0") == "have"  # being merged
    book.hear(Merged(1, ("o0.0",)), 4.0)
    assert book.run.expects("a", "o0", "o0.0") == "have"  # decided, not acknowledged
    book.run.acknowledge("a", "o0.0")
    assert book.run.expects("a", "o0", "o0.0") == "unknown"


def test_a_merge_tells_which_were_used_and_why_others_were_not(book: Book) -> None:
    book.join("b", 0.0, Train("b", 5))
    book.bring("o0", "a", 3.0)
    items = (("o0.0", 0.5), ("o1.0", 0.5))
    assert book.bring("o1", "b", 3.0, Aggregate(items, "main", outer=False)) == [
        Merge(1, items, "main", False, {"o0.0": "a", "o1.0": "b"})
    ]
    effects = book.hear(Merged(1, ("o1.0",), (("o0.0", "NaN"),)), 4.0)
    assert effects == [
        told("a", "o0.0", "discarded", 0, "NaN"),
        told("b", "o1.0", "used", 1, ""),
    ]
    assert (book.run.updates_used, book.run.steps_used) == (1, 5)
    assert (book.run.version, book.run.published) == (1, 1)


def test_outcomes_are_kept_until_each_is_acknowledged(book: Book) -> None:
    book.bring("o0", "a", 3.0, Discard("o0.0", "no"), Train("a", 5))
    book.bring("o1", "a", 4.0, Discard("o1.0", "no"))
    assert list(book.run.untold["a"]) == ["o0.0", "o1.0"]
    book.run.acknowledge("a", "o0.0")
    book.run.acknowledge("a", "o0.0")  # once more: nothing
    book.run.acknowledge("b", "o0.0")
    assert list(book.run.untold["a"]) == ["o1.0"]
    book.run.acknowledge("a", "o1.0")
    assert book.run.untold == {}


# ---- timers ----------------------------------------------------------------------------------


def test_a_timer_fires_once(book: Book) -> None:
    assert book.hear(Evaluated(0, {}), 1.0, SetTimer("t", 5.0)) == [Arm("t", 5.0)]
    assert book.run.timers == {"t": 5.0}
    heard = len(book.says.heard)
    book.hear(TimerFired("t"), 5.0)
    book.hear(TimerFired("t"), 5.0)
    assert len(book.says.heard) == heard + 1


def test_a_cancelled_timer_that_was_on_its_way_is_not_heard(book: Book) -> None:
    book.hear(Evaluated(0, {}), 1.0, SetTimer("t", 5.0))
    assert book.hear(Evaluated(0, {}), 2.0, CancelTimer("t")) == [Disarm("t")]
    assert book.hear(Evaluated(0, {}), 2.0, CancelTimer("t")) == []
    heard = len(book.says.heard)
    assert book.hear(TimerFired("t"), 5.0) == []
    assert len(book.says.heard) == heard


def test_a_timer_set_anew_does_not_fire_at_its_former_time(book: Book) -> None:
    book.hear(Evaluated(0, {}), 1.0, SetTimer("t", 5.0))
    assert book.hear(Evaluated(0, {}), 2.0, SetTimer("t", 8.0)) == [Arm("t", 8.0)]
    heard = len(book.says.heard)
    book.hear(TimerFired("t"), 5.0)
    assert len(book.says.heard) == heard
    book.hear(TimerFired("t"), 8.0)
    assert len(book.says.heard) == heard + 1


# ---- the end ---------------------------------------------------------------------------------


def test_finish_discards_what_is_held_drops_orders_and_disarms_timers(book: Book) -> None:
    book.join("b", 0.0, Train("b", 5))
    order = book.run.open["b"]
    book.hear(Evaluated(0, {}), 1.0, SetTimer("t", 9.0))
    effects = book.bring("o0", "a", 3.0, Finish("done"), Finish("again"), Train("a", 5))
    assert effects == [
        told("a", "o0.0", "discarded", 0, "the run is over"),
        Interrupt(order, "drop"),
        Disarm("t"),
        Stop("done"),
    ]
    assert (book.run.open, book.run.held, book.run.timers) == ({}, {}, {})


def test_finish_interrupts_nobody_whose_order_could_not_be_fetched_yet(book: Book) -> None:
    effects = book.bring("o0", "a", 3.0, Aggregate((("o0.0", 1.0),)), Train("a", 5), Finish("done"))
    assert effects == [Merge(1, (("o0.0", 1.0),), "main", True, {"o0.0": "a"}), Stop("done")]
    assert book.hear(Merged(1, ("o0.0",)), 4.0) == [told("a", "o0.0", "used", 1, "")]
    assert book.run.published == 1


def test_after_the_end_the_strategy_hears_nothing_and_clients_are_told(book: Book) -> None:
    book.hear(Evaluated(0, {}), 1.0, Finish("done"))
    heard = len(book.says.heard)
    assert book.bring("o0", "a", 2.0) == [told("a", "o0.0", "discarded", 0, "the run is over")]
    assert book.join("b", 3.0) == []
    assert book.hear(ClientLeft("b", "bye"), 4.0) == []
    assert len(book.says.heard) == heard


def test_a_stop_lets_the_strategy_merge_what_it_has_and_then_ends(book: Book) -> None:
    book.bring("o0", "a", 3.0)
    effects = book.hear(Stopping("3 versions done"), 4.0, Aggregate((("o0.0", 1.0),)))
    assert effects == [
        Merge(1, (("o0.0", 1.0),), "main", True, {"o0.0": "a"}),
        Stop("3 versions done"),
    ]
    assert book.run.finished == "3 versions done"
    assert book.hear(Stopping("again"), 5.0) == []
    assert book.run.finished == "3 versions done"


# ---- what no strategy may say ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("actions", "said"),
    [
        ([Train("nobody", 5)], "no such member"),
        ([Train("a", 5)], "its order o0 is open"),
        ([Ask("a", "drop"), Train("a", 0)], "at least one"),
        (
            [Ask("a", "drop"), Train("a", 10**5000)],
            r"Train\('a'\): its steps are more than 2\*\*53",
        ),
        ([Ask("a", "drop"), Train("a", 2.5)], r"Train\('a', 2.5\): steps are whole"),  # type: ignore[arg-type]
        ([SetTimer("t", math.nan)], r"SetTimer\('t', nan\)"),
        ([SetTimer("t", None)], r"SetTimer\('t', None\)"),  # type: ignore[arg-type]
        (["train"], "'train' is no action"),
        ([Ask("nobody", "send")], "no open order"),
        ([Aggregate((("o9.0", 1.0),))], "'o9.0' is not held"),
        ([Discard("o9.0", "no")], "'o9.0' is not held"),
    ],
)
def test_what_cannot_be_carried_out_stops_the_run_with_its_error(
    book: Book, actions: list[Action], said: str
) -> None:
    with pytest.raises(StrategyError, match=said):
        book.hear(Evaluated(0, {}), 1.0, *actions)


def test_an_update_cannot_stand_twice_in_one_aggregate(book: Book) -> None:
    book.bring("o0", "a", 3.0)
    with pytest.raises(StrategyError, match=r"'o0\.0' is not held"):
        book.hear(Evaluated(0, {}), 3.0, Aggregate((("o0.0", 0.5), ("o0.0", 0.5))))


@pytest.mark.parametrize("weight", [math.nan, math.inf, None])
def test_a_weight_is_a_number(book: Book, weight: float) -> None:
    """A NaN went into the merge, which then used nothing, version after version."""
    book.bring("o0", "a", 3.0)
    with pytest.raises(StrategyError, match=f"update 'o0.0' has weight {weight}"):
        book.hear(Evaluated(0, {}), 3.0, Aggregate((("o0.0", weight),)))


def test_a_driver_that_breaks_its_promises_is_stopped(book: Book) -> None:
    with pytest.raises(AssertionError, match="a joined twice"):
        book.join("a", 1.0)
    with pytest.raises(AssertionError, match="b left without"):
        book.hear(ClientLeft("b", "?"), 1.0)


def test_the_book_is_dumped_and_loaded_as_it_was(book: Book) -> None:
    book.join("b", 0.0, Train("b", 5))
    book.hear(ClientLeft("b", "gone"), 1.0)
    book.bring("o0", "a", 3.0, SetTimer("t", 9.0), Aggregate((("o0.0", 1.0),)), Train("a", 5))
    again = Run(book.says)
    state.restore(again, state.dump(book.run))
    assert again == book.run
