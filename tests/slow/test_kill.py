"""Processes killed without warning, at the worst moments: the run ends at its target all the same.

After each run the journal is gone through: every update was used or discarded exactly once, and
versions came one after another.
"""

import hashlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from atoll.client.client import Client
from atoll.client.options import Options, maker
from atoll.client.trainer import Task, Trained
from atoll.protocols import messages

if TYPE_CHECKING:
    from tests.slow.conftest import Federation

pytestmark = pytest.mark.slow


class Witness(Client):
    """A client that writes down which bytes it was told that a version has."""

    seen: dict[int, set[bytes]]

    def _ordered(self, order: messages.Order) -> None:
        assert order.model is not None
        told = order.model.sha256 or hashlib.sha256(order.inline).digest()
        self.seen.setdefault(order.version, set()).add(told)
        super()._ordered(order)


def witness(address: str, index: int, folder: Path) -> Witness:
    options = Options(f"w{index}", shard=(index, 2), slowdown=0.004)
    made = Witness(address, maker(options), name=f"w{index}", folder=folder / f"w{index}")
    made.seen = {}
    return made


@pytest.mark.parametrize(
    ("strategy", "save_every", "seed"),
    [
        pytest.param("fedavg:steps=10,min_clients=2", 1, 0, marks=pytest.mark.long),
        ("fedbuff:size=2,steps=8", 3, 1),
    ],
)
def test_a_server_killed_thrice_ends_at_its_target_without_a_fork(
    federation: "Federation", strategy: str, save_every: int, seed: int
) -> None:
    options = [
        "--strategy", strategy, "--target-accuracy", "0.93", "--save-every", str(save_every),
        "--lease", "10", "--keep", "3",
    ]  # fmt: skip
    rng = random.Random(seed)
    server = federation.server(*options)
    witnesses = [witness(federation.address, i, federation.folder) for i in range(2)]
    guests = [federation.guest(one) for one in witnesses]
    for _ in range(3):
        wanted = federation.merged() + rng.randint(1, 3)
        until(partial(reached, federation, wanted), what=server.said())
        time.sleep(rng.random() * 0.1)
        server.kill()
        server = federation.server(*options)
    data = server.data()
    assert data["metrics"]["accuracy"] >= 0.93
    for guest in guests:
        guest.ended()
    federation.ledger().check()
    check_no_fork(witnesses)


def check_no_fork(witnesses: Sequence[Witness]) -> None:
    """Whatever a server made again after its death has the bytes that it had before."""
    seen: dict[int, set[bytes]] = {}
    for one in witnesses:
        for version, hashes in one.seen.items():
            seen.setdefault(version, set()).update(hashes)
    assert len(seen) > 3
    assert all(len(hashes) == 1 for hashes in seen.values()), "a version was made twice, otherwise"


def reached(federation: "Federation", version: int) -> bool:
    return federation.merged() >= version


def until(true: Callable[[], object], seconds: float = 120.0, what: str = "") -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not in {seconds} s: {what}"
        time.sleep(0.002)


BIG = """
import torch
from torch import nn

class Big(nn.Module):
    '''Digits, with 20 MB of ballast that travels.'''
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)
        self.ballast = nn.Parameter(torch.zeros(5_000_000))
    def forward(self, x):
        return self.fc(x.flatten(1))
"""


def test_a_client_killed_in_mid_training_goes_on_with_its_order(federation: "Federation") -> None:
    server = federation.server("--strategy", "fedavg:steps=20,min_clients=2", "--versions", "4")
    slow = ["--shard", "1/2", "--sleep-per-step", "0.1"]
    other = federation.digits("c0", (0, 2))
    first = federation.client("c1", *slow)
    until(lambda: federation.merged() >= 1 and orders(federation, "c1") == 2, 120, "second order")
    time.sleep(0.2)  # of the 2 that it takes
    first.kill()
    second = federation.client("c1", *slow)
    data = server.data()
    report = second.data()
    assert data["versions"] == 4
    assert (report["orders"], report["used"]) == (3, 3)  # the killed one, again, and the rest
    other.ended()
    ledger = federation.ledger()
    ledger.check()
    rows = federation.history("update")
    assert len([row for row in rows if row["client"] == "c1"]) == 4
    # The quick one may have had a fifth order in hand, and done it, when the run was over.
    assert len([fate for fate in ledger.fates.elements() if fate.startswith("used ")]) == 8
    assert not federation.history("leave")


