"""A run in virtual time keeps a driver's promises, and is the same every time."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from atoll.aggregation.fedavg import FedAvg
from atoll.aggregation.fedbuff import FedBuff
from atoll.aggregation.fedcompass import FedCompass
from atoll.aggregation.strategy import Actions, Strategy
from atoll.protocols.errors import ServerError, UsageError
from atoll.protocols.events import (
    Action,
    Aggregate,
    Ask,
    ClientInfo,
    ClientJoined,
    ClientLeft,
    Discard,
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
from atoll.server.history import History
from atoll.server.learning import NoLearning
from atoll.server.rules import Rules
from atoll.server.run import FORMER
from atoll.server.simulation import Simulation
from atoll.server.simulator import Listen, simulate
from atoll.server.world import Absence, ClientModel, crowd, exponential

Heard = list[tuple[float, Event, list[Action]]]


class Log:
    """What a strategy heard and said."""

    def __init__(self) -> None:
        self.rows: Heard = []

    def hear(self, now: float, event: Event, actions: list[Action]) -> None:
        self.rows.append((now, event, actions))

    def updates(self) -> list[tuple[float, Update]]:
        return [(now, e.update) for now, e, _ in self.rows if isinstance(e, UpdateReceived)]

    def joins(self) -> list[tuple[float, str]]:
        return [(now, e.client) for now, e, _ in self.rows if isinstance(e, ClientJoined)]

    def leaves(self) -> list[tuple[float, str, str]]:
        return [(now, e.client, e.reason) for now, e, _ in self.rows if isinstance(e, ClientLeft)]


class Orders(Strategy):
    """Gives each joining client one order of 10 steps, discards what comes, and can be extended."""

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        yield Train(client, 10)

    def on_update(self, update: Update, now: float) -> Actions:
        yield Discard(update.id, "in time")


class AskAt(Orders):
    """Asks `a` once, at a time."""

    def __init__(self, at: float, then: Then) -> None:
        self.at, self.then = at, then

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        yield Train(client, 10)
        yield SetTimer("ask", self.at)

    def on_timer(self, timer: str, now: float) -> Actions:
        yield Ask("a", self.then)


def play(strategy: Strategy, *models: ClientModel, until: float = 100.0, **more: float) -> Log:
    log = Log()
    simulate(
        strategy, models, until, listen=log.hear, lease=more.get("lease", 5.0),
        update_bytes=int(more.get("up", 0)), model_bytes=int(more.get("down", 0)),
    )  # fmt: skip
    return log


def arrivals(log: Log) -> list[tuple[float, str, bool]]:
    return [(now, update.id, update.current) for now, update in log.updates()]


# ---- time ------------------------------------------------------------------------------------


def test_rounds_take_as_long_as_the_slowest_of_the_cohort() -> None:
    made = simulate(FedAvg(steps=10, min_clients=3), {"a": 0.1, "b": 0.3, "c": 0.7}, until=100.0)
    assert made.versions == 100 // 7
    assert made.updates_used == 3 * made.versions
    assert made.steps_used == 10 * made.updates_used
    assert made.mean_staleness == 0.0
    assert made.seconds == 100.0
    assert made.reason == "100 seconds done"


def test_the_idle_share_is_the_time_without_an_order() -> None:
    made = simulate(FedAvg(steps=10, min_clients=2), {"a": 1.0, "b": 4.0}, until=80.0)
    assert made.clients["a"].idle == pytest.approx(0.75)
    assert made.clients["b"].idle == pytest.approx(0.0)
    assert made.idle == pytest.approx(0.375)
    assert (made.clients["a"].updates, made.clients["a"].steps) == (2, 20)


def test_transfers_take_their_bytes_and_their_latency() -> None:
    model = ClientModel("a", 0.5, down=100.0, up=50.0, latency=0.25)
    log = play(Orders(), model, down=400, up=300)
    ((now, update),) = log.updates()
    assert now == 0.25 + 400 / 100 + 10 * 0.5 + 0.25 + 300 / 50
    assert update.train_seconds == 5.0
    assert update.started == 0.0


def test_an_update_at_the_instant_of_its_deadline_is_in_time() -> None:
    made = simulate(FedAvg(steps=10, min_clients=2, deadline=10.0, rounds=1), {"a": 0.5, "b": 1.0})
    assert (made.seconds, made.updates_used) == (10.0, 2)


def test_at_one_instant_a_leave_comes_first_then_a_join_then_an_update_then_a_timer() -> None:
    class Waits(Orders):
        def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
            yield Train(client, 10)
            yield SetTimer("t", 10.0)

    models = (
        ClientModel("slow", 1.0),
        ClientModel("late", 1.0, joins=10.0),
        ClientModel("gone", 9.0, absences=(Absence(5.0),)),
    )
    log = play(Waits(), *models, until=11.0)
    at_ten = [type(event) for now, event, _ in log.rows if now == 10.0]
    assert at_ten == [ClientLeft, ClientJoined, UpdateReceived, TimerFired]


def test_a_version_exists_right_after_the_event_that_asked_for_it() -> None:
    log = Log()
    simulate(FedBuff(size=2, steps=5), {"a": 0.1, "b": 0.1}, until=5.0, listen=log.hear)
    for (now, _, actions), (then, event, _) in itertools.pairwise(log.rows):
        said = sum(isinstance(action, Aggregate) for action in actions)
        assert said == (isinstance(event, Merged) and then == now)
    assert sum(isinstance(event, Merged) for _, event, _ in log.rows) == 10


def test_mean_staleness_is_that_of_the_items() -> None:
    log = Log()
    made = simulate(FedBuff(size=1, steps=10), {"a": 0.1, "b": 0.3}, until=50.0, listen=log.hear)
    stale, version = [], 0
    bases = {update.id: update.base for _, update in log.updates()}
    for _, _, actions in log.rows:
        for action in actions:
            if isinstance(action, Aggregate):
                stale += [version - bases[update] for update, _ in action.items]
                version += 1
    assert made.mean_staleness == pytest.approx(sum(stale) / len(stale))
    assert made.mean_staleness > 0.5


def test_other_units_of_time_change_only_the_time_axis() -> None:
    logs = []
    for unit in (1.0, 8.0):  # a power of two: exact in floats
        log = Log()
        paces = {"a": 0.1 * unit, "b": 0.33 * unit, "c": 0.7 * unit}
        simulate(
            FedCompass(min_clients=3, min_steps=5, max_steps=40, dead_after=1000.0 * unit),
            paces, 50.0 * unit, listen=log.hear, rules=Rules(versions=30),
        )  # fmt: skip
        logs.append([(now / unit, u.id, u.base, u.steps) for now, u in log.updates()])
    assert logs[0] == logs[1]
    assert len(logs[0]) > 30


# ---- absences --------------------------------------------------------------------------------


def test_offline_within_the_lease_loses_nothing_and_nobody_hears_of_it() -> None:
    model = ClientModel("a", 1.0, absences=(Absence(2.0, 6.0, "offline"),))
    log = play(Orders(), model)
    assert arrivals(log) == [(10.0, "o0.0", True)]
    assert log.leaves() == []


def test_a_result_that_was_finished_offline_comes_with_the_return() -> None:
    model = ClientModel("a", 1.0, absences=(Absence(8.0, 12.0, "offline"),))
    assert arrivals(play(Orders(), model)) == [(12.0, "o0.0", True)]


def test_a_dead_client_back_within_its_lease_starts_its_order_over() -> None:
    model = ClientModel("a", 1.0, absences=(Absence(8.0, 12.0),))
    log = play(Orders(), model)
    assert arrivals(log) == [(22.0, "o0.0", True)]
    assert log.joins() == [(0.0, "a")]


def test_a_finished_result_survives_its_process_and_is_not_trained_again() -> None:
    model = ClientModel("a", 1.0, up=10.0, absences=(Absence(11.0, 14.0),))
    log = play(Orders(), model, up=30)
    assert arrivals(log) == [(17.0, "o0.0", True)]  # 14 and a whole upload


def test_a_lease_that_ends_is_a_leave_and_the_old_result_is_late() -> None:
    model = ClientModel("a", 1.0, up=10.0, absences=(Absence(11.0, 30.0),))
    log = play(Orders(), model, up=30)
    assert log.leaves() == [(16.0, "a", "not heard of for 5 s")]
    assert log.joins() == [(0.0, "a"), (30.0, "a")]
    assert arrivals(log) == [(33.0, "o0.0", False), (43.0, "o1.0", True)]


def test_a_new_order_ends_work_on_an_old_one_that_went_on_offline() -> None:
    model = ClientModel("a", 1.0, absences=(Absence(1.0, 8.0, "offline"),))
    log = play(Orders(), model)
    assert arrivals(log) == [(18.0, "o1.0", True)]


def test_a_goodbye_is_a_leave_at_once() -> None:
    model = ClientModel("a", 1.0, absences=(Absence(3.0, 4.0, "goodbye"),))
    log = play(Orders(), model)
    assert log.leaves() == [(3.0, "a", "said goodbye")]
    assert arrivals(log) == [(14.0, "o1.0", True)]


def test_an_absence_for_ever_ends_in_a_leave_and_nothing_more() -> None:
    log = play(Orders(), ClientModel("a", 1.0, absences=(Absence(3.0),)))
    assert log.leaves() == [(8.0, "a", "not heard of for 5 s")]
    assert isinstance(log.rows[-1][1], Stopping)
    assert log.rows[-1][1].reason == "nothing more will come"


def test_the_leases_of_those_who_are_connected_go_on() -> None:
    log = play(Orders(), ClientModel("a", 5.0), ClientModel("b", 1.0, absences=(Absence(30.0),)))
    assert [client for _, client, _ in log.leaves()] == ["b"]


def test_an_order_given_to_a_client_that_is_away_reaches_it_at_its_return() -> None:
    class TrainAt(Orders):
        def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
            yield SetTimer("t", 3.0)

        def on_timer(self, timer: str, now: float) -> Actions:
            yield Train("a", 10)

    model = ClientModel("a", 1.0, absences=(Absence(2.0, 6.0, "offline"),))
    ((now, update),) = play(TrainAt(), model).updates()
    assert (now, update.started, update.train_seconds) == (16.0, 3.0, 10.0)


def test_a_model_that_was_not_there_yet_is_fetched_again() -> None:
    model = ClientModel("a", 1.0, down=10.0, absences=(Absence(2.0, 4.0, "offline"),))
    assert arrivals(play(Orders(), model, down=30)) == [(17.0, "o0.0", True)]


def test_a_result_older_than_the_run_remembers_is_refused() -> None:
    class Impatient(Orders):
        """Drops and gives anew, until the first order is forgotten."""

        def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
            yield Train(client, 10)
            yield SetTimer("t", 11.0)

        def on_timer(self, timer: str, now: float) -> Actions:
            for _ in range(FORMER + 1):
                yield Ask("a", "drop")
                yield Train("a", 10)

    log = play(Impatient(), ClientModel("a", 1.0, up=10.0), up=20)  # uploading from 10 to 12
    assert [update.id for _, update in log.updates()] == [f"o{FORMER + 1}.0"]


def test_a_client_that_benchmarks_says_its_pace_and_one_that_rejoins_is_remembered() -> None:
    away = (Absence(15.0, 40.0),)
    models = (
        ClientModel("bench", 1.5, benchmark=True),
        ClientModel("known", 1.0, absences=away),
        ClientModel("unknown", 2.0, absences=away),
    )
    joins = [e for _, e, _ in play(Orders(), *models).rows if isinstance(e, ClientJoined)]
    assert [(e.client, e.info.seconds_per_step) for e in joins] == [
        ("bench", 1.5),
        ("known", None),
        ("unknown", None),
        ("known", 1.0),  # from its result at 10
        ("unknown", None),
    ]


def test_two_clients_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="'a'"):
        simulate(Orders(), [ClientModel("a", 1.0), ClientModel("b", 1.0), ClientModel("a", 1.0)])


# ---- asks ------------------------------------------------------------------------------------


def test_asked_to_send_a_client_finishes_its_step_and_sends_what_it_has() -> None:
    log = Log()
    made = simulate(AskAt(3.5, "send"), {"a": 1.0}, 9.0, listen=log.hear)
    ((now, update),) = log.updates()
    assert (now, update.steps, update.train_seconds) == (4.0, 4, 4.0)
    assert update.final
    assert made.clients["a"].steps == 4


def test_asked_to_send_before_its_first_step_a_client_does_that_one() -> None:
    model = ClientModel("a", 1.0, down=10.0)
    ((now, update),) = play(AskAt(1.0, "send"), model, down=20).updates()
    assert (now, update.steps) == (3.0, 1)


def test_asked_to_continue_a_client_sends_a_snapshot_and_trains_on() -> None:
    log = play(AskAt(3.5, "continue"), ClientModel("a", 1.0, up=10.0), up=10)
    assert [(now, u.id, u.steps, u.final) for now, u in log.updates()] == [
        (5.0, "o0.0s1", 4, False),
        (11.0, "o0.0", 10, True),
    ]


def test_a_snapshot_cut_off_on_its_way_is_sent_again() -> None:
    model = ClientModel("a", 1.0, up=10.0, absences=(Absence(4.5, 6.0, "offline"),))
    log = play(AskAt(3.5, "continue"), model, up=20)
    assert arrivals(log) == [(8.0, "o0.0s1", True), (12.0, "o0.0", True)]


def test_a_snapshot_whose_step_was_not_done_dies_with_its_process() -> None:
    model = ClientModel("a", 1.0, absences=(Absence(3.7, 6.0),))
    assert arrivals(play(AskAt(3.5, "continue"), model)) == [(16.0, "o0.0", True)]


def test_asked_to_drop_a_client_sends_nothing() -> None:
    assert play(AskAt(3.5, "drop"), ClientModel("a", 1.0)).updates() == []


@pytest.mark.parametrize("then", ["drop", "send"])
def test_an_ask_that_comes_after_the_work_changes_nothing(then: Then) -> None:
    log = play(AskAt(10.5, then), ClientModel("a", 1.0, latency=0.6))
    assert arrivals(log) == [(11.2, "o0.0", then == "send")]


def test_a_result_on_its_way_arrives_though_its_order_was_dropped_and_a_new_one_given() -> None:
    class Anew(AskAt):
        def on_timer(self, timer: str, now: float) -> Actions:
            yield Ask("a", "drop")
            yield Train("a", 10)

    log = play(Anew(11.0, "drop"), ClientModel("a", 1.0, up=10.0), up=20)  # uploads from 10 to 12
    assert arrivals(log) == [(12.0, "o0.0", False), (23.0, "o1.0", True)]


def test_an_ask_does_not_reach_a_client_that_is_away() -> None:
    model = ClientModel("a", 1.0, absences=(Absence(3.0, 6.0, "offline"),))
    assert arrivals(play(AskAt(3.5, "send"), model)) == [(10.0, "o0.0", True)]


# ---- the end ---------------------------------------------------------------------------------


def test_a_run_that_finishes_by_itself_needs_no_end() -> None:
    made = simulate(FedAvg(steps=10, rounds=3), {"a": 0.5})
    assert (made.seconds, made.reason, made.versions) == (15.0, "3 rounds done", 3)


@pytest.mark.parametrize(
    ("rules", "reason", "seconds"),
    [
        (Rules(versions=4), "4 versions done", 20.0),
        (Rules(updates=3), "3 updates done", 15.0),
        (Rules(steps=15), "15 steps done", 10.0),
        (Rules(seconds=12.0), "12 seconds done", 12.0),
    ],
)
def test_rules_end_a_run(rules: Rules, reason: str, seconds: float) -> None:
    made = simulate(FedAvg(steps=10), {"a": 0.5}, until=1000.0, rules=rules)
    assert (made.reason, made.seconds) == (reason, seconds)


class Graded(NoLearning):
    """Accuracy 1 - 1 / (version + 1), without any training."""

    def evaluate(self, version: int) -> Mapping[str, float]:
        return {"accuracy": 1 - 1 / (version + 1)}


def test_the_first_version_at_the_target_ends_the_run_at_its_time() -> None:
    made = simulate(
        FedAvg(steps=10), {"a": 0.5}, 1000.0, learning=Graded(), rules=Rules(target=0.75)
    )
    assert made.accuracy == [(5.0, 0.5), (10.0, pytest.approx(2 / 3)), (15.0, 0.75)]
    assert (made.seconds, made.versions) == (15.0, 3)
    assert made.seconds_to(0.6) == 10.0
    assert made.seconds_to(0.9) is None
    assert made.rules.best_version == 3


def test_only_every_so_many_versions_are_evaluated() -> None:
    made = simulate(FedAvg(steps=10), {"a": 0.5}, 30.0, learning=Graded(), evaluate_every=2)
    assert [t for t, _ in made.accuracy] == [10.0, 20.0, 30.0]
    never = simulate(FedAvg(steps=10), {"a": 0.5}, 30.0, learning=Graded(), evaluate_every=None)
    assert never.accuracy == []


def test_metrics_without_accuracy_are_heard_all_the_same() -> None:
    class Losses(NoLearning):
        def evaluate(self, version: int) -> Mapping[str, float]:
            return {"loss": 1.0 / version}

    rules = Rules(target=0.25, metric="loss")
    made = simulate(FedAvg(steps=10), {"a": 0.5}, 1000.0, learning=Losses(), rules=rules)
    assert (made.accuracy, made.versions) == ([], 4)


def test_an_order_that_its_own_breath_drops_leaves_no_row() -> None:
    class Fickle(Orders):
        def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
            yield Train(client, 10)
            yield Ask(client, "drop")

    made = simulate(Fickle(), {"a": 1.0}, 5.0)
    assert [row["kind"] for row in made.history] == ["join", "started", "finish"]


def test_a_stop_merges_what_a_strategy_gives_at_the_end() -> None:
    class Flush(Orders):
        def __init__(self) -> None:
            self.held: list[str] = []

        def on_update(self, update: Update, now: float) -> Actions:
            self.held.append(update.id)
            yield from ()

        def on_stop(self, reason: str, now: float) -> Actions:
            yield Aggregate(tuple((update, 0.5) for update in self.held))

    made = simulate(Flush(), {"a": 1.0, "b": 2.0}, 25.0)
    assert (made.versions, made.updates_used, made.seconds) == (1, 2, 25.0)


def test_what_a_strategy_raises_is_an_error_of_its_own() -> None:
    """It was told as a bug of ours."""

    class Broken(Orders):
        def on_update(self, update: Update, now: float) -> Actions:
            raise ZeroDivisionError("in the strategy")

    said = r"UpdateReceived at 10 s: ZeroDivisionError\('in the strategy'\)"
    with pytest.raises(ServerError, match=said) as caught:
        simulate(Broken(), {"a": 1.0})
    assert caught.value.code == "FL-S204"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_summary_names_what_came_of_it() -> None:
    made = simulate(FedAvg(steps=10), {"a": 0.5}, 30.0, learning=Graded())
    text = str(made)
    assert "FedAvg: 6 versions in 30 virtual seconds" in text
    assert "6 updates and 60 local steps" in text
    assert "accuracy 0.8571" in text
    assert made.hash[:16] in text
    many = simulate(FedAvg(steps=10), {f"c{i}": 0.5 for i in range(13)}, 30.0)
    assert "c12" not in str(many)


def test_a_client_that_never_connected_has_no_idle_time() -> None:
    made = simulate(Orders(), [ClientModel("a", 1.0, joins=50.0)], 10.0)
    assert (made.idle, made.clients["a"].idle) == (0.0, 0.0)


# ---- the same every time ---------------------------------------------------------------------


def busy(seed: int, listen: Listen | None = None, history: bool = True) -> Simulation:
    """Clients with noise, changing speeds and deaths."""
    draw = exponential(0.5)
    models = [
        replace(model, uptime=60.0, downtime=15.0, latency=0.05)
        for model in crowd(12, draw, seed, change=0.1)
    ]
    return simulate(
        FedCompass(min_steps=5, max_steps=25, min_clients=4), models, 400.0, seed,
        lease=10.0, listen=listen, history=history,
    )  # fmt: skip


def test_the_same_seed_gives_the_same_hash_and_history() -> None:
    first, second = busy(3), busy(3)
    assert first.hash == second.hash
    assert first.history == second.history
    assert str(first) == str(second)
    assert busy(4).hash != first.hash


def test_the_hash_does_not_depend_on_who_looks() -> None:
    assert busy(3, Log().hear, history=False).hash == busy(3).hash


def test_the_hash_knows_the_smallest_difference() -> None:
    paces = [0.1, 0.1 + 1e-15]
    a, b = (simulate(FedAvg(steps=10), {"a": pace}, 10.0).hash for pace in paces)
    assert a != b


def test_the_history_is_that_of_a_real_run() -> None:
    made = busy(3)
    history = History.of(made.history)
    assert history.version == made.versions
    assert history.finished == made.reason
    assert {n: c.updates for n, c in history.clients.items()} == {
        n: c.updates for n, c in made.clients.items()
    }
    merged = sum(c.merged for c in history.clients.values())
    stale = sum(c.staleness for c in history.clients.values())
    assert merged == made.updates_used
    assert stale / merged == pytest.approx(made.mean_staleness)
    times = [row["t"] for row in made.history]
    assert times == sorted(times)
    for span in history.spans:
        assert span.end is not None
        assert span.end >= span.start


MAKERS: list[Callable[[], Strategy]] = [
    lambda: FedAvg(steps=10, deadline=30.0, over_select=1.3, fraction=0.5),
    lambda: FedAvg(steps=10, deadline=30.0, late="stale"),
    lambda: FedBuff(size=3, steps=10, max_age=20.0),
    lambda: FedCompass(min_steps=5, max_steps=25),
]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("make", MAKERS)
def test_every_update_has_one_fate_and_every_order_a_member(
    make: Callable[[], Strategy], seed: int
) -> None:
    """Random paces, transfers and deaths: what is received is used, discarded or held, once."""
    log, present, fates = Log(), set[str](), list[str]()
    models = [
        replace(m, uptime=40.0, downtime=12.0, up=100.0, down=100.0, latency=0.1)
        for m in crowd(6, exponential(0.4), seed)
    ]
    made = simulate(
        make(), models, 300.0, seed, lease=8.0, update_bytes=100, model_bytes=100, listen=log.hear
    )
    assert made.versions > 3
    for now, event, actions in log.rows:
        assert now <= 300.0
        if isinstance(event, ClientJoined):
            assert event.client not in present
            present.add(event.client)
        if isinstance(event, ClientLeft):
            present.remove(event.client)
        for action in actions:
            if isinstance(action, Aggregate):
                fates += [update for update, _ in action.items]
            if isinstance(action, Discard):
                fates.append(action.update)
            if isinstance(action, Train):
                assert action.client in present
            assert not isinstance(action, Finish)
    received = [update.id for _, update in log.updates()]
    assert len(received) == len(set(received))
    assert len(fates) == len(set(fates))
    assert set(fates) <= set(received)
    assert all(0.0 <= client.idle <= 1.0 for client in made.clients.values())
    assert made.seconds == 300.0
    assert math.isfinite(made.mean_staleness)
