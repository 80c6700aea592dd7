"""Local algorithms, optimizers and what is done to a gradient before the step."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from atoll.client.algorithm import Again, FedProx, LocalAlgorithm, Params, Plain, local_algorithm
from atoll.client.data import DataInfo, Split
from atoll.client.local import LocalConfig, TorchTrainer
from atoll.client.models import build
from atoll.client.sgd import SGD
from atoll.client.specs import make_trainer
from atoll.client.trainer import Task
from atoll.protocols.errors import UsageError

BLOBS = "synthetic:examples=200,features=4,classes=3"


def trainer(
    local: LocalConfig | None = None, spec: str = "mlp:hidden=8", **more: str
) -> TorchTrainer:
    return make_trainer(spec, BLOBS, local=local or LocalConfig(device="cpu"), **more)  # type: ignore[arg-type]


def values(trainer: TorchTrainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.export().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def one_weight() -> TorchTrainer:
    """F(w) = (w - 1)^2 / 2 from w = 0, learning rate 0.1: the spec's hand example."""
    data = Split(torch.zeros(4, 1), torch.zeros(4))
    return TorchTrainer(
        Quadratic(), data, None, LocalConfig(lr=0.1, device="cpu"), kind="regression"
    )


class Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def training_loss(self, batch: object) -> Tensor:
        return (self.w - 1) ** 2 / 2


# ---- local algorithms ----------------------------------------------------------------------


def test_fedprox_has_the_hand_numbers() -> None:
    """w0 = 0, lr 0.1, mu 1: step 1 gives 0.1; step 2's gradient is (0.1 - 1) + 0.1, giving 0.18."""
    t = one_weight()
    t.algorithm = FedProx(mu=1.0)
    first = float(t.train(Task(1)).tensors["w"])
    t.load({"w": torch.zeros(())})
    second = float(t.train(Task(2)).tensors["w"])
    assert first == pytest.approx(0.1)
    assert second == pytest.approx(0.18)


def test_fedprox_of_mu_0_is_plain_bit_for_bit() -> None:
    plain, prox = trainer(algorithm="plain"), trainer(algorithm="fedprox:mu=0")
    assert same(dict(plain.train(Task(20)).tensors), dict(prox.train(Task(20)).tensors))


def test_a_large_mu_holds_the_model_where_it_was() -> None:
    free, held = (
        trainer(LocalConfig(lr=0.01)),
        trainer(LocalConfig(lr=0.01), algorithm="fedprox:mu=99"),
    )
    start = values(free)

    def moved(t: TorchTrainer) -> float:
        end = t.train(Task(40)).tensors
        return math.sqrt(sum(float((end[n] - start[n]).square().sum()) for n in start))

    assert moved(held) < 0.1 * moved(free)


def test_a_strategy_s_mu_overrules_and_prox_is_the_same_as_its_name() -> None:
    a = trainer(algorithm="fedprox:mu=0").train(Task(5, extra={"mu": 0.5})).tensors
    b = trainer(algorithm="fedprox:mu=0.5").train(Task(5)).tensors
    c = trainer(LocalConfig(prox=0.5, device="cpu")).train(Task(5)).tensors
    d = trainer().train(Task(5)).tensors
    assert same(dict(a), dict(b))
    assert same(dict(b), dict(c))
    assert not same(dict(c), dict(d))


class Recorder(LocalAlgorithm):
    def __init__(self) -> None:
        self.seen: list[str] = []
        self.again_is_same = False

    def before_order(self, params: Params, task: Task) -> None:
        self.seen.append(f"order of {task.steps}")

    def transform_grad(self, params: Params, again: Again) -> None:
        before = [p.grad.clone() for p in params.values() if p.grad is not None]
        again()
        after = [p.grad for p in params.values() if p.grad is not None]
        self.again_is_same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        self.seen.append("grad")
        for p in params.values():
            p.grad = torch.zeros_like(p)

    def after_step(self, params: Params) -> None:
        self.seen.append("step")