DEAF = """
import time
from atoll.client import Trained
class Deaf:
    def load(self, tensors):
        self.tensors = dict(tensors)
    def train(self, task):
        open("training", "w").close()
        time.sleep(300 if task.steps else 0)
        return Trained(self.tensors, task.steps, 1, {})
    def evaluate(self):
        return {}
"""


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leaves_with_a_goodbye_and_again_ends_at_once(
    federation: "Federation", times: int
) -> None:
    """The second one waited for the step that the trainer was in, as the first one does; while
    torch was imported, the first one was swallowed and left half a numpy."""
    (federation.folder / "deaf.py").write_text(DEAF)
    federation.server("--strategy", "fedavg:steps=20", "--model", "linear")
    trainer = ("--trainer", "deaf:Deaf") if times == 2 else ("--sleep-per-step", "0.1")
    client = federation.client("c0", *trainer)
    federation.until(lambda: "is in the run" in client.said(), 60, "welcome")
    if times == 2:
        federation.until((federation.folder / "training").exists, 60, "training")
    client.interrupt()
    federation.until(lambda: federation.history("leave"), 30, "goodbye")
    if times == 2:
        client.interrupt()
    assert client.wait() == (130 if times == 2 else 0)
    assert "stopped by its owner" in str(federation.history("leave"))


SLOW = """
import time
class Slow:
    def load(self, tensors): ...
    def train(self, task): ...
    def evaluate(self):
        time.sleep(300)
"""


def test_ctrl_c_again_ends_a_server_that_waits_for_an_evaluation(
    federation: "Federation",
) -> None:
    """It waited a minute for it, whatever was pressed."""
    (federation.folder / "slow.py").write_text(SLOW)
    server = federation.server("--model", "linear", "--trainer", "slow:Slow")
    federation.until(lambda: "serving" in server.said(), 60, "serving")
    server.interrupt()
    federation.until(lambda: "stopping (Ctrl-C again" in server.said(), 30, "word")
    server.interrupt()
    assert server.wait(20) == 130
    assert server.told()["error"]["code"] == "FL-S208"
    federation.server()  # goes on


def test_ctrl_c_twice_ends_a_server_that_is_still_starting(federation: "Federation") -> None:
    """In a third of the tries that was a traceback: the loop was closed under the import of torch,
    and the second Ctrl-C met that."""
    for _ in range(3):
        server = federation.server(wait=False)
        federation.until((federation.state / "server.json").exists, 60, "port")
        server.interrupt()
        federation.until(lambda: "stopping" in server.said(), 10, "word")  # noqa: B023
        server.interrupt()
        assert server.wait(20) in (0, 130)
        assert "Traceback" not in server.said()
        (federation.state / "server.json").unlink(missing_ok=True)
    federation.server()  # goes on


def test_a_client_killed_in_mid_upload_delivers_without_training_again(
    federation: "Federation",
) -> None:
    (federation.folder / "big.py").write_text(BIG)
    model = ["--model", "big:Big"]
    server = federation.server(
        "--strategy", "fedavg:steps=5,min_clients=2", "--versions", "2", *model, "--data", "digits"
    )
    gate = federation.gate(9 << 20)
    other = federation.client("c0", *model, "--shard", "0/2")
    first = federation.client("c1", *model, "--shard", "1/2", address=gate.address)
    until(lambda: gate.shut, 120, "half of an upload")
    first.kill()
    assert federation.merged() == 0
    gate.open.set()
    second = federation.client("c1", *model, "--shard", "1/2", address=gate.address)
    assert server.data()["versions"] == 2
    report = second.data()
    assert (report["orders"], report["used"]) == (1, 2)  # the first was trained in its former life
    other.data()
    ledger = federation.ledger()
    ledger.check()
    assert len(ledger.updates) == 4
    assert not federation.history("leave")


