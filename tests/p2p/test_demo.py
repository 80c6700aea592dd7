"""What a demo of peers compares, refuses and says; its processes are for slow tests."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from atoll.p2p import folder as folders
from atoll.p2p.cli import cli
from atoll.p2p.cli_demo import ending
from atoll.p2p.demo import Digests, Swarm, SwarmSpec
from atoll.p2p.demo_view import PeerView, Show, SwarmView, line, render
from atoll.protocols import console
from atoll.protocols.children import Child

VIEW = SwarmView(
    "charlm on topics", 12.0, 4, 9, 2.5,
    (
        PeerView("peer-1", "training", 4, 2.4, 4, 2_000_000, 1000),
        PeerView("peer-2", "killed", 3, 2.6, 3, 1_000_000, 1000),
        PeerView("peer-3", "to come", 0, None, 0, 0, 0),
    ),
    0,
)  # fmt: skip


def spec(out: Path) -> SwarmSpec:
    return SwarmSpec(4, 9, 5, "charlm", "topics", 1e-3, "fp32", 0, 60.0, out)


def test_a_fork_is_a_round_of_which_two_peers_hold_other_models() -> None:
    digests = Digests()
    digests.note("a", 0, "first model")
    digests.note("a", 1, "x")
    digests.note("a", 2, "y")
    digests.note("b", 2, "y")
    digests.note("b", 3, "")
    assert (digests.compared, digests.forks) == (1, 0)
    digests.note("b", 1, "other")
    assert (digests.compared, digests.forks) == (2, 1)
    digests.note("b", 1, "x")  # healed before the next look
    assert (digests.compared, digests.forks) == (2, 0)


def test_a_fork_is_seen_in_what_the_peers_write(tmp_path: Path) -> None:
    swarm = Swarm(spec(tmp_path), Show(quiet=True), print)
    for name, digest in (("peer-1", "aa"), ("peer-2", "bb")):
        swarm.children[name] = Child(name, "atoll.p2p", (), tmp_path)
        swarm.folder(name).mkdir(parents=True)
        status = {"round": 3, "digested": 2, "digest": digest, "state": "training", "loss": 2.0}
        (swarm.folder(name) / folders.STATUS).write_text(json.dumps(status))
    swarm._look()
    view = swarm.view()
    assert (view.forks, view.round, view.loss) == (1, 3, 2.0)
    assert swarm.digests.said == {2: {"peer-1": "aa", "peer-2": "bb"}}
    assert [p.state for p in view.peers] == ["training", "training", "to come", "to come"]


@pytest.mark.parametrize(
    "options",
    [("--peers", "2"), ("--peers", "17"), ("--timeout", "10"), ("--rounds", "0")],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert console.run(cli, ["demo", "--out", str(out), *options, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "FL-S108"
    assert not out.exists()


def test_a_folder_that_cannot_be_made_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert console.run(cli, ["demo", "--out", str(tmp_path / "file" / "out"), "--json"]) == 74
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "FL-P405"


class Interrupted(Child):
    """Whoever waits for it to end is interrupted."""

    stopped = False

    def stop(self, seconds: float) -> None:
        if seconds > 0:
            raise KeyboardInterrupt
        self.stopped = True


def test_the_second_interrupt_ends_the_peers_at_once(tmp_path: Path) -> None:
    """It ended the demo with a traceback, while it waited for the peers' goodbyes."""
    swarm = Swarm(spec(tmp_path), Show(quiet=True), print)
    found = [Interrupted(name, "atoll.p2p", (), tmp_path) for name in swarm.names[:2]]
    swarm.children = {child.name: child for child in found}
    with swarm._processes():
        raise KeyboardInterrupt
    assert swarm.interrupted
    assert all(child.stopped for child in found)


def test_why_a_peer_ended_is_told_in_its_own_words(tmp_path: Path) -> None:
    swarm = Swarm(spec(tmp_path), Show(quiet=True), print)
    child = Child("peer-2", "atoll.p2p", (), tmp_path)
    child.out.write_text(
        json.dumps({"ok": False, "error": {"code": "FL-S101", "message": "no", "hint": "do"}})
    )
    assert str(swarm._failed(child)) == "FL-S101: peer-2: no (do)"
    child.out.write_text("")
    child.reason = "killed by signal 9"
    told = swarm._failed(child)
    assert (told.code, told.message) == ("FL-P203", "peer-2 ended: killed by signal 9")


def test_elsewhere_than_on_a_terminal_a_round_is_told_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Show() as show:
        show.event(1.0, "peer-1 is up")
        show.show(VIEW)
        show.show(VIEW)
    with Show(quiet=True) as show:
        show.event(1.0, "peer-1 is up")
        show.show(VIEW)
    assert capsys.readouterr().err.splitlines() == [
        "   1.0s  peer-1 is up",
        f"  12.0s  {line(VIEW)}",
    ]
    assert line(VIEW) == "round 4/9   1 peer   loss 2.5000   sent 3.0 MB"


def test_the_table_has_a_line_for_each_peer() -> None:
    screen = Console(width=80)
    with screen.capture() as got:
        screen.print(render(VIEW))
    lines = [" ".join(each.split()) for each in got.get().splitlines()]
    assert lines[0] == "charlm on topics 12s"
    assert lines[1] == "round 4/9 1 peer loss 2.5000 sent 3.0 MB forks 0"
    assert lines[3] == "peer-1 4 4 2.4000 2.0 MB 1.0 kB training"
    assert lines[5] == "peer-3 0 0 - 0 B 0 B to come"


def told(**other: Any) -> dict[str, Any]:
    return {
        "peers": 4, "rounds": 9, "loss_first": 4.0, "loss_last": 2.5, "elapsed_s": 40.0,
        "joined_at_round": 3, "killed_at_round": 5, "digests_equal": True, "digest": "ab" * 32,
        "forks": 0, "rounds_compared": 9, "bytes_up": 2000, "bytes_down": 2000,
        "sample": "words\x1b[2J", "files": {"model": "out/model.safetensors"}, **other,
    }  # fmt: skip


def test_the_end_says_what_happened() -> None:
    lines = ending(told()).splitlines()
    assert lines[:3] == [
        "9 rounds of 4 peers in 40.0 s, loss 4.0000 to 2.5000",
        "one joined late, in round 3; one was killed after round 5",
        "0 forks in 9 rounds compared; at the end one model: abababababababab",
    ]
    assert "words" in lines
    missed = told(joined_at_round=None, killed_at_round=None, digests_equal=False, sample="")
    assert ending(missed).splitlines()[1:3] == [
        "nobody joined late; nobody was killed",
        "0 forks in 9 rounds compared; at the end different models",
    ]
