"""Hostile clients of a simulated run: what they send, and who survives it."""

import json
import sys
from pathlib import Path

import pytest
import torch

from atoll.aggregation.fedavg import FedAvg
from atoll.client.data import Data, DataInfo, Split, load_data
from atoll.client.local import LocalConfig
from atoll.protocols import console
from atoll.protocols.errors import UsageError
from atoll.server.attack import Attack
from atoll.server.cli import cli
from atoll.server.scenario import Scenario
from atoll.server.simulator import simulate
from atoll.server.training import Training
from atoll.server.world import ClientModel, at_paces, attacked

NAMES = [f"c{i}" for i in range(5)]


def test_a_spec_has_a_kind_and_maybe_a_strength() -> None:
    assert Attack.parse("sign-flip") == Attack("sign-flip", 1.0)
    assert Attack.parse("sign-flip:5") == Attack("sign-flip", 5.0)
    assert Attack.parse("scale") == Attack("scale", 1000.0)
    assert Attack.parse("label-flip") == Attack("label-flip", 1.0)


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ("krum", "FL-S101"),
        ("scale:0", "FL-S102"),
        ("scale:x", "FL-S102"),
        ("scale:inf", "FL-S102"),
        ("label-flip:2", "FL-S102"),
    ],
)
def test_what_is_no_attack_is_refused(spec: str, code: str) -> None:
    with pytest.raises(UsageError, match=code):
        Attack.parse(spec)
    with pytest.raises(UsageError, match=code):
        ClientModel("c", 0.1, attack=spec)


def test_what_is_sent_instead_of_a_delta() -> None:
    delta = torch.tensor([1.0, -2.0])
    assert Attack.parse("sign-flip:3").on_delta(delta).tolist() == [-3.0, 6.0]
    assert Attack.parse("scale").on_delta(delta).tolist() == [1000.0, -2000.0]
    assert Attack.parse("label-flip").on_delta(delta) is delta


def test_labels_are_turned_round_for_the_attacker_alone() -> None:
    data = Data(DataInfo((2,), 10), Split(torch.zeros(3, 2), torch.tensor([0, 4, 9])))
    turned = Attack.parse("label-flip").on_data(data).train
    assert isinstance(turned, Split)
    assert turned.y.tolist() == [9, 5, 0]
    assert data.labels().tolist() == [0, 4, 9]
    assert Attack.parse("scale").on_data(data) is data


def test_labels_that_are_no_classes_cannot_be_turned() -> None:
    data = Data(DataInfo((2,), 1, "regression"), Split(torch.zeros(3, 2), torch.zeros(3)))
    with pytest.raises(UsageError, match="FL-S104"):
        Attack.parse("label-flip").on_data(data)


def test_a_share_of_the_clients_is_drawn_by_the_seed() -> None:
    models = at_paces({f"c{i}": 0.1 for i in range(10)})
    drawn = [m.name for m in attacked(models, "scale", 0.3, 1) if m.attack == "scale"]
    assert len(drawn) == 3
    assert drawn == [m.name for m in attacked(models, "scale", 0.3, 1) if m.attack]
    assert drawn != [m.name for m in attacked(models, "scale", 0.3, 2) if m.attack]
    with pytest.raises(UsageError, match="FL-S102"):
        attacked(models, "scale", 1.5)


def test_a_scenario_names_attackers() -> None:
    text = "strategy fedavg\nclient a 0.1 attack=scale:7\nclient b 0.1\n"
    assert [m.attack for m in Scenario.parse(text).models()] == ["scale:7", ""]


def accuracy(rule: str, attacks: dict[str, str]) -> float:
    made = Training.of(
        NAMES, model="linear", data=load_data("synthetic:features=8,classes=4,examples=400"),
        local=LocalConfig(lr=0.1, batch=16), aggregation=rule, attacks=attacks,
    )  # fmt: skip
    found = simulate(
        FedAvg(steps=5, rounds=4, min_clients=5), dict.fromkeys(NAMES, 0.1), learning=made
    )
    return found.accuracy[-1][1]


def test_one_attacker_spoils_the_mean_and_not_the_median() -> None:
    hostile = {"c3": "sign-flip:10"}
    honest = accuracy("mean", {})
    assert accuracy("median", hostile) > honest - 0.05
    assert accuracy("mean", hostile) < honest - 0.2


def simulated(capsys: pytest.CaptureFixture[str], *more: str, code: int = 0) -> dict[str, str]:
    assert console.run(cli, ["simulate", "--until", "5", *more, "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    found: dict[str, str] = told["data"] if told["ok"] else told["error"]
    return found


def test_the_command_line_draws_attackers(capsys: pytest.CaptureFixture[str]) -> None:
    fedavg = ("--strategy", "fedavg:steps=5,min_clients=4")
    some: tuple[list[str], ...] = (
        [],
        ["--attack", "scale"],
        ["--attack", "scale", "--attackers", "0.5"],
    )
    assert len({simulated(capsys, *fedavg, *more)["hash"] for more in some}) == 3


@pytest.mark.parametrize(
    "more",
    [
        ["--attackers", "0.5"],
        ["--attack", "scale", "--null"],
    ],
)
def test_attackers_of_nothing_are_refused(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulated(capsys, *more, code=78)["code"] == "FL-S104"


def test_a_trainer_of_ones_own_attacks_from_within(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    monkeypatch.delitem(sys.modules, "own_trainer", raising=False)
    own = ("--model", "linear", "--trainer", "own_trainer:Softmax", "--attack", "scale")
    assert simulated(capsys, *own, code=78)["code"] == "FL-S104"
