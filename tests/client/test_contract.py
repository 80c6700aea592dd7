"""The contract: what a trainer does amiss is told as its own, by the method that did it."""

import math
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from atoll.client import contract
from atoll.client.trainer import Task, Tensors, Trained
from atoll.protocols.errors import ClientError, DataError
from atoll.protocols.events import Then

W = {"w": torch.zeros(3)}


class Mine:
    """A trainer whose methods do what they were given."""

    def __init__(self, does: Any = None, **more: Any) -> None:
        self.does = does
        self.__dict__ |= more

    def load(self, tensors: Tensors) -> None:
        self.does()

    def train(self, task: Task) -> Trained:
        return self.does() if callable(self.does) else self.does  # type: ignore[no-any-return]

    evaluate: Any = train


def leave() -> None:
    sys.exit(2)


def fail() -> None:
    raise KeyError("oops")


def misfit() -> None:
    raise ValueError("w is (4,)")


def given(tensors: Any = W, steps: Any = 2, examples: Any = 64, metrics: Any = None) -> Trained:
    return Trained(tensors, steps, examples, metrics or {})


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "train() returned None, not a Trained"),  # was an AttributeError of ours
        ((W, 2), "train() returned a tuple, not a Trained"),
        (given(tensors=[1]), "train() returned tensors as a list"),
        (Trained(W, 2, 64, None), "train() returned metrics as None"),  # type: ignore[arg-type]
        (given(tensors={"w": torch.zeros(3).numpy()}), "train() returned 'w' as a ndarray"),
        (given(steps=2.0), "train() gave steps=2.0"),
        (given(examples=None), "train() gave examples=None"),
        (given(examples=-1), "train() gave examples=-1"),  # was a ValueError of protobuf's
        (given(examples=10**30), f"train() gave examples={10**30}"),
        (given(steps=-1), "train() gave steps=-1"),
        (given(steps=3), "train() was asked for 2 steps and ran 3"),
        (given(steps=1), "train() was asked for 2 steps and ran 1"),
        (given(metrics={"loss": "low"}), "train() gave loss='low'"),
        (given(metrics={"loss": torch.zeros(2)}), "train() gave loss=tensor([0., 0.])"),
        (fail, "train() failed: KeyError('oops')"),
        (leave, "train() failed: SystemExit(2)"),  # ended the command without a word
        (misfit, "train() failed: ValueError('w is (4,)')"),
    ],
)
def test_what_train_does_amiss_is_told(returned: Any, said: str) -> None:
    with pytest.raises(ClientError) as caught:
        contract.train(Mine(returned), Task(2))
    assert (caught.value.code, caught.value.message) == ("FL-C104", f"the trainer's {said}")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "evaluate() returned None, not a mapping"),
        ({"accuracy": "good"}, "evaluate() gave accuracy='good'"),  # ended the server's run
        (fail, "evaluate() failed: KeyError('oops')"),
        ({"accuracy": 97.0}, "evaluate() gave accuracy=97"),  # reached a target of 0.9 at once
        ({"accuracy": -0.01}, "evaluate() gave accuracy=-0.01"),
        ({"loss": 10**400}, f"evaluate() gave loss={'1' + '0' * 59}"),  # an OverflowError
        ({"loss": 1.0, "examples": 0.5}, "evaluate() gave examples=0.5"),
        ({"loss": 1.0, "examples": -5}, "evaluate() gave examples=-5"),
    ],
)
def test_what_evaluate_does_amiss_is_told(returned: Any, said: str) -> None:
    class Judge(Mine):
        def evaluate(self) -> Mapping[str, float]:
            return self.train(Task(0))  # type: ignore[return-value]

    with pytest.raises(ClientError) as caught:
        contract.evaluate(Judge(returned))
    assert (caught.value.code, caught.value.message) == ("FL-C104", f"the trainer's {said}")


def test_numbers_of_torch_and_numpy_are_numbers() -> None:
    import numpy as np

    told = given(examples=np.int64(64), metrics={"loss": torch.tensor(0.5), "n": 3})
    made = contract.train(Mine(told), Task(2))
    assert (made.examples, made.metrics) == (64, {"loss": 0.5, "n": 3.0})
    assert type(made.examples) is int