def test_hooks_come_in_order_and_again_recomputes_the_same_batch() -> None:
    recorder, t = Recorder(), trainer()
    t.algorithm = recorder
    before = values(t)
    t.train(Task(2))
    assert recorder.seen == ["order of 2", "grad", "step", "grad", "step"]
    assert recorder.again_is_same
    assert same(values(t), before), "the gradients the hook left are the ones stepped along"


@pytest.mark.parametrize(
    ("spec", "code"),
    [("fedprocks", "FL-S101"), ("fedprox:mu=-1", "FL-S102"), ("builtins:dict", "FL-S103")],
)
def test_what_is_no_local_algorithm_is_refused(spec: str, code: str) -> None:
    with pytest.raises(UsageError) as caught:
        local_algorithm(spec)
    assert caught.value.code == code


def test_prox_and_an_algorithm_together_are_refused() -> None:
    assert isinstance(local_algorithm("plain"), Plain)
    with pytest.raises(UsageError, match="FL-S104"):
        trainer(LocalConfig(prox=0.1), algorithm="fedprox:mu=0.2")


# ---- optimizers ----------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_our_sgd_is_torch_s_bit_for_bit(momentum: float, decay: float) -> None:
    def run(make: Callable[..., SGD | torch.optim.SGD]) -> list[Tensor]:
        model = build("mlp:hidden=8", DataInfo((4,), 3), 0)
        optimizer = make(list(model.parameters()), 0.1, momentum=momentum, weight_decay=decay)
        x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
        for _ in range(10):
            model.zero_grad(set_to_none=False)  # the same gradient tensors at each step
            torch.autograd.backward(nn.functional.cross_entropy(model(x), torch.arange(30) % 3))
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(SGD), run(torch.optim.SGD), strict=True))


def test_a_fresh_optimizer_forgets_between_orders_and_a_kept_one_does_not() -> None:
    """Heavy ball on (w-1)^2/2: the second step of one order, or the first of another."""

    def run(keep: bool) -> float:
        config = LocalConfig(lr=0.1, momentum=0.9, keep_optimizer_state=keep, device="cpu")
        t = TorchTrainer(Quadratic(), Split(torch.zeros(4, 1), torch.zeros(4)), config=config)
        t.train(Task(1))
        return float(t.train(Task(1, done=1)).tensors["w"])

    assert run(keep=False) == pytest.approx(0.1 + 0.1 * 0.9)
    assert run(keep=True) == pytest.approx(0.1 + 0.1 * (0.9 + 0.9 * 1.0))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_kept_optimizer_state_can_be_stored_and_brought_back(optimizer: str) -> None:
    config = LocalConfig(
        lr=0.01, momentum=0.9, optimizer=optimizer, keep_optimizer_state=True, device="cpu"
    )
    one, other = trainer(config), trainer(config)
    one.train(Task(5))
    other.load(one.export())
    other.load_optimizer_state(one.optimizer_state())
    assert same(dict(one.train(Task(5, 5)).tensors), dict(other.train(Task(5, 5)).tensors))
    with pytest.raises(ValueError, match=r"9\.bias/exp_avg"):
        one.load_optimizer_state({"9.bias/exp_avg": torch.zeros(1)})


def test_the_gradient_is_clipped_to_its_largest_norm() -> None:
    start = trainer()
    before = values(start)
    after = trainer(LocalConfig(lr=1.0, clip=1e-3, device="cpu")).train(Task(1)).tensors
    norm = math.sqrt(sum(float((after[n] - before[n]).square().sum()) for n in before))
    assert norm == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("cast", ["bf16", "fp16"])
def test_autocast_trains_nearly_the_same_and_keeps_float32_weights(cast: str) -> None:
    full, half = trainer(), trainer(LocalConfig(autocast=cast, device="cpu"))
    a, b = full.train(Task(30)), half.train(Task(30))
    assert a.metrics["loss"] != b.metrics["loss"]
    assert b.metrics["loss"] == pytest.approx(a.metrics["loss"], abs=0.02)
    assert {t.dtype for t in b.tensors.values()} == {torch.float32}
