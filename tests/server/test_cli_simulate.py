"""simulate: the options of a world, the hash that comes again, and what is left in --out."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from atoll.protocols import console
from atoll.server.cli import cli
from atoll.server.history import History

Capsys = pytest.CaptureFixture[str]


def simulated(capsys: Capsys, *arguments: str, code: int = 0) -> Any:
    assert console.run(cli, ["simulate", *arguments, "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    return told["data"] if told["ok"] else told["error"]


NULL = ("--null", "--strategy", "fedavg:steps=10,min_clients=4", "--until", "50")


def test_time_alone_is_what_the_strategy_makes_of_it(capsys: Capsys) -> None:
    """FedAvg's round lasts as long as its slowest: 10 steps at 0.1 s, so 50 rounds in 50 s."""
    told = simulated(capsys, *NULL)
    assert (told["versions"], told["updates"], told["steps"]) == (50, 200, 2000)
    assert (told["virtual_s"], told["reason"]) == (50.0, "50 seconds done")
    assert [c["updates"] for c in told["clients"]] == [50, 50, 50, 50]
    idle = [c["idle"] for c in told["clients"]]
    assert idle == pytest.approx([0, 0, 0.5, 0.75], abs=1e-9)
    assert (told["accuracy"], told["reached"], told["files"]) == (None, None, {})


EXAMPLES = Path(__file__).parents[2] / "examples"


