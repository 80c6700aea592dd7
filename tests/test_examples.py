"""The examples tell the truth: each runs, and shows what its first line promises."""

import ast
import importlib
import math
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from atoll.aggregation import check_aggregator, check_codec, check_strategy
from atoll.aggregation.stack import Rows
from atoll.client.bench import check
from atoll.client.trainer import Task

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))


@pytest.fixture(autouse=True)
def in_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


def example(name: str) -> ModuleType:
    sys.modules.pop(name, None)
    return importlib.import_module(name)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_example_is_one_story_of_under_a_hundred_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) < 100


def test_own_strategy_makes_its_ten_versions(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "own_strategy.py"), run_name="__main__")
    assert "Pairs: 10 versions in 19 virtual seconds" in capsys.readouterr().out


def test_own_strategy_holds_what_every_strategy_must() -> None:
    check_strategy(example("own_strategy").Pairs, seeds=50)


def test_own_aggregator_holds_what_every_rule_must() -> None:
    check_aggregator(example("own_aggregator").Agreeing, cases=50)


def test_own_aggregator_leaves_out_who_goes_the_other_way() -> None:
    rule = example("own_aggregator").Agreeing()
    rows = [torch.tensor(v) for v in ([1.0, 0.0], [0.9, 0.1], [-1.0, 0.2])]
    assert rule.coefficients(Rows(rows), [1 / 3] * 3) == [0.5, 0.5, 0.0]


def test_own_codec_holds_what_every_codec_must() -> None:
    check_codec(example("own_codec").Bytes, cases=50)


def test_own_codec_is_as_near_as_half_a_step_and_hides_no_nan() -> None:
    codec = example("own_codec").Bytes()
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    packed = codec.encode(values)
    assert len(packed) == codec.size(1000) == 1008
    found = codec.decoder(packed, 1000)(0, 1000, torch.empty(1000))
    assert (found - values).abs().max() <= (values.max() - values.min()) / 255 * 0.501
    for bad in (math.nan, math.inf):
        values[3] = bad
        decode = codec.decoder(codec.encode(values), 1000)
        assert not torch.isfinite(decode(3, 4, torch.empty(1))).all()


@pytest.mark.parametrize("name", ["own_strategy", "own_aggregator", "own_codec"])
def test_a_part_of_ones_own_takes_under_thirty_lines(name: str) -> None:
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text())
    (part,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    assert part.end_lineno is not None
    assert part.end_lineno - part.lineno < 30


@pytest.mark.parametrize("name", ["own_aggregator", "own_codec"])
def test_a_part_of_ones_own_learns_digits(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    told = capsys.readouterr().out
    assert float(re.findall(r"best ([\d.]+)", told)[0]) > 0.8


def test_own_trainer_keeps_the_contract_of_a_trainer_and_learns() -> None:
    trainer = example("own_trainer").Softmax(shard=(1, 2))
    assert check(trainer).steps == 2
    assert trainer.evaluate()["accuracy"] < 0.3
    trainer.train(Task(steps=300))
    assert trainer.evaluate()["accuracy"] > 0.8


def test_own_trainer_draws_the_same_batches_after_a_restart() -> None:
    """Two orders of 5 steps are one of 10, also where another process does the second."""
    make = example("own_trainer").Softmax
    whole, first, second = make(), make(), make()
    wanted = whole.train(Task(steps=10)).tensors
    second.load(first.train(Task(steps=5)).tensors)
    found = second.train(Task(steps=5, done=5)).tensors
    assert all((found[name] == wanted[name]).all() for name in wanted)


def test_own_trainer_stops_and_snapshots_when_it_is_asked() -> None:
    asked = iter([None, "continue", "send"])
    taken: list[int] = []
    task = Task(10, asked=lambda: next(asked), snapshot=lambda work: taken.append(work.steps))  # type: ignore[arg-type]
    assert example("own_trainer").Softmax().train(task).steps == 3
    assert taken == [2]


def test_own_trainer_refuses_another_model() -> None:
    trainer = example("own_trainer").Softmax()
    with pytest.raises(ValueError, match=r"1\.weight"):
        trainer.load({})


def test_of_many_clients_fewer_wait_with_fedcompass_than_with_fedavg() -> None:
    thousand = example("simulate_thousand")
    made = thousand.compare(clients=60, seconds=60.0)
    idle = dict(zip(thousand.NAMES, (s.idle for s in made), strict=True))
    assert idle["FedBuff"] < idle["FedCompass"] < idle["FedAvg, deadline 20 s"] < idle["FedAvg"]
    assert "FedCompass" in thousand.table(made, thousand.NAMES)


def test_fedcompass_is_the_first_at_the_target_on_digits() -> None:
    compare = example("compare_strategies")
    made = compare.compare(target=0.8)
    seconds = {name: s.seconds_to(0.8) for name, s in made.items()}
    assert None not in seconds.values()
    assert min(seconds, key=lambda name: seconds[name] or 0) == "FedCompass"
    assert f"{seconds['FedCompass']:.0f}" in compare.table(made, 0.8)


@pytest.mark.slow  # importing peft alone takes seconds
def test_with_lora_only_adapters_travel_and_the_other_half_is_learned() -> None:
    lora = example("lora")
    accuracy, learning = lora.train()
    assert accuracy[0] < 0.55  # the base knows five of ten digits
    assert accuracy[-1] > 0.85
    update, model = learning.sizes()
    assert update == model == 4 * 4 * (64 + 256 + 256 + 256 + 256 + 10)  # rank 4, three layers
    whole = 4 * sum(p.numel() for p in lora.base().parameters())
    assert whole / update > 18
    assert all("lora_" in name for name in learning.model())


@pytest.mark.slow
def test_a_server_and_two_clients_in_one_program(tmp_path: Path) -> None:
    summary = example("python_api").train(tmp_path)
    assert summary.reason.startswith("target reached")
    assert summary.updates >= 2
    assert (tmp_path / "run.json").exists()
