"""The listings: every part with its parameters, for people and as JSON, without its import."""

import contextlib
import fcntl
import json
import os
import re
import resource
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from atoll.protocols import console
from atoll.server import catalogue
from atoll.server.catalogue import parts
from atoll.server.cli import cli
from atoll.server.cli_catalogue import COMMANDS, all_about, screen
from tests.conftest import Package


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert console.run(cli, arguments) == 0
    return capsys.readouterr().out


def on_a_terminal(columns: int, *arguments: str) -> list[str]:
    """The lines that a terminal of so many columns is given."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    program = "import sys; from atoll.server.cli import main; main()"
    command = [sys.executable, "-c", program, *arguments]
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    subprocess.run(command, stdout=theirs, stderr=subprocess.DEVNULL, check=True, env=env)
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # its other end is closed
        while more := os.read(ours, 1 << 16):
            text += more
    os.close(ours)
    return text.decode().splitlines()


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
    assert console.run(cli, [command]) == 0
    assert f"{option} NAME:parameter=value" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_in_a_pipe_each_part_is_one_whole_line_of_five_fields(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = told(capsys, command)
    parts = json.loads(told(capsys, command, "--json"))["data"]["parts"]
    rows = [line.split("\t") for line in shown.splitlines()]
    assert [row[0] for row in rows] == [", ".join((p["name"], *p["also"])) for p in parts]
    for row, part in zip(rows, parts, strict=True):
        given = ", ".join(f"{p['name']}={p['default']}" for p in part["parameters"])
        assert (row[1], row[2], row[4]) == (part["summary"], given, " ".join(part["papers"]))
        assert len(row) == 5


def test_a_terminal_of_60_columns_gets_lines_of_60() -> None:
    """They were 261 wide, and the terminal broke them in the middle of words."""
    lines = on_a_terminal(60, "strategies")
    assert max(map(len, lines)) <= 60
    assert lines[0] == "fedavg"
    assert lines[1].startswith("    Rounds. Pick a cohort, train it from")
    assert "staleness_exponent=0.5," in " ".join(lines)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_nothing_but_a_long_word_is_wider_than_the_terminal(command: str, width: int) -> None:
    found = parts(COMMANDS[command][0])
    shown = [screen(found, width), *(all_about(part, width) for part in found)]
    lines = "\n".join(shown).splitlines()
    assert all(len(one) <= width or len(one.split()) == 1 for one in lines if width > 40)
    words = "\n".join(shown).split()
    assert all(word in words for part in found for word in part.summary.split())


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
    assert "  needs of the run what its" in told(capsys, "aggregators", "fedlaw")
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
        "print(sorted({'torch', 'numpy', 'grpc', 'rich'} & set(sys.modules)))\n"
    )
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert told.stdout.endswith("\n[]\n")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began < 1.0  # it is 0.2
