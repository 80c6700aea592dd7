"""Real training in virtual time: the numbers are a real run's, whatever order things arrive in."""

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from atoll.aggregation.fedavg import FedAvg
from atoll.aggregation.fedbuff import FedBuff
from atoll.aggregation.strategy import Actions, Strategy
from atoll.client.data import Data, load_data
from atoll.client.local import LocalConfig, TorchTrainer
from atoll.client.specs import make_trainer
from atoll.client.trainer import Task
from atoll.protocols import tensors
from atoll.protocols.events import (
    Aggregate,
    Ask,
    ClientInfo,
    ClientJoined,
    Discard,
    SetTimer,
    Train,
    Update,
)
from atoll.server.rules import Rules
from atoll.server.run import FORMER, Order
from atoll.server.simulator import simulate
from atoll.server.training import Training

PACES = {"a": 0.1, "b": 0.3}
LOCAL = LocalConfig(lr=0.1, batch=8)


@cache
def data() -> Data:
    return load_data("synthetic:features=6,classes=3,examples=200")


def training(clients: Mapping[str, float] = PACES, step: str = "sgd") -> Training:
    return Training.of(
        list(clients), model="linear", data=data(), partition="iid", local=LOCAL, step=step
    )


def trainer(name: str) -> TorchTrainer:
    place = list(PACES).index(name)
    return make_trainer("linear", data(), "iid", (place, 2), 0, LOCAL, client=name)


def rounds(count: int, paces: Mapping[str, float] = PACES, step: str = "sgd") -> Training:
    made = training(paces, step)
    simulate(FedAvg(steps=5, rounds=count, min_clients=2), paces, learning=made)
    return made


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_two_rounds_are_the_weighted_mean_of_the_clients_models_twice() -> None:
    model = training().model()
    for done in (0, 5):
        local = []
        for name in PACES:
            client = trainer(name)
            client.load(model)
            trained = client.train(Task(5, done)).tensors
            local.append((client.examples, {n: t.clone() for n, t in trained.items()}))
        total = sum(examples for examples, _ in local)
        model = {
            n: sum((m[n] * (examples / total) for examples, m in local), torch.zeros(()))
            for n in model
        }
    for name, value in rounds(2).model().items():
        torch.testing.assert_close(value, model[name], rtol=1e-5, atol=1e-6)


def test_a_synchronous_run_has_the_same_bits_whoever_arrives_first() -> None:
    assert same(rounds(3).model(), rounds(3, {"a": 0.5, "b": 0.1}).model())


def test_an_outer_optimizer_takes_the_step() -> None:
    plain, fast = rounds(1).model(), rounds(1, step="sgd:lr=2").model()
    start = training().model()
    for name in start:
        torch.testing.assert_close(fast[name] - start[name], 2 * (plain[name] - start[name]))
    assert not same(rounds(2).model(), rounds(2, step="momentum").model())


def test_the_model_is_judged_and_the_target_ends_the_run() -> None:
    made, goal = training(), 0.9
    found = simulate(
        FedAvg(steps=1, min_clients=2), PACES, 500.0, learning=made, rules=Rules(target=goal)
    )
    assert found.reason.startswith("target reached")
    assert all(accuracy < goal for _, accuracy in found.accuracy[:-1])
    judge = trainer("a")
    judge.load(made.model())
    assert found.accuracy[-1][1] == judge.evaluate()["accuracy"] >= goal


def test_sizes_are_those_of_the_bytes_sent_and_the_model_can_be_saved(tmp_path: Path) -> None:
    made = training()
    numbers = 6 * 3 + 3  # weights and biases of a linear model
    assert made.sizes() == (4 * numbers, 4 * numbers)
    saved = load_file(made.save(tmp_path / "model.safetensors"))
    assert same(saved, made.model())


def test_without_a_judge_nothing_is_evaluated() -> None:
    source = trainer("a")
    made = Training(trainer, source.manifest, source.export())
    found = simulate(FedAvg(steps=5, rounds=2, min_clients=2), PACES, learning=made)
    assert (found.accuracy, found.versions) == ([], 2)


def test_the_same_seed_gives_the_same_hash_with_all_the_losses() -> None:
    hashes = [
        simulate(FedBuff(size=2, steps=5), PACES, 10.0, learning=training()).hash for _ in range(2)
    ]
    assert hashes[0] == hashes[1]
    assert hashes[0] != simulate(FedBuff(size=2, steps=5), PACES, 10.0).hash


