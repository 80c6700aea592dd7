"""Adam and AdamW against torch's, and the schedule of their step size."""

import math

import pytest
import torch
from torch import nn

from atoll.client.adam import Adam
from atoll.client.data import Split
from atoll.client.local import LocalConfig, TorchTrainer
from atoll.client.schedule import cosine, schedule
from atoll.client.trainer import Task
from atoll.protocols.errors import UsageError


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_same_bits_as_torch(decoupled: bool, decay: float) -> None:
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (
        [nn.Parameter(torch.linspace(-1, 1, 37)), nn.Parameter(torch.ones(5, 7))] for _ in range(2)
    )
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    one, other = Adam(ours, 0.01, decay, decoupled), kind(theirs, 0.01, weight_decay=decay)
    for step in range(50):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            none = step % 7 == 3 and i == 1  # a parameter without a gradient stays
            p.grad = None if none else torch.randn(p.shape, generator=generator)
            q.grad = None if p.grad is None else p.grad.clone()
        one.step()
        other.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True)), step
    for p, q in zip(ours, theirs, strict=True):
        assert {n: v.tolist() for n, v in one.state[p].items()} == {
            n: v.tolist() for n, v in other.state[q].items()
        }


def test_a_fresh_one_takes_short_steps_first() -> None:
    """The first step is lr along the gradient's sign, whatever its length; here a quarter of it."""
    p = nn.Parameter(torch.zeros(2))
    optimizer, moved = Adam([p], lr=0.1, warm=4), []
    for _ in range(6):
        before = p.detach().clone()
        p.grad = torch.tensor([3.0, -8.0])
        optimizer.step()
        moved.append((before - p.detach()).tolist())
    wanted = [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]
    assert moved == [[pytest.approx(x), pytest.approx(-x)] for x in wanted]


def test_a_cosine_rises_and_falls() -> None:
    factor = cosine(steps=110, warm=10, floor=0.1)
    assert [factor(i) for i in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert factor(10) == 1.0
    assert factor(60) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert [factor(110), factor(10_000)] == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("spec", ["cosine:steps=0", "cosine:warm=-1", "cosine:floor=2", "cosin"])
def test_a_schedule_that_cannot_be_is_refused(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        schedule(spec)
    assert caught.value.code in ("FL-S101", "FL-S102")


def test_the_schedule_counts_the_steps_of_the_run_and_not_of_the_order() -> None:
    """y = 0 for x = 1 from w = 1 by SGD: w *= 1 - 2 lr in each step."""
    config = LocalConfig(lr=0.1, batch=1, schedule="cosine:steps=4,warm=0,floor=0", device="cpu")
    data = Split(torch.ones(1, 1), torch.zeros(1))
    factor = cosine(4, 0, 0.0)

    def trained(task: Task) -> float:
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        trainer = TorchTrainer(model, data, config=config, kind="regression")
        return trainer.train(task).tensors["weight"].item()

    def wanted(*steps: int) -> float:
        return math.prod(1 - 0.2 * factor(step) for step in steps)

    assert trained(Task(2)) == pytest.approx(wanted(0, 1))
    assert trained(Task(2, done=2)) == pytest.approx(wanted(2, 3))
    assert trained(Task(2, done=40, extra={"run_step": 1})) == pytest.approx(wanted(1, 2))


def test_a_schedule_is_refused_where_the_algorithm_reckons_with_one_step_size() -> None:
    from atoll.client.scaffold import Scaffold

    config = LocalConfig(schedule="cosine", device="cpu")
    data = Split(torch.ones(1, 1), torch.zeros(1))
    with pytest.raises(UsageError, match="Scaffold") as caught:
        TorchTrainer(nn.Linear(1, 1), data, config=config, algorithm=Scaffold())
    assert caught.value.code == "FL-S104"
