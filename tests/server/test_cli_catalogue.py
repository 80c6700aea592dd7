"""The listings: every part with its parameters, for people and as JSON, without its import."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from atoll.protocols import console
from atoll.server import catalogue
from atoll.server.cli import cli
from atoll.server.cli_catalogue import COMMANDS
from tests.conftest import Package


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert console.run(cli, arguments) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_a_listing_names_every_part_of_its_slot(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    slot, option, _ = COMMANDS[command]
    shown = told(capsys, command)
    for entry in catalogue.entries(slot):
        assert entry.name in shown
        assert entry.summary in shown or catalogue.builtin(slot)[entry.name] in [
            e.where for e in catalogue.entries(slot) if e.name != entry.name
        ]
    assert f"{option} NAME:parameter=value" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_its_json_has_every_part_once_with_all_its_names(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    slot = COMMANDS[command][0]
    data = json.loads(told(capsys, command, "--json"))["data"]
    names = [name for part in data["parts"] for name in (part["name"], *part["also"])]
    assert sorted(names) == sorted(catalogue.builtin(slot))
    assert all(part["summary"] and not part["error"] for part in data["parts"])


def test_one_part_is_told_with_every_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    shown = told(capsys, "aggregators", "geometric-median")
    assert shown.startswith("rfa, geometric-median  The geometric median")
    assert "  needs 3 updates for a version\n" in shown
    assert "iterations  1000   at most; 0: the weighted mean" in shown
    shown = told(capsys, "strategies", "fedavg")
    assert re.search(r"^  late +discard +discard or stale$", shown, re.MULTILINE)


def test_what_it_refuses_and_what_its_parameters_decide_are_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = told(capsys, "aggregators", "trimmed-mean")
    assert "  refuses sparse updates, of which most values are 0\n" in shown
    assert "  needs so many updates for a version as its parameters say\n" in shown
    assert "\n\n" not in told(capsys, "aggregators", "median")  # no table of no parameters


def test_a_name_that_is_not_there_points_at_the_listing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert console.run(cli, ["codecs", "fp31"]) == 78
    assert "see `fl-server codecs`" in capsys.readouterr().err


def test_parts_of_installed_packages_are_listed_and_not_run(
    package: Package, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = '"""Theirs."""\nclass Mine:\n    """Adds up."""\n    needs = frozenset({"tea"})\n'
    points = "mine = theirs_atoll:Mine\nmean = theirs_atoll:Mine\ngone = no_such_atoll:X\n"
    points += "built = math:sqrt\n"
    package("theirs_atoll", code + "raise SystemExit('it was run')\n", aggregators=points)
    shown = told(capsys, "aggregators")
    assert "mine" in shown
    assert "Adds up." in shown
    assert "needs tea" in shown
    assert "from package 'theirs_atoll'" in shown
    assert "aggregator 'mean' is offered by Atoll itself and by package 'theirs_atoll'" in shown
    assert "no_such_atoll:X cannot be imported: no package no_such_atoll" in shown
    parts = json.loads(told(capsys, "aggregators", "--json"))["data"]["parts"]
    found = {part["name"]: part for part in parts}
    assert found["mine"]["needs"] == ["tea"]
    assert found["mean"]["error"]
    assert found["built"]["error"] == ""  # it has no source, and may be fine
    assert console.run(cli, ["start", "--aggregator", "mine", "--state", str(tmp_path / "s")]) == 78
    assert "aggregator mine needs tea, which this run does not give" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_listing_imports_nothing_heavy_and_is_quick() -> None:
    program = (
        "import sys\nfrom atoll.protocols import console\nfrom atoll.server.cli import cli\n"
        "console.run(cli, ['aggregators'])\n"
        "print(sorted({'torch', 'numpy', 'grpc', 'rich'} & set(sys.modules)), file=sys.stderr)\n"
    )
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert told.stderr == "[]\n"
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began < 1.0  # it is 0.2
