"""fl-peer: what it refuses, what it shows of a peer's directory; the network is for slow tests."""

import fcntl
import io
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from atoll.p2p import cli_run, invite, ports
from atoll.p2p import folder as folders
from atoll.p2p.cli import cli
from atoll.p2p.doctor import _addresses
from atoll.p2p.line import Line, near_members, text_of, waits
from atoll.p2p.peer import Peer
from atoll.protocols import console
from atoll.protocols.errors import PeerError
from tests.p2p.people import INVITE

TEXT = invite.write(INVITE)
STATUS: dict[str, Any] = {
    "peer": "QmOne", "name": "one", "run": INVITE.run, "pid": 2**30, "at": 0.0, "rounds": 9,
    "round": 4, "loss": 2.5, "digest": "ab" * 32, "state": "training", "why": "", "bytes_in": 2e6,
    "bytes_out": 1e6,
    "members": [
        {"peer": "QmOne", "name": "one"},
        {"peer": "QmTwo", "name": "two", "round": 4, "ready": True, "silent": 0.3},
        {"peer": "QmThree", "name": "th\x1b[2Jree", "round": 2, "ready": False, "silent": 99.0},
        {"peer": "QmFour", "name": "four", "round": -1, "ready": False, "silent": None},
    ],
}  # fmt: skip