def test_clients_train_with_a_trainer_of_ones_own(
    capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softmax regression in numpy: each client has its part of the digits."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "own_trainer", raising=False)
    own = ("--model", "linear", "--trainer", "own_trainer:Softmax", "--until", "20", "--seed", "1")
    told = simulated(capsys, "--strategy", "fedavg:steps=20,min_clients=4", *own)
    assert told["versions"] == 10
    assert told["accuracy"] > 0.7
    again = simulated(capsys, "--strategy", "fedavg:steps=20,min_clients=4", *own)
    assert again["hash"] == told["hash"]


@pytest.mark.parametrize(
    "bad",
    [
        ("--seed", "-1"),
        ("--seed", "99999999999999999999"),
        ("--until", "nan"),  # it never ended
        ("--until", "-1"),
        ("--until", "inf"),  # it never ended
        ("--clip", "inf"),
        ("--max-epsilon", "inf"),
        ("--lease", "nan"),
        ("--lease", "-1"),
        ("--threads", "0"),
        ("--threads", "9" * 30),
        ("--evaluate-every", "-1"),
    ],
    ids=" ".join,
)
def test_a_number_that_nobody_can_mean_is_refused(capsys: Capsys, bad: tuple[str, str]) -> None:
    error = simulated(capsys, "--null", *bad, code=78)
    assert error["code"] == "FL-S102"
    assert error["message"].startswith(bad[0])


def test_a_folder_that_cannot_be_is_refused_before_anything_is_run(
    capsys: Capsys, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert simulated(capsys, *NULL, "--out", str(out), code=2)["code"] == "FL-S108"


@pytest.mark.parametrize("name", ["history.jsonl", "timeline.png", "model.safetensors"])
def test_what_is_in_the_way_in_out_is_known_before_anything_is_simulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """It was known at the end; a pipe was waited for, for ever."""
    (tmp_path / name).mkdir()
    error = simulated(capsys, *NULL, "--out", str(tmp_path), code=2)
    assert error["code"] == "FL-S108"
    assert f"cannot write {tmp_path / name}: it is there" in error["message"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("option", "value", "code"),
    [
        ("--workers", "0", "FL-S108"),
        ("--workers", "1025", "FL-S108"),  # with 10**30 nothing was said for minutes
        ("--engine", "nonsense", "FL-S108"),
        ("--partition", "nonsense", "FL-D104"),
        ("--partition", "dirichlet:-1", "FL-D104"),
        ("--seconds", "inf", "FL-S108"),
        ("--dropout", "inf", "FL-S108"),
        ("--dropout", "600,inf", "FL-S108"),
        ("--aggregator", "nonsense", "FL-S101"),
        ("--model", "nonsense", "FL-S101"),
        ("--data", "nonsense", "FL-D103"),
        ("--trainer", "no_such_module:Mine", "FL-S103"),
    ],
)
def test_without_training_is_refused_what_would_be_with_it(
    capsys: Capsys, option: str, value: str, code: str
) -> None:
    assert console.run(cli, ["simulate", *NULL, option, value, "--json"]) in (2, 78)
    told = capsys.readouterr()
    assert json.loads(told.out)["error"]["code"] == code
    assert told.err == ""


def test_clients_of_ours_need_data(capsys: Capsys) -> None:
    assert simulated(capsys, "--data", "none", code=78)["code"] == "FL-S104"
    assert simulated(capsys, *NULL, "--data", "none")["versions"] == 50


def test_the_same_command_gives_the_same_hash_and_another_seed_another(capsys: Capsys) -> None:
    drawn = (*NULL, "--clients", "5", "--speeds", "exp", "--dropout", "20,5")
    first, second = (simulated(capsys, *drawn, "--seed", "1")["hash"] for _ in range(2))
    assert first == second
    assert simulated(capsys, *drawn, "--seed", "2")["hash"] != first


def test_the_seed_also_draws_what_happens_on_the_way(capsys: Capsys) -> None:
    fixed = (*NULL, "--speeds", "1,1,1,1", "--dropout", "20,5")
    hashes = {simulated(capsys, *fixed, "--seed", seed)["hash"] for seed in "123"}
    assert len(hashes) == 3


def test_digits_are_learned_and_everything_lies_in_out(tmp_path: Path, capsys: Capsys) -> None:
    out = tmp_path / "made" / "here"
    told = simulated(capsys, "--until", "6", "--out", str(out), "--evaluate-every", "2")
    assert told["versions"] >= 4
    assert told["best_accuracy"] > 0.7
    assert sorted(told["files"]) == ["accuracy", "history", "model", "timeline"]
    assert sorted(p.name for p in out.iterdir()) == [
        "accuracy.png", "history.jsonl", "model.safetensors", "timeline.png",
    ]  # fmt: skip
    history = History.read(out / "history.jsonl")
    assert history.version == told["versions"]
    assert {point.version % 2 for point in history.series("accuracy")} == {0}
    assert history.finished == told["reason"]
    assert sum(t.numel() for t in load_file(out / "model.safetensors").values()) == 4810


def test_the_target_decides_the_exit_code(capsys: Capsys) -> None:
    told = simulated(capsys, "--until", "30", "--target-accuracy", "0.5")
    assert told["reached"] is True
    assert 0 < told["seconds_to_target"] == told["virtual_s"] < 30
    assert simulated(capsys, "--until", "2", "--target-accuracy", "1", code=5)["reached"] is False


def test_bandwidth_and_model_size_cost_virtual_time(capsys: Capsys) -> None:
    """4 MB at 8 Mbit/s are 4 s each way, and 1 s of training: a round lasts 9 s."""
    told = simulated(capsys, *NULL, "--bandwidth", "8mbit", "--model-size", "4MB")
    assert told["versions"] == math.floor(50 / 9)


def test_a_lossy_codec_up_changes_what_is_learned(capsys: Capsys) -> None:
    plain = simulated(capsys, "--until", "3")
    lossy = simulated(capsys, "--until", "3", "--codec", "up=bf16")
    assert plain["versions"] == lossy["versions"]
    assert plain["hash"] != lossy["hash"]


def test_a_strategy_of_the_users_own_runs(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "strategy_of_mine.py").write_text(
        "from atoll.aggregation import FedAvg\n"
        "class Twice(FedAvg):\n"
        "    def __init__(self, steps: int = 5) -> None:\n"
        "        super().__init__(steps=2 * steps)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ("--null", "--until", "50", "--strategy", "strategy_of_mine:Twice:steps=10")
    assert simulated(capsys, *own)["versions"] == 25


def test_people_read_a_summary_with_the_hash(capsys: Capsys) -> None:
    assert console.run(cli, ["simulate", *NULL]) == 0
    out = capsys.readouterr().out
    assert out.startswith("FedAvg: 50 versions in 50 virtual seconds (50 seconds done)")
    assert "\n  hash " in out


# ---- what cannot be ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        (["--null", "--target-accuracy", "0.9"], "FL-S104", 78),
        (["--null", "--bandwidth", "20mbit"], "FL-S108", 2),
        (["--clients", "0"], "FL-S108", 2),
        (["--pace", "0"], "FL-S108", 2),
        (["--pace", "nan"], "FL-S108", 2),
        (["--speeds", "1,2", "--clients", "3"], "FL-S108", 2),
        (["--speeds", "1,2", "--change", "0.1"], "FL-S104", 78),
        (["--speeds", "tachyons"], "FL-S101", 78),
        (["--speeds", "trace:no-such.json"], "FL-D101", 3),
        (["--dropout", "never"], "FL-S108", 2),
        (["--dropout", "10,0"], "FL-S108", 2),
        (["--bandwidth", "sideways=1mbit"], "FL-S108", 2),
        (["--strategy", "fedavgg"], "FL-S101", 78),
        (["--partition", "fairly"], "FL-D104", 78),
        (["--seconds", "-1"], "FL-S108", 2),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: list[str], code: str, exit_code: int, capsys: Capsys
) -> None:
    assert simulated(capsys, *arguments, code=exit_code)["code"] == code


def test_each_client_may_ask_for_a_codec_of_its_own(capsys: Capsys) -> None:
    run = ("--strategy", "fedavg:steps=5,min_clients=4", "--until", "3", "--model", "linear")
    told = simulated(
        capsys, *run, "--codec", "up=topk:0.01+ef/int8,down=int8",
        "--client-codec", "c1=up=int8,down=fp32", "--client-codec", "c3=up=fp32",
    )  # fmt: skip
    up = {c["name"]: c["bytes_up"] / c["updates"] for c in told["clients"]}
    assert up["c0"] == up["c2"] < up["c1"] / 5 < up["c3"] / 15
    refused = simulated(capsys, *run, "--client-codec", "c1=sign", code=76)
    assert refused["code"] == "FL-W108"


@pytest.mark.parametrize("bad", ["c9=int8", "int8", "c1="])
def test_a_codec_for_nobody_is_refused(capsys: Capsys, bad: str) -> None:
    assert simulated(capsys, "--client-codec", bad, code=2)["code"] == "FL-S108"


def test_codecs_without_training_are_refused(capsys: Capsys) -> None:
    told = simulated(capsys, "--null", "--client-codec", "c1=int8", code=78)
    assert told["code"] == "FL-S104"
