"""The base of all strategies, a strategy of one's own, and the checks that find a bad one."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

import atoll.aggregation
from atoll.aggregation import FedAvg, FedBuff, FedCompass, Strategy
from atoll.aggregation.strategy import Actions
from atoll.aggregation.testing import check_strategy, history, restart
from atoll.aggregation.virtual import Virtual
from atoll.protocols import state
from atoll.protocols.errors import ServerError
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
    TimerFired,
    Train,
    Update,
    UpdateReceived,
)


def result(**more: bool) -> UpdateReceived:
    return UpdateReceived(Update("u", "o", "a", 0, 5, 5, 0.0, 1.0, {}, **more))


# ---- the base class


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (ClientJoined("a", ClientInfo(1)), []),
        (ClientLeft("a", "gone"), []),
        (result(), []),
        (result(current=False), [Discard("u", "its order was closed")]),
        (result(final=False), [Discard("u", "snapshots are not used by this strategy")]),
        (TimerFired("t"), []),
        (Merged(1, ("u",)), []),
        (Evaluated(1, {"accuracy": 0.5}), []),
        (Stopping("time is up"), []),
    ],
)
def test_every_event_has_an_empty_answer(event: Event, said: list[Action]) -> None:
    assert Strategy().handle(event, 0.0) == said


def test_a_hook_without_a_yield_is_told_with_its_remedy() -> None:
    class Halting(Strategy):
        def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:  # type: ignore[empty-body]
            pass

    with pytest.raises(ServerError) as caught:
        Halting().handle(ClientJoined("a", ClientInfo(1)), 0.0)
    assert caught.value.code == "FL-S204"
    assert caught.value.message == "Halting answers ClientJoined with None, not with actions"
    assert "yield from ()" in caught.value.hint


@pytest.mark.parametrize(
    ("strategy", "clients", "sizes"),
    [
        (Strategy(), 4, (1, None)),
        (FedAvg(), None, (1, None)),
        (FedAvg(cohort=8, min_results=2), None, (2, 8)),
        (FedAvg(cohort=8), 5, (1, 5)),
        (FedAvg(cohort=8, late="stale"), 5, (1, None)),
        (FedBuff(size=3), 2, (1, 3)),
        (FedCompass(), 4, (1, None)),
    ],
)
def test_a_strategy_knows_how_many_updates_a_version_may_have(
    strategy: Strategy, clients: int | None, sizes: tuple[int, int | None]
) -> None:
    assert strategy.merge_sizes(clients) == sizes


def test_what_a_strategy_gives_depends_on_its_parameters() -> None:
    assert FedAvg().gives == {"rounds"}
    assert FedAvg(late="stale").gives == FedBuff().gives == FedCompass().gives == {"stale"}


# ---- a strategy of one's own


@dataclass
class Each(Strategy):
    """Merge every result alone, at full weight."""

    steps: int = 3

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        yield Train(client, self.steps)

    def on_update(self, update: Update, now: float) -> Actions:
        yield Aggregate(((update.id, 1.0),))
        yield Train(update.client, self.steps)


def test_a_strategy_of_a_few_lines_holds_to_all_promises() -> None:
    check_strategy(Each, seeds=40, steps=(3, 3))


@dataclass
class Twice(Each):
    def on_update(self, update: Update, now: float) -> Actions:
        yield Aggregate(((update.id, 1.0),))
        yield Aggregate(((update.id, 1.0),))


@dataclass
class Forgets(Each):
    def on_update(self, update: Update, now: float) -> Actions:
        yield Train(update.client, self.steps)


@dataclass
class Hurries(Each):
    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        yield Train(client, self.steps)
        yield Train(client, self.steps)


@dataclass
class Haunted(Each):
    def on_leave(self, client: str, reason: str, now: float) -> Actions:
        yield Train(client, self.steps)


@dataclass
class Endless(Each):
    def on_update(self, update: Update, now: float) -> Actions:
        yield Aggregate(((update.id, float("nan")),))


@dataclass
class Negative(Each):
    def on_update(self, update: Update, now: float) -> Actions:
        yield Aggregate(((update.id, -1.0),))


@dataclass
class Empty(Each):
    def on_update(self, update: Update, now: float) -> Actions:
        yield Aggregate(())


@dataclass
class Invents(Each):
    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        yield Discard("u", "never received")


@dataclass
class Mute(Each):
    def on_update(self, update: Update, now: float) -> Actions:
        yield Discard(update.id, "")


@dataclass
class Yesterday(Each):
    def on_update(self, update: Update, now: float) -> Actions:
        yield SetTimer("t", now - 1.0)


@dataclass
class Asks(Each):
    def on_leave(self, client: str, reason: str, now: float) -> Actions:
        yield Ask(client, "drop")


@dataclass
class Regrets(Each):
    """Merges again what a merge dropped."""

    def on_merged(self, merged: Merged, now: float) -> Actions:
        for update, _ in merged.dropped:
            yield Aggregate(((update, 1.0),))


@dataclass
class Clings(Each):
    """Forgets at its stop what it held."""

    waiting: list[str] = field(default_factory=list, init=False)

    def on_update(self, update: Update, now: float) -> Actions:
        self.waiting.append(update.id)
        yield Train(update.client, self.steps)

    def on_stop(self, reason: str, now: float) -> Actions:
        self.waiting.clear()
        yield from ()


@dataclass
class Ordered(Each):
    """Takes it that of two who join at once the first in the alphabet comes first."""

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        before = f"c{int(client[1:]) - 1}"
        if now == 0.0 and client != "c0" and before not in self.seen:
            yield Train("nobody", 1)
        self.seen.add(client)
        yield Train(client, self.steps)

    seen: set[str] = field(default_factory=set, init=False)


@dataclass
class Peeks(Each):
    """Trains on before its snapshot is decided, and forgets it."""

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        yield Train(client, self.steps)
        yield Ask(client, "continue")

    def on_snapshot(self, update: Update, now: float) -> Actions:
        yield from ()


@dataclass
class Amnesiac(Each):
    """Keeps a part of its state where no dump finds it."""

    seen: int = field(default=0, init=False, metadata={"stored": False})

    def on_update(self, update: Update, now: float) -> Actions:
        self.seen += 1
        yield Aggregate(((update.id, 1.0 / self.seen),))
        yield Train(update.client, self.steps)


@dataclass
class Jumpy(Each):
    def on_timer(self, timer: str, now: float) -> Actions:
        yield from (Train(c, 3) for c in ("c0", "c1"))


@dataclass
class Divides(Each):
    """A client may hold no examples."""

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        yield Train(client, 1 + self.steps // info.examples)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Twice, "was used or discarded before"),
        (Forgets, "is neither used, discarded nor held"),
        (Hurries, "it has an open order"),
        (Haunted, "it is absent"),
        (Endless, "a weight that is no number"),
        (Negative, "a negative weight"),
        (Empty, "nothing to merge"),
        (Invents, "was not received"),
        (Mute, "a decision explains itself"),
        (Yesterday, "in the past"),
        (Asks, "it has no open order"),
        (Regrets, "was used or discarded before"),
        (Clings, "is neither used, discarded nor held"),
        (Ordered, "it is absent"),
        (Peeks, "is neither used, discarded nor held"),
        (Amnesiac, "a restart before every event changes its decisions"),
        (Divides, "it raises ZeroDivisionError"),
        (Jumpy, "it is absent|it has an open order"),
    ],
)
def test_a_strategy_that_breaks_a_promise_is_found_with_its_seed(
    make: Callable[[], Strategy], why: str
) -> None:
    with pytest.raises(AssertionError, match=rf"^seed \d+: (.|\n)*({why})"):
        check_strategy(make, seeds=60)


def test_steps_out_of_bounds_are_found() -> None:
    with pytest.raises(AssertionError, match="steps outside of"):
        check_strategy(Each, seeds=5, steps=(4, 9))


# ---- the virtual driver


def test_at_one_instant_a_leave_comes_before_a_join_before_an_update_before_a_timer() -> None:
    @dataclass
    class Alarmed(Each):
        def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
            yield SetTimer(f"{client} {now}", 3.0)
            yield Train(client, self.steps)

    run = Virtual(Alarmed(), {"a": 1.0, "b": 1.0, "c": 1.0})
    run.join(3, "c")
    run.join(0, "a")
    run.join(0, "b")
    run.leave(3, "b")
    run.run(3)
    happened = [line.split("(")[0] for line in run.log if line.startswith("3.0")]
    assert happened == [
        "3.000000 ClientLeft",
        "3.000000 ClientJoined",
        "3.000000 UpdateReceived",
        "3.000000 Merged",
        "3.000000 TimerFired",
        "3.000000 TimerFired",
        "3.000000 TimerFired",
    ]


def test_a_timer_that_was_cancelled_or_set_anew_does_not_fire() -> None:
    @dataclass
    class Timed(Strategy):
        fired: list[str] = field(default_factory=list)

        def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
            yield SetTimer("moved", 1.0)
            yield SetTimer("moved", 2.0)
            yield SetTimer("cancelled", 1.0)
            yield CancelTimer("cancelled")

        def on_timer(self, timer: str, now: float) -> Actions:
            self.fired.append(f"{timer} {now}")
            yield from ()

    strategy = Timed()
    run = Virtual(strategy, {})
    run.join(0, "a")
    run.fire(1.5, "moved")  # set, so it is not wrong
    run.fire(1.5, "unknown")
    run.run()
    assert strategy.fired == ["unknown 1.5", "moved 2.0"]


def test_who_is_there_cannot_join_and_who_is_not_cannot_leave() -> None:
    run = Virtual(Each(), {"a": 1.0})
    run.leave(0, "a")
    run.join(0, "a")
    run.join(1, "a")
    run.run(1)
    assert len(run.log) == 2


def test_a_snapshot_comes_at_once_and_the_rest_in_its_time() -> None:
    @dataclass
    class Snaps(Each):
        steps: int = 10

        def on_timer(self, timer: str, now: float) -> Actions:
            yield Ask("a", "continue")

        def on_snapshot(self, update: Update, now: float) -> Actions:
            yield Aggregate(((update.id, 0.5),))

    run = Virtual(Snaps(), {"a": 1.0})
    run.join(0, "a")
    run.fire(4, "now")
    run.run(10)
    received = [line for line in run.log if "UpdateReceived" in line]
    assert ["4.0" in received[0], "steps=4" in received[0], "final=False" in received[0]] == [
        True
    ] * 3
    assert ["10.0" in received[1], "steps=10" in received[1]] == [True] * 2
    assert [m.version for m in run.merges] == [1, 2]


def test_work_that_is_asked_for_comes_at_once_and_not_again() -> None:
    @dataclass
    class Hasty(Each):
        steps: int = 10

        def on_timer(self, timer: str, now: float) -> Actions:
            yield Ask("a", "send")

    run = Virtual(Hasty(), {"a": 1.0})
    run.join(0, "a")
    run.fire(4, "now")
    run.run(20)
    received = [line for line in run.log if "UpdateReceived" in line]
    assert ["steps=4" in line for line in received] == [True, False]
    assert [line.split()[0] for line in received] == ["4.000000", "14.000000"]


def test_what_is_not_a_number_is_dropped_by_its_merge_and_named() -> None:
    run = Virtual(Each(), {"a": 1.0}, bad=lambda update: update == "o1.0")
    run.join(0, "a")
    run.run(7)
    merged = [line for line in run.log if "Merged" in line]
    assert "used=('o0.0',), dropped=()" in merged[0]
    assert "used=(), dropped=(('o1.0', 'nan in it'),)" in merged[1]


def test_a_run_that_is_over_is_not_stopped_again() -> None:
    @dataclass
    class Done(Each):
        def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
            yield Finish("enough")

    run = Virtual(Done(), {"a": 1.0})
    run.join(0, "a")
    assert "Stopping" not in "".join(run.run().stop().log)
    assert "Stopping(reason='time is up')" in "".join(Virtual(Each(), {}).run().stop().log)


def test_orders_behind_a_merge_start_when_the_version_exists() -> None:
    run = Virtual(Each(), {"a": 1.0}, merging=0.5)
    run.join(0, "a")
    run.run(8)
    assert [o.started for o in run.orders] == [0.0, 3.5, 7.0]


# ---- names


@pytest.mark.parametrize("make", [FedAvg, FedBuff, FedCompass])
def test_a_fresh_strategy_comes_back_from_its_dump(make: Callable[[], Strategy]) -> None:
    strategy = make()
    assert restart(strategy) == strategy


@pytest.mark.parametrize("make", [FedAvg, FedBuff, FedCompass])
def test_a_strategy_in_the_middle_of_a_run_comes_back_from_its_dump(
    make: Callable[[], Strategy],
) -> None:
    strategy = history(make, seed=3).run(events=25).strategy
    assert state.dumps(restart(strategy)) == state.dumps(strategy)  # a loss of NaN equals no other


def test_names_are_found_lazily_and_unknown_ones_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="no attribute 'FedMagic'"):
        _ = atoll.aggregation.FedMagic


def test_strategies_need_no_torch() -> None:
    code = (
        "import sys; from atoll.aggregation import FedAvg, FedBuff, FedCompass, Strategy; "
        "sys.exit(bool({'torch', 'numpy', 'asyncio', 'grpc'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_strategy_that_calls_sys_exit_fails_as_one_that_raises() -> None:
    """It went through the server's loop and ended the process, with a traceback of ours."""

    class Leaving(Strategy):
        def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
            yield Train(client, 1)
            raise SystemExit(4)

    with pytest.raises(RuntimeError, match=r"it calls sys.exit\(4\)"):
        Leaving().handle(ClientJoined("a", ClientInfo(1)), 0.0)
