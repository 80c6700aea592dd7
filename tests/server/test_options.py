"""Options: what nobody can mean is refused before anything starts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from atoll.client.cli import cli as client
from atoll.protocols import console
from atoll.protocols.errors import UsageError
from atoll.server.cli import cli as server
from atoll.server.cli_peers import like_peers
from atoll.server.options import spec_of
from atoll.server.rules import Rules
from atoll.server.spec import RunSpec
from tests.p2p.people import MANIFEST


@pytest.mark.parametrize(
    "bad",
    [
        ("--lr", "nan"),
        ("--lr", "-1"),
        ("--batch", "0"),
        ("--clip", "-1"),
        ("--local-momentum", "1"),
        ("--lease", "-4"),
        ("--lease", "nan"),
        ("--keep", "-1"),
        ("--save-every", "0"),
    ],
)
def test_a_number_that_makes_no_sense_is_named_with_its_remedy(
    bad: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    assert console.run(server, ["start", "--state", str(state), *bad, "--json"]) == 78
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "FL-S102"
    assert bad[0] in error["message"]
    assert error["hint"].startswith("give ")
    assert not state.exists()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (("--max-examples", "-4"), "--max-examples -4"),  # was told of --most-examples
        (("--local-optimizer", "adammm"), "'adammm' is not one of 'sgd', 'adam', 'adamw'"),
        (("--dp", "8"), "'--dp 8': '8' is not key=value"),
        (("--local-dp", "on:noise=8"), "--local-dp 'on:noise=8': it has no parameter 'on:noise'"),
    ],
)
def test_a_start_refuses_before_it_serves(
    bad: tuple[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--dp 8` served with the default noise, and an optimizer that is none broke every client."""
    state = tmp_path / "state"
    assert console.run(server, ["start", "--state", str(state), *bad, "--json"]) in (2, 78)
    assert said in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not state.exists()


@pytest.mark.parametrize("name", ["model", "data", "outer", "seed"])
def test_what_the_peers_train_is_not_said_anew_by_a_server_among_them(name: str) -> None:
    """`--peer INVITE --model mlp` served the peers' model without a word."""
    own = RunSpec("01J", strategy="fedavg", model="mlp", data="digits", outer="sgd", seed=7)
    for given in ((), ("strategy",)):
        made = like_peers(own, MANIFEST, given)
        assert (made.model, made.data, made.outer) == ("charlm", "topics", "nesterov:0.7,0.9")
    with pytest.raises(UsageError, match=rf"--{name} \w+, but the peers of this run have") as bad:
        like_peers(own, MANIFEST, ("strategy", name))
    assert bad.value.code == "FL-S104"
    with pytest.raises(UsageError, match="--data none, but"):
        like_peers(replace(own, data=""), MANIFEST, ("data",))
    same = like_peers(own, MANIFEST, ())
    assert like_peers(same, MANIFEST, ("strategy", name)) == same


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (("--lr", "nan"), "FL-S102"),
        (("--target-accuracy", "7"), "FL-S108"),
        (("--partition", "dirichlett:1"), "FL-D104"),
        (("--codec", "up=fp31"), "FL-S101"),
        (("--data", "none"), "FL-S104"),
        (("--trainer", "no_such_module:Mine"), "FL-S103"),
        (("--seed", "-1"), "FL-S102"),
        (("--speeds", "1,1,1,1e-300"), "FL-S108"),
        (("--timeout", "nan"), "FL-S108"),
        (("--timeout", "inf"), "FL-S108"),
        (("--partition", "dirichlet:x"), "FL-D104"),
        (("--strategy", "fedcompas"), "FL-S101"),
        (("--clients", "0"), "FL-S108"),
    ],
)
def test_a_demo_checks_before_it_speaks(
    bad: tuple[str, str], code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It said that it starts, and then that it cannot."""
    out = tmp_path / "out"
    assert console.run(server, ["demo", "--out", str(out), *bad, "--json"]) != 0
    told = capsys.readouterr()
    assert json.loads(told.out)["error"]["code"] == code
    assert told.err == ""
    assert not out.exists()


@pytest.mark.parametrize("spelled", ["none", ""])
def test_a_server_without_test_data_can_be_asked_for(spelled: str) -> None:
    context = server.commands["start"].make_context("start", ["--data", spelled])
    assert spec_of(context.params).data == ""


@pytest.mark.parametrize("target", [float("nan"), float("inf"), 0.0, -1.0, 7.0])
def test_an_accuracy_that_cannot_be_reached_is_no_target(target: float) -> None:
    with pytest.raises(UsageError, match="target"):
        Rules(target=target)


def test_another_metric_has_its_own_scale_and_time_is_a_number() -> None:
    assert Rules(target=7.0, metric="loss").target == 7.0
    for never in (float("nan"), float("inf"), 0.0):
        with pytest.raises(UsageError, match=f"seconds={never} would end the run"):
            Rules(seconds=never)


@pytest.mark.parametrize("name", ["B", " ", "\u00e4", "a/b", "-a", "a" * 64])
def test_a_client_name_is_checked_before_anything_is_connected(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["start", "127.0.0.1:9", "--name", name, "--json"]
    assert console.run(client, given) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "FL-S108"


@pytest.mark.parametrize("option", ["--dp", "--local-dp"])
def test_an_empty_promise_of_noise_is_refused(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--dp "$UNSET"` ran without noise."""
    assert console.run(server, ["simulate", "--null", option, "", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert f"Invalid value for '{option}'" in told["error"]["message"]
