"""fl-peer as a user has it: real processes, real hivemind, a directory for each peer."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from atoll.p2p import folder as folders
from atoll.p2p import invite, ports
from atoll.p2p.doctor import examine

pytestmark = pytest.mark.slow
pytest.importorskip("hivemind")

SMALL = (
    "--model", "charlm:width=32,depth=1", "--data", "topics:context=32", "--steps", "10",
    "--host", "127.0.0.1", "--port", "0",
)  # fmt: skip


class Shell:
    """Commands in one folder; those that go on are ended with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.going: list[subprocess.Popen[str]] = []
        self.before: list[str] = []  # what a command is run by

    def begin(self, *arguments: str, **more: Any) -> "subprocess.Popen[str]":
        made = subprocess.Popen(
            [*self.before, sys.executable, "-m", "atoll.p2p", *arguments],
            cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", **more},
        )  # fmt: skip
        self.going.append(made)
        return made

    def ask(self, *arguments: str, said: str = "", **more: Any) -> tuple[int, dict[str, Any]]:
        """A command's exit code, and its data or its error."""
        one = self.begin(*arguments, "--json", **more)
        out, err = one.communicate(said, timeout=240)
        assert out, err
        told = json.loads(out)
        return one.returncode, told["data"] if told["ok"] else told["error"]

    def status(self, folder: str) -> dict[str, Any]:
        return folders.status(self.folder / folder)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    for one in made.going:
        one.kill()
        one.communicate()
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info["cmdline"])]
    _, alive = psutil.wait_procs(left, timeout=20)
    assert not alive, alive


