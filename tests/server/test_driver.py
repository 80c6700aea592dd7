"""The real-time driver: the same decisions as virtual time, everything written down first."""

import asyncio
import contextlib
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from atoll.aggregation.fedavg import FedAvg
from atoll.aggregation.fedbuff import FedBuff
from atoll.aggregation.fedcompass import FedCompass
from atoll.aggregation.strategy import Actions, Strategy
from atoll.protocols.errors import AtollError, ServerError
from atoll.protocols.events import (
    Action,
    CancelTimer,
    ClientInfo,
    ClientJoined,
    ClientLeft,
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
from atoll.server.clock import Clock
from atoll.server.driver import Driver
from atoll.server.inputs import Input, in_order
from atoll.server.journal import Batch, Journal, dump_actions
from atoll.server.replay import replay
from atoll.server.rules import Rules
from atoll.server.run import Deliver, Effect, Merge, Order, Outcome, Run, Tell
from atoll.server.simulator import simulate
from atoll.server.world import Absence, ClientModel
from tests.server.test_redo import largest_file

Heard = tuple[float, Event, list[Action]]


class Hand(Clock):
    """A clock that shows what it is told. A timer in its future never comes by itself."""

    shown = 0.0

    def now(self) -> float:
        return self.shown

    def wall(self, at: float) -> float:
        return 0.0 if at <= self.shown else 3600.0


@dataclass
class Answering:
    """A world that merges at once and, where it is given paces, trains in real time."""

    paces: dict[str, float] = field(default_factory=dict)  # seconds per step
    heard_: list[Heard] = field(default_factory=list)
    interrupts: list[tuple[str, Then]] = field(default_factory=list)
    told: list[Outcome] = field(default_factory=list)
    forget: list[str] = field(default_factory=list)
    meta: list[tuple[str, str]] = field(default_factory=list)
    unfinished: bool = False
    dropped: tuple[str, ...] = ()
    driver: Driver = field(init=False)

    def ready(self, effect: Deliver | Tell) -> None: ...

    def deliver(self, order: Order) -> None:
        if self.paces:
            loop = asyncio.get_running_loop()
            seconds = order.steps * self.paces[order.client]
            loop.call_later(seconds, lambda: self.driver.post(result(order)))

    def interrupt(self, order: Order, then: Then) -> None:
        self.interrupts.append((order.id, then))

    def merge(self, merge: Merge) -> None:
        dropped = tuple((u, "bad") for u, _ in merge.items if u in self.dropped)
        used = tuple(u for u, _ in merge.items if u not in self.dropped)
        self.driver.post(Merged(merge.version, used, dropped))

    def tell(self, client: str, outcome: Outcome) -> None:
        self.told.append(outcome)

    def quick(self, merge: Merge) -> bool:
        return False

    def heard(
        self, now: float, event: Event, actions: list[Action], effects: list[Effect]
    ) -> Callable[[], None]:
        return lambda: self.heard_.append((now, event, actions))

    def spent(self) -> tuple[list[str], list[tuple[str, str]]]:
        forget, self.forget = self.forget, []
        meta, self.meta = self.meta, []
        return forget, meta

    def busy(self) -> bool:
        return self.unfinished


def result(order: Order, steps: int | None = None) -> UpdateReceived:
    done = order.steps if steps is None else steps
    return UpdateReceived(Update(f"{order.id}.0", order.id, order.client, 0, done, done, 0.0, 0.1))


@contextmanager
def driven(
    folder: Path,
    strategy: Strategy,
    world: Answering | None = None,
    rules: Rules | None = None,
    clock: Clock | None = None,
) -> Iterator[Driver]:
    journal = Journal(folder / "journal.sqlite", "r", durable=False)
    world = world or Answering()
    driver = Driver(Run(strategy), journal, world, rules or Rules(), clock or Hand())
    world.driver = driver
    yield driver
    journal.close()


def world_of(driver: Driver) -> Answering:
    assert isinstance(driver.world, Answering)
    return driver.world


async def serving(driver: Driver, *events: Event) -> None:
    """Post these and serve until the run is over."""
    driver.attach()
    for event in events:
        driver.post(event)
    async with asyncio.timeout(10):
        await driver.serve()


def rows(driver: Driver) -> list[tuple[float, Event, str | None]]:
    return [(row.now, row.event, row.actions) for row in driver.journal.rows()]


JOINED = ClientJoined("a", ClientInfo(10))


# ---- the same decisions as the simulator -----------------------------------------------------

CLIENTS = [
    ClientModel("a", 0.11, noise=0.05, examples=30),
    ClientModel("b", 0.27, noise=0.05, absences=(Absence(11.0, 55.0), Absence(90.0, 95.0))),
    ClientModel("c", 0.8, examples=5, absences=(Absence(30.0, 42.0, "goodbye"),)),
    ClientModel("d", 0.5, joins=20.0, absences=(Absence(40.0, 70.0, "offline"),)),
]
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "fedavg": lambda: FedAvg(steps=10, cohort=2, deadline=6.0, min_clients=2),
    "fedbuff": lambda: FedBuff(size=3, steps=9, max_age=4.0),
    "fedcompass": lambda: FedCompass(min_steps=5, max_steps=30),
}


