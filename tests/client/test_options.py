"""From a command line to a trainer: what a user's own is told, and what is refused."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from atoll.client.options import Options, look, maker, own_trainer
from atoll.client.trainer import Task, Tensors, Trained
from atoll.protocols.errors import AtollError, UsageError
from atoll.protocols.runinfo import RunInfo
from tests.protocols.test_runinfo import told as told_run


class Mine:
    """Knows whose it is."""

    def __init__(self, client: str, shard: tuple[int, int], lr: float = 0.1, seed: int = 7) -> None:
        self.told = (client, shard, lr, seed)

    def load(self, tensors: Tensors) -> None: ...

    def train(self, task: Task) -> Trained:
        return Trained({}, task.steps, task.steps, {})

    def evaluate(self) -> dict[str, float]:
        return {}


class Plain(Mine):
    def __init__(self, lr: float = 0.1) -> None:
        self.told = ("", (0, 0), lr, 0)


@pytest.fixture(autouse=True)
def mine() -> Iterator[None]:
    module = ModuleType("mine")
    vars(module).update(Mine=Mine, Plain=Plain, ready=Plain(0.5), number=5, nothing=object)
    sys.modules["mine"] = module
    yield
    del sys.modules["mine"]


def told(spec: str) -> object:
    return own_trainer(spec, "a", (1, 4), 3).told  # type: ignore[attr-defined]


def test_a_maker_is_told_whose_trainer_it_makes() -> None:
    """So that `--shard` is worth something, and the clients of a demo are unlike."""
    assert told("mine:Mine") == ("a", (1, 4), 0.1, 3)
    assert told("mine:Mine:lr=0.2,seed=9") == ("a", (1, 4), 0.2, 9)


def test_a_maker_that_does_not_ask_is_told_nothing() -> None:
    assert told("mine:Plain:lr=0.2") == ("", (0, 0), 0.2, 0)
    assert told("mine:ready") == ("", (0, 0), 0.5, 0)


def test_a_trainer_made_again_holds_out_no_more_than_before(tmp_path: Path) -> None:
    data = "synthetic:examples=200"
    wish = {"model": "linear", "data": data, "local": {}, "validate": 0.1}
    run = RunInfo.of(told_run(**wish))
    trains = [maker(Options("a", validate=v), tmp_path)(run).examples for v in (0.2, 0.1, None)]  # type: ignore[attr-defined]
    assert trains[0] < trains[1] == trains[2]
    with pytest.raises(UsageError, match="in this run this client may have trained"):
        maker(Options("a", validate=0.2), tmp_path)(run)


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("mine:number", "is no Trainer"),
        ("mine:nothing", r"has no load\(\)"),
        ("mine:Mine:x=1", "'x'"),
    ],
)
def test_what_is_no_trainer_is_refused(spec: str, what: str) -> None:
    with pytest.raises(UsageError, match=what) as refused:
        own_trainer(spec)
    assert refused.value.code == "FL-S102"


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"trainer": "no_such_module_here:X"}, "FL-S103"),
        ({"trainer": "mine:Mone"}, "FL-S103"),
        ({"model": "mpl"}, "FL-S101"),
        ({"model": "mine:Mone"}, "FL-S103"),
        ({"data": "digitz"}, "FL-D103"),
        ({"data": "csv:no/such/file.csv,target=y"}, "FL-D101"),
        ({"data": "mine:load"}, "FL-S103"),
    ],
)
def test_what_is_not_there_is_told_before_a_server_is_waited_for(
    given: dict[str, str], code: str
) -> None:
    """A mistyped name was told ten minutes later, when the server had come."""
    with pytest.raises(AtollError) as caught:
        look(Options("a", **given))  # type: ignore[arg-type]
    assert caught.value.code == code


def test_what_is_there_is_neither_made_nor_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("no table")
    data = (
        "digits",
        "synthetic:examples=20",
        f"csv:{tmp_path / 't.csv'},target=y",
        "mine:Mine",
        "",
    )
    for one in data:
        look(Options("a", model="mlp", data=one))
    look(Options("a", model="mine:Mine"))
    look(Options("a", trainer="mine:Mine", shard=(1, 4)))  # which a trainer is told


@pytest.mark.parametrize(
    "given",
    [
        {"model": "mlp"},
        {"data": "digits"},
        {"partition": "dirichlet:0.5"},
        {"device": "cpu"},
        {"validate": 0.0},  # and it judged all the same
        {"validate": 0.2},
    ],
)
def test_what_a_trainer_would_not_be_told_is_refused(given: dict[str, object]) -> None:
    """It was ignored without a word."""
    with pytest.raises(UsageError, match="beside --trainer mine:Mine") as caught:
        look(Options("a", trainer="mine:Mine", **given))  # type: ignore[arg-type]
    assert caught.value.code == "FL-S102"
    assert f"leave --{next(iter(given))} out" in caught.value.hint