def test_an_upload_goes_on_where_it_was_when_the_server_was_killed(
    federation: "Federation",
) -> None:
    """What had arrived was swept away at the next start, and all of it was sent once more. The
    upload went on over the closed line, and the client's log had a traceback of it."""
    (federation.folder / "big.py").write_text(BIG)
    options = [
        "--strategy", "fedbuff:size=1,steps=5", "--versions", "1", "--model", "big:Big",
        "--data", "digits",
    ]  # fmt: skip
    server = federation.server(*options)
    gate = federation.gate(9 << 20)
    slow = ("--sleep-per-step", "0.2")  # the order after the last version is not done in time
    client = federation.client("c0", "--model", "big:Big", *slow, address=gate.address)
    until(lambda: gate.shut, 120, "half of an upload")
    (part,) = (federation.state / "updates").glob("*.part")
    # What it says of itself lies at the end, so its size is the whole's from the first chunk on.
    until(lambda: part.stat().st_blocks * 512 > 7 << 20, 60, "the chunks that came")
    gate.refuse = True  # until somebody is there again
    server.kill()
    server = federation.server(*options)
    gate.open.set()
    gate.refuse = False
    assert server.data()["versions"] == 1
    report = client.data()
    assert (report["orders"], report["used"]) == (1, 1)
    assert "Traceback" not in client.err.read_text()
    size = sum(row["bytes"] for row in federation.history("update"))
    assert size > 12 << 20
    assert gate.passed < size + (6 << 20)  # both times together; 9 would be all once more
    federation.ledger().check()


class Stirring:
    """A trainer of a big model that costs no time: it moves every value a little."""

    def __init__(self) -> None:
        self.made = 0
        self.tensors: dict[str, torch.Tensor] = {}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = {name: value.clone() for name, value in tensors.items()}

    def train(self, task: Task) -> Trained:
        self.made += 1
        moved = {name: value - 0.001 * self.made for name, value in self.tensors.items()}
        return Trained(moved, task.steps, task.steps, {})

    def evaluate(self) -> Mapping[str, float]:
        return {}


@pytest.mark.parametrize("moment", ["writing", pytest.param("sealed", marks=pytest.mark.long)])
def test_a_server_killed_while_it_merges_a_big_model_makes_that_version_again(
    federation: "Federation", moment: str
) -> None:
    (federation.folder / "big.py").write_text(BIG)
    options = [
        "--strategy", "fedbuff:size=2,steps=1", "--versions", "8", "--model", "big:Big",
        "--data", "digits", "--outer", "momentum", "--save-every", "3",
    ]  # fmt: skip
    server = federation.server(*options)
    witnesses = [
        Witness(federation.address, Stirring(), name=f"w{i}", folder=federation.folder / f"w{i}")
        for i in range(2)
    ]
    for one in witnesses:
        one.seen = {}
        federation.guest(one)
    versions = federation.state / "versions"
    for number in (2, 5):
        until(partial(made, versions, number, moment == "writing"), what=server.said())
        server.kill()
        server = federation.server(*options)
    assert server.data()["versions"] >= 8
    for guest in federation.guests:
        guest.ended()
    federation.ledger().check()
    check_no_fork(witnesses)


def made(versions: Path, number: int, begun: bool) -> bool:
    """Whether this version, or a later one, is on disk, or has been begun."""
    if begun and (versions / f"{number}.tmp").exists():
        return True
    found = [int(p.name) for p in versions.glob("*") if p.name.isdecimal()]
    return max(found, default=0) >= number


def orders(federation: "Federation", client: str) -> int:
    """That this client could begin."""
    mine = {row["order"] for row in federation.history("train") if row["client"] == client}
    return len([row for row in federation.history("started") if row["order"] in mine])
