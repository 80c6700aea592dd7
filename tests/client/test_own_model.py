"""The example of a user's own model and data, as the README has it."""

import sys
from pathlib import Path

import pytest

from atoll.client.data import load_data
from atoll.client.local import LocalConfig
from atoll.client.specs import make_trainer
from atoll.client.trainer import Task

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def in_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "own_model", raising=False)


def test_a_user_s_module_and_dataset_train_by_name() -> None:
    local = LocalConfig(momentum=0.9, device="cpu")
    trainer = make_trainer("own_model:Net:hidden=32", "own_model:load", local=local)
    assert trainer.evaluate()["accuracy"] < 0.7  # two classes: about a half
    trainer.train(Task(steps=100))
    assert trainer.evaluate()["accuracy"] > 0.7


def test_its_examples_can_be_split_by_class() -> None:
    data = load_data("own_model:load")
    assert (data.info.shape, data.info.classes) == ((2,), 2)
    trainers = [make_trainer("own_model:Net", data, "classes:1", (i, 2)) for i in range(2)]
    assert [t.examples for t in trainers] == [1000, 1000]