def arrivals(made: Callable[[], Strategy]) -> list[Heard]:
    """What a strategy hears and says in 120 virtual seconds of clients that come and go."""
    heard: list[Heard] = []

    def listen(now: float, event: Event, actions: list[Action]) -> None:
        heard.append((now, event, actions))

    simulate(made(), CLIENTS, 120.0, lease=10.0, listen=listen)
    return heard


async def fed(driver: Driver, recorded: list[Heard]) -> list[Heard]:
    """Feed the same arrivals to a real driver, each when it came; merges are the world's."""
    driver.attach()
    world, clock = world_of(driver), driver.clock
    assert isinstance(clock, Hand)
    serving = asyncio.create_task(driver.serve())
    for at, (now, event, _) in enumerate(recorded):
        clock.shown = now
        if not isinstance(event, Merged):
            driver.post(event)
        async with asyncio.timeout(5):
            while len(world.heard_) <= at and not serving.done():  # noqa: ASYNC110
                await asyncio.sleep(0)
    await asyncio.wait_for(serving, 5)
    return world.heard_


@pytest.mark.parametrize("name", STRATEGIES)
def test_driver_and_simulator_decide_the_same_on_the_same_arrivals(
    name: str, tmp_path: Path
) -> None:
    recorded = arrivals(STRATEGIES[name])
    kinds = {type(event) for _, event, _ in recorded}
    assert {ClientJoined, ClientLeft, UpdateReceived, Merged, Stopping} <= kinds
    with driven(tmp_path, STRATEGIES[name]()) as driver:
        heard = asyncio.run(fed(driver, recorded))
        assert [said(row) for row in heard] == [said(row) for row in recorded]
        assert [row[2] for row in rows(driver)] == [dump_actions(row[2]) for row in recorded]


def said(row: Heard) -> tuple[float, Event, str]:
    """Updates but for what only a real client knows."""
    now, event, actions = row
    return now, event, dump_actions(actions)


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_was_decided_in_real_time_comes_again_from_the_journal(
    name: str, tmp_path: Path
) -> None:
    paces = {"a": 0.0002, "b": 0.0004, "c": 0.0011}
    made: dict[str, Callable[[], Strategy]] = {
        "fedavg": lambda: FedAvg(steps=10, deadline=0.005, min_clients=1),
        "fedbuff": lambda: FedBuff(size=3, steps=9, max_age=0.002),
        "fedcompass": lambda: FedCompass(min_steps=5, max_steps=30),
    }
    world = Answering(paces)
    clock = Clock()
    clock.start()
    with driven(tmp_path, made[name](), world, Rules(versions=12), clock) as driver:
        joins = [ClientJoined(c, ClientInfo(10, paces[c])) for c in sorted(paces)]
        asyncio.run(serving(driver, *joins))
        assert driver.run.version >= 12
        assert replay(made[name](), world.heard_) == len(world.heard_)
        run = Run(made[name]())
        for now, event, actions in rows(driver):
            _, again, _ = run.handle(event, now)
            assert dump_actions(again) == actions
        times = [now for now, _, _ in rows(driver)]
        assert times == sorted(times)


# ---- ties ------------------------------------------------------------------------------------


def test_ties_are_leave_join_update_timer_then_by_arrival() -> None:
    update = UpdateReceived(Update("o1.0", "o1", "a", 0, 1, 1, 0.0, 0.1))
    other = UpdateReceived(Update("o2.0", "o2", "b", 0, 1, 1, 0.0, 0.1))
    events: list[Event] = [
        Stopping("over"), TimerFired("t"), other, update, ClientJoined("c", ClientInfo(1)),
        ClientLeft("b", "gone"), Evaluated(1, {}),
    ]  # fmt: skip
    inputs = [Input(3.0, event, None, None) for event in events]
    early = Input(2.0, TimerFired("early"), None, None)
    ordered = [one.event for one in in_order([*inputs, early])]
    assert ordered == [
        TimerFired("early"), events[5], events[4], other, update, events[6], events[1], events[0],
    ]  # fmt: skip