def peer_in(folder: Path, status: dict[str, Any] | None = None) -> Path:
    folders.write(folder, folders.About(TEXT, "one", ("/ip4/0.0.0.0/tcp/7448",)))
    if status is not None:
        (folder / folders.STATUS).write_text(json.dumps(status))
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The code of the error that a command ends with."""
    code = console.run(cli, [*arguments, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert not told["ok"]
    assert code != 0
    return str(told["error"]["code"])


@pytest.mark.parametrize(
    "option",
    [
        "--steps=0",
        "--batch=0",
        "--rounds=-1",
        "--first=0",
        "--seed=99999999999999999999",
        "--name=a\nb",
        "--name=",
    ],
)
def test_what_founds_no_run_is_told_at_once(
    option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """After torch was imported it was told by a name that is no option's. A seed that torch
    does not take was called a bug, and so was the name, when the peer that had it was started."""
    folder = tmp_path / "peer"
    assert console.run(cli, ["init", option, "--folder", str(folder), "--json"])
    assert f"Invalid value for '{option.split('=')[0]}'" in capsys.readouterr().out
    assert not folder.exists()


def test_a_wrong_or_truncated_invite_is_told_before_anything_is_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("join", "doctor"):
        assert refused(capsys, command, "something") == "FL-P301"
        assert refused(capsys, command, TEXT[:-9]) == "FL-P302"
    assert refused(capsys, "join", TEXT, "--host", "nowhere") == "FL-S108"
    assert refused(capsys, "init", "--no-listen") == "FL-S104"
    assert refused(capsys, "init", "--port", "70000") == "FL-S108"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["status", "start", "leave", "invite"])
def test_a_directory_without_a_peer_is_told(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert refused(capsys, command, str(tmp_path)) == "FL-P308"
    (tmp_path / folders.ABOUT).write_text("{}")
    assert refused(capsys, command, str(tmp_path)) == "FL-P405"


def test_a_run_is_not_founded_where_something_lies(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    assert refused(capsys, "init", "--folder", str(tmp_path)) == "FL-P309"
    assert refused(capsys, "join", TEXT, "--folder", str(tmp_path)) == "FL-P309"
    peer_in(tmp_path / "peer")
    assert refused(capsys, "init", "--folder", str(tmp_path / "peer")) == "FL-P309"


def test_a_machine_takes_part_where_it_did_before_and_a_second_peer_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = Path("atoll-peer")
    assert folders.for_run(None, INVITE.run) == first
    peer_in(first)
    assert folders.for_run(None, INVITE.run) == first  # it is not running: the same again
    assert folders.for_run(None, "another run") == Path("atoll-peer-2")
    assert folders.new(None) == Path("atoll-peer-2")
    with open(first / folders.LOCK, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert folders.running(first)
        assert folders.for_run(None, INVITE.run) == Path("atoll-peer-2")
    assert not folders.running(first)


def test_what_is_secret_is_this_users_alone(tmp_path: Path) -> None:
    folder = peer_in(tmp_path / "peer")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / folders.ABOUT).stat().st_mode & 0o777 == 0o600
    assert folders.signed(folder) == b""
    (folder / folders.SIGNED).write_bytes(b"paper")
    assert folders.signed(folder) == b""  # not the founder's
    (folder / folders.KEY).write_bytes(b"key")
    assert folders.signed(folder) == b"paper"
    (folder / folders.SIGNED).unlink()
    with pytest.raises(PeerError, match="No such file") as error:
        folders.signed(folder)
    assert error.value.code == "FL-P405"


def test_who_said_goodbye_is_shown_as_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was silent, and never heard of, for the ten minutes in which the roster still has it."""
    gone = {
        "peer": "QmFive",
        "name": "five",
        "round": 3,
        "ready": True,
        "silent": None,
        "left": True,
    }
    folder = peer_in(tmp_path / "peer", {**STATUS, "members": [*STATUS["members"], gone]})
    assert console.run(cli, ["status", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["QmFive", "five", "3", "-", "left"]
    assert lines[-2].split()[-2:] == ["never", "silent"]


def test_status_shows_the_run_and_its_members(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = peer_in(tmp_path / "peer")
    assert console.run(cli, ["status", str(folder)]) == 0
    assert "has not run yet" in capsys.readouterr().out
    peer_in(folder, STATUS)
    assert console.run(cli, ["status", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("one  not running   round 4/9   loss 2.5000   up 1.0 MB")
    assert lines[2].split() == ["PEER", "NAME", "ROUND", "HEARD", "STATE"]
    assert [line.split()[-1] for line in lines[3:]] == ["peer", "ready", "silent", "silent"]
    assert [line.split()[2] for line in lines[3:]] == ["4", "4", "2", "-"]  # -1: it said none yet
    assert "\x1b" not in "".join(lines)
    assert console.run(cli, ["status", str(folder), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert (data["round"], data["running"], len(data["members"])) == (4, False, 4)
    (folder / folders.STATUS).write_text("[torn")
    assert folders.status(folder) == {}


PEER = """\
import fcntl, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
lock = open(folder / "lock", "ab")
fcntl.flock(lock, fcntl.LOCK_EX)
lock.truncate(0)
lock.write(str(os.getpid()).encode())
lock.flush()
print("up", flush=True)
signal.sigwait({signal.SIGTERM})
lock.close()
time.sleep(0.2)
(folder / "model.safetensors").write_text("whole")
"""


@contextmanager
def running_in(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """What a peer's process is to `fl-peer leave`: it ends when told, and writes its model last."""
    block = [signal.SIGTERM]
    signal.pthread_sigmask(signal.SIG_BLOCK, block)
    try:
        made = subprocess.Popen(
            [sys.executable, "-c", PEER, str(folder)], stdout=subprocess.PIPE, text=True
        )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, block)
    with made:
        assert made.stdout is not None
        assert made.stdout.readline() == "up\n"
        try:
            yield made
        finally:
            made.kill()


def test_leave_ends_the_peer_that_runs_there_and_waits_for_its_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It told the process that the last status named: after a kill and a new start that was
    nobody, or whoever has its number by now. And it returned before the model was written."""
    folder = peer_in(tmp_path / "peer", STATUS)
    assert refused(capsys, "leave", str(folder)) == "FL-P310"
    with running_in(folder) as peer:
        assert folders.pid(folder) == peer.pid != STATUS["pid"]
        assert console.run(cli, ["leave", str(folder)]) == 0
        assert (folder / folders.MODEL).read_text() == "whole"
    said = f"stopped after 4 rounds; go on with   fl-peer start {folder}\n"
    assert capsys.readouterr().out == said
    peer_in(folder, {**STATUS, "state": "left"})
    with running_in(folder):
        assert console.run(cli, ["leave", str(folder)]) == 0
    assert capsys.readouterr().out == "left after 4 rounds\n"
    assert refused(capsys, "leave", str(folder)) == "FL-P310"


@pytest.mark.parametrize("command", ["join", "start"])
def test_a_second_peer_in_a_directory_is_told_who_has_it_and_changes_nothing(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was told after ten seconds, not by whom, and peer.json was the second one's by then."""
    folder = peer_in(tmp_path / "peer", STATUS)
    before = (folder / folders.ABOUT).read_text()
    given = ["join", TEXT, "--folder", str(folder), "--name", "two"]
    with running_in(folder) as peer:
        assert console.run(cli, given if command == "join" else ["start", str(folder)]) == 73
        said = capsys.readouterr().err
        assert f"error FL-P406: {folder} is in use by another peer (process {peer.pid})" in said
        assert f"fix    stop it (fl-peer leave {folder}), or give another --folder" in said
    assert (folder / folders.ABOUT).read_text() == before


def test_of_two_that_join_at_once_the_second_leaves_the_first_its_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found it empty. The second tidied up after itself: the first one's key and lock."""
    folder = tmp_path / "peer"

    def late(place: Path, as_json: bool) -> None:
        (place / folders.IDENTITY).write_bytes(b"the first one's")
        raise folders.in_use(place)

    monkeypatch.setattr(cli_run, "_take_part", late)
    assert refused(capsys, "join", TEXT, "--folder", str(folder)) == "FL-P406"
    assert {folders.ABOUT, folders.IDENTITY} <= {path.name for path in folder.iterdir()}


def test_a_run_whose_first_round_would_never_be_is_not_founded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "peer"
    assert refused(capsys, "init", "--first", "257", "--folder", str(folder)) == "FL-S108"
    assert not folder.exists()


def test_leave_does_not_wait_for_ever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = peer_in(tmp_path / "peer", STATUS)
    for seconds in ("nan", "-1"):
        assert refused(capsys, "leave", str(folder), "--timeout", seconds) == "FL-S108"
    with running_in(folder):
        assert refused(capsys, "leave", str(folder), "--timeout", "0") == "FL-P311"


def test_what_a_former_life_said_last_is_not_told_as_now(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = peer_in(tmp_path / "peer", STATUS)
    with running_in(folder) as peer:
        assert console.run(cli, ["status", str(folder)]) == 0
        assert capsys.readouterr().out.startswith("one  starting   round 4/9")
        peer_in(folder, {**STATUS, "pid": peer.pid})
        assert console.run(cli, ["status", str(folder)]) == 0
        assert capsys.readouterr().out.startswith("one  training   round 4/9")


@pytest.mark.parametrize(
    "status",
    [{"round": 1}, {**STATUS, "at": "x"}, {**STATUS, "loss": "x"}, {**STATUS, "members": {"a": 3}}],
)
def test_a_status_that_no_peer_wrote_is_an_error(
    status: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was told as a bug of ours."""
    folder = peer_in(tmp_path / "peer", status)
    assert console.run(cli, ["status", str(folder)]) == 74
    assert "error FL-P405" in capsys.readouterr().err
    peer_in(folder, {"addresses": 3})
    assert console.run(cli, ["invite", str(folder)]) == 0


def test_a_port_that_another_program_has_is_refused_and_a_former_one_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two daemons listened on one port, and who connected met the one or the other: a peer that was
    killed came back to a port that was taken meanwhile, and never met some of the others."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for command in (["init"], ["join", TEXT]):
            folder = str(tmp_path / command[0])
            given = ["--folder", folder, "--host", "127.0.0.1", "--port", str(port)]
            assert refused(capsys, *command, *given) == "FL-P201"
            assert not Path(folder).exists()
        taken, any_port = (f"/ip4/127.0.0.1/tcp/{port}",), ("/ip4/127.0.0.1/tcp/0",)
        here = Peer(tmp_path, INVITE, name="one", listen=taken)
        assert here._listens() == [any_port]
        here._habits.listen = any_port
        assert here._listens() == [any_port]
    assert here._listens() == [any_port, taken]
    assert Peer(tmp_path, INVITE, name="one", listen=())._listens() == [()]
    assert ports.free("192.0.2.77", 7448)  # nobody's: the daemon says why it cannot
    assert ports.free("::1", 0)


def test_an_invite_may_be_broken_over_lines(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first line was taken for all of it."""
    lines = "\n".join(TEXT[at : at + 60] for at in range(0, len(TEXT), 60))
    given = ["join", "-", "--folder", str(tmp_path / "letters")]
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a").write_text("mine")
    for text, code in ((lines, "FL-P309"), (f"{lines}\nmore", "FL-P309"), (lines[:99], "FL-P302")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert refused(capsys, *given) == code


def test_a_peer_that_nobody_can_decide_with_says_whom_it_waits_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It said "averaging" for ever."""
    said = "waits for th\x1b[2Jree …QmThree: too few of the last round's members answer"
    waiting = {**STATUS, "missing": ["QmThree"]}
    assert waits(STATUS) == ""
    assert waits(waiting) == said
    assert waits({"missing": list("abcde")}).startswith("waits for …a, …b, …c or 2 others: too few")
    with Line() as line:
        line.show({**waiting, "state": "averaging"})
        line.show({**waiting, "state": "averaging"})
    assert capsys.readouterr().err.count("waits for three …QmThree") == 1
    folder = peer_in(tmp_path / "peer", waiting)
    with running_in(folder):
        assert console.run(cli, ["status", str(folder)]) == 0
    assert "waits for three …QmThree" in capsys.readouterr().out


def test_a_line_on_a_terminal_is_never_longer_than_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that wrapped was not redrawn but written again, twice a second."""
    monkeypatch.setenv("COLUMNS", "60")
    with Line() as line:
        line._live = True
        line.show(STATUS)
    assert capsys.readouterr().err.strip() == text_of(STATUS)[:59]


def test_an_invite_is_printed_with_the_addresses_known_now(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = "/ip4/10.0.0.9/tcp/7448/p2p/QmOne"
    folder = peer_in(tmp_path / "peer", {**STATUS, "addresses": [here]})
    assert console.run(cli, ["invite", str(folder)]) == 0
    found = invite.read(capsys.readouterr().out)
    assert found.addresses == (here, *INVITE.addresses)
    assert found.secret == INVITE.secret


def test_the_line_says_members_round_loss_and_bytes() -> None:
    assert near_members(STATUS) == ["QmOne", "QmTwo"]
    assert text_of(STATUS) == (
        "round 4/9   2 peers   loss 2.5000   up 1.0 MB   down 2.0 MB   training"
    )
    assert text_of({}) == "round 0   0 peers   loss -   up 0 B   down 0 B"


def test_elsewhere_than_on_a_terminal_there_is_a_line_for_each_round(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Line() as line:
        for change in ({}, {}, {"round": 5}, {"round": 5, "loss": 1.0}):
            line.show({**STATUS, **change})
        assert not line.alone
        line.show({**STATUS, "members": STATUS["members"][:1]})
        assert line.alone
    assert len(capsys.readouterr().err.splitlines()) == 3
    with Line(quiet=True) as line:
        line.show(STATUS)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("addresses", "verdict", "words"),
    [
        (["/ip4/127.0.0.1/tcp/1/p2p/Q", "/ip6/::1/tcp/1"], "problem", "no address but loopback"),
        (["/ip4/127.0.0.1/tcp/1", "/ip4/192.168.1.20/tcp/1"], "note", "from this network"),
        (["/ip4/192.168.1.20/tcp/1", "/ip4/8.8.8.8/tcp/1"], "good", "from anywhere"),
        ([], "problem", "loopback"),
    ],
)
def test_the_doctor_says_who_can_reach_an_address(
    addresses: list[str], verdict: str, words: str
) -> None:
    check = _addresses(addresses)
    assert (check.verdict, words in check.said) == (verdict, True)
