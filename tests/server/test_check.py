"""Check: wrong names are refused without torch, and the names it knows are those there are."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from atoll.protocols.errors import AtollError, UsageError
from atoll.server.check import FILES, KNOWN, check
from atoll.server.spec import RunSpec, withdraw

TABLES = {
    "aggregator": "atoll.aggregation.aggregator",
    "outer": "atoll.aggregation.outer",
    "local algorithm": "atoll.client.algorithm",
    "model": "atoll.client.models",
    "codec": "atoll.protocols.codecs",
    "data": "atoll.client.data",
}


def spec(**given: str) -> RunSpec:
    return RunSpec("01J8ZQ4T0V7M3N5P6R8S9T0V1W", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("slot", KNOWN)
def test_the_names_it_knows_are_those_of_the_slot(slot: str) -> None:
    assert set(importlib.import_module(TABLES[slot]).BUILTIN) == KNOWN[slot]


@pytest.mark.parametrize("slot", ["aggregator", "outer", "algorithm", "model", "data"])
def test_every_built_in_name_passes(slot: str) -> None:
    for name in KNOWN["local algorithm" if slot == "algorithm" else slot] - set(FILES):
        check(spec(**{slot: name}))


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"strategy": "fedcompas"}, "FL-S101"),
        ({"strategy": "fedavg:stepz=3"}, "FL-S102"),
        ({"strategy": "json:dumps:obj=1"}, "FL-S102"),
        ({"strategy": "no_such_module:X"}, "FL-S103"),
        ({"aggregator": "meen"}, "FL-S101"),
        ({"outer": "nestorov:lr=1"}, "FL-S101"),
        ({"algorithm": "fedproxy"}, "FL-S101"),
        ({"model": "no_such_module:Net"}, "FL-S103"),
        ({"model": "json.no_such:Net"}, "FL-S103"),
        ({"codec_up": "fp31"}, "FL-S101"),
        ({"codec_down": "fp31"}, "FL-S101"),
        ({"data": "digit"}, "FL-D103"),
        ({"data": "mnist:no/such/folder"}, "FL-D101"),
        ({"data": "no_such_module:data"}, "FL-S103"),
    ],
)
def test_a_wrong_slot_is_refused(given: dict[str, str], code: str) -> None:
    with pytest.raises(AtollError) as caught:
        check(spec(**given))
    assert caught.value.code == code


def test_a_module_of_the_users_own_is_found_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net_of_mine.py").write_text("raise SystemExit('it was run')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    check(spec(model="net_of_mine:Net", data="net_of_mine:data"))


def test_only_the_strategy_matters_where_nothing_is_trained() -> None:
    check(spec(model="nonsense"), trains=False)
    with pytest.raises(UsageError, match="unknown strategy"):
        check(spec(strategy="nonsense"), trains=False)


def test_a_wrong_name_costs_no_import_of_torch() -> None:
    """One process: a person who mistypes waits for its start, not for torch."""
    program = (
        "import sys\n"
        "from atoll.protocols import console\n"
        "from atoll.server.cli import cli\n"
        "for slot in ('strategy', 'outer', 'aggregator', 'model', 'codec', 'local'):\n"
        "    option = f'--{slot}'\n"
        "    assert console.run(cli, ['start', '--state', 'never', option, 'nonsense']) == 78\n"
        "    assert console.run(cli, ['simulate', option, 'nonsense']) == 78\n"
        "print('torch' in sys.modules)\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert told.stdout == "False\n", told.stderr
    assert told.stderr.count("error FL-S101") == 12
    assert not Path("never").exists()


def test_a_run_that_never_began_is_withdrawn(tmp_path: Path) -> None:
    spec().write(tmp_path / "run.json")
    withdraw(tmp_path)
    assert not (tmp_path / "run.json").exists()
    withdraw(tmp_path)


def test_a_run_with_a_version_is_not_withdrawn(tmp_path: Path) -> None:
    spec().write(tmp_path / "run.json")
    (tmp_path / "versions" / "0").mkdir(parents=True)
    withdraw(tmp_path)
    assert (tmp_path / "run.json").exists()