@pytest.mark.parametrize(("then", "steps"), [("send", 1), ("drop", 0), ("continue", 2)])
def test_fewer_steps_are_right_where_it_was_asked_to_stop(then: Then, steps: int) -> None:
    class Asking(Mine):
        def train(self, task: Task) -> Trained:
            assert task.asked() == then
            return given(steps=steps)

    assert contract.train(Asking(), Task(2, asked=lambda: then)).steps == steps


def test_a_model_that_does_not_fit_is_apart_from_a_load_that_fails() -> None:
    for does, code in ((misfit, "FL-C103"), (fail, "FL-C104"), (leave, "FL-C104")):
        with pytest.raises(ClientError) as caught:
            contract.load(Mine(does), W)
        assert caught.value.code == code


def test_errors_of_ours_and_ctrl_c_pass_as_they_are() -> None:
    def lost() -> None:
        raise DataError("FL-D105", "no data")

    def stopped() -> None:
        raise KeyboardInterrupt

    for does, kind in ((lost, DataError), (stopped, KeyboardInterrupt)):
        with pytest.raises(kind):
            contract.train(Mine(does), Task(2))


def test_what_it_holds_is_its_weight() -> None:
    assert contract.examples(Mine()) == contract.examples(Mine(examples=0)) == 1
    assert contract.examples(Mine(examples=7)) == 7
    for wrong in (None, "many", -5, 10**18):
        with pytest.raises(ClientError, match=f"FL-C104: the trainer's examples={wrong!r}"):
            contract.examples(Mine(examples=wrong))


@pytest.mark.parametrize("count", [0, -1, 10**18, 10**30])
def test_a_validator_with_an_impossible_number_of_examples_is_told_of_it(count: int) -> None:
    """The server ended the session of one, and waited for the other in every merge."""

    class Odd:
        def judge(self, *_: Any) -> tuple[float, int, None]:
            return 1.0, count, None

    with pytest.raises(
        ClientError, match=r"FL-C104: the trainer's validator\.judge\(\) gave"
    ) as odd:
        contract.judge(Odd(), {}, False, True)
    assert str(count) in odd.value.message


def test_metrics_are_said_where_a_server_would_read_them() -> None:
    """One that was not finite cost the client its place in the run."""
    found = {"loss": math.nan, "norm": math.inf, "f1/macro": 0.5}
    assert contract.said("train", found) == {"f1/macro": 0.5}


@pytest.mark.parametrize("accuracy", [0.0, 1.0, math.nan])
def test_a_share_is_taken_as_it_is(accuracy: float) -> None:
    judge = Mine()
    judge.evaluate = lambda: {"accuracy": accuracy, "loss": 5.0}
    found = contract.evaluate(judge)
    assert found == pytest.approx({"accuracy": accuracy, "loss": 5.0}, nan_ok=True)


@pytest.mark.parametrize("reads_only", [False, True])
def test_what_a_trainer_loads_is_its_own_unless_it_only_reads(reads_only: bool) -> None:
    class Keeps(Mine):
        def load(self, tensors: Tensors) -> None:
            self.tensors = tensors

    given, judge = {"w": torch.zeros(3)}, Keeps(reads_only=reads_only)
    contract.load(judge, given)
    assert torch.equal(judge.tensors["w"], given["w"])
    assert (judge.tensors["w"].data_ptr() == given["w"].data_ptr()) == reads_only


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"val loss": 1.0}, "evaluate() gave a metric 'val loss'"),
        ({"": 1.0}, "evaluate() gave a metric ''"),
        (dict.fromkeys(map(str, range(300)), 1.0), "evaluate() gave 300 metrics"),
    ],
    ids=["name", "no name", "many"],
)
def test_metrics_that_no_message_takes_are_told_as_the_trainers(
    metrics: Mapping[str, float], said: str
) -> None:
    with pytest.raises(ClientError) as caught:
        contract.said("evaluate", metrics)
    assert (caught.value.code, caught.value.message) == ("FL-C104", f"the trainer's {said}")