def test_a_client_that_joins_and_leaves_at_one_instant_has_done_so_in_this_order() -> None:
    """Sorted by rank alone it left first, and the run died of a leave without a join."""
    events: list[Event] = [JOINED, ClientLeft("a", "gone"), JOINED, ClientLeft("b", "gone")]
    ordered = [one.event for one in in_order([Input(1.0, e, None, None) for e in events])]
    assert ordered == [events[3], events[0], events[1], events[2]]


@dataclass
class Deadline(Strategy):
    """Gives one order with a deadline, and remembers what it heard first."""

    at: float = 1.0
    heard: list[str] = field(default_factory=list, init=False)

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        yield Train(client, 5)
        yield SetTimer("deadline", self.at)

    def on_update(self, update: Update, now: float) -> Actions:
        self.heard.append(f"update at {now:g}")
        yield CancelTimer("deadline")
        yield Finish("in time")

    def on_timer(self, timer: str, now: float) -> Actions:
        self.heard.append(f"timer at {now:g}")
        yield Finish("too late")


def test_an_update_at_the_instant_of_its_deadline_is_in_time(tmp_path: Path) -> None:
    """A timer of the loop may come a hair before its time: it is stamped with its own."""
    strategy = Deadline()
    with driven(tmp_path, strategy) as driver:
        assert isinstance(driver.clock, Hand)
        clock = driver.clock

        async def late() -> None:
            driver.attach()
            driver.post(JOINED)
            await driver._take(await driver._queue.all())
            clock.shown = 0.9999
            driver._fire("deadline", 1.0)
            driver.post(result(driver.run.open["a"]))
            await serving(driver)

        asyncio.run(late())
    assert strategy.heard == ["update at 1"]
    assert driver.run.finished == "in time"


def test_a_timer_cancelled_while_it_waits_to_be_handled_is_not_heard(tmp_path: Path) -> None:
    strategy = Deadline()
    with driven(tmp_path, strategy) as driver:
        assert isinstance(driver.clock, Hand)
        clock = driver.clock

        async def both() -> None:
            driver.attach()
            driver.post(JOINED)
            await driver._take(await driver._queue.all())
            clock.shown = 2.0
            driver.post(result(driver.run.open["a"]))
            driver._fire("deadline", 1.0)
            await serving(driver)

        asyncio.run(both())
        assert [actions for _, event, actions in rows(driver) if isinstance(event, TimerFired)] == [
            "[]"
        ]
    assert strategy.heard == ["update at 2"]


def test_a_timer_fires_at_its_time(tmp_path: Path) -> None:
    clock = Clock()
    clock.start()
    with driven(tmp_path, Deadline(at=0.02), clock=clock) as driver:
        asyncio.run(serving(driver, JOINED))
    assert driver.run.finished == "too late"
    assert 0.02 <= world_of(driver).heard_[-1][0] < 1.0


def test_timers_of_a_recovered_run_are_armed_again(tmp_path: Path) -> None:
    clock = Clock(5.0)
    clock.start()
    with driven(tmp_path, Deadline(), clock=clock) as driver:
        driver.run.members.add("a")
        driver.run.timers["deadline"] = 5.01
        asyncio.run(serving(driver))
    assert driver.run.finished == "too late"


# ---- what goes wrong -------------------------------------------------------------------------


@dataclass
class Broken(Strategy):
    """Fails on its second client."""

    joined: int = field(default=0, init=False)

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        self.joined += 1
        if self.joined == 2:
            raise ZeroDivisionError("no weights")
        yield Train(client, 5)


def test_an_exception_in_a_strategy_stops_the_run_and_is_journaled(tmp_path: Path) -> None:
    third = ClientJoined("c", ClientInfo(1))
    with driven(tmp_path, Broken()) as driver:
        with pytest.raises(ServerError, match="the strategy failed on ClientJoined") as failed:
            asyncio.run(serving(driver, JOINED, ClientJoined("b", ClientInfo(1)), third))
        assert failed.value.code == "FL-S204"
        assert driver.error is failed.value
        assert list(driver.journal.failures()) == [(2, "ZeroDivisionError('no weights')")]
        kept = rows(driver)
        assert [actions is None for _, _, actions in kept] == [False, True, True]
        assert kept[2][1] == third  # an input that was taken is not lost
        assert len(world_of(driver).heard_) == 1  # nothing was handled behind the failure


def test_what_no_driver_can_carry_out_stops_the_run_too(tmp_path: Path) -> None:
    class Wild(Strategy):
        def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
            yield Train("nobody", 5)

    with driven(tmp_path, Wild()) as driver, pytest.raises(ServerError, match="no such member"):
        asyncio.run(serving(driver, JOINED))


