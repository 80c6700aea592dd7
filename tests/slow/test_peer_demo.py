"""fl-peer demo: four processes over real libp2p, one late, one killed; nothing is left behind."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from atoll.p2p import folder as folders

pytestmark = pytest.mark.slow
pytest.importorskip("hivemind")

SECONDS = 500.0  # a demo may take beside other tests; alone it is a tenth


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "out"
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info["cmdline"])]
    _, alive = psutil.wait_procs(left, timeout=60)
    for one in alive:
        one.kill()
    assert not alive, alive


def begin(out: Path, *more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "atoll.p2p", "demo", "--json", "--out", str(out), *more],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_one_joins_late_one_is_killed_and_the_model_does_not_fork(out: Path) -> None:
    one = begin(out, "--rounds", "24", "--timeout", str(SECONDS))
    said, errors = one.communicate(timeout=SECONDS + 60)
    told = json.loads(said)["data"]
    assert one.returncode == 0, (told, errors)
    assert (told["peers"], told["rounds"], told["joined_late"], told["killed"]) == (4, 24, 1, 1)
    assert (told["digests_equal"], told["forks"]) == (True, 0)
    assert told["rounds_compared"] >= 12
    assert told["loss_last"] < told["loss_first"] - 0.5
    assert told["bytes_up"] > 1e6
    assert told["bytes_down"] > 1e6
    assert told["sample"]
    models = [out / "model.safetensors", *out.glob("peers/*/model.safetensors")]
    assert len(models) == 4  # the demo's and those of the three who live
    assert {hashlib.sha256(m.read_bytes()).hexdigest() for m in models} == {told["model_sha256"]}
    members = {m["name"]: m for m in told["members"]}
    assert members["peer-3"]["state"] == "killed"
    assert 0 < members["peer-4"]["joined"] < members["peer-2"]["joined"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_however_it_goes_nothing_is_left_behind(out: Path, number: signal.Signals) -> None:
    one = begin(out)
    end = time.monotonic() + 240
    while not folders.status(out / "peers" / "peer-1"):
        assert one.poll() is None, one.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)
    one.send_signal(number)
    said, _ = one.communicate(timeout=240)
    if number == signal.SIGINT:
        assert (one.returncode, json.loads(said)["error"]["code"]) == (130, "FL-S208")


def test_when_the_time_is_up_the_exit_code_is_5(out: Path) -> None:
    one = begin(out, "--timeout", "11")
    said, _ = one.communicate(timeout=240)
    told = json.loads(said)
    assert one.returncode == 5
    assert not told["ok"] or not told["data"]["reached"]
