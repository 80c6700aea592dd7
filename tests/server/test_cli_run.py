"""status and run: what a state directory tells without its server, and how it is said."""

import fcntl
import hashlib
import json
import os
import socket
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from atoll.protocols import console
from atoll.protocols.errors import ServerError, UsageError
from atoll.protocols.manifest import Manifest, TensorSpec
from atoll.server import cli_run, look, offline
from atoll.server.cli import cli, end_line
from atoll.server.door import held, locked, write_note
from atoll.server.history import line
from atoll.server.live import Live
from atoll.server.look import FromFile, Place, Watch, picture
from atoll.server.screen import status_screen, worth
from atoll.server.server import Summary
from atoll.server.spec import RunSpec
from atoll.server.status import ClientStatus, GroupStatus, Status
from atoll.server.versions import VersionStore

Capsys = pytest.CaptureFixture[str]

ID = "01J8ZQ4T0V7M3N5P6R8S9T0V1W"
NOBODY = 65534  # a user id
ROWS: list[dict[str, Any]] = [
    {"t": 0.0, "kind": "evaluated", "version": 0, "metrics": {"accuracy": 0.1, "loss": 2.3}},
    {"t": 0.5, "kind": "join", "client": "fast", "examples": 60},
    {"t": 1.0, "kind": "join", "client": "slow", "examples": 40},
    {"t": 1.0, "kind": "train", "client": "fast", "order": "o0", "steps": 10, "version": 0},
    {"t": 1.0, "kind": "train", "client": "slow", "order": "o1", "steps": 10, "version": 0},
    {"t": 1.0, "kind": "started", "order": "o0", "bytes": 64},
    {"t": 1.0, "kind": "started", "order": "o1", "bytes": 64},
    {"t": 2.0, "kind": "update", "client": "fast", "order": "o0", "update": "o0.0", "steps": 10,
     "base": 0, "train_seconds": 0.5, "started": 1.0, "bytes": 64, "metrics": {}},
    {"t": 2.0, "kind": "aggregate", "version": 1, "items": [["o0.0", 1.0]],
     "staleness": {"o0.0": 0}},
    {"t": 2.0, "kind": "merged", "version": 1, "stats": {}},
    {"t": 2.1, "kind": "evaluated", "version": 1, "metrics": {"accuracy": 0.9, "loss": 0.4}},
    {"t": 4.0, "kind": "update", "client": "slow", "order": "o1", "update": "o1.0", "steps": 7,
     "base": 0, "train_seconds": 3.5, "started": 1.0, "bytes": 64, "metrics": {}},
    {"t": 4.0, "kind": "aggregate", "version": 2, "items": [["o1.0", 1.0]],
     "staleness": {"o1.0": 1}},
    {"t": 4.0, "kind": "merged", "version": 2, "stats": {}},
    {"t": 4.2, "kind": "evaluated", "version": 2, "metrics": {"accuracy": 0.8, "loss": 0.6}},
    {"t": 5.0, "kind": "leave", "client": "slow", "reason": "battery"},
]  # fmt: skip
FINISH = {"t": 6.0, "kind": "finish", "reason": "2 versions done"}
WEIGHTS = {number: torch.full((4, 4), float(number)) for number in range(3)}


def made(folder: Path, *rows: dict[str, Any]) -> Path:
    """A state directory as a stopped server leaves it."""
    folder.mkdir(parents=True)
    RunSpec(ID, name="digits-fc", strategy="fedavg:steps=10").write(folder / "run.json")
    manifest = Manifest((TensorSpec("w", (4, 4), "float32", "trainable"),))
    store = VersionStore(folder / "versions", manifest)
    for number, weights in WEIGHTS.items():
        store.save(store.initial({"w": weights}, number), durable=False)
    (folder / "history.jsonl").write_bytes(b"".join(map(line, [*ROWS, *rows])))
    return folder


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return made(tmp_path / "atoll-state")


