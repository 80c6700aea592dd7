"""Bench and check: real steps timed, the model left as it was, a bad trainer told."""

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn

from atoll.client.bench import WARM, bench, check
from atoll.client.data import load_data
from atoll.client.local import LocalConfig, TorchTrainer
from atoll.client.models import manifest_of
from atoll.client.specs import make_trainer
from atoll.client.trainer import Task, Tensors, Trained
from atoll.protocols.errors import ClientError


def made(model: str = "mlp:hidden=8", **config: object) -> TorchTrainer:
    local = LocalConfig(device="cpu", **config)  # type: ignore[arg-type]
    return make_trainer(model, "synthetic:examples=100,features=4,classes=3", local=local)


class Steady:
    """A user's trainer on a clock of its own: each step takes `pace`, each order `cost` more."""

    def __init__(self, pace: float, cost: float = 0.0, ran: int = 0) -> None:
        self.pace, self.cost, self.off = pace, cost, ran
        self.now, self.orders = 0.0, list[tuple[int, int]]()
        self.w = torch.zeros(3)

    def clock(self) -> float:
        return self.now

    def load(self, tensors: Tensors) -> None:
        self.w = tensors["w"].clone()

    def train(self, task: Task) -> Trained:
        self.orders.append((task.steps, task.done))
        steps = max(0, task.steps + self.off)
        self.now += self.cost + steps * self.pace
        self.w = self.w + steps
        for step in range(steps):
            task.report(step + 1)
        return Trained({"w": self.w}, steps, steps * 16, {})

    def evaluate(self) -> Mapping[str, float]:
        return {"loss": 1.0}


def test_the_speed_is_the_trainer_s() -> None:
    steady = Steady(pace=0.01)
    found = bench(steady, seconds=2.0, clock=steady.clock)
    assert found.seconds_per_step == pytest.approx(0.01)
    assert found.examples_per_second == pytest.approx(1600)
    assert (found.device, found.encode_mb_s) == ("unknown", 0.0)


def test_it_takes_about_as_long_as_it_was_given_and_uses_growing_orders() -> None:
    steady = Steady(pace=0.01, cost=0.001)
    found = bench(steady, seconds=2.0, clock=steady.clock)
    sizes = [steps for steps, _ in steady.orders]
    assert sizes[:7] == [0, WARM, 1, 2, 4, 8, 16]
    assert 2.0 <= steady.now - WARM * 0.01 < 2.1
    assert found.seconds_per_step == pytest.approx(0.01, rel=0.02)
    ends = [done + steps for steps, done in steady.orders[1:]]
    assert [done for _, done in steady.orders[2:]] == ends[:-1], "the data order goes on"


def test_one_slow_step_is_enough() -> None:
    steady = Steady(pace=60.0)
    assert bench(steady, seconds=2.0, clock=steady.clock).seconds_per_step == pytest.approx(60)
    assert [steps for steps, _ in steady.orders] == [0, WARM, 1]


def test_the_model_and_the_kept_optimizer_are_as_they_were() -> None:
    """Training after a bench equals training without one."""
    plain, benched = (made(momentum=0.9, keep_optimizer_state=True) for _ in range(2))
    for t in (plain, benched):
        t.train(Task(3))
    ticks: Iterator[int] = iter(range(10**6))
    found = bench(benched, seconds=3.0, clock=lambda: float(next(ticks)))
    assert (found.device, found.encode_mb_s > 0) == ("cpu", True)
    a, b = plain.train(Task(4, 3)).tensors, benched.train(Task(4, 3)).tensors
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_trainer_that_runs_nothing_cannot_be_timed() -> None:
    steady = Steady(pace=0.1, ran=-99)
    with pytest.raises(ClientError) as caught:
        bench(steady, clock=steady.clock)
    assert caught.value.code == "FL-C104"


def test_check_says_what_it_found_and_leaves_the_model() -> None:
    t = made()
    before = {name: tensor.clone() for name, tensor in t.export().items()}
    found = check(t, manifest_of(t.model))
    assert (found.steps, found.tensors, found.parameters) == (2, 4, 4 * 8 + 8 + 8 * 3 + 3)
    assert found.loss is not None
    assert found.metrics["examples"] == 21  # a fifth of 34, 33 and 33
    assert all(torch.equal(before[name], tensor) for name, tensor in t.export().items())


def test_a_user_s_trainer_is_checked_against_the_run_s_manifest() -> None:
    class One(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(n))

    assert check(Steady(1.0), manifest_of(One(3))).parameters == 3
    assert check(Steady(1.0)).parameters == 0
    with pytest.raises(ClientError, match=r"FL-C103: tensor 'w' is \(3,\), .* \(4,\)"):
        check(Steady(1.0), manifest_of(One(4)))


@pytest.mark.parametrize("other", ["mlp:hidden=9", "linear", "mlp:hidden=8,depth=2"])
def test_a_model_of_another_shape_is_named_with_its_tensor(other: str) -> None:
    with pytest.raises(ClientError) as caught:
        check(made(), manifest_of(made(other).model))
    assert caught.value.code == "FL-C103"
    assert "tensor '1." in caught.value.message or "tensor '3." in caught.value.message


class Wrong(nn.Module):
    """Takes five features where the data has four."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def test_a_model_that_does_not_take_the_data_is_told_with_torch_s_words() -> None:
    data = load_data("synthetic:examples=100,features=4,classes=3")
    t = TorchTrainer(Wrong(), data.train, config=LocalConfig(device="cpu"))
    with pytest.raises(ClientError) as caught:
        check(t)
    assert caught.value.code == "FL-C104"
    assert "32x4 and 5x3" in caught.value.message


@pytest.mark.parametrize("ran", [-1, 1])
def test_a_trainer_that_runs_other_than_what_was_asked_is_told(ran: int) -> None:
    with pytest.raises(ClientError) as caught:
        check(Steady(1.0, ran=ran))
    assert caught.value.code == "FL-C104"
    assert "ran 1" in caught.value.message  # of 2, or where it was asked for none
