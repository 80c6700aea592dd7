"""Whoever trains a simulated run's clients, and however many at once, the hash is the same."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from atoll.aggregation.fedavg import FedAvg
from atoll.aggregation.fedbuff import FedBuff
from atoll.aggregation.fedcompass import FedCompass
from atoll.aggregation.strategy import Actions, Strategy
from atoll.client import stacked
from atoll.client.data import Data, load_data
from atoll.client.local import LocalConfig, TorchTrainer
from atoll.client.partition import shards_of
from atoll.client.specs import trainer_on
from atoll.protocols.errors import ClientError
from atoll.protocols.events import Aggregate, Ask, ClientInfo, SetTimer, Train, Update
from atoll.server import crew as crews
from atoll.server.crew import Job, OneByOne, Together
from atoll.server.simulator import simulate
from atoll.server.training import Training
from atoll.server.world import Absence, ClientModel, at_paces

NAMES = ("a", "b", "c")
LOCAL = LocalConfig(lr=0.1, batch=16, device="cpu")
PACES = at_paces({"a": 0.1, "b": 0.23, "c": 0.4})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def data() -> Data:
    return load_data("synthetic:features=10,classes=4,examples=300")


def trainer(name: str, lr: float = 0.1) -> TorchTrainer:
    rows = shards_of(data(), "dirichlet:1", len(NAMES), 0)[NAMES.index(name)]
    local = LocalConfig(lr=lr, batch=16, device="cpu")
    return trainer_on(data().shard(rows), data(), "mlp:hidden=8", 0, local, client=name)


def training(crew: OneByOne) -> Training:
    judge = trainer("a")
    return Training(trainer, judge.manifest, judge.export(), judge=judge, crew=crew)


class AskAll(Strategy):
    """Two orders each; the first is asked for a snapshot, then for what there is."""

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        yield Train(client, 12)
        yield SetTimer(f"snapshot {client}", 0.35)
        yield SetTimer(f"send {client}", 0.75)

    def on_timer(self, timer: str, now: float) -> Actions:
        what, _, client = timer.partition(" ")
        yield Ask(client, "continue" if what == "snapshot" else "send")

    def on_update(self, update: Update, now: float) -> Actions:
        yield Aggregate(((update.id, 0.5),))
        if update.base == 0:
            yield Train(update.client, 7)


ABSENT = [
    ClientModel("a", 0.1, absences=(Absence(3.0, 5.0), Absence(9.0, 30.0))),
    ClientModel("b", 0.2, absences=(Absence(2.0, 4.0, "offline"), Absence(8.0, 31.0, "offline"))),
    ClientModel("c", 0.4, absences=(Absence(6.0, 7.0, "goodbye"),)),
]


@pytest.mark.parametrize(
    ("strategy", "clients"),
    [
        (lambda: FedAvg(steps=8, rounds=4, min_clients=3), PACES),
        (lambda: FedBuff(size=2, steps=8), PACES),
        (lambda: FedCompass(min_steps=2, max_steps=10, min_clients=3), PACES),
        (AskAll, PACES),
        (lambda: FedBuff(size=2, steps=20, flush_on_stop=True), ABSENT),
        (lambda: FedAvg(steps=20, min_clients=1, deadline=5.0), ABSENT),
    ],
)
def test_together_or_one_by_one_the_hash_is_the_same(
    strategy: Callable[[], Strategy], clients: list[ClientModel]
) -> None:
    runs = [
        simulate(strategy(), clients, 40.0, learning=training(crew(trainer)), lease=2.0)
        for crew in (OneByOne, Together)
    ]
    assert runs[0].versions > 2
    assert runs[0].hash == runs[1].hash
    assert runs[0].accuracy == runs[1].accuracy


class Counting(Together):
    """Notes how many were trained at once."""

    def __init__(self) -> None:
        super().__init__(trainer)
        self.at_once: list[int] = []

    def _train(self, wanted: str) -> None:
        before = len(self._made)
        super()._train(wanted)
        self.at_once.append(len(self._made) - before)


def test_all_of_a_round_are_trained_at_once() -> None:
    crew = Counting()
    simulate(FedAvg(steps=8, rounds=4, min_clients=3), PACES, learning=training(crew))
    assert crew.at_once == [3] * 4
    assert not crew._begun
    assert not crew._made


def test_no_more_is_trained_ahead_than_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(t.numel() * 4 for t in trainer("a").export().values())
    monkeypatch.setattr(crews, "AHEAD", 2 * size)
    crew = Counting()
    simulate(FedAvg(steps=8, rounds=2, min_clients=3), PACES, learning=training(crew))
    assert crew.at_once == [2, 1] * 2


def test_a_diverged_client_fails_as_it_does_alone() -> None:
    def wild(name: str) -> TorchTrainer:
        return trainer(name, 1e30)

    judge = wild("a")
    assert stacked.fits(judge)
    for crew in (OneByOne(wild), Together(wild)):
        made = Training(wild, judge.manifest, judge.export(), crew=crew)
        with pytest.raises(ClientError, match=r"FL-C104.*step 2 of 8"):
            simulate(FedAvg(steps=8, min_clients=3), PACES, learning=made)


def test_what_is_forgotten_is_let_go() -> None:
    crew = Together(trainer)
    start = trainer("a").export()
    jobs = [Job(f"o{i}", name, 0, 4, 0) for i, name in enumerate(NAMES)]
    for job in jobs:
        crew.begin(job, lambda: start)
    crew.forget("o1")
    crew.trained(jobs[0], lambda: start)
    assert set(crew._made) == {"o0", "o2"}
    crew.forget("o2")
    assert set(crew._made) == {"o0"}
