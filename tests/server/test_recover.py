"""A run killed after any of its inputs goes on as if nothing had happened."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from atoll.aggregation.fedavg import FedAvg
from atoll.aggregation.fedbuff import FedBuff
from atoll.aggregation.fedcompass import FedCompass
from atoll.aggregation.strategy import Actions, Strategy
from atoll.protocols import state
from atoll.protocols.errors import ServerError
from atoll.protocols.events import (
    ClientInfo,
    ClientJoined,
    Evaluated,
    Event,
    Merged,
    Train,
    Update,
    UpdateReceived,
)
from atoll.protocols.membership import Membership
from atoll.server.journal import ACKS, Journal, Row, dump_actions
from atoll.server.recover import Recovered, recover, snapshot
from atoll.server.rules import Rules
from atoll.server.run import Merge, Run
from atoll.server.simulator import simulate
from atoll.server.workshop import Stock
from atoll.server.world import Absence, ClientModel

MADE: dict[str, Callable[[], Strategy]] = {
    "fedavg": lambda: FedAvg(steps=10, cohort=2, deadline=6.0, late="stale"),
    "fedbuff": lambda: FedBuff(size=3, steps=9, max_age=4.0, unique_per_buffer=True),
    "fedcompass": lambda: FedCompass(min_steps=5, max_steps=30),
}
CLIENTS = [
    ClientModel("a", 0.11, noise=0.05, examples=30),
    ClientModel("b", 0.27, noise=0.05, absences=(Absence(11.0, 35.0), Absence(50.0, 54.0))),
    ClientModel("c", 0.8, examples=5, absences=(Absence(20.0, 32.0, "goodbye"),)),
]


def written(made: Callable[[], Strategy]) -> list[Row]:
    """The journal of 60 virtual seconds, each version evaluated."""
    rows: list[Row] = []
    run = Run(made())

    def listen(now: float, event: Event, _: object) -> None:
        events = [event]
        if isinstance(event, Merged):
            events.append(Evaluated(event.version, {"accuracy": event.version / 100}))
        for one in events:
            _, actions, _ = run.handle(one, now)
            rows.append(Row(len(rows) + 1, now, one, dump_actions(actions)))

    simulate(made(), CLIENTS, 60.0, lease=10.0, listen=listen)
    return rows


@dataclass
class Cut:
    """As much of a journal as a killed process leaves: `open`: the last decisions are not in it."""

    all_rows: list[Row]
    after: int  # rows
    open: int = 1
    taken: tuple[int, float, str] | None = None

    def last_snapshot(self) -> tuple[int, float, str] | None:
        return self.taken

    def rows(self, after: int = 0) -> Iterator[Row]:
        for row in self.all_rows[after : self.after]:
            decided = row.seq <= self.after - self.open
            yield Row(row.seq, row.now, row.event, row.actions if decided else None)

    def meta(self, key: str) -> None:
        return None

    def acknowledged(self) -> Iterator[tuple[str, str]]:
        return iter(())


def recovered(cut: Cut, strategy: Strategy, rules: Rules | None = None) -> Recovered:
    return recover(cut, strategy, rules or Rules(), Membership())  # type: ignore[arg-type]


def stand(found: Recovered) -> tuple[str, str, str]:
    """All that must be the same, as text."""
    return state.dumps(found.run), state.dumps(found.run.strategy), state.dumps(found.rules)


def go_on(found: Recovered, rows: list[Row]) -> None:
    for row in rows:
        _, actions, effects = found.run.handle(row.event, row.now)
        assert dump_actions(actions) == row.actions, f"input {row.seq}"
        if isinstance(row.event, Evaluated):
            found.rules.evaluated(row.event.version, row.event.metrics, row.now)
        found.stock.merges.extend(e for e in effects if isinstance(e, Merge))


@pytest.mark.parametrize("name", MADE)
def test_killed_after_any_input_a_run_goes_on_the_same(name: str) -> None:
    rows = written(MADE[name])
    assert len(rows) > 60
    whole = stand(recovered(Cut(rows, len(rows), 0), MADE[name]()))
    for after in range(len(rows) + 1):
        found = recovered(Cut(rows, after), MADE[name]())
        assert found.inputs == after
        assert found.now == (rows[after - 1].now if after else 0.0)
        go_on(found, rows[after:])
        assert stand(found) == whole


@pytest.mark.parametrize("name", MADE)
def test_with_snapshots_in_between_too(name: str) -> None:
    rows = written(MADE[name])
    whole = recovered(Cut(rows, len(rows), 0), MADE[name]())
    for at in range(0, len(rows), 7):
        former = recovered(Cut(rows, at), MADE[name]())
        text = snapshot(former.run, former.membership, former.rules, former.stock)
        assert text is not None
        for after in (at, min(at + 5, len(rows))):
            cut = Cut(rows, after, taken=(at, former.now, text))
            found = recovered(cut, MADE[name]())
            assert found.inputs == after - at
            go_on(found, rows[after:])
            assert stand(found) == stand(whole)
            assert found.stock.merges == whole.stock.merges


def test_a_changed_strategy_is_found_out(tmp_path: Path) -> None:
    rows = written(MADE["fedbuff"])
    changed = FedBuff(size=3, steps=8, max_age=4.0, unique_per_buffer=True)
    with pytest.raises(ServerError, match=r"input 1 \(ClientJoined at 0.000 s\)") as found:
        recovered(Cut(rows, len(rows)), changed)
    assert found.value.code == "FL-S206"
    assert "the strategy that wrote it" in found.value.hint
    with pytest.raises(ServerError, match="now with") as found:
        recovered(Cut(rows, len(rows)), FedBuff(size=4, steps=9, max_age=4.0))
    assert found.value.code == "FL-S206"


def test_another_spelling_of_the_same_numbers_is_no_other_decision() -> None:
    """A journal outlives the library that wrote it: 1e-05 or 0.00001, it is the same weight."""
    rows = written(MADE["fedbuff"])
    told = [json.loads(row.actions) for row in rows if row.actions is not None]
    respelt = [
        row if row.actions is None else replace(row, actions=json.dumps(json.loads(row.actions)))
        for row in rows
    ]
    assert any(told)
    assert [row.actions for row in respelt] != [row.actions for row in rows]
    assert recovered(Cut(respelt, len(rows)), MADE["fedbuff"]()).inputs == len(rows)


def test_another_strategy_is_found_out_by_its_snapshot() -> None:
    rows = written(MADE["fedbuff"])
    former = recovered(Cut(rows, 20), MADE["fedbuff"]())
    text = snapshot(former.run, former.membership, former.rules, former.stock)
    assert text is not None
    with pytest.raises(ServerError, match=r"FedAvg\.cohort: missing") as found:
        recovered(Cut(rows, 20, taken=(20, former.now, text)), FedAvg())
    assert found.value.code == "FL-S206"


@dataclass
class Touchy(Strategy):
    """Fails on clients whose name begins with x, until it is mended."""

    mended: bool = False
    joined: list[str] = field(default_factory=list, init=False)

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        if client.startswith("x") and not self.mended:
            raise ZeroDivisionError("no weights")
        self.joined.append(client)
        yield Train(client, 5)


def joins(*clients: str) -> list[Row]:
    decided = {c: dump_actions([Train(c, 5)]) for c in clients}
    return [
        Row(i + 1, float(i), ClientJoined(c, ClientInfo(1)), None if c == "x" else decided[c])
        for i, c in enumerate(clients)
    ]


def test_a_strategy_that_failed_fails_again_until_it_is_mended() -> None:
    rows = joins("a", "x")
    with pytest.raises(ServerError, match=r"input 2 .*ZeroDivisionError") as failed:
        recovered(Cut(rows, 2, 0), Touchy())
    assert failed.value.code == "FL-S204"
    mended = Touchy(mended=True)
    assert recovered(Cut(rows, 2, 0), mended).inputs == 2
    assert mended.joined == ["a", "x"]


def test_a_strategy_that_fails_where_it_did_not_is_found_out() -> None:
    with pytest.raises(ServerError, match="was answered before, and now fails") as found:
        recovered(Cut(joins("a", "xx"), 2, 0), Touchy())
    assert found.value.code == "FL-S206"


def test_a_strategy_with_hidden_state_has_no_snapshot() -> None:
    class Plain(Strategy):
        def __init__(self) -> None:
            self.seen = 0

    hidden = MADE["fedbuff"]()
    hidden.hidden = 1  # type: ignore[attr-defined]
    for strategy in (Plain(), hidden):
        assert snapshot(Run(strategy), Membership(), Rules(), Stock()) is None


def test_limits_are_those_of_now_and_the_best_is_that_of_then() -> None:
    rows = written(MADE["fedbuff"])
    former = recovered(Cut(rows, 40), MADE["fedbuff"](), Rules(target=0.01, versions=9))
    text = snapshot(former.run, former.membership, former.rules, former.stock)
    assert text is not None
    assert former.rules.reached_at is not None
    cut = Cut(rows, 40, taken=(40, former.now, text))
    found = recovered(cut, MADE["fedbuff"](), Rules(target=0.9, updates=500))
    assert (found.rules.target, found.rules.versions, found.rules.updates) == (0.9, None, 500)
    assert found.rules.best == former.rules.best
    assert found.rules.reached_at is None  # of another target
    same = recovered(cut, MADE["fedbuff"](), Rules(target=0.01))
    assert same.rules.reached_at == former.rules.reached_at


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    book = Journal(tmp_path / "journal.sqlite", "r", durable=False)
    yield book
    book.close()


def test_members_and_acknowledgements_come_back_and_leases_start_anew(journal: Journal) -> None:
    membership = Membership(lease=20.0)
    membership.hello("a", "node-a", 1.0)
    updates = [Update(f"o{i}.0", f"o{i}", "a", 0, 5, 5, 0.0, 0.1) for i in range(2)]
    strategy = FedBuff(size=1, steps=5)
    events: list[tuple[float, Event]] = [(1.0, ClientJoined("a", ClientInfo(3)))]
    for i, update in enumerate(updates):
        events += [(2.0 + i, UpdateReceived(update)), (2.5 + i, Merged(i + 1, (update.id,)))]
    meta = [("membership", state.dumps(membership)), (ACKS + "o0.0", json.dumps([["a", "o0.0"]]))]
    journal.append(events, meta=meta)
    found = recover(journal, strategy, Rules(), Membership(lease=20.0))
    assert list(found.run.untold["a"]) == ["o1.0"]
    assert found.now == 3.5
    member = found.membership.members["a"]
    assert (member.standing, member.lease, member.node) == ("suspect", 23.5, "node-a")


def test_what_a_merge_could_not_use_is_not_asked_for_again(journal: Journal) -> None:
    """Its bytes were freed when its client was told, and the version could not be made again."""
    events: list[tuple[float, Event]] = [
        (0.0, ClientJoined("a", ClientInfo(3))),
        (0.0, ClientJoined("b", ClientInfo(3))),
        (1.0, UpdateReceived(Update("o0.0", "o0", "a", 0, 5, 5, 0.0, 0.1))),
        (1.0, UpdateReceived(Update("o1.0", "o1", "b", 0, 5, 5, 0.0, 0.1))),
        (1.5, Merged(1, ("o1.0",), (("o0.0", "not finite"),))),
    ]
    journal.append(events)
    found = recover(journal, FedBuff(size=2, steps=5), Rules(), Membership())
    (merge,) = found.stock.merges
    assert [update for update, _ in merge.items] == ["o1.0"]
    assert found.run.updates_used == 1


def test_an_empty_journal_is_a_fresh_run(journal: Journal) -> None:
    found = recover(journal, FedAvg(), Rules(), Membership())
    assert (found.inputs, found.now, found.run) == (0, 0.0, Run(found.run.strategy))


def test_a_journal_of_nonsense_is_told(journal: Journal) -> None:
    journal.append([(0.0, Merged(7, ()))])  # a version that nobody asked for
    with pytest.raises(ServerError) as found:
        recover(journal, FedAvg(), Rules(), Membership())
    assert found.value.code == "FL-S204"  # undecided: it failed on it then too
    journal.decide(1, [])
    journal.flush()
    with pytest.raises(ServerError) as found:
        recover(journal, FedAvg(), Rules(), Membership())
    assert found.value.code == "FL-S206"
