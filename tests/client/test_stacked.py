"""Many clients' training as batched products: the numbers of one client at a time, bit for bit."""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import nn

from atoll.client import stacked
from atoll.client.algorithm import FedProx, LocalAlgorithm
from atoll.client.data import Data, Split, load_data
from atoll.client.local import LocalConfig, TorchTrainer
from atoll.client.partition import shards_of
from atoll.client.specs import trainer_on
from atoll.client.stacked_products import same_bits
from atoll.client.trainer import Task

LOCAL = LocalConfig(lr=0.1, batch=8, device="cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Where the bits are the same; with several, torch cuts a large product into pieces."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def data() -> Data:
    return load_data("synthetic:features=20,classes=10,examples=600")


def trainers(
    model: str = "mlp:hidden=16",
    local: LocalConfig = LOCAL,
    algorithm: str = "plain",
    many: int = 5,
) -> list[TorchTrainer]:
    parts = shards_of(data(), "quantity:1", many, 3)
    return [
        trainer_on(data().shard(rows), data(), model, 0, local, algorithm, f"c{i}")
        for i, rows in enumerate(parts)
    ]


def works(made: list[TorchTrainer], steps: Callable[[int], int]) -> list[stacked.Work]:
    """Each from a model of its own, at another place in its data."""
    found = []
    for i, trainer in enumerate(made):
        generator = torch.Generator().manual_seed(i)
        start = {
            name: torch.randn(t.shape, generator=generator) * 0.2
            for name, t in trainer.export().items()
        }
        found.append(stacked.Work(trainer, start, Task(steps(i), done=5 * i)))
    return found


def check_same(todo: list[stacked.Work]) -> None:
    together = stacked.train(todo)
    for (trainer, start, task), made in zip(todo, together, strict=True):
        assert made is not None
        trainer.load(start)
        alone = trainer.train(task)
        assert (made.steps, made.examples, made.metrics) == (
            alone.steps,
            alone.examples,
            alone.metrics,
        )
        assert made.tensors.keys() == alone.tensors.keys()
        for name, tensor in alone.tensors.items():
            assert torch.equal(made.tensors[name], tensor), name


@pytest.mark.parametrize(
    ("model", "local", "algorithm"),
    [
        ("linear", LOCAL, "plain"),
        ("mlp:hidden=16", LOCAL, "plain"),
        ("mlp:hidden=24,depth=3", LocalConfig(lr=0.1, batch=32, device="cpu"), "plain"),
        ("mlp:hidden=8", LocalConfig(lr=0.1, batch=20, momentum=0.9, device="cpu"), "plain"),
        ("mlp:hidden=8", LocalConfig(lr=0.1, batch=8, weight_decay=0.01, device="cpu"), "plain"),
        ("mlp:hidden=8", LocalConfig(lr=0.01, batch=8, optimizer="adam", device="cpu"), "plain"),
        ("mlp:hidden=8", LOCAL, "fedprox:mu=0.5"),
    ],
)
def test_the_numbers_are_those_of_one_client_at_a_time(
    model: str, local: LocalConfig, algorithm: str
) -> None:
    made = trainers(model, local, algorithm)
    assert all(stacked.fits(trainer) for trainer in made)
    check_same(works(made, lambda i: 6))


def test_layers_without_bias_or_relu_between_them() -> None:
    made = [unbiased(i, 16, 12, 17) for i in range(3)]
    assert all(stacked.fits(trainer) for trainer in made)
    check_same(works(made, lambda i: 6))


@pytest.mark.parametrize("rows", [7, 8, 17, 20, 32])
@pytest.mark.parametrize(("first", "second"), [(9, 7), (7, 9), (8, 3), (24, 1)])
def test_no_layer_is_stacked_whose_products_have_other_bits_in_a_batch(
    first: int, second: int, rows: int
) -> None:
    """For some of these sizes one processor's library takes another kernel, another's does not."""
    made = [unbiased(i, first, second, rows) for i in range(3)]
    if stacked.fits(made[0]):
        check_same(works(made, lambda i: 3))
    else:
        sizes = [(20, first), (first, second), (second, 10)]
        assert not all(same_bits(rows, *size) for size in sizes)


def unbiased(i: int, first: int, second: int, rows: int) -> TorchTrainer:
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(40, 4, 5, generator=generator)
    y = torch.randint(0, 10, (40,), generator=generator)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(20, first, bias=False), nn.Linear(first, second), nn.ReLU(),
        nn.Linear(second, 10),
    )  # fmt: skip
    local = LocalConfig(lr=0.1, batch=rows, device="cpu")
    return TorchTrainer(model, Split(x, y), config=local, client=f"c{i}")


def test_clients_may_have_different_numbers_of_steps() -> None:
    check_same(works(trainers(), lambda i: (3, 0, 11, 1, 7)[i]))


def test_clients_who_differ_are_stacked_apart() -> None:
    made = [*trainers(many=3), *trainers("linear", many=2)]
    made += trainers(algorithm="fedprox:mu=0.1", many=2) + trainers(algorithm="fedprox", many=2)
    check_same(works(made, lambda i: 4))


def test_an_orders_own_mu_counts() -> None:
    todo = works(trainers(algorithm="fedprox:mu=0.1"), lambda i: 4)
    check_same([work._replace(task=Task(4, 0, {"mu": 0.7})) for work in todo])


def test_more_clients_than_go_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "MOST", 2)
    check_same(works(trainers(many=5), lambda i: 2 + i))


def test_a_loss_that_is_no_number_is_left_to_be_found_alone() -> None:
    todo = works(trainers(), lambda i: 3)
    broken = {name: t.clone() for name, t in todo[1].start.items()}
    next(iter(broken.values())).view(-1)[0] = float("nan")
    todo[1] = todo[1]._replace(start=broken)
    made = stacked.train(todo)
    assert [found is None for found in made] == [False, True, False, False, False]


class Own(LocalAlgorithm):
    pass


def on_digits(model: nn.Module, **given: object) -> TorchTrainer:
    split = Split(torch.randn(20, 16), torch.randint(0, 8, (20,)))
    return TorchTrainer(model, split, **given)  # type: ignore[arg-type]


def tied() -> nn.Module:
    layer = nn.Linear(16, 16)
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer)


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 8))
    model[1].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "trainer",
    [
        lambda: object(),
        lambda: on_digits(nn.Linear(16, 8)),
        lambda: on_digits(nn.Sequential(nn.Linear(16, 8))),
        lambda: on_digits(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU())),
        lambda: on_digits(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh())),
        lambda: on_digits(tied()),
        lambda: on_digits(frozen()),
        lambda: on_digits(plain(), algorithm=Own()),
        lambda: on_digits(plain(), config=LocalConfig(clip=1.0)),
        lambda: on_digits(plain(), config=LocalConfig(optimizer="adamw")),
        lambda: on_digits(plain(), config=LocalConfig(keep_optimizer_state=True)),
        lambda: on_digits(plain(), slowdown=0.1),
        lambda: on_digits(plain(), kind="regression"),
        lambda: on_digits(plain(), config=LocalConfig(batch=3)),  # 384 multiplications
    ],
)
def test_what_does_not_fit_is_trained_alone(trainer: Callable[[], object]) -> None:
    assert not stacked.fits(trainer())


def plain() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8))


def test_what_fits() -> None:
    assert stacked.fits(on_digits(plain()))
    assert stacked.fits(on_digits(plain(), config=LocalConfig(batch=4)))
    assert stacked.fits(on_digits(plain(), algorithm=FedProx(0.1)))
