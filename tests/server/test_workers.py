"""Several processes train one simulation: the same hash, and one clear error where one ends."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from atoll.aggregation.fedavg import FedAvg
from atoll.aggregation.fedbuff import FedBuff
from atoll.aggregation.strategy import Strategy
from atoll.client.data import load_data
from atoll.client.local import LocalConfig
from atoll.protocols import console
from atoll.protocols.errors import ClientError, ServerError, UsageError
from atoll.server.cli import cli
from atoll.server.cli_simulate import engine_of
from atoll.server.crew import Job
from atoll.server.simulation import Simulation
from atoll.server.simulator import simulate
from atoll.server.trainers import Trainers
from atoll.server.training import Training
from atoll.server.worker import Frame, Worker, packed, shapes_of, unpacked
from atoll.server.workers import Process, Workers
from atoll.server.world import Absence, ClientModel

DATA = "synthetic:features=12,classes=5,examples=300"
NAMES = ["a", "b", "c", "d"]
LOCAL = LocalConfig(lr=0.1, batch=16, device="cpu")
CLIENTS = [
    ClientModel("a", 0.1),
    ClientModel("b", 0.2, absences=(Absence(2.1, 3.0),)),
    ClientModel("c", 0.2, absences=(Absence(1.0, 5.0, "offline"),)),
    ClientModel("d", 0.4),
]


class Loopback:
    """A worker in this process: its frames go through JSON, as through a pipe."""

    def __init__(self, trainers: str) -> None:
        self.worker = Worker(trainers, 1)
        self.answers: list[Frame] = []
        self.heard: list[str] = []

    def send(self, frame: Frame) -> None:
        self.heard.append(frame.head["kind"])
        frame = Frame(json.loads(json.dumps(dict(frame.head))), frame.body)
        self.answers += self.worker.handle(frame)

    def receive(self) -> list[Frame]:
        made, self.answers = self.answers, []
        assert made, "nothing more will come"
        return [Frame(json.loads(json.dumps(dict(f.head))), f.body) for f in made]

    def close(self) -> None:
        self.heard.append("closed")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loopback(trainers: Trainers) -> Workers:
    return Workers([Loopback(trainers.dumps()) for _ in range(3)], trainers.clients)


def run(strategy: Strategy, engine: Any = None, **given: Any) -> Simulation:
    learning = Training.of(
        NAMES, model="mlp:hidden=8", data=DATA, partition="dirichlet:1", local=LOCAL,
        engine=engine, **given,
    )  # fmt: skip
    try:
        return simulate(strategy, CLIENTS, 12.0, learning=learning, lease=0.5)
    finally:
        learning.close()


@pytest.mark.parametrize("attacks", [{}, {"b": "label-flip", "d": "sign-flip:3"}])
def test_the_hash_is_that_of_one_process(attacks: dict[str, str]) -> None:
    made = [run(FedBuff(size=2, steps=8), engine, attacks=attacks) for engine in (None, loopback)]
    assert made[0].versions > 5
    assert made[0].hash == made[1].hash
    assert made[0].accuracy == made[1].accuracy


def test_a_trainer_that_keeps_state_is_trained_when_it_is_asked_for() -> None:
    keeping = LocalConfig(lr=0.1, batch=16, momentum=0.9, keep_optimizer_state=True, device="cpu")
    hashes = []
    for engine in (None, loopback):
        made = Training.of(NAMES, model="linear", data=DATA, local=keeping, engine=engine)
        hashes.append(simulate(FedAvg(steps=8, min_clients=4), CLIENTS, 12.0, learning=made).hash)
    assert hashes[0] == hashes[1]


@pytest.mark.slow
@pytest.mark.long
def test_processes_train_what_one_does() -> None:
    strategy = FedAvg(steps=8, rounds=3, min_clients=4)
    many = run(strategy, lambda trainers: Workers.of(trainers, 2))
    assert many.hash == run(FedAvg(steps=8, rounds=3, min_clients=4)).hash


def trainers(**given: Any) -> Trainers:
    return Trainers(NAMES, "linear", DATA, local=LOCAL, **given)


def test_each_worker_has_its_clients_and_a_version_once() -> None:
    spec = trainers()
    links = [Loopback(spec.dumps()) for _ in range(2)]
    crew = Workers(links, spec.clients)
    start = spec.judge().export()  # type: ignore[attr-defined]
    jobs = [Job(f"o{i}", name, 0, 3, 0) for i, name in enumerate(NAMES)]
    for job in jobs:
        crew.begin(job, lambda: start)
    assert links[0].heard == links[1].heard == ["shapes", "model", "begin", "begin"]
    crew.trained(jobs[0], lambda: start)
    assert links[0].heard[4:] == ["go", "want"]
    assert links[1].heard[4:] == ["go"]
    crew.trained(jobs[2], lambda: start)  # came with the first
    assert links[0].heard[6:] == []
    for job in jobs:
        crew.forget(job.order)
    crew.forget("o99")
    crew.close()
    assert links[0].heard[6:] == ["forget", "forget", "drop", "closed"]
    assert not links[0].worker._models
    assert not links[0].worker._begun


def test_an_order_asked_for_otherwise_is_trained_anew() -> None:
    spec = trainers()
    crew, start = loopback(spec), spec.judge().export()  # type: ignore[attr-defined]
    job = Job("o0", "a", 0, 6, 0)
    crew.begin(job, lambda: start)
    assert crew.trained(job, lambda: start).steps == 6
    part = Job("o0", "a", 0, 2, 0)
    assert crew.trained(part, lambda: start).steps == 2
    assert crew.trained(job, lambda: start).steps == 6


def test_a_diverged_client_fails_as_in_one_process() -> None:
    wild = Trainers(NAMES, "mlp:hidden=8", DATA, local=LocalConfig(lr=1e30, batch=16, device="cpu"))
    crew, start = loopback(wild), wild.judge().export()  # type: ignore[attr-defined]
    job = Job("o0", "a", 0, 6, 0)
    crew.begin(job, lambda: start)
    with pytest.raises(ClientError, match=r"FL-C104.*of 6"):
        crew.trained(job, lambda: start)


def test_objects_of_this_process_cannot_be_named_to_another() -> None:
    with pytest.raises(UsageError, match="FL-S104"):
        Trainers(NAMES, "linear", load_data(DATA)).dumps()
    spec = trainers(attacks={"a": "scale"}, partition="dirichlet:1")
    assert Trainers.loads(spec.dumps()) == spec


ALGORITHMS = [
    "fedavg-m:beta=0.3,warm=true", "scaffold", "scaffold-m", "scaffold-m:table=server", "feddyn",
    "fedprox",
]  # fmt: skip


NEED_ROUNDS = {"feddyn", "fedavg-m-vr", "scaffold-m-vr:beta=0.5"}
FAST = {  # each kind of state once
    ("fedavg-m:beta=0.3,warm=true", False), ("feddyn", False), ("scaffold-m", True),
    ("scaffold-m:table=server", False),
}  # fmt: skip
BOTH_WAYS = [
    *((algorithm, False) for algorithm in sorted({*ALGORITHMS, *NEED_ROUNDS})),
    *((algorithm, True) for algorithm in sorted({*ALGORITHMS} - NEED_ROUNDS)),
]


@pytest.mark.parametrize(
    ("algorithm", "asynchronous"),
    [pytest.param(*one, marks=() if one in FAST else pytest.mark.slow) for one in BOTH_WAYS],
)
def test_vectors_and_private_state_go_along(algorithm: str, asynchronous: bool) -> None:
    """Clients die and come back; with FedBuff outcomes come while the next order is under way."""
    made = []
    for engine in (None, loopback):
        strategy = FedBuff(size=2, steps=8) if asynchronous else FedAvg(steps=8, min_clients=2)
        made.append(run(strategy, engine, algorithm=algorithm))
    assert made[0].versions > 3
    assert made[0].hash == made[1].hash
    assert made[0].accuracy == made[1].accuracy


def test_what_was_made_ahead_is_made_again_where_the_state_has_changed() -> None:
    spec = Trainers(NAMES, "linear", DATA, local=LOCAL, algorithm="scaffold")
    link = Loopback(spec.dumps())
    crew, start = Workers([link], spec.clients), spec.judge().export()  # type: ignore[attr-defined]
    count = sum(t.numel() for t in start.values())
    extras = {"control": torch.zeros(count)}
    job = Job("o0", "a", 0, 4, 0, extras=extras)
    crew.begin(job, lambda: start)
    first = crew.trained(job, lambda: start)
    c, number = torch.full((count,), 0.5), torch.tensor(1)
    changed = {"control": {"c": c, "commits": number, "epoch": torch.tensor(0)}}
    later = Job("o0", "a", 0, 4, 0, extras=extras, latest=changed)
    second = crew.trained(later, lambda: start)
    assert torch.equal(second.extras["dc"], first.extras["dc"] - c)
    assert second.said["commits"] == first.said["commits"] + 1
    assert all(torch.equal(first.tensors[n], second.tensors[n]) for n in start)
    assert crew.trained(later, lambda: start).extras["dc"] is second.extras["dc"]
    assert link.heard[-3:] == ["go", "want", "want"]


def test_tensors_of_every_kind_travel_as_they_are() -> None:
    sent = {
        "w": torch.randn(3, 4), "none": torch.empty(0, 7), "half": torch.randn(5).bfloat16(),
        "count": torch.tensor(7), "yes": torch.tensor([True, False]), "t": torch.randn(4, 3).T,
    }  # fmt: skip
    shapes = shapes_of(sent)
    came = unpacked(json.loads(json.dumps(shapes)), packed(shapes, sent))
    assert all(torch.equal(came[name], sent[name]) for name in sent)
    assert [t.dtype for t in came.values()] == [t.dtype for t in sent.values()]


@pytest.mark.slow
def test_a_worker_that_ends_is_one_clear_error() -> None:
    link = Process(trainers().dumps())
    link._process.kill()
    with pytest.raises(ServerError, match="FL-S211"):
        link.receive()
    link._process.wait()
    with pytest.raises(ServerError, match="FL-S211"):
        link.send(Frame({"kind": "go"}))
    link.close()


def test_no_more_workers_are_started_than_there_are_clients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forty for two clients took 46 s to start, silently."""
    asked: list[int] = []
    monkeypatch.setattr(Workers, "of", lambda _, workers, threads: asked.append(workers))
    for workers in (2, 40):
        engine = engine_of({"workers": workers, "engine": "processes", "threads": 1})
        assert engine is not None
        engine(trainers())
    assert asked == [2, min(40, len(NAMES))]


@pytest.mark.parametrize(
    "more", [["--workers", "0"], ["--engine", "slurm"], ["--engine", "processes:x"]]
)
def test_workers_that_cannot_be_are_refused(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.run(cli, ["simulate", "--until", "1", *more, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "FL-S108"


def test_without_ray_its_engine_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert console.run(cli, ["simulate", "--until", "1", "--engine", "ray", "--json"]) == 78
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "FL-S104"
    assert "pip install 'atoll[ray]'" in error["hint"]


RAY = importlib.util.find_spec("ray") is not None  # not imported: that is for the crew to do


@pytest.mark.slow
@pytest.mark.skipif(not RAY, reason="Ray is not installed")
def test_on_a_ray_cluster_the_hash_is_that_of_one_process() -> None:
    from atoll.server.rayworkers import RayWorkers

    where: list[str] = []

    def engine(trainers: Trainers) -> RayWorkers:
        made = RayWorkers(trainers, 2)
        where.extend(node["NodeManagerAddress"] for node in made._ray.nodes())
        return made

    with_ray = run(FedBuff(size=2, steps=8), engine)
    assert with_ray.hash == run(FedBuff(size=2, steps=8)).hash
    assert where == ["127.0.0.1"]
