"""A model, data, a strategy and a trainer of one's own, in real processes."""

import importlib
import json
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from atoll.client.client import Client
from atoll.client.options import Options, maker
from atoll.server import judging
from atoll.server.rules import Rules

if TYPE_CHECKING:
    from tests.slow.conftest import Federation

pytestmark = pytest.mark.slow

OWN = '''
from dataclasses import dataclass, field
import torch
from torch import nn
from torch.utils.data import TensorDataset
from atoll.aggregation import Strategy
from atoll.client.trainer import Trained
from atoll.protocols.events import Aggregate, Train

class Net(nn.Module):
    """With BatchNorm, whose buffers travel too."""
    def __init__(self, hidden=8):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(2, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 2)
        )
    def forward(self, x):
        return self.body(x)

def load():
    made = torch.Generator().manual_seed(0)
    x = torch.randn(600, 2, generator=made)
    y = (x[:, 0] > 0).long()
    return TensorDataset(x[:400], y[:400]), TensorDataset(x[400:], y[400:])

@dataclass
class Pairs(Strategy):
    """Merge whatever two have come."""
    steps: int = 5
    held: list[str] = field(default_factory=list, init=False)
    def on_join(self, client, info, now):
        yield Train(client, self.steps)
    def on_update(self, update, now):
        self.held.append(update.id)
        if len(self.held) == 2:
            yield Aggregate(tuple((u, 0.5) for u in self.held))
            self.held.clear()
        yield Train(update.client, self.steps)

class Fixed:
    """A trainer that is no torch loop at all."""
    def load(self, tensors):
        self.tensors = dict(tensors)
    def train(self, task):
        for step in range(task.steps):
            task.report(step + 1)
            if task.asked() is not None:
                break
        return Trained(self.tensors, task.steps, 40 * task.steps, {"loss": 0.0})
    def evaluate(self):
        return {}

class Says(Fixed):
    says = 0.95
    def evaluate(self):
        return {"loss": 1.0, "accuracy": self.says}

class Percent(Says):
    says = 95.0

class Nan(Says):
    says = float("nan")
'''