def test_a_world_that_fails_is_no_good_end(tmp_path: Path) -> None:
    """An error outside of the strategy ended the task alone, and the run passed for finished."""

    class Failing(Answering):
        error: Exception = OSError("no history")

        def deliver(self, order: Order) -> None:
            raise self.error

    for number, (error, code) in enumerate(
        [(OSError("no history"), "FL-S100"), (ServerError("FL-S203", "full"), "FL-S203")]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        world = Failing()
        world.error = error
        with driven(folder, Broken(), world) as driver, pytest.raises(AtollError) as failed:
            asyncio.run(serving(driver, JOINED))
        assert failed.value.code == code
        assert driver.error is failed.value


def test_a_failure_elsewhere_ends_the_run_with_its_error(tmp_path: Path) -> None:
    with driven(tmp_path, FedAvg(min_clients=1)) as driver:

        async def fail() -> None:
            driver.attach()
            asyncio.get_running_loop().call_later(0.01, driver.fail, ServerError("FL-S203", "full"))
            driver.fail_threadsafe(ServerError("FL-S100", "later"))
            await serving(driver, JOINED)

        with pytest.raises(ServerError, match="later"):
            asyncio.run(fail())


def test_a_journal_that_cannot_be_written_ends_the_run_before_anything_is_handled(
    tmp_path: Path,
) -> None:
    with driven(tmp_path, FedAvg(min_clients=1)) as driver:
        many = [ClientJoined(f"c{i}", ClientInfo(1)) for i in range(20)]
        with largest_file(0), pytest.raises(ServerError) as full:
            asyncio.run(serving(driver, *many))
        assert full.value.code == "FL-S203"
        assert world_of(driver).heard_ == []
        assert rows(driver) == []


# ---- the end ---------------------------------------------------------------------------------


def test_a_rule_ends_the_run_and_its_last_merge_is_awaited(tmp_path: Path) -> None:
    world = Answering({"a": 0.0001, "b": 0.0001})
    clock = Clock()
    clock.start()
    with driven(tmp_path, FedBuff(size=2, steps=5), world, Rules(updates=6), clock) as driver:
        joins = [ClientJoined(c, ClientInfo(10)) for c in "ab"]
        asyncio.run(serving(driver, *joins))
        assert driver.run.finished == "6 updates done"
        assert not driver.run.merging
        decided = [outcome.update for outcome in world.told]
        assert len(decided) == len(set(decided))
        kept = [e.update.id for _, e, _ in rows(driver) if isinstance(e, UpdateReceived)]
        assert sorted(decided) == sorted(kept)


def test_a_rule_that_held_before_a_restart_holds_after_it(tmp_path: Path) -> None:
    """Killed between the last version and its stop, the run went on for one version more."""
    with driven(tmp_path, FedAvg(min_clients=1), rules=Rules(versions=3)) as driver:
        driver.run.version = driver.run.published = 3
        asyncio.run(serving(driver))
        assert driver.run.finished == "3 versions done"


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("quick", [True, False])
def test_no_version_is_begun_beyond_the_last_that_was_asked_for(
    tmp_path: Path, quick: bool, together: bool
) -> None:
    """Results that came while the last version was made or written became one more."""
    world = Quick() if quick else Answering()
    with driven(tmp_path, FedBuff(size=1, steps=5), world, Rules(versions=2)) as driver:

        async def five() -> None:
            driver.attach()
            joins = [ClientJoined(c, ClientInfo(10)) for c in "abcde"]
            for one in joins:
                driver.post(one)
            await driver._take(await driver._queue.all())
            for order in list(driver.run.open.values()):
                driver.post(result(order))
                if not together:
                    await driver._take(await driver._queue.all())
            async with asyncio.timeout(10):
                await driver.serve()

        asyncio.run(five())
        assert (driver.run.published, driver.run.finished) == (2, "2 versions done")
        fates = {outcome.update: outcome.fate for outcome in world.told}
        used = ["o0.0", "o1.0"]
        assert fates == {f"o{n}.0": "used" if f"o{n}.0" in used else "discarded" for n in range(5)}
        heard = [type(event) for _, event, _ in rows(driver)]
        assert heard.count(Stopping) == 1
        again = Run(FedBuff(size=1, steps=5))
        for now, event, actions in rows(driver):
            assert dump_actions(again.handle(event, now)[1]) == actions
        assert again.finished == driver.run.finished


def test_a_strategy_that_fails_on_the_end_fails_the_run(tmp_path: Path) -> None:
    class Last(FedBuff):
        def on_stop(self, reason: str, now: float) -> Actions:
            raise ZeroDivisionError

    with driven(tmp_path, Last(size=1, steps=5), Quick(), Rules(versions=1)) as driver:

        async def one() -> None:
            driver.attach()
            driver.post(JOINED)
            await driver._take(await driver._queue.all())
            driver.post(result(driver.run.open["a"]))
            await driver.serve()

        with pytest.raises(ServerError, match="Stopping: ZeroDivisionError"):
            asyncio.run(one())


def test_a_limit_of_time_ends_a_run_in_which_nothing_happens(tmp_path: Path) -> None:
    clock = Clock()
    clock.start()
    with driven(tmp_path, FedAvg(min_clients=1), rules=Rules(seconds=0.02), clock=clock) as driver:
        began = time.monotonic()
        asyncio.run(serving(driver))
    assert driver.run.finished == "0.02 seconds done"
    assert time.monotonic() - began < 5


def test_a_finished_run_waits_for_what_its_world_still_has_to_say(tmp_path: Path) -> None:
    """The evaluation of the last version came too late for its own summary."""
    with driven(tmp_path, Deadline()) as driver:
        world = world_of(driver)
        world.unfinished = True

        async def end() -> None:
            driver.attach()
            driver.stop("enough")
            driver.stop("twice")
            served = asyncio.create_task(driver.serve())
            while driver.run.finished is None:  # noqa: ASYNC110
                await asyncio.sleep(0)
            for _ in range(3):
                driver.wake()
                await asyncio.sleep(0.005)
            assert not served.done()
            driver.post_threadsafe(Evaluated(0, {"accuracy": 0.5}))
            world.unfinished = False
            driver.wake()
            await asyncio.wait_for(served, 30)

        asyncio.run(end())
        assert driver.run.finished == "enough"
        assert driver.rules.best == 0.5
        assert [type(event) for _, event, _ in rows(driver)] == [Stopping, Evaluated]


def test_an_evaluation_that_meets_the_target_ends_the_run(tmp_path: Path) -> None:
    with driven(tmp_path, FedAvg(min_clients=2), rules=Rules(target=0.9)) as driver:
        asyncio.run(serving(driver, JOINED, Evaluated(1, {"accuracy": 0.95})))
        assert driver.run.finished == "target reached: accuracy 0.9500, wanted 0.9"


# ---- the journal -----------------------------------------------------------------------------


def test_a_receipt_comes_once_its_input_is_durable_and_handled(tmp_path: Path) -> None:
    with driven(tmp_path, Deadline()) as driver:
        seen: list[tuple[int, bool]] = []

        async def post() -> None:
            driver.attach()
            driver.post(
                JOINED, then=lambda: seen.append((len(rows(driver)), bool(driver.run.members)))
            )
            driver.post(Stopping("enough"))
            await driver.serve()

        asyncio.run(post())
    assert seen == [(2, True)]


def test_while_the_disk_is_at_it_nobody_is_told_anything(tmp_path: Path) -> None:
    """A receipt or an order that is out before its input is durable is a promise nobody keeps."""
    said: list[str] = []
    begun, free = threading.Event(), threading.Event()

    class Saying(Answering):
        def deliver(self, order: Order) -> None:
            said.append(order.client)
            self.driver.stop("enough")

    with driven(tmp_path, FedAvg(min_clients=1, steps=1), Saying()) as driver:
        write = driver.journal.write

        def slowly() -> None:
            begun.set()
            assert free.wait(10)
            write()

        driver.journal.write = slowly  # type: ignore[method-assign]

        async def watched() -> list[str]:
            driver.attach()
            driver.post(JOINED, then=lambda: said.append("receipt"))
            running = asyncio.create_task(driver.serve())
            while not begun.is_set():  # noqa: ASYNC110  # another thread says so
                await asyncio.sleep(0)
            for _ in range(100):
                await asyncio.sleep(0)
            early = list(said)
            free.set()
            await running
            return early

        assert asyncio.run(watched()) == []
    assert said == ["a", "receipt"]


def test_orders_are_made_ready_while_their_input_is_written(tmp_path: Path) -> None:
    said: list[str] = []
    ready = threading.Event()

    class Saying(Answering):
        def ready(self, effect: Deliver | Tell) -> None:
            assert isinstance(effect, Deliver)
            said.append(f"ready {effect.order.id}")
            ready.set()

        def deliver(self, order: Order) -> None:
            said.append(f"sent {order.id}")

    with driven(tmp_path, FedAvg(min_clients=1, steps=1), Saying()) as driver:
        write = driver.journal.write

        def slowly() -> None:
            assert ready.wait(10), "it was not made ready while this was written"
            said.append("written")
            write()

        driver.journal.write = slowly  # type: ignore[method-assign]

        async def post() -> None:
            driver.attach()
            driver.post(JOINED, then=lambda: said.append("receipt"))
            await driver._take(await driver._queue.all())

        asyncio.run(post())
        driver._disk.close()
        driver.journal.write = write  # type: ignore[method-assign]
    assert said == ["ready o0", "written", "sent o0", "receipt"]


def test_what_the_world_no_longer_needs_goes_with_the_next_inputs(tmp_path: Path) -> None:
    with driven(tmp_path, Deadline()) as driver:
        world_of(driver).meta.append(("membership", "{}"))
        asyncio.run(serving(driver, JOINED, Stopping("enough")))
        assert driver.journal.meta("membership") == "{}"


def test_snapshots_are_taken_every_so_many_inputs_where_there_are_any(tmp_path: Path) -> None:
    texts: list[str | None] = ["one", None]
    with driven(tmp_path, Deadline()) as driver:
        driver.snapshot_every = 2
        driver.snapshot = lambda: texts.pop(0)

        async def post() -> None:
            driver.attach()
            for client in "abcd":
                driver.post(ClientJoined(client, ClientInfo(1)))
                await driver._take(await driver._queue.all())
                await driver._settle()
            await serving(driver, Stopping("enough"))

        driver.run.strategy = Strategy()
        asyncio.run(post())
        assert texts == []
        assert driver.journal.last_snapshot() == (2, 0.0, "one")


def test_an_interrupt_reaches_the_world(tmp_path: Path) -> None:
    with driven(tmp_path, Deadline()) as driver:
        asyncio.run(serving(driver, JOINED, Stopping("enough")))
        assert world_of(driver).interrupts == [("o0", "drop")]


def test_the_clock_stands_still_until_it_is_started() -> None:
    clock = Clock(7.0)
    assert clock.now() == 7.0
    assert clock.wall(9.5) == 2.5
    assert clock.wall(3.0) == 0.0
    clock.start()
    assert 7.0 <= clock.now() < 8.0


def test_decisions_that_cannot_be_written_at_the_end_are_told(tmp_path: Path) -> None:
    with contextlib.ExitStack() as full:

        class Last(Strategy):
            def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
                full.enter_context(largest_file(0))
                yield Finish("enough")

        with driven(tmp_path, Last()) as driver:
            with pytest.raises(ServerError) as told:
                asyncio.run(serving(driver, JOINED))
            assert told.value.code == "FL-S203"
            full.close()
            assert rows(driver) == []


def test_sqlite_follows_when_nothing_else_is_to_be_done(tmp_path: Path) -> None:
    """Somebody may look into it with tools of their own; the log alone is not for reading."""
    with driven(tmp_path, FedAvg(steps=1, min_clients=1)) as driver:

        def followed() -> int:
            with contextlib.closing(sqlite3.connect(tmp_path / "journal.sqlite")) as look:
                return int(look.execute("SELECT count(*) FROM event").fetchone()[0])

        async def quiet() -> None:
            driver.attach()
            served = asyncio.create_task(driver.serve())
            driver.post(JOINED)
            while not world_of(driver).heard_:  # noqa: ASYNC110  # the disk says so
                await asyncio.sleep(0)
            assert followed() == 0
            while not followed():  # noqa: ASYNC110  # the disk says so
                await asyncio.sleep(0.01)
            driver.halt()
            await served

        asyncio.run(asyncio.wait_for(quiet(), 10))


class Quick(Answering):
    """A world whose merges take no time: they are heard without a wait for the disk."""

    def quick(self, merge: Merge) -> bool:
        return True

    def merge(self, merge: Merge) -> None:
        self.driver.derive(Merged(merge.version, tuple(u for u, _ in merge.items)))


async def amid_writing(driver: Driver, then: Callable[["asyncio.Task[None]"], object]) -> bool:
    """Serve; while a result is being written, which takes its time, do `then`. Whether it was
    written when `serve` had ended. Raises what `serve` does."""
    begun, free, ended = threading.Event(), threading.Event(), threading.Event()
    write = driver.journal.write

    def slowly() -> None:
        begun.set()
        assert free.wait(10)
        write()
        ended.set()

    driver.attach()
    driver.post(JOINED)
    await driver._take(await driver._queue.all())
    driver.journal.write = slowly  # type: ignore[method-assign]
    driver.post(result(driver.run.open["a"]))
    running = asyncio.create_task(driver.serve())
    while not begun.is_set():  # noqa: ASYNC110  # another thread says so
        await asyncio.sleep(0)
    then(running)
    asyncio.get_running_loop().call_later(0.01, free.set)
    try:
        await running
    except asyncio.CancelledError:
        assert running.cancelled()
    driver.journal.write = write  # type: ignore[method-assign]
    return ended.is_set()


def test_a_driver_that_is_cancelled_while_it_writes_ends_when_that_is_written(
    tmp_path: Path,
) -> None:
    """What had followed was written from another thread meanwhile, and then the journal closed."""
    with driven(tmp_path, FedBuff(size=1, steps=5), Quick()) as driver:
        assert asyncio.run(amid_writing(driver, lambda running: running.cancel()))
        kinds = [type(event).__name__ for _, event, _ in rows(driver)]
        assert kinds == ["ClientJoined", "UpdateReceived", "Merged"]


def test_a_driver_that_is_halted_while_it_writes_says_what_was_written(tmp_path: Path) -> None:
    """The history of a stopped server ended a round before its journal and its summary."""
    world = Quick()
    with driven(tmp_path, FedBuff(size=1, steps=5), world) as driver:

        def halt(_: object) -> None:
            driver.halt()
            driver.post(ClientJoined("b", ClientInfo(1)))  # too late

        assert asyncio.run(amid_writing(driver, halt))
        written = [type(event).__name__ for _, event, _ in rows(driver)]
        assert written == ["ClientJoined", "UpdateReceived", "Merged"]
        assert [type(event).__name__ for _, event, _ in world.heard_] == written


def test_what_follows_from_an_input_has_its_time_not_that_of_what_waits(tmp_path: Path) -> None:
    """It was stamped later than inputs that had come meanwhile, and the run's time went back."""
    world = Quick()
    with driven(tmp_path, FedBuff(size=1, steps=5), world) as driver:
        assert isinstance(driver.clock, Hand)
        clock = driver.clock

        async def three() -> None:
            driver.attach()
            driver.post(JOINED)
            await driver._take(await driver._queue.all())
            clock.shown = 1.0
            driver.post(result(driver.run.open["a"]))
            batch = await driver._queue.all()
            clock.shown = 2.0
            driver.post(ClientJoined("b", ClientInfo(1)))  # while the batch goes to the disk
            await driver._take(batch)
            clock.shown = 3.0
            await serving(driver, Stopping("enough"))

        asyncio.run(three())
        times = [(now, type(event).__name__) for now, event, _ in rows(driver)]
        assert times == [
            (0.0, "ClientJoined"), (1.0, "UpdateReceived"), (1.0, "Merged"), (2.0, "ClientJoined"),
            (3.0, "Stopping"),
        ]  # fmt: skip


def test_what_followed_and_was_lost_comes_again_first_and_at_its_time(tmp_path: Path) -> None:
    """Its orders were out already: had anything new come before, their numbers would be others'."""
    clock = Clock(7.0)
    with driven(tmp_path, FedBuff(size=1, steps=5), Quick(), clock=clock) as driver:
        driver.run.handle(JOINED, 6.0)
        update = result(driver.run.open["a"])
        driver.run.handle(update, 7.0)
        clock.start()

        async def again() -> None:
            driver.attach()
            driver.derive(Merged(1, (update.update.id,)))
            await serving(driver, ClientJoined("b", ClientInfo(1)), Stopping("enough"))

        asyncio.run(again())
        heard = [(now, type(event).__name__) for now, event, _ in rows(driver)]
        assert heard[0] == (7.0, "Merged")
        assert [name for _, name in heard] == ["Merged", "ClientJoined", "Stopping"]
        clients = [order.client for order in driver.run.former["a"]]
        assert clients == ["a"]
        assert driver.run.former["a"][-1].id == "o1"


def test_what_follows_outside_of_any_input_is_an_input_of_its_own(tmp_path: Path) -> None:
    with driven(tmp_path, FedBuff(size=1, steps=5), Quick()) as driver:
        assert isinstance(driver.clock, Hand)
        clock = driver.clock

        async def later() -> None:
            driver.attach()
            served = asyncio.create_task(driver.serve())
            await asyncio.sleep(0)
            clock.shown = 5.0
            driver.derive(Evaluated(0, {"accuracy": 0.5}))
            driver.stop("enough")
            await asyncio.wait_for(served, 5)

        asyncio.run(later())
        assert rows(driver)[0][:2] == (5.0, Evaluated(0, {"accuracy": 0.5}))


def test_a_strategy_may_fail_on_what_follows_too(tmp_path: Path) -> None:
    class Failing(FedBuff):
        def on_merged(self, merged: Merged, now: float) -> Actions:
            raise ZeroDivisionError
            yield  # pragma: no cover

    with driven(tmp_path, Failing(size=1, steps=5), Quick()) as driver:

        async def fail() -> None:
            driver.attach()
            driver.post(JOINED)
            await driver._take(await driver._queue.all())
            await serving(driver, result(driver.run.open["a"]))

        with pytest.raises(ServerError, match="failed on Merged") as failed:
            asyncio.run(fail())
        assert failed.value.code == "FL-S204"
        assert [seq for seq, _ in driver.journal.failures()] == [3]


# ---- what is said, and when ------------------------------------------------------------------


class Careful(Answering):
    """Looks what a process killed now would leave, whenever something shows outside."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.seen: list[tuple[str, int]] = []  # what was said, inputs in the journal by then

    def _look(self, what: str) -> None:
        with tempfile.TemporaryDirectory() as copy:
            shutil.copytree(self.folder, copy, dirs_exist_ok=True)
            left = Journal(Path(copy) / "journal.sqlite", "r", durable=False)
            self.seen.append((what, left.seq))
            left.close()

    def deliver(self, order: Order) -> None:
        self._look(order.id)

    def tell(self, client: str, outcome: Outcome) -> None:
        self._look(outcome.fate)


def joined(client: str) -> ClientJoined:
    return ClientJoined(client, ClientInfo(1))


def test_nothing_is_said_of_an_input_that_is_not_written(tmp_path: Path) -> None:
    world = Careful(tmp_path)
    with driven(tmp_path, FedAvg(steps=1, min_clients=2), world) as driver:

        async def two() -> None:
            driver.attach()
            driver.post(joined("a"))
            await driver._take(await driver._queue.all())
            assert world.seen == []  # nobody waits: it is not written yet either
            assert driver.journal.behind
            driver.post(joined("b"))
            await driver._take(await driver._queue.all())
            assert world.seen == [("o0", 2), ("o1", 2)]
            await serving(driver, Stopping("enough"))

        asyncio.run(two())


def test_inputs_for_which_only_receipts_wait_are_written_together(tmp_path: Path) -> None:
    with driven(tmp_path, FedAvg(steps=1, min_clients=3), Careful(tmp_path)) as driver:
        receipts: list[str] = []
        commits: list[int] = []
        stage = driver.journal.stage

        def counted(batch: Batch) -> None:
            commits.append(len(batch.entries))
            stage(batch)

        driver.journal.stage = counted  # type: ignore[method-assign]

        async def three() -> None:
            driver.attach()
            for client in "abc":
                driver.post(joined(client))
            await driver._take(await driver._queue.all())
            for client in "abc":
                done = result(driver.run.open[client])
                driver.post(done, then=lambda: receipts.append(str(len(commits))))
                await driver._take(await driver._queue.all())
                assert len(receipts) == (3 if client == "c" else 0)
            await serving(driver, Stopping("enough"))

        asyncio.run(three())
        assert commits[:2] == [3, 3]
        assert receipts == ["2", "2", "2"]


def test_a_receipt_does_not_wait_for_an_input_that_never_comes(tmp_path: Path) -> None:
    with driven(tmp_path, FedAvg(steps=1, min_clients=3)) as driver:

        async def one() -> None:
            served = asyncio.create_task(driver.serve())
            await asyncio.sleep(0)
            written = asyncio.Event()
            driver.post(joined("a"), then=written.set)
            await asyncio.wait_for(written.wait(), 5)
            assert [type(event).__name__ for _, event, _ in rows(driver)] == ["ClientJoined"]
            driver.stop("enough")
            await asyncio.wait_for(served, 5)

        asyncio.run(one())


def test_what_comes_after_waits_for_all_that_came_before(tmp_path: Path) -> None:
    """A client that is back is told of its order: by then the order must be in the journal."""
    with driven(tmp_path, FedAvg(steps=1, min_clients=2)) as driver:
        seen: list[int] = []

        def look() -> None:
            seen.append(len(rows(driver)))

        async def back() -> None:
            driver.attach()
            served = asyncio.create_task(driver.serve())
            await asyncio.sleep(0)
            driver.post(joined("a"))
            driver.after(look)
            driver.stop("enough")
            driver.after(look)
            await asyncio.wait_for(served, 5)
            driver.after(look)

        asyncio.run(back())
        assert seen == [2, 2, 2]


def test_a_journal_that_failed_writes_nothing_that_followed(tmp_path: Path) -> None:
    """What was worked out while the disk refused its cause would make no sense without it."""
    with driven(tmp_path, FedBuff(size=1, steps=5), Quick()) as driver:

        async def full() -> None:
            driver.attach()
            driver.post(JOINED)
            await driver._take(await driver._queue.all())
            driver.post(result(driver.run.open["a"]))
            with largest_file(0), pytest.raises(ServerError, match="large"):
                await driver._take(await driver._queue.all())
            driver.journal.flush()

        asyncio.run(full())
        assert [type(event).__name__ for _, event, _ in rows(driver)] == ["ClientJoined"]
        driver._disk.close()