def until(true: Callable[[], Any], what: str, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not in {seconds:g} s"
        time.sleep(0.1)


def ended(one: "subprocess.Popen[str]") -> dict[str, Any]:
    out, err = one.communicate(timeout=240)
    assert one.returncode == 0, err
    told: dict[str, Any] = json.loads(out)["data"]
    return told


@pytest.mark.long
def test_one_founds_another_joins_and_both_end_with_the_same_model(shell: Shell) -> None:
    code, made = shell.ask("init", *SMALL, "--rounds", "400", "--no-start", "--name", "first")
    assert code == 0
    assert made["folder"] == "atoll-peer"
    papers = invite.read(made["invite"])
    assert papers.addresses == tuple(made["addresses"])
    first = shell.begin("start", "--json")
    until(lambda: shell.status("atoll-peer").get("round", 0) >= 2, "two rounds alone")

    code, checked = shell.ask("doctor", made["invite"], "--port", "0")
    verdicts = {check["name"]: check["verdict"] for check in checked["checks"]}
    assert {verdicts[name] for name in ("daemon", "run", "way back", "clock", "secret")} == {"good"}
    code, wrong = shell.ask("join", invite.write(replace(papers, secret=bytes(32))), *SMALL[-4:])
    assert (code, wrong["code"]) == (77, "FL-P304")
    code, taken = shell.ask("start")
    assert (code, taken["code"]) == (73, "FL-P406")

    second = shell.begin("join", "-", *SMALL[-4:], "--name", "second", "--folder", "b", "--json")
    assert second.stdin is not None
    second.stdin.write(f"{made['invite']}\n")
    second.stdin.flush()
    until(lambda: shell.status("b").get("rounds_joined", 0) >= 2, "two rounds together")
    assert {m["name"] for m in shell.status("atoll-peer")["members"]} == {"first", "second"}
    one, other = ended(first), ended(second)
    assert (one["rounds"], other["rounds"]) == (400, 400)
    assert one["digest"] == other["digest"]
    assert one["loss_last"] < one["loss_first"]
    assert one["bytes_out"] > 0
    assert (shell.folder / "b" / "model.safetensors").exists()


@pytest.mark.long
def test_one_alone_stops_and_goes_on_where_it_was(shell: Shell) -> None:
    code, _ = shell.ask("init", *SMALL, "--no-start")
    assert code == 0
    first = shell.begin("start", "--json")
    until(lambda: shell.status("atoll-peer").get("round", 0) >= 3, "three rounds")
    code, left = shell.ask("leave")
    assert (code, left["running"], left["left"]) == (0, False, False)
    assert not ended(first)["left"]
    assert (code := shell.ask("leave")[0]) == 3, code
    before = shell.status("atoll-peer")["round"]
    again = shell.begin("start", "--json")
    until(lambda: shell.status("atoll-peer")["round"] >= before + 2, "two rounds more")
    assert shell.ask("leave")[0] == 0
    ended(again)


def test_what_stands_in_the_way_is_told(shell: Shell, tmp_path: Path) -> None:
    from tests.p2p.people import INVITE

    who = "QmQnv1XtVcE8GPWnZ8bL4kGGzxZr8iEMfHWZnK1wiTzC7X"
    nobody = replace(INVITE, addresses=(f"/ip4/127.0.0.1/tcp/9/p2p/{who}",))
    here = ("--host", "127.0.0.1")
    with silent_port() as port, ThreadPoolExecutor() as beside:
        silent = replace(INVITE, addresses=(f"/ip4/127.0.0.1/tcp/{port}/p2p/{who}",))
        asked = [
            beside.submit(shell.ask, *arguments)
            for arguments in (
                ("join", invite.write(nobody), *here),
                ("join", invite.write(silent), *here, "--folder", "b"),
                ("doctor", invite.write(nobody)),
                ("init", "--model", "nonesuch", *here, "--folder", "d"),
                ("init", *SMALL, "--codec", "powersgd", "--folder", "c"),
            )
        ]
        failed = shell.begin("doctor", invite.write(nobody))
        assert "error FL-P312" in failed.communicate(timeout=240)[1]
        looking = shell.begin("join", invite.write(nobody), *here, "--folder", "e")
        said = looking.communicate(timeout=240)[1]
        assert "looking for a member of the run at /ip4/127.0.0.1/tcp/9, for 40 s at most" in said
    for one, wanted in zip(asked, [(69, "FL-P202"), (69, "FL-P202")], strict=False):
        code, told = one.result()
        assert (code, told["code"]) == wanted
    assert not (tmp_path / "atoll-peer").exists(), "nothing is left of a run that was not found"
    assert not (tmp_path / "b").exists()
    code, told = asked[2].result()
    assert code == 9
    assert "run" in [c["name"] for c in told["checks"] if c["verdict"] == "problem"]
    assert asked[3].result()[0] == 78
    code, told = asked[4].result()
    assert (code, told["code"]) == (64, "FL-P401")
    assert not (tmp_path / "c").exists()


def test_a_doctor_that_is_second_at_a_free_port_takes_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two at once both found 7448 free, and one told of a daemon that does not start."""
    with silent_port() as port:
        monkeypatch.setattr(ports, "USUAL", port)
        monkeypatch.setattr(ports, "free", lambda *_: True)
        found = asyncio.run(examine(None, None, "127.0.0.1"))
    told = [(c.name, c.verdict) for c in found if c.name in ("daemon", "port")]
    assert told == [("daemon", "good"), ("port", "note"), ("port", "good")]


def test_a_daemon_that_is_missing_is_told(shell: Shell, tmp_path: Path) -> None:
    import hivemind

    at = Path(hivemind.__file__).parent
    broken = tmp_path / "path" / "hivemind"
    (broken / "hivemind_cli").mkdir(parents=True)
    for one in at.iterdir():
        if one.name != "hivemind_cli":
            (broken / one.name).symlink_to(one)
    for one in (at / "hivemind_cli").iterdir():
        if one.name != "p2pd":
            (broken / "hivemind_cli" / one.name).symlink_to(one)
    paths = os.pathsep.join([str(broken.parent), os.environ.get("PYTHONPATH", "")])
    code, told = shell.ask("init", *SMALL, PYTHONPATH=paths)
    assert (code, told["code"]) == (69, "FL-P201")
    assert str(broken / "hivemind_cli" / "p2pd") in told["message"]
    assert "install hivemind" in told["hint"]


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """Where packets are dropped: a listener that accepts nobody, its queue full."""
    with socket.socket() as listening, contextlib.ExitStack() as stack:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        port: int = listening.getsockname()[1]
        for _ in range(4):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        late = stack.enter_context(socket.socket())
        late.settimeout(1.0)
        with pytest.raises(TimeoutError):
            late.connect(("127.0.0.1", port))
        yield port


@pytest.fixture
def two_machines() -> Iterator[list[list[str]]]:
    """Two network namespaces with a cable between them: what runs a command in each."""
    names = [f"atoll{os.getpid()}{side}" for side in "ab"]
    ends = [f"v{os.getpid()}{side}" for side in "ab"]
    steps = [["netns", "add", name] for name in names]
    steps.append(["link", "add", ends[0], "type", "veth", "peer", "name", ends[1]])
    for i, (name, cable) in enumerate(zip(names, ends, strict=True), 1):
        steps += [
            ["link", "set", cable, "netns", name],
            ["-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", cable],
            ["-n", name, "link", "set", cable, "up"],
            ["-n", name, "link", "set", "lo", "up"],
        ]
    try:
        for step in steps:
            try:
                subprocess.run(["ip", *step], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"this machine lets nobody make network namespaces: {error}")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


def alone(
    shell: Shell, here: list[str], *options: str
) -> tuple[dict[str, Any], "subprocess.Popen[str]"]:
    """A founder on that machine, which has made a round: what `init` said, and its process."""
    shell.before = here
    code, made = shell.ask("init", *SMALL[:6], *options, "--no-start")
    assert code == 0
    founder = shell.begin("start", "--json")
    until(lambda: shell.status("atoll-peer").get("round", 0) >= 1, "a round alone")
    return made, founder


@pytest.mark.long
def test_two_machines_that_share_nothing_but_a_cable(
    shell: Shell, two_machines: list[list[str]]
) -> None:
    here, there = two_machines
    made, first = alone(shell, here, "--rounds", "300")
    assert any("/ip4/10.77.0.1/tcp/" in address for address in made["addresses"])
    shell.before = there
    second = shell.begin("join", made["invite"], "--folder", "b", "--json")
    until(lambda: shell.status("b").get("rounds_joined", 0) >= 2, "two rounds together")
    one, other = ended(first), ended(second)
    assert one["digest"] == other["digest"]
    assert other["bytes_in"] > 0


@pytest.mark.long
def test_a_slow_line_is_measured_and_given_nothing_to_reduce(
    shell: Shell, two_machines: list[list[str]]
) -> None:
    """Two peers beside each other and one behind a cable of 80 Mbit/s. Of three, in equal shares,
    it would give 4/3 of the vector in a round; with nothing to reduce it gives 1."""
    here, there = two_machines
    for side in (here, there):
        cable = f"v{os.getpid()}{'ab'[side is there]}"
        narrow = f"tc qdisc add dev {cable} root tbf rate 80mbit burst 64kb latency 50ms"
        try:
            subprocess.run([*side, *narrow.split()], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine lets nobody shape what a cable takes: {error}")
    large = ("--model", "charlm:width=256,depth=4", "--data", "topics:context=16")
    size = 4 * 3_188_224
    shell.before = here
    code, made = shell.ask(
        "init", *large, "--steps", "2", "--batch", "2", "--first", "3", "--no-start"
    )
    assert code == 0
    shell.begin("start", "--json")
    until(lambda: shell.status("atoll-peer"), "the founder is up")
    shell.begin("join", made["invite"], "--folder", "b", "--json")
    shell.before = there
    shell.begin("join", made["invite"], "--folder", "c", "--json")

    def lines() -> dict[str, float]:
        told = shell.status("atoll-peer")
        return {m["peer"]: m["bandwidth"] for m in told.get("members", ())}

    until(lambda: len(lines()) == 3 and all(lines().values()), "all have measured their lines")
    slow = shell.status("c")["peer"]
    others = [rate for peer, rate in lines().items() if peer != slow]
    assert 2e6 < lines()[slow] < 20e6
    assert min(others) > 2 * lines()[slow]
    told = shell.status("c")
    until(lambda: shell.status("c")["round"] >= told["round"] + 6, "six rounds more")
    after = shell.status("c")
    rounds = after["round"] - told["round"]
    assert (after["bytes_out"] - told["bytes_out"]) / rounds < 1.2 * size


@pytest.mark.long
def test_the_doctor_finds_a_port_that_a_firewall_keeps_shut(
    shell: Shell, two_machines: list[list[str]]
) -> None:
    """What leaves this machine comes through all the same: only a connection from there tells."""
    here, there = two_machines
    made, _ = alone(shell, here)
    shell.before = there

    def way_back() -> tuple[int, dict[str, str]]:
        code, told = shell.ask("doctor", made["invite"], "--port", "7555")
        (found,) = [c for c in told["checks"] if c["name"] == "way back"]
        return code, found

    code, found = way_back()
    assert (code, found["verdict"]) == (0, "good"), found
    assert "10.77.0.2" in found["said"]
    # What the port answers is lost: there is no filter that every kernel has.
    shut = "ip rule add pref 1 ipproto tcp sport 7555 blackhole"
    try:
        subprocess.run([*there, *shut.split()], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine has no way to shut a port: {error}")
    code, found = way_back()
    assert (code, found["verdict"]) == (9, "problem"), found
    assert "open the port" in found["remedy"]
