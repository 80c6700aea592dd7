"""Killed before it had begun: what the start was asked for is the run's all the same.

From `run.json` to the first line of the journal a server loads torch, data and model, for seconds.
"""

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from atoll.protocols.errors import ServerError
from atoll.server.rules import Rules
from atoll.server.server import Server
from atoll.server.spec import RunSpec, begun, open_spec
from tests.server.test_workshop import SPEC, Life

INIT = Path("start.safetensors")


def test_limits_of_a_start_that_was_killed_hold_for_the_next(tmp_path: Path) -> None:
    """It had no stop rule, and went on for ever."""
    asked = Rules(target=0.9, versions=3, seconds=7.5)
    spec = open_spec(tmp_path / "state", begun(SPEC, asked, None))
    assert spec.limits == {"target": 0.9, "metric": "accuracy", "versions": 3, "seconds": 7.5}
    again = open_spec(tmp_path / "state", begun(SPEC, Rules(), None))  # without options
    life = Life(tmp_path / "state", rules=Rules(versions=5), limits=again.limits)
    assert life.assembly.driver.rules == Rules(target=0.9, versions=5, seconds=7.5)
    life.die()
    last = Life(tmp_path / "state", limits=again.limits)  # now the journal has them
    assert last.assembly.driver.rules.versions == 5
    last.die()


def test_what_is_looked_at_stays_with_its_target(tmp_path: Path) -> None:
    """A loss of 0.1 that was wanted became an accuracy of 0.1, and the run was over at once."""
    Life(tmp_path, rules=Rules(target=0.1, metric="loss")).die()
    again = Life(tmp_path)
    assert (again.rules.target, again.rules.metric) == (0.1, "loss")
    again.die()
    other = Life(tmp_path, rules=Rules(target=0.8))
    assert (other.rules.target, other.rules.metric) == (0.8, "accuracy")
    other.die()


def test_a_pretrained_start_is_taken_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start trained from random values, and nobody was told."""
    monkeypatch.chdir(tmp_path)
    save_file({"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}, INIT)
    open_spec(tmp_path / "state", begun(SPEC, Rules(), INIT))
    monkeypatch.chdir("/")
    again = open_spec(tmp_path / "state", begun(SPEC, Rules(), None))
    life = Life(tmp_path / "state", init=again.init)
    assert life.assembly.store.open(0).flat("trainable").tolist() == [1.0, 2.0, 3.0, 4.0]
    life.die()


def test_a_server_made_in_python_has_one_start_too(tmp_path: Path) -> None:
    made = functools.partial(
        Server, "linear", data="digits", folder=tmp_path / "state", init=tmp_path / INIT
    )
    made()
    made()  # the same
    with pytest.raises(ServerError) as refused:
        made(init=tmp_path / "other")
    assert refused.value.code == "FL-S109"


def test_a_server_made_in_python_notes_them_too(tmp_path: Path) -> None:
    Server(
        "linear",
        data="digits",
        rules=Rules(steps=9),
        folder=tmp_path / "state",
        init=tmp_path / INIT,
    )
    spec = RunSpec.read(tmp_path / "state" / "run.json")
    assert spec.limits == {"metric": "accuracy", "steps": 9}
    assert spec.init == str(tmp_path / INIT)
    Server("linear", data="digits", folder=tmp_path / "none")
    assert RunSpec.read(tmp_path / "none" / "run.json").limits == {}