def test_clients_join_with_the_examples_of_their_shards() -> None:
    joined: dict[str, int] = {}

    def hear(now: float, event: object, actions: object) -> None:
        if isinstance(event, ClientJoined):
            joined[event.client] = event.info.examples

    simulate(FedAvg(rounds=1), PACES, learning=training(), listen=hear)
    assert joined == {name: trainer(name).examples for name in PACES}


def test_versions_and_updates_that_nobody_needs_are_let_go() -> None:
    made = training()
    simulate(FedBuff(size=2, steps=5), PACES, 60.0, learning=made)
    assert made._newest.number > 20
    assert len(made._versions.numbers()) <= 1 + len(PACES)
    assert len(made._held) < 2


def test_versions_of_orders_that_never_come_back_are_let_go_too() -> None:
    made = training()
    for i in range(20):
        made.given(Order(f"o{i}", "a", i, 5))
    assert list(made._orders["a"]) == [f"o{i}" for i in range(19 - FORMER, 20)]


class AskOnce(Strategy):
    """One order; asked for a snapshot or not; the final result makes a version."""

    def __init__(self, ask: bool) -> None:
        self.ask = ask
        self.snapshots: list[Update] = []

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        yield Train(client, 10)
        if self.ask:
            yield SetTimer("ask", 0.35)

    def on_timer(self, timer: str, now: float) -> Actions:
        yield Ask("a", "continue")

    def on_snapshot(self, update: Update, now: float) -> Actions:
        self.snapshots.append(update)
        yield from super().on_snapshot(update, now)

    def on_update(self, update: Update, now: float) -> Actions:
        yield Aggregate(((update.id, 1.0),))


def test_a_snapshot_does_not_change_what_its_order_comes_to() -> None:
    models = []
    for ask in (False, True):
        made, strategy = training({"a": 0.1}), AskOnce(ask)
        simulate(strategy, {"a": 0.1}, 5.0, learning=made)
        assert [update.steps for update in strategy.snapshots] == ([4] if ask else [])
        models.append(made.model())
    assert same(models[0], models[1])


@pytest.mark.parametrize("codec", ["fp16", "bf16"])
def test_updates_may_travel_packed(codec: str) -> None:
    exact = rounds(2).model()
    packed = Training.of(
        list(PACES), model="linear", data=data(), partition="iid", local=LOCAL, up=codec
    )
    simulate(FedAvg(steps=5, rounds=2, min_clients=2), PACES, learning=packed)
    assert not same(exact, packed.model())
    for name, value in packed.model().items():
        torch.testing.assert_close(value, exact[name], rtol=0.02, atol=0.01)


def far(packed: str, count: int = 40) -> float:
    """How far from the model that exact updates make."""
    exact = rounds(count).model()
    made = Training.of(
        list(PACES), model="linear", data=data(), partition="iid", local=LOCAL, up=packed
    )
    simulate(FedAvg(steps=5, rounds=count, min_clients=2), PACES, learning=made)
    model = made.model()
    return math.sqrt(sum(float((model[n] - exact[n]).square().sum()) for n in exact))


def test_what_a_codec_left_out_is_sent_later() -> None:
    """21 values, of which two travel: with feedback the model comes out as without a codec."""
    assert far("topk:0.1+ef") < 0.25 * far("topk:0.1")
    assert far("powersgd:1+ef") < far("powersgd:1")


class Wasteful(Strategy):
    """Merges every second update, discards the others."""

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        yield Train(client, 5)

    def on_update(self, update: Update, now: float) -> Actions:
        self.count = getattr(self, "count", 0) + 1
        if self.count % 2:
            yield Discard(update.id, "every second one")
        else:
            yield Aggregate(((update.id, 1.0),))
        yield Train(update.client, 5)


def test_what_was_not_used_is_given_back() -> None:
    """One client, decay 1: all it has learned was merged, or is kept."""
    made = Training.of(
        ["a"], model="linear", data=data(), partition="iid", local=LOCAL, up="topk:0.1,bits=32+ef"
    )
    start = made.model()
    gone: list[Tensor] = []
    pack = tensors.delta

    def spied(*given: Any) -> Tensor:
        gone.append(pack(*given).clone())
        return gone[-1].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "delta", spied)
        simulate(Wasteful(), {"a": 0.1}, 5.0, learning=made)
    learned = torch.stack(gone).sum(0)
    moved = torch.cat([(start[n] - made.model()[n]).reshape(-1) for n in start])
    assert len(gone) >= 8
    kept = made.keeps.residual("a")
    assert kept is not None
    assert torch.allclose(moved + kept, learned, atol=1e-5)
