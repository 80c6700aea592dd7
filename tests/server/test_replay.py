"""What a run decided comes again from what it heard; any difference is shown."""

from copy import deepcopy
from pathlib import Path

import pytest

from atoll.aggregation.fedavg import FedAvg
from atoll.aggregation.fedbuff import FedBuff
from atoll.aggregation.fedcompass import FedCompass
from atoll.aggregation.strategy import Strategy
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
from atoll.server.digest import BATCH, Digest, said
from atoll.server.journal import Journal, dump_actions
from atoll.server.replay import replay
from atoll.server.run import Run
from atoll.server.simulator import simulate

Row = tuple[float, Event, list[Action]]


def recorded() -> list[Row]:
    rows: list[Row] = []
    simulate(
        FedCompass(min_steps=5, max_steps=25),
        {"a": 0.1, "b": 0.25, "c": 0.8},
        60.0,
        listen=lambda now, event, actions: rows.append((now, event, actions)),
    )
    return rows


def test_a_fresh_strategy_decides_the_same_again() -> None:
    rows = recorded()
    assert replay(FedCompass(min_steps=5, max_steps=25), rows) == len(rows) > 50


def test_a_journal_is_replayed_with_the_actions_it_holds(tmp_path: Path) -> None:
    rows = recorded()
    journal = Journal(tmp_path / "journal.sqlite", "r", durable=False)
    first = journal.append([(now, event) for now, event, _ in rows])
    for at, (_, _, actions) in enumerate(rows[:-3]):
        journal.decide(first + at, actions)
    journal.flush()
    held = [(row.now, row.event, row.actions) for row in journal.rows()]
    journal.close()
    strategy = FedCompass(min_steps=5, max_steps=25)
    assert replay(strategy, held) == len(rows) - 3  # the last had not been written down


@pytest.mark.parametrize("strategy", [FedBuff(size=3, steps=9), FedAvg(rounds=1, steps=9)])
def test_work_that_comes_after_the_end_was_not_heard(strategy: Strategy) -> None:
    """A replay gave it to the strategy, which wanted to train on: seen on a busy machine."""
    fresh, run, rows = deepcopy(strategy), Run(strategy), list[Row]()

    def tell(now: float, event: Event) -> None:
        heard, actions, _ = run.handle(event, now)
        rows.append((now, heard, actions))

    def result(at: int) -> Event:
        return UpdateReceived(Update(f"o{at}.0", f"o{at}", "ab"[at], 0, 9, 9, 0.0, 0.1))

    tell(0.0, ClientJoined("a", ClientInfo(10)))
    tell(0.0, ClientJoined("b", ClientInfo(10)))
    tell(1.0, result(0))
    if isinstance(strategy, FedBuff):
        tell(2.0, Stopping("enough"))
        tell(2.1, result(1))
    else:
        tell(2.0, result(1))
        tell(2.1, Merged(1, ("o0.0", "o1.0"), ()))
    assert run.finished
    tell(3.0, ClientLeft("a", "gone"))
    assert replay(fresh, rows) == len(rows)


def test_the_first_difference_is_shown_with_both_sides() -> None:
    with pytest.raises(ServerError) as differs:
        replay(FedCompass(min_steps=6, max_steps=25), recorded())
    assert differs.value.code == "FL-S209"
    assert differs.value.message == (
        "input 0 at 0 s (joined a ClientInfo(examples=1, seconds_per_step=None, capabilities=())):"
        " recorded train a 5, replayed train a 6"
    )


@pytest.mark.parametrize(
    ("decided", "shown"),
    [
        ([], "recorded nothing more, replayed 1 more: train a 50"),
        ([Train("a", 50), Finish("done")], "recorded 1 more: finish 'done', replayed nothing more"),
        ("[]", 'recorded [], replayed [["Train",{"client":"a","steps":50,"extra":{}}]]'),
    ],
)
def test_actions_too_few_or_too_many_are_shown(decided: list[Action] | str, shown: str) -> None:
    with pytest.raises(ServerError, match="input 0 at 2 s") as differs:
        replay(FedAvg(), [(2.0, ClientJoined("a", ClientInfo(1)), decided)])
    assert differs.value.message.endswith(shown)


# ---- the digest ------------------------------------------------------------------------------

UPDATE = Update("o1.0", "o1", "a", 0, 5, 160, 1.0, 2.5, {"loss": 0.5, "accuracy": 0.9})
ONES: list[Event | Action] = [
    UpdateReceived(UPDATE),
    UpdateReceived(Update("o1.0", "o1", "a", 0, 5, 160, 1.0, 2.5)),
    UpdateReceived(Update("o1.0", "o1", "a", 0, 5, 160, 1.0, 2.5, current=False)),
    UpdateReceived(Update("o1.0", "o1", "a", 0, 5, 160, 1.0, 2.5, final=False)),
    Train("a", 5),
    Train("a", 5, {"lr": 0.1}),
    Aggregate((("o1.0", 0.5),)),
    Aggregate((("o1.0", 0.25),)),
    Aggregate((("o1.0", 0.5),), outer=False),
    Aggregate((("o1.0", 0.5),), "teacher"),
    SetTimer("t", 1.0),
    CancelTimer("t"),
    TimerFired("t"),
    Merged(1, ("o1.0",)),
    Merged(1, ("o1.0",), (("o2.0", "NaN"),)),
    Merged(1, ("o1.0",), (), {"delta_norm": 1.0}),
    Evaluated(1, {"accuracy": 0.9}),
    ClientJoined("a", ClientInfo(3)),
    ClientJoined("a", ClientInfo(3, 0.5)),
    ClientLeft("a", "gone"),
    Discard("o1.0", "late"),
    Ask("a", "send"),
    Ask("a", "drop"),
    Stopping("done"),
    Finish("done"),
]


def test_everything_that_differs_is_said_in_another_way_on_one_line() -> None:
    lines = [said(one) for one in ONES]
    assert len(set(lines)) == len(lines)
    assert not any("\n" in line for line in lines)


def test_metrics_are_said_in_order_of_their_names() -> None:
    assert said(ONES[0]).endswith("11 accuracy=0.9 loss=0.5")


def test_a_digest_can_be_read_at_any_time_and_depends_on_the_order() -> None:
    def digest(rows: list[Row], look: bool = False) -> str:
        made = Digest()
        for row in rows:
            made.feed(*row)
            if look:
                made.hex()
        return made.hex()

    rows = recorded() * 8
    assert len(rows) > BATCH
    assert digest(rows) == digest(rows, look=True)
    assert digest(rows) != digest(rows[1:])
    assert digest(rows) != digest([rows[1], rows[0], *rows[2:]])
    assert Digest().hex() == Digest().hex() != digest(rows)


def test_actions_as_json_name_their_kind() -> None:
    assert dump_actions([Finish("x")]) == '[["Finish",{"reason":"x"}]]'
