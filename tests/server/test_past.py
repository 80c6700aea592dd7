"""The history of a killed server: whatever it did not get to write comes again, once."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from atoll.aggregation.fedbuff import FedBuff
from atoll.protocols.errors import ServerError
from atoll.protocols.events import Event, Merged
from atoll.protocols.membership import Membership
from atoll.server.history import line
from atoll.server.journal import Row
from atoll.server.ledger import EVERY
from atoll.server.past import Past
from atoll.server.recover import recover, snapshot
from atoll.server.rows import Recorder
from atoll.server.rules import Rules
from atoll.server.run import Run
from atoll.server.simulator import simulate
from atoll.server.totals import Totals
from atoll.server.workshop import Stock

SIZES = (10, 20)


def strategy() -> FedBuff:
    return FedBuff(size=2, steps=5, max_age=4.0)


@dataclass
class Inputs:
    """A journal with all that was heard."""

    all_rows: list[Row]
    taken: tuple[int, float, str] | None = None

    def last_snapshot(self) -> tuple[int, float, str] | None:
        return self.taken

    def rows(self, after: int = 0) -> Iterator[Row]:
        return iter(self.all_rows[after:])

    def meta(self, key: str) -> None:
        return None

    def acknowledged(self) -> Iterator[tuple[str, str]]:
        return iter(())


def lived() -> tuple[Inputs, list[str]]:
    """What was journaled of a run, and its history as a server that never died writes it."""
    run, recorder = Run(strategy()), Recorder()
    up, down = SIZES
    inputs: list[Row] = []
    lines: list[str] = []

    def listen(now: float, event: Event, _: object) -> None:
        heard, actions, effects = run.handle(event, now)
        inputs.append(Row(len(inputs) + 1, now, event, None))
        lines.extend(
            line(row).decode()
            for row in recorder.rows(run, now, heard, actions, effects, up, lambda order: down)
        )
        if isinstance(event, Merged):  # what only a driver writes stands in between
            lines.append(line({"t": now + 0.001, "kind": "back", "client": "a"}).decode())

    simulate(strategy(), {"a": 0.1, "b": 0.3, "c": 0.7}, 12.0, listen=listen)
    return Inputs(inputs), lines


def told(lines: list[str]) -> list[str]:
    """Those of inputs: the others are not in the journal."""
    return [one for one in lines if json.loads(one)["kind"] != "back"]


def resumed(path: Path, inputs: Inputs) -> list[str]:
    since = inputs.taken[1] if inputs.taken else float("-inf")
    past = Past(path, since, SIZES)
    recover(inputs, strategy(), Rules(), Membership(), past.heard)  # type: ignore[arg-type]
    past.ledger.flush()
    lines = path.read_text().splitlines(keepends=True)
    assert past.ledger.lines(0, len(lines) + 1) == lines
    past.ledger.close()
    again = Totals()
    for one in lines:
        again.append(json.loads(one))
    assert past.history == again
    return lines


def test_rows_that_were_not_written_come_again_wherever_it_died(tmp_path: Path) -> None:
    inputs, lines = lived()
    assert len(lines) > 80
    path = tmp_path / "history.jsonl"
    for at in range(len(lines) + 1):
        half = lines[at][:7] if at < len(lines) else ""  # of a line that was being written
        path.write_text("".join(lines[:at]) + half)
        assert told(resumed(path, inputs)) == told(lines), at


def test_with_a_snapshot_only_what_came_after_it_is_missing(tmp_path: Path) -> None:
    inputs, lines = lived()
    path = tmp_path / "history.jsonl"
    run = Run(strategy())
    rows = inputs.all_rows
    at = next(i for i in range(40, len(rows)) if rows[i].now > rows[i - 1].now)
    for row in rows[:at]:
        run.handle(row.event, row.now)
    now = rows[at - 1].now
    text = snapshot(run, Membership(), Rules(), Stock())
    assert text is not None
    later = Inputs(rows, (at, now, text))
    first = next(i for i, one in enumerate(lines) if json.loads(one)["t"] > now)
    path.write_text("".join(lines[:first]))  # flushed long ago
    assert sorted(told(resumed(path, later))) == sorted(told(lines))


def test_a_fresh_run_has_no_past(tmp_path: Path) -> None:
    past = Past(tmp_path / "history.jsonl", float("-inf"), SIZES)
    assert (past.history, len(past.ledger)) == (Totals(), 0)
    past.ledger.close()


def test_a_journal_that_lacks_its_newest_part_is_seen(tmp_path: Path) -> None:
    """A copy without `journal.sqlite-wal` went on from long ago, and cut the history off there."""
    _, lines = lived()
    path = tmp_path / "history.jsonl"
    path.write_text("".join(lines))
    heard = {"join", "leave", "update"}
    last = max(row["t"] for row in map(json.loads, lines) if row["kind"] in heard)
    with pytest.raises(ServerError, match="its newest part is missing") as refused:
        Past(path, 0.0, SIZES, journaled=last - 1e-9)
    assert refused.value.code == "FL-S206"
    assert path.read_text() == "".join(lines)
    later = line({"t": last + 1, "kind": "evaluated", "version": 1, "metrics": {}})
    path.write_text("".join(lines) + later.decode())  # what follows from inputs may be later
    Past(path, 0.0, SIZES, journaled=last).ledger.close()


def test_a_history_that_is_gone_is_written_again_not_gathered_first(tmp_path: Path) -> None:
    inputs, _ = lived()
    past = Past(tmp_path / "history.jsonl", float("-inf"), SIZES)
    for _ in range(12):
        run = Run(strategy())
        for row in inputs.all_rows:
            past.heard(run, row.now, *run.handle(row.event, row.now))
    assert len(past.ledger) > 2 * EVERY
    assert past.ledger.waiting < EVERY
    past.ledger.close()


@pytest.mark.parametrize("row", ['{"t": 1.0}', "[]", "5", "\ufeff{}", '{"t": 1, "kind": []}'])
def test_a_row_that_is_none_stops_the_reading_not_the_counting(tmp_path: Path, row: str) -> None:
    """A start on such a directory ended with FL-S100."""
    path = tmp_path / "history.jsonl"
    path.write_text(row + "\n")
    with pytest.raises(ServerError, match=r"history\.jsonl:1: ") as refused:
        Past(path, 0.0, SIZES)
    assert refused.value.code == "FL-S206"
