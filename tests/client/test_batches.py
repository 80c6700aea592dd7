"""The order of the data: a pure function of the step, over tensors and over any Dataset."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset

from atoll.client.batches import Order
from atoll.client.local import LocalConfig, TorchTrainer
from atoll.client.trainer import Task
from atoll.protocols.errors import DataError

# ---- the data order ------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 10**6))
def test_a_pass_shows_each_example_at_most_once_in_batches_of_one_size(
    n: int, batch: int, number: int
) -> None:
    order = Order(n, batch, seed=3, client="a")
    first = number * order.steps_per_pass
    seen = torch.cat([order.indices(first + i) for i in range(order.steps_per_pass)]).tolist()
    assert len(set(seen)) == len(seen) == order.steps_per_pass * min(batch, n)
    assert n - len(seen) < order.batch


def test_the_batch_of_a_step_depends_on_seed_client_and_step_alone() -> None:
    one, other = Order(100, 10, 0, "a"), Order(100, 10, 0, "a")
    forwards = [one.indices(step).tolist() for step in range(35)]
    backwards = [other.indices(step).tolist() for step in reversed(range(35))]
    assert forwards == backwards[::-1]
    assert forwards[0] != forwards[10], "each pass is a shuffle of its own"
    for seed, client in ((1, "a"), (0, "b")):
        assert Order(100, 10, seed, client).indices(0).tolist() != forwards[0]


def test_examples_left_over_by_one_pass_come_in_another() -> None:
    order = Order(11, 4, 0, "a")
    seen = {i for step in range(20) for i in order.indices(step).tolist()}
    assert seen == set(range(11))


def test_a_client_without_examples_is_refused() -> None:
    with pytest.raises(DataError, match=r"FL-D105.*'a'"):
        Order(0, 4, 0, "a")


# ---- a user's own datasets -----------------------------------------------------------------


class Items(Dataset[dict[str, object]]):
    """Items of any form, put together by a collate_fn of the user's own."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, at: int) -> dict[str, object]:
        return {"value": float(at), "name": f"item {at}"}

    @staticmethod
    def collate_fn(items: list[dict[str, float]]) -> dict[str, object]:
        return {
            "value": torch.tensor([i["value"] for i in items]),
            "names": [i["name"] for i in items],
        }


class Mean(nn.Module):
    """Learns the mean of what it is shown, by a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.batches: list[list[str]] = []

    def training_loss(self, batch: dict[str, Tensor]) -> Tensor:
        self.batches.append([str(name) for name in batch["names"]])
        return (self.w - batch["value"]).square().mean()


def test_any_dataset_trains_in_the_same_order_as_tensors_would() -> None:
    model = Mean()
    config = LocalConfig(lr=0.05, batch=4, device="cpu")
    t = TorchTrainer(model, Items(), Items(), config, kind="other", client="a", seed=0)
    t.train(Task(4, done=3))
    order = Order(10, 4, 0, "a")
    assert model.batches == [[f"item {i}" for i in order.indices(s).tolist()] for s in range(3, 7)]


def test_a_model_s_own_loss_is_its_score() -> None:
    found = TorchTrainer(
        Mean(), Items(), Items(), LocalConfig(device="cpu"), kind="other"
    ).evaluate()
    assert found == {"loss": pytest.approx(sum(i * i for i in range(10)) / 10), "examples": 10}