@pytest.fixture
def own(federation: "Federation", monkeypatch: pytest.MonkeyPatch) -> "Federation":
    (federation.folder / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(federation.folder)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return federation


def test_a_model_and_data_of_ones_own_learn_together(own: "Federation") -> None:
    mine = ["--model", "own:Net:hidden=6", "--data", "own:load"]
    server = own.server(
        *mine, "--strategy", "fedavg:steps=8,min_clients=2", "--target-accuracy", "0.9"
    )
    clients = [own.client(f"c{i}", *mine, "--shard", f"{i}/2") for i in range(2)]
    data = server.data()
    assert data["metrics"]["accuracy"] >= 0.9
    for client in clients:
        assert client.data()["used"] > 0
    own.ledger().check()


def test_without_test_data_on_the_server_the_clients_evaluate(own: "Federation") -> None:
    server = own.server(
        "--model", "own:Net", "--data", "none", "--strategy", "fedavg:steps=8,min_clients=2",
        "--target-accuracy", "0.9",
    )  # fmt: skip
    mine = ["--model", "own:Net", "--data", "own:load"]
    clients = [own.client(f"c{i}", *mine, "--shard", f"{i}/2") for i in range(2)]
    assert server.data()["metrics"]["accuracy"] >= 0.9
    for client in clients:
        client.data()


@pytest.mark.parametrize(("judge", "hidden"), [("none", 8), ("none", 40_000), ("own:load", 40_000)])
def test_what_a_run_ends_with_is_judged_too(own: "Federation", judge: str, hidden: int) -> None:
    """Clients were not asked about the last version. A large one, which is merged in a thread of
    its own, was judged by nobody: another was called the best, and exported."""
    model = ("--model", f"own:Net:hidden={hidden}")
    options = ("--strategy", "fedavg:steps=8,min_clients=2", "--versions", "3")
    server = own.server(*model, "--data", judge, *options)
    mine = [*model, "--data", "own:load"]
    clients = [own.client(f"c{i}", *mine, "--shard", f"{i}/2") for i in range(2)]
    assert server.data()["versions"] == 3
    for client in clients:
        client.data()
    judged = own.history("evaluated")
    assert judged[-1]["version"] == 3
    each = 200  # has all of the test data
    assert judged[-1]["metrics"]["examples"] == (2 * each if judge == "none" else each)


def test_an_ended_run_does_not_wait_for_ever_for_the_last_word(
    own: "Federation", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "LAST_WORD", 1.0)
    over = threading.Event()

    class Slow(importlib.import_module("own").Fixed):  # type: ignore[misc]
        def evaluate(self) -> dict[str, float]:
            over.wait(60)
            return {"loss": 1.0}

    class Judges(importlib.import_module("own").Fixed):  # type: ignore[misc]
        def evaluate(self) -> dict[str, float]:
            return {"loss": 2.0}

    local = own.local(model="own:Net", data="", strategy="fedavg:steps=1,min_clients=2,rounds=1")
    guest = own.guest(Client(own.address, Slow(), name="slow", seconds_per_step=0.1))
    with_it = own.guest(Client(own.address, Judges(), name="quick", seconds_per_step=0.1))
    local.join(20)
    assert local.error is None, local.error
    assert local.summary is not None, "it waits for a client that does not answer"
    assert local.summary.versions == 1
    (judged,) = own.history("evaluated")
    assert judged["metrics"] == {"loss": 2.0, "examples": 1.0}  # of the one that did
    over.set()
    guest.ended()
    with_it.ended()


def test_one_that_hangs_ends_the_judging_of_no_run(
    own: "Federation", monkeypatch: pytest.MonkeyPatch
) -> None:
    """No version was judged any more, and nobody said why."""
    monkeypatch.setattr(judging, "PATIENCE", 0.5)
    monkeypatch.setattr(judging, "LAST_WORD", 0.5)
    over = threading.Event()

    class Hangs(importlib.import_module("own").Fixed):  # type: ignore[misc]
        def evaluate(self) -> dict[str, float]:
            over.wait(60)
            return {"accuracy": 0.1}

    local = own.local(
        Rules(target=0.9), model="own:Net", data="", strategy="fedbuff:size=1,steps=1"
    )
    hangs = own.guest(Client(own.address, Hangs(), name="hangs", seconds_per_step=0.1))
    own.until(lambda: own.history("join"))
    says = importlib.import_module("own").Says()
    with_it = own.guest(Client(own.address, says, name="says", seconds_per_step=0.1))
    local.join(30)
    assert local.summary is not None, "it goes on for ever"
    assert local.summary.reason.startswith("target reached: accuracy 0.9500")
    over.set()
    for guest in (hangs, with_it):
        guest.ended()


def test_an_ended_run_does_not_wait_for_a_client_without_test_data(own: "Federation") -> None:
    local = own.local(model="own:Net", data="", strategy="fedavg:steps=1,min_clients=1,rounds=1")

    class Bare(importlib.import_module("own").Fixed):  # type: ignore[misc]
        def evaluate(self) -> dict[str, float]:
            time.sleep(1.0)  # nothing else happens by then that would wake the server
            return {}

    guest = own.guest(Client(own.address, Bare(), name="bare", seconds_per_step=0.1))
    local.join(judging.LAST_WORD - 10)
    assert local.error is None, local.error
    assert local.summary is not None, "it waits for a word that has been said"
    guest.ended()


def test_a_client_whose_accuracy_is_none_takes_nobodys(own: "Federation") -> None:
    """A percentage, or NaN, kept runs from their targets, and nobody said why."""
    options = ["--strategy", "fedavg:steps=1,min_clients=3", "--versions", "3"]
    server = own.server("--model", "own:Net", "--data", "none", *options)
    names = ("Says", "Percent", "Nan")
    clients = [own.client(name.lower(), "--trainer", f"own:{name}") for name in names]
    data = server.data()
    assert data["metrics"]["accuracy"] == 0.95
    assert "client=nan gives no accuracy" in server.said()
    assert "accuracy=95 (give a share, from 0 to 1)" in clients[1].said()
    assert len(own.history("evaluated")) > 1  # the first version and the last
    assert clients[1].said().count("not evaluated") == 1
    for client in clients:
        client.data()


def test_a_demo_of_ones_own_trainers(own: "Federation") -> None:
    """The server's evaluates, and each client has its own part of the data."""
    shutil.copy(Path(__file__).parents[2] / "examples" / "own_trainer.py", own.folder)
    demo = own.command(
        "demo", "fl-server", "demo", "--clients", "2", "--model", "linear", "--trainer",
        "own_trainer:Softmax", "--target-accuracy", "0.8", "--timeout", "60", "--json",
        "--strategy", "fedavg:steps=20", "--out", str(own.folder / "out"),
    )  # fmt: skip
    data = demo.data()
    assert data["reached"]
    assert data["accuracy"] >= 0.8
    lines = (own.folder / "out" / "history.jsonl").read_text().splitlines()
    joins = map(json.loads, lines)
    assert [row["examples"] for row in joins if row["kind"] == "join"] == [719, 719]


def test_a_strategy_of_ones_own_goes_on_after_a_kill(own: "Federation") -> None:
    """With a trainer of one's own, too. The server needs its code again, and nothing else."""
    options = ["--strategy", "own:Pairs", "--versions", "40"]
    server = own.server(*options)
    client = own.client("c", "--trainer", "own:Fixed")
    own.until(lambda: own.merged() >= 5, 30, server.said())
    server.kill()
    server = own.server()
    assert server.data()["versions"] == 40
    assert client.data()["used"] >= 80 - 2
    own.ledger().check()


def test_a_client_without_the_code_of_the_run_is_told_what_it_lacks(own: "Federation") -> None:
    """A server's word never imports code here."""
    local = own.local(model="own:Net", data="own:load")
    assert local.error is None, local.error
    bare = own.guest(Client(own.address, maker(Options("bare")), name="bare"))
    blind = own.guest(Client(own.address, maker(Options("blind", "own:Net")), name="blind"))
    for guest, code in ((bare, "FL-C107"), (blind, "FL-D103")):
        guest.join(20)
        assert guest.error is not None
        assert guest.error.code == code
    assert bare.error is not None
    assert "own:Net" in bare.error.message
