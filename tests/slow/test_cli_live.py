"""status and run watch against a real server: while it runs, when it is killed, when it is gone."""

import json
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from atoll.protocols import console
from atoll.server.cli import cli
from atoll.server.status import Status

if TYPE_CHECKING:
    from tests.slow.conftest import Federation

pytestmark = pytest.mark.slow

TARGET = ("--strategy", "fedcompass:min_clients=2,min_steps=10,max_steps=40",
          "--target-accuracy", "0.93")  # fmt: skip


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"127.0.0.1:{taken.getsockname()[1]}"


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert console.run(cli, [*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["data"]
    return found


def test_nobody_there_is_exit_69(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["status"], ["status", "--watch"], ["run", "watch"]):
        assert console.run(cli, [*command, "--address", free_port(), "--json"]) == 69
        assert json.loads(capsys.readouterr().out)["error"]["code"] == "FL-S207"


def test_a_run_is_watched_from_its_first_row_to_its_last(
    federation: "Federation", capsys: pytest.CaptureFixture[str]
) -> None:
    """By address and by state directory the same rows arrive, and both know how it ended."""
    server = federation.server(*TARGET)
    before = told(capsys, "status", "--address", federation.address)
    assert (before["state"], before["clients"]) == ("running", [])
    where = {"by-address": ["--address", federation.address], "by-state": [str(federation.state)]}
    watchers = [
        federation.command(name, "fl-server", "run", "watch", *place, "--jsonl")
        for name, place in where.items()
    ]
    waiting = federation.command(
        "waiting", "fl-server", "status", "--state", str(federation.state), "--watch", "--json"
    )
    for i in range(2):
        federation.client(f"c{i}", "--shard", f"{i}/2", "--sleep-per-step", "0.005")
    deadline = time.monotonic() + 60
    seen: set[str] = set()
    while server.alive and time.monotonic() < deadline and "training" not in seen:
        now = Status.of(told(capsys, "status", "--state", str(federation.state)))
        seen |= {c.doing for c in now.clients}
        assert now.target == 0.93
        assert None not in {c.updates for c in now.clients}
        time.sleep(0.1)
    assert "training" in seen
    summary = server.data()
    history = [
        json.loads(line) for line in (federation.state / "history.jsonl").read_text().splitlines()
    ]
    for watcher in watchers:
        assert watcher.wait(20) == 0
        *rows, last = map(json.loads, watcher.out.read_text().splitlines())
        assert rows == history
        assert (last["ok"], last["final"]) == (True, True)
        end = last["data"]
        assert (end["state"], end["reason"]) == ("finished", summary["reason"])
        assert end["version"] == summary["versions"]
        assert end["target"] == 0.93
        assert sum(client["updates"] for client in end["clients"]) >= summary["updates"] > 0
    assert waiting.data(20)["state"] == "finished"
    assert told(capsys, "run", "ls", str(federation.folder))["runs"][0]["state"] == "finished"


def test_a_killed_server_is_stopped_not_running(
    federation: "Federation", capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its note still names an address: nobody answers there, so the files are asked."""
    server = federation.server(*TARGET)
    watcher = federation.command("w", "fl-server", "run", "watch", str(federation.state), "--json")
    assert told(capsys, "status", "--state", str(federation.state))["state"] == "running"
    server.kill()
    assert (federation.state / "server.json").exists()
    status = told(capsys, "status", "--state", str(federation.state))
    assert status["state"] == "stopped"
    assert watcher.data(20)["state"] == "stopped"
    target = str(tmp_path / "m.safetensors")
    exported = told(capsys, "run", "export", str(federation.state), "-o", target)
    assert exported["version"] == 0


def test_another_servers_port_is_not_taken_for_ours(
    federation: "Federation", capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    federation.server(*TARGET)
    other = tmp_path / "other"
    other.mkdir()
    spec = json.loads((federation.state / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**spec, "id": "01J8ZQ4T0V7M3N5P6R8S9T0V1W"}))
    (other / "server.json").write_text((federation.state / "server.json").read_text())
    assert told(capsys, "status", "--state", str(other))["state"] == "stopped"
    assert told(capsys, "status", "--state", str(federation.state))["state"] == "running"


def test_a_run_that_cannot_begin_leaves_the_folder_for_a_better_one(
    federation: "Federation",
) -> None:
    wrong = federation.server("--outer", "nesterov:lrr=0.7", wait=False)
    assert wrong.error() == "FL-S102"
    assert not (federation.state / "run.json").exists()
    federation.server("--outer", "nesterov:lr=0.7")