def data(capsys: Capsys, *arguments: str, code: int = 0) -> Any:
    """What a command says with --json: its data, or its error."""
    assert console.run(cli, [*arguments, "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["v"] == 1
    assert told["ok"] is (code == 0)
    return told["data"] if code == 0 else told["error"]


# ---- status ----------------------------------------------------------------------------------


def test_status_of_a_stopped_run_is_what_its_history_says(state: Path, capsys: Capsys) -> None:
    told = data(capsys, "status", "--state", str(state))
    assert (told["run"], told["name"], told["state"]) == (ID, "digits-fc", "stopped")
    assert told["reason"] == f"no server runs; go on with: fl-server start --state {state}"
    assert (told["version"], told["updates"], told["steps"]) == (2, 2, 17)
    assert (told["latest"], told["latest_version"]) == (0.8, 2)
    assert (told["best"], told["best_version"]) == (0.9, 1)
    fast, slow = told["clients"]
    assert (fast["name"], fast["state"], fast["reason"]) == ("fast", "offline", "no server runs")
    assert (slow["name"], slow["state"], slow["reason"]) == ("slow", "left", "battery")
    assert (fast["updates"], fast["bytes_up"], fast["bytes_down"]) == (1, 64, 64)
    assert fast["seconds_per_step"] == pytest.approx(0.5 / 10)
    assert slow["seconds_per_step"] == pytest.approx(3.5 / 7)


def test_what_to_type_next_can_be_typed(tmp_path: Path, capsys: Capsys) -> None:
    state = made(tmp_path / "my runs" / "s\u00e9")
    told = data(capsys, "status", "--state", str(state))
    assert told["reason"].endswith(f"fl-server start --state '{state}'")


def test_a_finished_run_says_why_it_ended(tmp_path: Path, capsys: Capsys) -> None:
    told = data(capsys, "status", "--state", str(made(tmp_path / "s", FINISH)))
    assert (told["state"], told["reason"]) == ("finished", "2 versions done")
    assert told["elapsed_s"] == 6.0


def test_the_target_is_told_without_a_server_too(tmp_path: Path, capsys: Capsys) -> None:
    """The newest `limits` row counts: the target may change from start to start."""
    asked: dict[str, Any] = {"t": 0.0, "kind": "limits", "metric": "accuracy", "target": 0.95}
    lower = {**asked, "t": 5.5, "target": 0.85}
    state = made(tmp_path / "s", asked, lower)
    told = data(capsys, "status", "--state", str(state))
    assert (told["target"], told["metric"]) == (0.85, "accuracy")
    assert console.run(cli, ["status", "--state", str(state)]) == 0
    assert "best 0.9000 (v1), target 0.85" in capsys.readouterr().out
    open_end = made(tmp_path / "t", asked, {"t": 5.5, "kind": "limits"})
    assert data(capsys, "status", "--state", str(open_end))["target"] is None


def test_best_is_by_the_metric_that_the_limits_look_at(tmp_path: Path, capsys: Capsys) -> None:
    asked: dict[str, Any] = {"t": 0.0, "kind": "limits", "metric": "loss", "target": 0.1}
    told = data(capsys, "status", "--state", str(made(tmp_path / "s", asked)))
    assert (told["metric"], told["best"], told["target"]) == ("loss", 0.4, 0.1)
    assert console.run(cli, ["run", "ls", str(tmp_path)]) == 0
    assert "loss 0.4000" in capsys.readouterr().out  # it stood there as an accuracy


def test_the_latest_accuracy_says_of_which_version_it_is_unless_of_the_newest() -> None:
    status = Status(ID, "digits", "fedavg", "running", version=8, latest=0.9, latest_version=7)
    assert worth(status) == "accuracy 0.9000 (v7)"
    assert worth(replace(status, latest_version=8)) == "accuracy 0.9000"
    assert worth(replace(status, latest_version=None)) == "accuracy 0.9000"  # a former server's


def test_the_end_says_of_which_version_its_accuracy_is_unless_of_the_last() -> None:
    summary = Summary(ID, "8 versions done", 8, 24, 100, 5.5, {"accuracy": 0.9, "examples": 4.0}, 7)
    made = "8 versions from 24 updates in 5.5 s"
    assert end_line(summary) == f"{made}, accuracy 0.9000 (v7)"
    assert end_line(replace(summary, best_version=8)) == f"{made}, accuracy 0.9000"
    assert end_line(replace(summary, metrics={}, best_version=None)) == made


def test_a_run_that_has_not_begun_has_a_status_too(tmp_path: Path, capsys: Capsys) -> None:
    RunSpec(ID).write(tmp_path / "run.json")
    told = data(capsys, "status", "--state", str(tmp_path))
    assert (told["state"], told["version"], told["clients"]) == ("stopped", 0, [])


def test_the_version_is_the_newest_that_files_or_history_know(state: Path, capsys: Capsys) -> None:
    (state / "versions" / "2").rename(state / "versions" / "2.corrupt")
    assert data(capsys, "status", "--state", str(state))["version"] == 2
    (state / "history.jsonl").unlink()
    assert data(capsys, "status", "--state", str(state))["version"] == 1


def test_a_torn_last_line_is_left_out(state: Path, capsys: Capsys) -> None:
    with (state / "history.jsonl").open("a") as file:
        file.write('{"t":9,"kind":"fin')
    assert data(capsys, "status", "--state", str(state))["elapsed_s"] == 5.0


def test_the_folder_of_a_demo_is_as_good_as_its_state(tmp_path: Path, capsys: Capsys) -> None:
    made(tmp_path / "demo" / "state")
    assert data(capsys, "status", "--state", str(tmp_path / "demo"))["run"] == ID


def test_atoll_state_is_looked_for_first(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "atoll-state")
    monkeypatch.chdir(tmp_path)
    assert data(capsys, "status")["state_dir"] == "atoll-state"


def test_no_run_there_is_exit_3(tmp_path: Path, capsys: Capsys) -> None:
    assert data(capsys, "status", "--state", str(tmp_path), code=3)["code"] == "FL-S107"
    assert data(capsys, "run", "show", str(tmp_path), code=3)["code"] == "FL-S107"
    assert data(capsys, "run", "export", str(tmp_path), code=3)["code"] == "FL-S107"


@pytest.mark.parametrize("text", ["nothing", "127.0.0.1:", ":7447", "host:99999", "host:x"])
def test_an_address_that_is_none_is_exit_2(text: str, capsys: Capsys) -> None:
    assert data(capsys, "status", "--address", text, code=2)["code"] == "FL-S108"


def test_an_address_and_a_state_directory_are_one_too_many(state: Path, capsys: Capsys) -> None:
    arguments = ("status", "--address", "127.0.0.1:1", "--state", str(state))
    assert data(capsys, *arguments, code=2)["code"] == "FL-S108"


def test_a_damaged_history_is_named(state: Path, capsys: Capsys) -> None:
    (state / "history.jsonl").write_text('{"t":0,"kind":"join"}\n')
    error = data(capsys, "status", "--state", str(state), code=78)
    assert error["code"] == "FL-S206"
    assert "history.jsonl" in error["message"]


@pytest.mark.parametrize(
    "bad", [b"\xff", b'{"t":4.3,"kind":"j\xffoin"}', b'{"t":4.3,"kind":"join"}']
)
@pytest.mark.parametrize("command", ["status --state", "run show", "run watch"])
def test_a_broken_byte_is_told_with_its_line_and_not_with_the_file(
    state: Path, capsys: Capsys, command: str, bad: bytes
) -> None:
    """A UnicodeDecodeError holds all that was read: the whole history was printed."""
    path = state / "history.jsonl"
    row = line({"t": 4.3, "kind": "evaluated", "version": 2, "metrics": {"accuracy": 0.8}})
    path.write_bytes(path.read_bytes() + bad + b"\n" + 500 * row)
    error = data(capsys, *command.split(), str(state), code=78)
    assert (error["code"], error["hint"]) == ("FL-S206", "restore it from a backup")
    assert error["message"].startswith(f"{path}:{len(ROWS) + 1}: not ")
    assert len(error["message"]) < len(str(path)) + 120


def test_a_row_that_breaks_while_it_is_watched_is_told_too(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    source = FromFile(path)
    path.write_bytes(line(ROWS[0]))
    assert len(source.rows()) == 1
    with path.open("ab") as file:
        file.write(line(ROWS[1]) + b'"\xff"\n')
    with pytest.raises(ServerError, match=r"history\.jsonl:3: not JSON") as refused:
        source.rows()
    assert refused.value.code == "FL-S206"


def test_jsonl_ends_with_a_line_that_says_so(state: Path, capsys: Capsys) -> None:
    assert console.run(cli, ["status", "--state", str(state), "--jsonl"]) == 0
    *_, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert (last["ok"], last["final"], last["data"]["state"]) == (True, True, "stopped")


def test_an_error_is_the_last_line_of_jsonl_too(tmp_path: Path, capsys: Capsys) -> None:
    assert console.run(cli, ["status", "--state", str(tmp_path), "--jsonl"]) == 3
    out, err = capsys.readouterr()
    last = json.loads(out)
    assert (last["ok"], last["final"], last["error"]["code"]) == (False, True, "FL-S107")
    assert err == ""


# ---- the screen ------------------------------------------------------------------------------

LIVE: dict[str, Any] = {
    "run": ID, "name": "digits-fc", "strategy": "fedcompass", "state": "running", "version": 118,
    "updates": 412, "steps": 9000, "elapsed_s": 100.0, "latest": 0.941, "best": 0.945,
    "best_version": 116, "news_of_tomorrow": 1,
    "groups": [["g37", ["hospital-a", "lab-slow"], ["hospital-a"], 109.0, 114.0], {"odd": 1}],
    "clients": [
        {"name": "lab-slow", "state": "active", "reason": "joined", "since_s": 250.0,
         "heard_s": 1.0, "seconds_per_step": 0.5, "order": "o12", "steps": 100, "step": 81,
         "bytes_up": 4_100_000, "bytes_down": 9},
        {"name": "hospital-a", "state": "active", "order": None},
        {"name": "lab-b", "state": "suspect", "reason": "silent", "since_s": 47.0, "order": "o9"},
        {"name": "lab-c", "state": "active", "order": "o13", "steps": 5, "step": 5, "tomorrow": 2,
         "seconds_per_step": 0.0008},
        {"name": "evil\x1b[2J", "state": "left", "reason": "over\nnight"},
        {"name": "lab-d", "state": "new"},
    ],
}  # fmt: skip


def test_one_screen_shows_the_run_its_group_and_every_client() -> None:
    lines = status_screen(Status.of(LIVE, address="h:1")).plain.splitlines()
    assert lines[0] == (
        "digits-fc  fedcompass  running 1m 40s   v118   accuracy 0.9410, best 0.9450 (v116)"
        "   412 updates, 9,000 local steps"
    )
    assert lines[1] == f"run {ID}   h:1"
    assert lines[2] == (
        "group g37: 1/2 arrived, expected in 9.0s, closes in 14s   waits for lab-slow"
    )
    end = lines[3].index("HEARD") + len("HEARD")  # numbers end where their heading ends
    assert [line[:end].endswith("1.0s") for line in lines[4:-1]].count(True) == 1
    row = {line.split()[0]: line for line in lines[4:-1]}
    assert sorted(row) == ["evil", "hospital-a", "lab-b", "lab-c", "lab-d", "lab-slow"]
    assert " ".join(row["lab-slow"].split()) == (
        "lab-slow training 2 steps/s o12 81/100 steps 4.1 MB 9 B 1.0s joined 4m 10s ago"
    )
    assert row["hospital-a"].split()[1] == "waiting"
    assert row["lab-b"].split()[1] == "suspect"
    assert row["lab-b"].endswith("silent 47s ago")
    assert row["lab-c"].split()[1:4] == ["sending", "1,250", "steps/s"]  # was 1.25e+03
    assert row["evil"].endswith("over night")
    assert lines[-1] == (
        "6 clients: 1 expected, 1 left, 1 sending, 1 suspect, 1 training, 1 waiting"
    )


def test_what_a_newer_server_says_besides_is_left_out() -> None:
    status = Status.of(LIVE)
    assert status.groups == (
        GroupStatus("g37", ("hospital-a", "lab-slow"), ("hospital-a",), 109.0, 114.0),
    )
    assert [c.name for c in status.clients] == sorted(c["name"] for c in LIVE["clients"])


def test_a_pipe_gets_whole_lines_without_colour(tmp_path: Path, capsys: Capsys) -> None:
    deep = tmp_path / ("long-" * 30)
    made(deep)
    assert console.run(cli, ["run", "ls", str(tmp_path)]) == 0
    out, _ = capsys.readouterr()
    assert str(deep) in out
    assert "\x1b" not in out


# ---- run ls, run show -------------------------------------------------------------------------


def test_ls_finds_the_runs_below_a_folder_also_damaged_ones(tmp_path: Path, capsys: Capsys) -> None:
    made(tmp_path / "b" / "state", FINISH)
    made(tmp_path / "a")
    made(tmp_path / "a" / "copy")  # within a run's own folder nothing else is looked for
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "run.json").write_text("{")
    made(tmp_path / ".hidden")
    made(tmp_path / "1" / "2" / "3" / "4" / "too-deep")
    runs = data(capsys, "run", "ls", str(tmp_path))["runs"]
    assert [(Path(r["state_dir"]).relative_to(tmp_path).as_posix(), r["state"]) for r in runs] == [
        ("a", "stopped"), ("b/state", "finished"), ("c", "damaged"),
    ]  # fmt: skip
    assert (runs[0]["version"], runs[0]["best"], runs[0]["updates"]) == (2, 0.9, 2)


def test_ls_does_not_take_a_server_that_is_starting_for_damage(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It accepts before it has imported torch."""
    monkeypatch.setattr(cli_run, "GLANCE", 0.2)
    made(tmp_path / "a")
    made(tmp_path / "b", FINISH)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = {"address": f"127.0.0.1:{silent.getsockname()[1]}"}
        for run in ("a", "b"):
            (tmp_path / run / "server.json").write_text(json.dumps(address))
        runs = data(capsys, "run", "ls", str(tmp_path))["runs"]
    assert [run["state"] for run in runs] == ["running", "finished"]
    assert runs[0]["version"] == 2
    assert "no server answers" in runs[0]["reason"]


def test_a_server_that_is_frozen_is_not_told_as_stopped(
    state: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lives and holds the lock: to start another one, as `status` said, could not succeed."""
    monkeypatch.setattr(look, "ANSWER", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, locked(state):
        write_note(state, f"127.0.0.1:{silent.getsockname()[1]}")
        for command in (["status", "--state"], ["run", "show"]):
            told = data(capsys, *command, str(state))
            told = told.get("status", told)
            assert told["state"] == "running"
            assert told["reason"] == f"its server (pid {os.getpid()}) does not answer"
            assert (told["version"], told["updates"]) == (2, 2)
            assert [c["reason"] for c in told["clients"]] == [told["reason"], "battery"]
        (state / "server.json").unlink()  # it is starting, and listens nowhere yet
        (run,) = data(capsys, "run", "ls", str(state))["runs"]
        assert (run["state"], run["reason"]) == ("running", "its server does not answer")
    assert data(capsys, "status", "--state", str(state))["state"] == "stopped"


@pytest.mark.parametrize("word", [0.01, 10.0])
def test_whoever_waits_long_for_an_answer_is_told_so(
    state: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch, word: float
) -> None:
    monkeypatch.setattr(look, "ANSWER", 0.3)
    monkeypatch.setattr(look, "WORD", word)
    with socket.create_server(("127.0.0.1", 0)) as silent, locked(state):
        write_note(state, f"127.0.0.1:{silent.getsockname()[1]}")
        assert console.run(cli, ["status", "--state", str(state), "--json"]) == 0
    waited = "the server does not answer yet, waiting up to 0.3 s\n"
    assert capsys.readouterr().err == (waited if word < 0.3 else "")


def test_a_finished_run_is_finished_whoever_holds_it(tmp_path: Path, capsys: Capsys) -> None:
    state = made(tmp_path / "s", FINISH)
    with locked(state):
        assert data(capsys, "status", "--state", str(state))["state"] == "finished"


def test_a_look_at_the_lock_keeps_no_server_from_starting(state: Path) -> None:
    with open(state / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        timer = threading.Timer(0.02, fcntl.flock, (file, fcntl.LOCK_UN))
        timer.start()
        with locked(state):
            assert held(state)
        timer.join()
    assert not held(state)


def test_ls_of_an_empty_folder_says_how_to_begin(tmp_path: Path, capsys: Capsys) -> None:
    assert data(capsys, "run", "ls", str(tmp_path)) == {"runs": []}
    assert console.run(cli, ["run", "ls", str(tmp_path)]) == 0
    assert "fl-server start" in capsys.readouterr().out
    assert data(capsys, "run", "ls", str(tmp_path / "no"), code=2)["code"] == "FL-S108"


def test_show_tells_spec_counters_files_and_versions(state: Path, capsys: Capsys) -> None:
    told = data(capsys, "run", "show", str(state))
    assert told["spec"]["strategy"] == "fedavg:steps=10"
    assert told["status"]["best_version"] == 1
    assert [v["version"] for v in told["versions"]] == [0, 1, 2]
    assert told["versions"][1]["metrics"] == {"accuracy": 0.9, "loss": 0.4}
    payload = WEIGHTS[1].numpy().tobytes()
    assert told["versions"][1]["payload_sha256"] == hashlib.sha256(payload).hexdigest()
    assert told["files"]["history.jsonl"] == (state / "history.jsonl").stat().st_size
    assert "rows/" not in told["files"]
    (state / "rows").mkdir()
    for name in ("a.1", "b.3"):
        (state / "rows" / name).write_bytes(b"0123")
    assert data(capsys, "run", "show", str(state))["files"]["rows/"] == 8
    assert console.run(cli, ["run", "show", str(state)]) == 0
    out = capsys.readouterr().out
    assert "v1 best" in out
    assert "accuracy 0.8000, best 0.9000 (v1)" in out


# ---- run export -------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "number"), [("best", 1), ("last", 2), ("0", 0)])
def test_export_copies_the_version_that_was_asked_for(
    state: Path, tmp_path: Path, capsys: Capsys, wanted: str, number: int
) -> None:
    target = tmp_path / "m.safetensors"
    told = data(capsys, "run", "export", str(state), "--version", wanted, "-o", str(target))
    assert (told["version"], told["bytes"]) == (number, target.stat().st_size)
    assert torch.equal(load_file(target)["w"], WEIGHTS[number])
    assert told["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()
    assert told["payload_sha256"] == hashlib.sha256(WEIGHTS[number].numpy().tobytes()).hexdigest()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["atoll-state", "m.safetensors"]


def test_export_names_its_file_after_run_and_version(
    state: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(state.parent)
    assert data(capsys, "run", "export")["file"] == "digits-fc-v1.safetensors"
    assert (state.parent / "digits-fc-v1.safetensors").exists()
    run = json.loads((state / "run.json").read_text())
    (state / "run.json").write_text(json.dumps({**run, "name": "../mine"}))
    assert data(capsys, "run", "export")["file"] == "..-mine-v1.safetensors"  # in this folder


@pytest.mark.parametrize("wanted", ["7", "newest", "-1"])
def test_a_version_that_is_not_kept_is_exit_3(state: Path, capsys: Capsys, wanted: str) -> None:
    error = data(capsys, "run", "export", str(state), "--version", wanted, code=3)
    assert error["code"] == "FL-S107"
    assert error["hint"] == "kept: 0, 1, 2; or best, or last"


def test_the_best_of_what_was_never_evaluated_is_the_newest(state: Path) -> None:
    (state / "history.jsonl").unlink()
    assert offline.pick(state, "best") == 2


def test_a_damaged_version_is_not_exported(state: Path, tmp_path: Path, capsys: Capsys) -> None:
    model = state / "versions" / "1" / "model.safetensors"
    broken = bytearray(model.read_bytes())
    broken[-1] ^= 1
    model.write_bytes(broken)
    target = tmp_path / "m.safetensors"
    error = data(capsys, "run", "export", str(state), "-o", str(target), code=78)
    assert error["code"] == "FL-S206"
    assert "version 1 is damaged: SHA-256" in error["message"]
    assert not target.exists()
    (state / "versions" / "1" / "version.json").unlink()
    assert data(capsys, "run", "export", str(state), code=78)["code"] == "FL-S206"


def test_export_into_no_folder_is_wrong_usage_and_not_a_failing_disk(
    state: Path, tmp_path: Path, capsys: Capsys
) -> None:
    target = tmp_path / "no" / "m.safetensors"
    error = data(capsys, "run", "export", str(state), "-o", str(target), code=2)
    assert (error["code"], error["message"]) == ("FL-S108", f"no folder {target.parent}")
    assert f"mkdir -p {target.parent}" in error["hint"]


def test_export_where_one_may_not_write_is_wrong_usage(state: Path) -> None:
    """In a process of its own: nothing is closed to a superuser, who becomes nobody there."""
    with tempfile.TemporaryDirectory() as closed:
        os.chmod(closed, 0o555)
        child = os.fork()
        if child == 0:
            try:
                if os.geteuid() == 0:
                    os.setresuid(NOBODY, NOBODY, NOBODY)
                offline.export(state, 1, Path(closed) / "m.safetensors")
            except UsageError as error:
                os._exit(0 if "may not be written" in error.message else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("through", ["itself", "a link"])
def test_export_replaces_nothing_but_a_file(
    state: Path, tmp_path: Path, capsys: Capsys, through: str
) -> None:
    """As root, `-o /dev/full` made a model of the device."""
    pipe, target = tmp_path / "pipe", tmp_path / "m.safetensors"
    os.mkfifo(pipe)
    target.symlink_to(pipe)
    given = pipe if through == "itself" else target
    error = data(capsys, "run", "export", str(state), "-o", str(given), code=2)
    assert error["code"] == "FL-S108"
    assert error["message"] == f"cannot write {given}: it is there, and is no regular file"
    assert (pipe.is_fifo(), target.is_symlink()) == (True, True)


def test_export_goes_through_a_folder_that_is_not_there(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    """It was written, and then looked for by another way: a crash file."""
    monkeypatch.chdir(tmp_path)
    told = data(capsys, "run", "export", str(state), "-o", "none/../it.st")
    assert (tmp_path / "it.st").stat().st_size == told["bytes"]


def test_export_to_a_folder_by_its_slash_is_wrong_usage(
    state: Path, tmp_path: Path, capsys: Capsys
) -> None:
    error = data(capsys, "run", "export", str(state), "-o", f"{tmp_path}/new/", code=2)
    assert "names a folder: name a file in it" in error["message"]
    assert not (tmp_path / "new").exists()


def test_export_follows_a_link(state: Path, tmp_path: Path, capsys: Capsys) -> None:
    """It was replaced, and what it led to stayed as it was."""
    link, target = tmp_path / "newest", tmp_path / "models" / "m.safetensors"
    target.parent.mkdir()
    link.symlink_to(target)
    for version in (1, 2):  # there is nothing yet, there is a file
        data(capsys, "run", "export", str(state), "--version", str(version), "-o", str(link))
        assert link.is_symlink()
        assert torch.equal(load_file(target)["w"], WEIGHTS[version])


def test_export_that_the_disk_does_not_take_says_so(state: Path, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors.part").mkdir()
    with pytest.raises(ServerError) as refused:
        offline.export(state, 1, tmp_path / "m.safetensors")
    assert refused.value.code == "FL-S203"


# ---- run watch --------------------------------------------------------------------------------


def test_watching_a_finished_run_tells_it_from_the_beginning(
    tmp_path: Path, capsys: Capsys
) -> None:
    state = made(tmp_path / "s", FINISH)
    assert console.run(cli, ["run", "watch", str(state)]) == 0
    out, err = capsys.readouterr()
    assert out == "finished: 2 versions done\nv2, accuracy 0.8000, best 0.9000 (v1)\n"
    assert len(err.splitlines()) == 11  # a line per event: no train, started or aggregate
    assert err.splitlines()[-1].split() == ["6.00s", "finished:", "2", "versions", "done"]


def test_watching_as_jsonl_gives_every_row_and_the_end(tmp_path: Path, capsys: Capsys) -> None:
    state = made(tmp_path / "s", FINISH)
    assert console.run(cli, ["run", "watch", str(state), "--jsonl"]) == 0
    out, err = capsys.readouterr()
    *rows, last = map(json.loads, out.splitlines())
    assert rows == [*ROWS, FINISH]
    assert (last["final"], last["data"]["state"], last["data"]["updates"]) == (True, "finished", 2)
    assert err == ""


def test_watching_a_stopped_run_ends_where_it_stopped(state: Path, capsys: Capsys) -> None:
    assert data(capsys, "run", "watch", str(state))["state"] == "stopped"


def test_the_file_is_read_as_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    source = FromFile(path)
    assert source.rows() == []
    path.write_bytes(line(ROWS[0]) + line(ROWS[1])[:10])
    assert source.rows() == [ROWS[0]]
    with path.open("ab") as file:
        file.write(line(ROWS[1])[10:])
    assert source.rows() == [ROWS[1]]


def test_the_picture_joins_history_and_status(state: Path) -> None:
    rows: list[dict[str, Any]] = []
    watch = Watch(Place(state=state), Live(quiet=True), lambda row: rows.append(dict(row)))
    status = watch.run()
    assert rows == ROWS
    clients = (
        ClientStatus("fast", "suspect", "silent"), ClientStatus("slow", "active", step=3),
    )  # fmt: skip
    status = Status(
        status.run, "digits-fc", "fedavg:steps=10", "running", target=0.95, clients=clients
    )
    shown = picture(watch.history, status, now=9.0)
    assert (shown.title, shown.now, shown.target) == ("digits-fc, fedavg", 9.0, 0.95)
    assert [(c.name, c.state, c.reason) for c in shown.clients] == [
        ("fast", "gone", "silent"), ("slow", "gone", ""),
    ]  # fmt: skip


def test_a_directory_without_versions_has_none_to_pick(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="no version in"):
        offline.pick(tmp_path, "best")
