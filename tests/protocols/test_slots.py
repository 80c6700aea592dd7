"""Slots: a built-in name, an entry point, or the user's own `module:object`, with parameters."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

from atoll.protocols import slots
from atoll.protocols.errors import UsageError

BUILTIN = {
    "fedavg": "atoll.aggregation.fedavg:FedAvg",
    "version": "sys:version_info",
    "gone": "atoll.aggregation.gone:Gone",
}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("fedavg", ("fedavg", "", {})),
        ("fedavg:steps=5", ("fedavg", "", {"steps": 5})),
        ("fedavg:steps=5,lr=.1,x=a", ("fedavg", "", {"steps": 5, "lr": 0.1, "x": "a"})),
        ("fedavg:over-select=True", ("fedavg", "", {"over_select": True})),
        ("m.n:Class", ("m.n", "Class", {})),
        ("m.n:Class:lr=1e-3", ("m.n", "Class", {"lr": 0.001})),
        ("a:staleness=hinge:10:4", ("a", "", {"staleness": "hinge:10:4"})),
        (" a : b = 1 ", ("a", "", {"b": 1})),
    ],
)
def test_a_spec_is_name_object_and_parameters(
    spec: str, expected: tuple[str, str, dict[str, slots.Value]]
) -> None:
    assert slots.split(spec) == expected


@pytest.mark.parametrize("spec", ["fedavg:x=1,steps", "fedavg:=5", "m:Class:lr"])
def test_a_parameter_without_name_or_value_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="is not key=value") as caught:
        slots.split(spec)
    assert caught.value.code == "FL-S102"


def test_a_builtin_is_made_with_its_parameters() -> None:
    from atoll.aggregation.fedavg import FedAvg

    made = slots.resolve("strategy", "fedavg:steps=7", BUILTIN)
    assert isinstance(made, FedAvg)
    assert made.steps == 7


def test_a_parameter_that_the_object_does_not_take_is_told() -> None:
    with pytest.raises(UsageError, match="stepz") as caught:
        slots.resolve("strategy", "fedavg:stepz=7", BUILTIN)
    assert caught.value.code == "FL-S102"


def test_an_object_that_is_not_called_takes_no_parameters() -> None:
    assert slots.resolve("x", "version", BUILTIN) is sys.version_info
    with pytest.raises(UsageError, match="takes no parameters") as caught:
        slots.resolve("x", "version:a=1", BUILTIN)
    assert caught.value.code == "FL-S102"


def test_a_name_nobody_knows_offers_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown strategy 'fedagv'") as caught:
        slots.find("strategy", "fedagv", BUILTIN)
    assert caught.value.code == "FL-S101"
    assert caught.value.hint.startswith("did you mean 'fedavg'? known: fedavg, gone, version")


def test_a_users_own_object_is_found_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_rule.py").write_text("class Rules:\n    class Mine:\n        size = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    found = slots.resolve("strategy", "my_own_rule:Rules.Mine", BUILTIN)
    assert getattr(found, "size", None) == 3


@pytest.mark.parametrize("spec", ["gone", "no_such_module_here:X", "json:no_such_name"])
def test_what_cannot_be_imported_is_told_with_the_reason(spec: str) -> None:
    with pytest.raises(UsageError, match="cannot be imported") as caught:
        slots.find("strategy", spec, BUILTIN)
    assert caught.value.code == "FL-S103"


def test_an_installed_package_adds_a_name_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("theirs", "math:sqrt", "atoll.strategy")

    def entry_points(group: str, name: str) -> list[importlib.metadata.EntryPoint]:
        return [point] if (group, name) == (point.group, point.name) else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    import math

    assert slots.find("strategy", "theirs", BUILTIN) is math.sqrt
    with pytest.raises(UsageError):
        slots.find("codec", "theirs", BUILTIN)
