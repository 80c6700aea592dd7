"""Asking: what a rule learns by, when the examples lie with clients."""

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from atoll.aggregation.asking import STEPS, Answer, Asking
from atoll.aggregation.fedlaw import FedLaw
from atoll.aggregation.stack import Reported, Rows
from atoll.aggregation.validated import Verdict, counted

LOWEST = {"a": torch.tensor([1.2, 0.4]), "b": torch.tensor([0.8, 0.2])}
X = torch.ones(2)
MODELS = torch.tensor([[2.0, 0.0], [0.0, 2.0]])


class Bowls:
    """Validators whose losses are 0.5 * |w - lowest|^2; those after `fails` questions are lost."""

    def __init__(self, fails: int = 99) -> None:
        self.fails = fails
        self.asked: list[bool] = []  # with a gradient?
        self.read = 0

    def begin(self) -> None:
        self.asked.clear()

    def ask(
        self, model: Tensor, buffers: Mapping[str, Tensor], gradient: bool
    ) -> Sequence[Answer] | None:
        self.asked.append(gradient)
        if len(self.asked) > self.fails:
            return None
        n = model.numel()
        slopes = {client: model - low.repeat(n)[:n] for client, low in LOWEST.items()}
        verdicts = {
            c: Verdict(float(0.5 * s.square().sum()), 10, float(s.norm()))
            for c, s in slopes.items()
        }
        return [Answer(c, slopes[c.client] if gradient else None) for c in counted(verdicts)]

    def done(self) -> None:
        self.read += 1

    def interrupt(self) -> None: ...


def merged(bowls: Bowls, **given: object) -> Reported:
    proxy = Asking(2, bowls)
    rule = FedLaw(lr=0.05, no_proxy="validators", **given).with_proxy(proxy)  # type: ignore[arg-type]
    proxy.begin({})
    found = rule.coefficients(Rows([*(X - model for model in MODELS), X]), [0.5, 0.5])
    assert isinstance(found, Reported)
    return found


def test_a_merge_of_five_steps_is_five_gradients_and_one_loss() -> None:
    bowls = Bowls()
    told = merged(bowls)
    assert bowls.asked == [True] * STEPS + [False]
    assert bowls.read == STEPS + 1
    assert told.rows["lambda"][0] > 0.5  # the lowest point of both lies at (1.0, 0.3)
    assert told.stats["proxy_loss"] < told.stats["proxy_loss_before"]
    assert told.stats["validators"] == 2


def test_no_epochs_are_one_question() -> None:
    bowls = Bowls()
    assert merged(bowls, epochs=0).rows["lambda"] == [0.5, 0.5]
    assert bowls.asked == [True]


@pytest.mark.parametrize("fails", [0, 1, 3, STEPS])
def test_a_question_that_fails_is_the_last_and_the_sizes_are_taken(fails: int) -> None:
    bowls = Bowls(fails)
    told = merged(bowls)
    assert len(bowls.asked) == fails + 1
    assert told.rows["lambda"] == [0.5, 0.5]
    assert told.stats["gamma"] == 1
    assert told.stats["guard"] == 1
    assert told.stats["validators"] == 0


def test_the_next_merge_asks_again() -> None:
    bowls = Bowls(0)
    proxy = Asking(2, bowls)
    proxy.begin({})
    assert math.isnan(proxy.loss())
    bowls.fails = 99
    proxy.begin({})
    proxy.vector.copy_(X)
    loss, slope = proxy.gradient(torch.empty(0, dtype=torch.int64))
    assert loss == proxy.loss()
    a, b = (X - lowest for lowest in LOWEST.values())
    wanted = (a + b * (a.norm() / b.norm())) / 2  # none longer than the middle one
    assert slope.tolist() == pytest.approx(wanted.tolist(), abs=1e-6)
    assert bowls.asked == [True]


def test_what_was_learned_is_had_again_from_the_stats_bit_by_bit() -> None:
    first = merged(Bowls())
    told = {**first.stats, **{f"lambda/u{i}": v for i, v in enumerate(first.rows["lambda"])}}
    assert FedLaw(no_proxy="validators").again(told, ["u0", "u1"]) == list(first)
