"""Peers over real hivemind, each a process: killed, frozen, late, lying; the rest goes on alike.

Each peer checks every mean it applies against the exact one of its group (`benchmarks/swarm.py`).
"""

import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from benchmarks.swarm import Swarm

pytestmark = pytest.mark.slow
pytest.importorskip("hivemind")

TEXT = {
    "model": "charlm:width=64,depth=1", "data": "topics:context=32", "seed": 1, "local_steps": 20,
    "batch": 8, "lr": 3e-3, "codec": "up=int8+ef,down=int8", "speed": 40.0,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    left = [p for p in psutil.process_iter(["name", "cmdline"]) if _of(p, tmp_path)]
    assert not left, f"processes left behind: {left}"


def _of(process: psutil.Process, folder: Path) -> bool:
    return any(str(folder) in part for part in process.info["cmdline"] or ())


def agreed(swarm: Swarm) -> None:
    """Nobody's model differs from another's of the same round, and all means were exact."""
    assert swarm.forks() == 0, swarm.commits()
    for by in swarm.commits().values():
        for _, event in by:
            assert event["error"] < 1e-6, event


def reach(swarm: Swarm, round_: int, *names: str, seconds: float = 120.0) -> None:
    """Until each has applied that round's mean or a later one: who is late downloads, and skips."""

    def there(name: str) -> bool:
        return any(event["round"] >= round_ for event in swarm.peers[name].told("commit"))

    for name in names:
        swarm.until(partial(there, name), seconds, f"round {round_} of {name}")


def group(swarm: Swarm, round_: int) -> dict[str, float]:
    """Who made that round's mean, with which weight."""
    _, event = swarm.commits()[round_][0]
    return dict(zip(event["group"], event["weights"], strict=True))


def _above_0(weights: dict[str, float]) -> dict[str, float]:
    return {peer: weight for peer, weight in weights.items() if weight > 0}


def test_two_peers_train_on_text_and_end_with_the_same_bits(folder: Path) -> None:
    from atoll.p2p.work import facts

    found = facts(TEXT["model"], TEXT["data"], 1)  # type: ignore[arg-type]
    real = {**TEXT, "elements": found.elements, "schema": found.schema, "init": found.init}
    with Swarm(folder, rounds=5, real=real, first=2) as swarm:
        swarm.up("a", "b")
        swarm.until(lambda: all(one.told("end") for one in swarm.peers.values()))
        ends = [one.told("end")[0] for one in swarm.peers.values()]
    assert len({end["digest"] for end in ends}) == 1
    assert [end["rounds"] for end in ends] == [5, 5]
    assert all(end["joined"] == 5 for end in ends)
    assert all(end["loss_last"] < end["loss_first"] - 0.5 for end in ends)


@pytest.mark.parametrize(
    ("moment", "dying"),
    [
        pytest.param(moment, dying, marks=() if quick else pytest.mark.long)
        for moment in ("train", "reduce", "made", "vote", "decided", "bind", "mean", "model")
        for dying in "ab"
        for quick in [(moment, dying) == ("reduce", "b")]
    ],
)
def test_a_peer_that_kills_itself_at_any_moment_comes_back_as_itself(
    folder: Path, moment: str, dying: str
) -> None:
    """`a` has founded the run, and proposes where its id is the first."""
    with Swarm(folder, first=3) as swarm:
        for name in "abc":
            swarm.start(name, die=f"{moment}:2" if name == dying else "")
            if name == "a":
                swarm.until(swarm.addresses)
        one = swarm.peers[dying]
        swarm.until(lambda: one.told("dies"))
        swarm.until(lambda: not one.alive)
        others = [name for name in "abc" if name != dying]
        reach(swarm, swarm.round + 2, *others)
        again = swarm.start(dying)
        swarm.until(lambda: again.told("commit"), what="a commit of who came back")
        reach(swarm, swarm.round + 2, "a", "b", "c")
        agreed(swarm)
        swarm.until(lambda: again.told("beat") and dying in group(swarm, swarm.round))


def kill_at_once(swarm: Swarm, names: str) -> int:
    """SIGKILL for all before any is waited for; the round they had come to."""
    for name in names:
        swarm.peers[name].popen.kill()
    before = swarm.round
    for name in names:
        swarm.peers[name].kill()
    return before


@pytest.mark.long
def test_all_are_killed_at_once_and_go_on(folder: Path) -> None:
    with Swarm(folder, first=3) as swarm:
        swarm.up("a", "b", "c")
        reach(swarm, 3, "a", "b", "c")
        before = kill_at_once(swarm, "abc")
        swarm.up("a", "b", "c")
        reach(swarm, before + 2, "a", "b", "c")
        agreed(swarm)


@pytest.mark.long
def test_all_are_killed_and_the_rest_find_each_other_without_the_founder(folder: Path) -> None:
    """Each looked where the invite said, at the founder's, and was alone for ever; and who had been
    alone for a beat had forgotten where the others were."""
    with Swarm(folder, first=3) as swarm:
        swarm.up("a", "b", "c")
        reach(swarm, 3, "a", "b", "c")
        before = kill_at_once(swarm, "abc")
        for name in "bc":  # at once
            swarm.start(name)
        reach(swarm, before + 2, "b", "c")
        agreed(swarm)


@pytest.mark.long
def test_a_late_joiner_has_the_model_and_one_that_gives_other_bits_harms_nobody(
    folder: Path,
) -> None:
    with Swarm(folder, first=3, elements=3_000_000, pause=2.0) as swarm:
        for name in "abc":
            swarm.start(name, lies="bits" if name == "b" else "")
            if name == "a":
                swarm.until(swarm.addresses)
        reach(swarm, 2, "a", "b", "c")
        swarm.start("q")
        swarm.until(lambda: len(swarm.peers["q"].told("commit")) >= 2)
        first = swarm.peers["q"].told("commit")[0]["round"]
        assert first > 1
        reach(swarm, swarm.round, "a", "b", "c")
        agreed(swarm)
        assert "q" in group(swarm, swarm.peers["q"].told("commit")[1]["round"])


@pytest.mark.long
def test_one_leaves_with_a_goodbye_and_another_comes_under_a_new_name(folder: Path) -> None:
    with Swarm(folder, first=3) as swarm:
        swarm.up("a", "b", "c")
        reach(swarm, 2, "a", "b", "c")
        swarm.peers["b"].popen.send_signal(signal.SIGTERM)
        swarm.until(lambda: swarm.peers["b"].told("end"))
        assert swarm.peers["b"].popen.wait(20) == 0
        assert not (folder / "b" / "state.json").exists()
        left = swarm.round
        reach(swarm, left + 3, "a", "c")
        assert "b" not in group(swarm, left + 3)
        old = swarm.peers["b"].told("end")[0]["peer"]
        again = swarm.start("b")
        swarm.until(lambda: again.told("commit"))
        reach(swarm, swarm.round + 1, "a", "b", "c")
        agreed(swarm)
        again.popen.send_signal(signal.SIGTERM)
        swarm.until(lambda: again.told("end"))
        assert again.told("end")[0]["peer"] != old


@pytest.mark.long
def test_a_copy_of_a_directory_started_beside_it_ends_the_earlier_one(folder: Path) -> None:
    with Swarm(folder, first=3) as swarm:
        swarm.up("a", "b", "c")
        reach(swarm, 2, "a", "b", "c")
        swarm.peers["c"].popen.send_signal(signal.SIGSTOP)  # no file goes while it is copied
        shutil.copytree(folder / "c", folder / "copy", ignore=shutil.ignore_patterns("*.sock"))
        swarm.peers["c"].popen.send_signal(signal.SIGCONT)
        swarm.start("copy")
        swarm.until(lambda: not swarm.peers["c"].alive, 60.0, "the end of c")
        assert "FL-P410" in (folder / "c.err").read_text() + str(swarm.peers["c"].events)
        assert not swarm.peers["c"].told("end")  # and without a goodbye, which would bind the copy
        assert all(swarm.peers[name].alive for name in ("a", "b", "copy"))
        reach(swarm, swarm.round + 3, "a", "b", "copy")
        assert swarm.forks() == 0


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_daemon_that_is_killed_or_frozen_is_replaced_and_its_peer_goes_on(
    folder: Path, how: signal.Signals
) -> None:
    with Swarm(folder, first=3) as swarm:
        swarm.up("a", "b", "c")
        reach(swarm, 2, "a", "b", "c")
        for process in psutil.Process(swarm.peers["b"].popen.pid).children():
            if "p2pd" in process.name():
                process.send_signal(how)
        reach(swarm, swarm.round + 2, "a", "c")
        seen = len(swarm.peers["b"].told("commit"))
        swarm.until(lambda: len(swarm.peers["b"].told("commit")) > seen + 2)
        agreed(swarm)


@pytest.mark.long
def test_peers_that_are_frozen_for_a_while_catch_up(folder: Path) -> None:
    """Half of four, the second half of all ids: the others go on, or wait, and nothing forks."""
    with Swarm(folder, first=4) as swarm:
        swarm.up("a", "b", "c", "d")
        reach(swarm, 2, "a", "b", "c", "d")
        for name in "cd":
            swarm.peers[name].popen.send_signal(signal.SIGSTOP)
        time.sleep(6)  # beyond their silence, whatever the others can do
        for name in "cd":
            swarm.peers[name].popen.send_signal(signal.SIGCONT)
        reach(swarm, swarm.round + 3, "a", "b", "c", "d")
        agreed(swarm)


@pytest.mark.long
@pytest.mark.parametrize("lies", ["nan", "short"])
def test_work_that_is_none_and_work_of_another_shape_weigh_nothing(folder: Path, lies: str) -> None:
    with Swarm(folder, first=3) as swarm:
        for name in "abc":
            swarm.start(name, lies=lies if name == "c" else "")
            if name == "a":
                swarm.until(swarm.addresses)

        def weighed() -> list[dict[str, float]]:
            return [group(swarm, round_) for round_ in swarm.commits()]

        # Of two who cannot give to each other one must wait, and it may be the honest one.
        swarm.until(lambda: {"a": 8.0, "b": 8.0} in [_above_0(w) for w in weighed()], 240)
        reach(swarm, swarm.round, "a", "b", seconds=180)
        agreed(swarm)
        assert all(weights.get("c", 0) == 0 for weights in weighed()), weighed()


@pytest.mark.long
def test_one_that_cannot_be_connected_to_takes_part(folder: Path) -> None:
    with Swarm(folder, first=3) as swarm:
        swarm.up("a", "b")
        swarm.start("c", accepts=False)
        reach(swarm, 3, "a", "b", "c")
        agreed(swarm)
        assert group(swarm, 3) == {"a": 8.0, "b": 8.0, "c": 8.0}


@pytest.mark.long
def test_one_that_torments_the_others_changes_nothing_but_by_a_share_of_its_own(
    folder: Path,
) -> None:
    """It holds the secret and takes part; what it claims and sends besides is `hostile.py`'s."""
    kinds = ("weight", "shape", "ballot", "stale", "replay", "garbage", "oversize", "bulk")
    with Swarm(folder, first=4) as swarm:
        for name in "abcq":
            swarm.start(name, lies="hostile" if name == "q" else "")
            if name == "a":
                swarm.until(swarm.addresses)
        reach(swarm, 2, "a", "b", "c", seconds=240)
        one = swarm.peers["q"]
        swarm.until(lambda: all(one.told("hostile", kind=kind) for kind in kinds), 240)
        reach(swarm, swarm.round + 5, "a", "b", "c", seconds=240)
        agreed(swarm)
        for by in swarm.commits().values():
            for _, event in by:
                assert all(weight <= 8.0 for weight in event["weights"]), event
        assert all(swarm.peers[name].alive for name in "abc")
        answers = {e["answer"] for e in one.told("hostile") if e["kind"] == "garbage"}
        assert answers >= {"FL-W101", "FL-P304", "FL-P305"}
