"""The public names: what a user types, where it is found, and that it costs nothing unused."""

import importlib
import subprocess
import sys

import pytest

NAMES = {
    "atoll.server": ["Rules", "Server", "Training", "simulate"],
    "atoll.client": ["Client", "Task", "Trained", "Trainer"],
    "atoll.p2p": ["Peer"],
    "atoll.aggregation": [
        "FedAvg", "FedBuff", "FedCompass",  # when
        "Mean", "Median", "TrimmedMean", "Krum",  # how
        "Sgd", "Nesterov", "Adam",  # outer step
        "Strategy", "check_aggregator", "check_strategy",  # write your own
    ],
    "atoll.protocols": [
        "Int8", "TopK", "AtollError", "Update",
        "ClientInfo", "Merged", "Evaluated",  # what strategy authors meet as well
        "Train", "Ask", "Aggregate", "Discard", "SetTimer", "CancelTimer", "Finish",
    ],
}  # fmt: skip

# Shrinks only: a name that can be imported must leave this list.
NOT_YET = {"Peer"}

HERE = [(p, n) for p, names in NAMES.items() for n in names if n not in NOT_YET]
LATER = [(p, n) for p, names in NAMES.items() for n in names if n in NOT_YET]


@pytest.mark.parametrize(("package", "name"), HERE)
def test_a_public_name_can_be_imported_and_comes_from_its_own_folder(
    package: str, name: str
) -> None:
    found = getattr(importlib.import_module(package), name)
    assert found.__name__ == name
    assert found.__module__.startswith(f"{package}.")


@pytest.mark.parametrize(("package", "name"), LATER)
def test_a_name_of_a_later_issue_is_not_exported_by_accident(package: str, name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(importlib.import_module(package), name)


@pytest.mark.parametrize("package", NAMES)
def test_a_package_says_in_one_sentence_what_it_is_for(package: str) -> None:
    said = importlib.import_module(package).__doc__
    assert said is not None
    assert said.strip().endswith(".")
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("from atoll.aggregation import FedAvg, FedBuff, FedCompass, Strategy", "torch grpc numpy"),
        ("from atoll.protocols import AtollError, Update, Train, Aggregate", "torch grpc click"),
        ("import atoll.server, atoll.client, atoll.p2p", "torch grpc hivemind click rich"),
    ],
)
def test_one_pays_only_for_what_one_opens(statement: str, absent: str) -> None:
    program = f"{statement}\nimport sys\nprint(sorted(set({absent.split()}) & set(sys.modules)))"
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert told.stdout == "[]\n"
