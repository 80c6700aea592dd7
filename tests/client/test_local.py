"""The torch loop: exactly N steps, the same batches again, hooks, optimizers and refusals."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from atoll.client.data import Data, DataInfo, Kind, Split, load_data
from atoll.client.local import LocalConfig, TorchTrainer, device_of
from atoll.client.models import build
from atoll.client.specs import make_trainer
from atoll.client.trainer import Task, Trained
from atoll.protocols.errors import ClientError, UsageError
from atoll.protocols.events import Then

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


@pytest.mark.parametrize("spec", ["mlp:hidden=8", "tests_dropout"])
def test_a_restarted_client_goes_on_as_if_it_had_not_been(spec: str) -> None:
    """7 steps and then 5 in another process equal 7 and 5 in one, dropout included."""

    def fresh() -> TorchTrainer:
        model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        data = load_data(BLOBS)
        if spec != "tests_dropout":
            model = build(spec, data.info, 0)
        else:
            for p in model.parameters():
                nn.init.constant_(p, 0.1)
        return TorchTrainer(model, data.train, client="a", config=LocalConfig(device="cpu"))

    whole, restarted = fresh(), fresh()
    middle = {n: t.clone() for n, t in whole.train(Task(7)).tensors.items()}
    end = {n: t.clone() for n, t in whole.train(Task(5, done=7)).tensors.items()}
    torch.rand(3)  # whatever else this process draws
    restarted.load(middle)
    assert same(dict(restarted.train(Task(5, done=7)).tensors), end)


def test_each_order_drops_other_units() -> None:
    kept: list[Tensor] = []

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(64))

        def training_loss(self, batch: object) -> Tensor:
            kept.append(nn.functional.dropout(self.w, 0.5) != 0)
            return self.w.sum()

    data = Split(torch.zeros(4, 1), torch.zeros(4))
    for client, done in (("a", 0), ("a", 1), ("b", 0), ("a", 0)):
        local = LocalConfig(lr=1e-6, device="cpu")
        TorchTrainer(Seen(), data, config=local, client=client).train(Task(1, done))
    assert torch.equal(kept[0], kept[3])
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


def test_training_leaves_the_random_state_of_the_process() -> None:
    before = torch.random.get_rng_state()
    trainer().train(Task(3))
    assert torch.equal(torch.random.get_rng_state(), before)


# ---- exactly N steps -----------------------------------------------------------------------


def test_so_many_steps_are_run_reported_and_counted() -> None:
    reported: list[int] = []
    work = trainer(LocalConfig(batch=16, device="cpu")).train(Task(9, report=reported.append))
    assert reported == list(range(1, 10))
    assert (work.steps, work.examples) == (9, 144)


def test_no_steps_give_the_model_back() -> None:
    t = trainer()
    before = values(t)
    work = t.train(Task(0))
    assert (work.steps, work.examples, dict(work.metrics)) == (0, 0, {})
    assert same(dict(work.tensors), before)


@pytest.mark.parametrize("then", ["send", "drop"])
def test_asked_to_stop_it_stops_after_that_step(then: Then) -> None:
    answers: Iterator[Then | None] = iter([None, None, then])
    stopped = trainer()
    work = stopped.train(Task(50, asked=lambda: next(answers)))
    assert work.steps == 3
    assert same(values(stopped), dict(trainer().train(Task(3)).tensors))


def test_asked_for_a_snapshot_it_gives_one_and_goes_on() -> None:
    answers: Iterator[Then | None] = iter([None, "continue", None, None])
    taken: list[tuple[int, dict[str, Tensor]]] = []

    def take(work: Trained) -> None:
        taken.append((work.steps, {n: t.clone() for n, t in work.tensors.items()}))

    work = trainer().train(Task(4, asked=lambda: next(answers), snapshot=take))
    assert work.steps == 4
    [(steps, tensors)] = taken
    assert steps == 2
    assert same(tensors, dict(trainer().train(Task(2)).tensors))


def test_the_loss_is_the_mean_over_the_steps() -> None:
    """F(w) = (w-1)^2/2, w_k = 1 - 0.9^k: the losses are 0.81^k / 2."""
    work = one_weight().train(Task(5))
    assert work.metrics["loss"] == pytest.approx(sum(0.81**k / 2 for k in range(5)) / 5)


def test_a_slow_client_sleeps_after_each_step() -> None:
    slept: list[float] = []
    t = TorchTrainer(
        Quadratic(), Split(torch.zeros(2, 1), torch.zeros(2)), slowdown=0.25, sleep=slept.append
    )
    t.train(Task(4))
    assert slept == [0.25] * 4


def test_a_loss_that_is_no_number_stops_the_order_and_names_the_step() -> None:
    t = trainer(LocalConfig(lr=1e30, device="cpu"))
    with pytest.raises(ClientError) as caught:
        t.train(Task(50, done=100))
    assert caught.value.code == "FL-C104"
    assert "of 50 (local step 10" in caught.value.message
    assert "lr=1e+30" in caught.value.hint


# ---- load, export, evaluate ----------------------------------------------------------------


def test_what_was_exported_can_be_loaded() -> None:
    a, b = trainer(), make_trainer("mlp:hidden=8", BLOBS, seed=1)
    a.train(Task(5))
    b.load(a.export())
    assert same(values(a), values(b))
    assert a.evaluate() == b.evaluate()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda t: t.pop("3.bias"), r"'3.bias' \(3,\) is missing"),
        (lambda t: t.update({"4.bias": torch.zeros(3)}), "'4.bias' is not in the model"),
        (lambda t: t.update({"1.bias": torch.zeros(9)}), r"'1.bias' is \(9,\), .* \(8,\)"),
        (lambda t: t.update({"1.bias": torch.zeros(8).long()}), "'1.bias' is torch.int64"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_changed(
    spoil: Callable[[dict[str, Tensor]], object], why: str
) -> None:
    t = trainer()
    before = values(t)
    tensors = {name: tensor + 1 for name, tensor in before.items()}
    spoil(tensors)
    with pytest.raises(ValueError, match=why):
        t.load(tensors)
    assert same(values(t), before)


def test_buffers_travel_and_frozen_parameters_neither_travel_nor_move() -> None:
    first = nn.Linear(4, 6).requires_grad_(False)
    model = nn.Sequential(first, nn.BatchNorm1d(6), nn.Linear(6, 3))
    frozen = first.weight.clone()
    t = TorchTrainer(model, load_data(BLOBS).train, config=LocalConfig(device="cpu"))
    work = t.train(Task(5))
    assert [n for n in work.tensors if n.startswith("0.")] == []
    assert int(work.tensors["1.num_batches_tracked"]) == 5
    assert float(work.tensors["1.running_mean"].abs().sum()) > 0
    assert torch.equal(first.weight, frozen)
    t.load(dict(work.tensors))


def test_evaluation_counts_right_answers_in_eval_mode() -> None:
    """Scores are the inputs themselves, so the accuracy and the loss are those of the formula."""
    x = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    test = Split(x, torch.tensor([0, 1, 1]))
    scores = nn.Linear(2, 2, bias=False)
    nn.init.eye_(scores.weight)
    model = nn.Sequential(nn.Dropout(0.9), scores)
    found = TorchTrainer(model, test, test, LocalConfig(device="cpu")).evaluate()
    losses = [math.log1p(math.exp(-2)), math.log1p(math.exp(-1)), math.log1p(math.exp(2))]
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx(sum(losses) / 3)
    assert found["examples"] == 3


def test_evaluation_in_batches_is_evaluation_of_the_whole() -> None:
    x, y = torch.randn(2500, 4, generator=torch.Generator().manual_seed(0)), torch.arange(2500) % 3
    t = TorchTrainer(build("mlp", DataInfo((4,), 3), 0), Split(x, y), Split(x, y))
    out = t.model(x).detach()
    found = t.evaluate()
    assert found["accuracy"] == pytest.approx(float((out.argmax(1) == y).float().mean()))
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(out, y)), rel=1e-5)


def test_text_has_a_perplexity_and_regression_has_no_accuracy() -> None:
    tokens = Split(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64))
    model = nn.Embedding(4, 4)
    nn.init.zeros_(model.weight)
    found = TorchTrainer(model, tokens, tokens, kind="text").evaluate()
    assert found["perplexity"] == pytest.approx(4)  # a guess among four
    numbers = Split(torch.ones(2, 1), torch.tensor([2.0, 4.0]))
    line = nn.Linear(1, 1)
    nn.init.ones_(line.weight)
    nn.init.zeros_(line.bias)
    found = TorchTrainer(line, numbers, numbers, kind="regression").evaluate()
    assert found == {"loss": pytest.approx((1 + 9) / 2), "examples": 2}


def test_without_test_data_there_is_nothing_to_say() -> None:
    assert one_weight().evaluate() == {"examples": 0.0}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("lr", math.nan),
        ("batch", 0),
        ("optimizer", "lion"),
        ("momentum", 1.0),
        ("weight_decay", -1.0),
        ("clip", 0.0),
        ("autocast", "fp8"),
        ("prox", -0.1),
        ("workers", -1),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_name(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"FL-S102: {field}="):
        LocalConfig(**{field: value})  # type: ignore[arg-type]


def test_a_device_that_is_not_there_is_refused() -> None:
    assert device_of("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="FL-S102"):
        device_of("abacus")


def test_a_model_with_nothing_to_train_is_refused() -> None:
    model = nn.Linear(4, 3).requires_grad_(False)
    with pytest.raises(UsageError, match="nothing to train"):
        TorchTrainer(model, load_data(BLOBS).train)


# ---- made from specs -----------------------------------------------------------------------


def test_clients_made_from_specs_share_a_model_and_split_the_examples() -> None:
    data = load_data(BLOBS)
    assert isinstance(data, Data)
    made = [make_trainer("linear", data, "iid", (i, 3), seed=4, client=f"c{i}") for i in range(3)]
    assert sum(t.examples for t in made) == len(data.labels())
    assert same(values(made[0]), values(made[1]))
    assert made[0].manifest == made[2].manifest


@pytest.mark.parametrize("kind", ["text", "regression"])
def test_each_kind_of_data_trains_by_its_own_loss(kind: Kind) -> None:
    if kind == "text":
        tokens = torch.arange(400).view(40, 10) % 5
        data = Data(DataInfo((10,), 5, "text", "abcde"), Split(tokens, (tokens + 1) % 5))
        t = make_trainer("charlm:width=32,depth=1", data, local=LocalConfig(lr=0.5, device="cpu"))
    else:
        x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        data = Data(DataInfo((3,), 1, "regression"), Split(x, x.sum(1)))
        t = make_trainer("linear", data, local=LocalConfig(device="cpu"))
    first, last = t.train(Task(10)).metrics["loss"], t.train(Task(10, 10)).metrics["loss"]
    assert last < 0.7 * first


def test_digits_reach_90_percent_in_120_steps_of_the_defaults() -> None:
    t = make_trainer("mlp", "digits", local=LocalConfig(device="cpu"))
    t.train(Task(120))
    assert t.evaluate()["accuracy"] > 0.9
