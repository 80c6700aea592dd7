"""Stopped, restarted, cut off: a run goes on where it was, and nobody trains anything twice."""

import shutil
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pytest
from torch import Tensor

from atoll.client.client import Client
from atoll.client.trainer import Task, Trained
from atoll.server.rules import Rules
from tests.conftest import Logged

if TYPE_CHECKING:
    from tests.slow.conftest import Federation

pytestmark = pytest.mark.slow


class Counting:
    """A trainer that takes its time, and counts itself and its work."""

    made = 0

    def __init__(self, seconds: float = 0.0) -> None:
        type(self).made += 1
        self.seconds = seconds  # for each order
        self.begun = self.trained = 0
        self.tensors: Mapping[str, Tensor] = {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {name: value.clone() for name, value in tensors.items()}

    def train(self, task: Task) -> Trained:
        self.begun += 1
        end = time.monotonic() + self.seconds
        while time.monotonic() < end and task.asked() is None:
            time.sleep(0.005)
        self.trained += task.asked() is None
        return Trained(self.tensors, task.steps, task.steps, {})

    def evaluate(self) -> Mapping[str, float]:
        return {}


def client(federation: "Federation", name: str, trainer: Counting, address: str = "") -> Client:
    folder = federation.folder / f"client-{name}"
    return Client(address or federation.address, trainer, name=name, folder=folder)


def test_a_run_stopped_for_now_goes_on_with_the_same_limits(
    federation: "Federation", logged: Logged
) -> None:
    """Ctrl-C, then the command that its last line names, without the options of the first. Its
    clients say that they wait: they said nothing."""
    server = federation.server("--strategy", "fedavg:steps=3,min_clients=2", "--versions", "12")
    trainers = [Counting(0.03), Counting(0.03)]
    guests = [federation.guest(client(federation, f"c{i}", t)) for i, t in enumerate(trainers)]
    federation.until(lambda: federation.merged() >= 4)
    server.interrupt()
    stopped = server.data()
    assert stopped["reason"] == ""
    assert 4 <= stopped["versions"] == federation.merged() < 12
    said = [f"client=c{i} has no server (the server stops for now), trying again" for i in (0, 1)]
    federation.until(lambda: all(line in logged.text for line in said))
    server = federation.server()
    assert server.data()["versions"] == 12
    assert "no stop rule" not in server.said()  # it has that of its first start
    reports = [guest.ended() for guest in guests]
    assert [report.reconnections for report in reports] == [1, 1]
    assert [report.used for report in reports] == [12, 12]
    # The order after the last version may be done before its client hears of the end.
    assert all(12 <= trainer.trained <= 13 for trainer in trainers)
    federation.ledger().check()
    rows = (federation.state / "history.jsonl").read_text()
    # It said that it serves, and that it has no stop rule, and took a target that it never had.
    again = federation.server("--target-accuracy", "0.5", wait=False)
    assert again.data()["reason"] == "12 versions done"
    assert (federation.state / "history.jsonl").read_text() == rows
    assert "run: this run is over, and stays so; another --state begins one" in again.said()
    assert "serving" not in again.said()


def test_a_stopped_server_names_the_command_that_goes_on_where_it_was(
    federation: "Federation",
) -> None:
    """It did not name the address at which its clients look for it."""
    start = ("fl-server", "start", "--state", "a state", "--listen", "127.0.0.1:0")
    server = federation.command("server", *start)
    federation.until(lambda: "serving" in server.said(), 60, "it to serve")
    address = server.said().split("serving ")[1].split()[0]
    server.interrupt()
    assert server.wait() == 0
    again = f"fl-server start --state 'a state' --listen {address}\n"
    assert f"stopped for now; go on with: {again}" in server.out.read_text()


def test_a_finished_run_is_summed_up_again_and_tells_those_who_missed_its_end(
    federation: "Federation",
) -> None:
    local = federation.local(Rules(versions=3), strategy="fedbuff:size=1,steps=3", lease=3.0)
    raw = federation.raw()
    raw.hello("late")  # a member that is cut off before the end
    raw.close()
    federation.guest(client(federation, "c", Counting(0.01))).ended()
    summary = local.ended()
    local = federation.local(strategy="fedbuff:size=1,steps=3", lease=3.0)
    assert local.ended().reason == summary.reason == "3 versions done"
    federation.ledger().check()


def test_a_member_that_comes_back_after_the_end_hears_goodbye(
    federation: "Federation", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atoll.server.server.LINGER", 120.0)
    local = federation.local(Rules(versions=2), strategy="fedbuff:size=1,steps=3", lease=120.0)
    assert local.error is None
    gate = federation.gate(1 << 40)
    member = federation.guest(client(federation, "away", Counting(300.0), gate.address))
    federation.until(lambda: federation.history("train"))
    gate.cut(refuse=True)
    federation.guest(client(federation, "c", Counting(0.01))).ended()
    late = federation.guest(client(federation, "late", Counting()))
    late.join(60)  # while the server waits for the one that is away
    assert late.error is not None
    assert (late.error.code, late.error.message) == ("FL-S107", "the run is over: 2 versions done")
    gate.cut(refuse=False)
    assert "2 versions done" in member.ended().reason
    local.ended()


def test_a_client_that_finds_nobody_ends_with_a_sentence(federation: "Federation") -> None:
    """It comes after the end, perhaps: it waited for ever. Patience is kept to the moment."""
    address = federation.local().server.address
    federation.locals[0].server.stop()
    federation.locals[0].ended()
    began = time.monotonic()
    late = federation.guest(Client(address, Counting(), name="late", first_seconds=1.5))
    late.join(60)
    assert time.monotonic() - began >= 1.5
    assert late.error is not None
    assert late.error.code == "FL-C101"
    assert "its run is over" in late.error.hint


def test_a_state_directory_copied_without_its_newest_part_is_refused(
    federation: "Federation",
) -> None:
    server = federation.server("--strategy", "fedbuff:size=1,steps=3")
    guest = federation.guest(client(federation, "c", Counting()))
    federation.until(lambda: federation.merged() >= 20)
    server.kill()
    guest.client.stop()
    assert (federation.state / "journal.sqlite-wal").stat().st_size > 0
    copy = federation.folder / "copy"
    shutil.copytree(federation.state, copy)
    for name in ("journal.sqlite-wal", "journal.sqlite-shm"):
        (copy / name).unlink()
    history = (copy / "history.jsonl").read_text()
    federation.address, federation.state = "127.0.0.1:0", copy
    code, exit_code, message = federation.server(wait=False).failure()
    assert (code, exit_code) == ("FL-S206", 78)
    assert "journal.sqlite is older than history.jsonl" in message
    assert (copy / "history.jsonl").read_text() == history


def test_a_client_cut_off_within_its_lease_keeps_its_order(federation: "Federation") -> None:
    federation.local(strategy="fedavg:steps=3,min_clients=2", lease=60.0)
    gate = federation.gate(1 << 40)
    slow, quick = Counting(0.4), Counting()
    member = federation.guest(client(federation, "slow", slow, gate.address))
    federation.guest(client(federation, "quick", quick))
    for version in range(3):
        federation.until(lambda: slow.begun > version)  # noqa: B023
        gate.cut()
        federation.until(lambda: federation.merged() > version)  # noqa: B023
    assert member.client.report.reconnections >= 3
    assert not federation.history("leave")
    federation.locals[0].server.stop()
    federation.locals[0].ended()
    assert slow.trained - federation.merged() in (0, 1)  # each order once; the last may be open
    federation.ledger().check()


def test_a_client_whose_lease_ended_joins_again_and_its_work_is_late(
    federation: "Federation",
) -> None:
    federation.local(Rules(versions=30), strategy="fedbuff:size=1,steps=3", lease=1.0)
    gate = federation.gate(1 << 40)
    trainer = Counting(1.0)
    member = federation.guest(client(federation, "away", trainer, gate.address))
    federation.until(lambda: trainer.begun)
    gate.cut(refuse=True)
    federation.until(lambda: federation.history("leave"), 10)
    gate.cut(refuse=False)
    federation.until(lambda: federation.history("update"), 10)
    first = federation.history("update")[0]
    assert (first["order"], first["current"]) == ("o0", False)
    federation.until(lambda: len(federation.history("join")) >= 2)
    federation.until(lambda: federation.merged() >= 3)
    assert member.client.report.orders >= 2
    federation.locals[0].server.stop()
    federation.locals[0].ended()
    federation.ledger().check()


def test_one_warm_trainer_does_all_orders(federation: "Federation") -> None:
    """The process stays, and so do the model, the data and the device between rounds."""
    Counting.made = 0
    told: list[str] = []

    def make(run: object) -> Counting:
        told.append(type(run).__name__)
        return Counting()

    local = federation.local(Rules(versions=20), strategy="fedbuff:size=1,steps=3")
    guest = federation.guest(Client(federation.address, make, name="warm"))
    local.ended()
    assert guest.ended().orders >= 20
    assert (Counting.made, told) == (1, ["RunInfo"])


def test_work_left_from_another_run_does_not_stand_in_the_way(federation: "Federation") -> None:
    """Orders are counted in each run: the new run's o0 was taken for the old one's and never
    trained, where a client's folder still held the old one's result."""
    federation.local(strategy="fedavg:steps=3,min_clients=1,min_results=1,deadline=60")
    first = Counting(1.0)
    gate = federation.gate(1 << 40)
    guest = federation.guest(client(federation, "c", first, gate.address))
    federation.until(lambda: first.begun)
    gate.cut(refuse=True)
    federation.until(lambda: first.trained)
    federation.until(lambda: list((federation.folder / "client-c").glob("*.slot")))
    guest.client.stop()
    guest.ended()
    federation.locals[0].server.stop()
    federation.locals[0].ended()
    federation.state = federation.folder / "other"
    federation.address = "127.0.0.1:0"
    local = federation.local(Rules(versions=3), strategy="fedbuff:size=1,steps=3")
    guest = federation.guest(client(federation, "c", Counting()))
    local.ended()
    assert guest.ended().used >= 3
