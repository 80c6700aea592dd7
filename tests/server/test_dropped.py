"""What a merge could not use, and what could not be measured: told, counted, survived."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from atoll.aggregation.fedavg import FedAvg
from atoll.protocols import console
from atoll.protocols.events import Merged, Update, UpdateReceived
from atoll.server import offline
from atoll.server.cli import cli
from atoll.server.history import History, line
from atoll.server.rows import Recorder
from atoll.server.run import Run
from tests.server.test_cli_run import ROWS, made

WHY = "the merged model would not be finite"
DROPPED = [r if r.get("version") != 2 or r["kind"] != "merged" else
           {**r, "dropped": [["o1.0", WHY]]} for r in ROWS]  # fmt: skip


def stopped(folder: Path, rows: list[dict[str, Any]]) -> Path:
    state = made(folder)
    (state / "history.jsonl").write_bytes(b"".join(map(line, rows)))
    return state


def test_only_the_row_of_a_snapshot_says_that_it_is_not_final() -> None:
    """`run watch --jsonl` says "final": true in its last line, and every update's row did."""
    for final in (True, False):
        update = Update("o0.0", "o0", "a", 0, 1, 1, 0.0, 0.1, final=final)
        (row,) = Recorder().rows(Run(FedAvg()), 1.0, UpdateReceived(update), (), ())
        assert row.get("final", True) is final
        assert ("final" in row) is not final


def test_the_row_of_a_merge_names_what_it_could_not_use() -> None:
    def rows(merged: Merged) -> list[dict[str, Any]]:
        return list(map(dict, Recorder().rows(Run(FedAvg()), 1.0, merged, (), ())))

    usual = {"t": 1.0, "kind": "merged", "version": 2, "stats": {}}
    assert rows(Merged(2, ("o0.0",))) == [usual]
    told = rows(Merged(2, (), (("o1.0", WHY),)))
    assert json.loads(json.dumps(told)) == [{**usual, "dropped": [["o1.0", WHY]]}]


def test_an_update_that_a_merge_dropped_was_not_used() -> None:
    """It was merged and counted as merged: live said 1 update, and 12 when the server had ended."""
    told = History()
    for row in DROPPED:
        told.append(row)
    fast, slow = told.clients["fast"], told.clients["slow"]
    assert (fast.merged, fast.discarded) == (1, 0)
    assert (slow.merged, slow.staleness, slow.discarded) == (0, 0, 1)
    (span,) = (s for s in told.spans if s.client == "slow")
    assert (span.staleness, span.reason) == (None, WHY)


def test_a_run_without_its_server_has_as_many_updates_as_with_it(tmp_path: Path) -> None:
    status = offline.status(stopped(tmp_path / "s", DROPPED))
    assert (status.version, status.updates, status.steps) == (2, 1, 10)


def test_a_model_that_diverged_can_be_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its loss was no number, its accuracy that of one class: status, ls and show crashed."""
    found = {"t": 4.2, "kind": "evaluated", "version": 2}
    worth = {"accuracy": 0.95, "loss": None}
    state = stopped(tmp_path / "s", [*ROWS[:-2], {**found, "metrics": worth}, ROWS[-1]])
    status = offline.status(state)
    assert (status.best, status.best_version) == (0.9, 1)
    assert status.latest is not None
    assert math.isnan(status.latest)
    assert console.run(cli, ["run", "show", str(state)]) == 0
    assert "accuracy 0.9500  loss nan" in capsys.readouterr().out
    assert console.run(cli, ["run", "show", str(state), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["data"]
    assert told["versions"][2]["metrics"] == worth
