"""A package of somebody else's, installed by pip: its parts run, are listed, and are refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CODE = '''"""Parts of an island."""

from dataclasses import dataclass
from typing import ClassVar

from atoll.aggregation import FedAvg, Mean
from atoll.aggregation.outer import Sgd
from atoll.client import LocalAlgorithm
from atoll.protocols.codecs import Fp16


@dataclass
class Calm(FedAvg):
    """FedAvg of ten steps."""

    steps: int = 10  # local steps


class Halved(Mean):
    """Half of everybody."""

    def add(self, total, delta, weight, *, first):
        super().add(total, delta, weight / 2, first=first)


class Needy(Mean):
    """Wants a lagoon."""

    needs: ClassVar = frozenset({"lagoon"})


class Slow(Sgd):
    """A plain step."""


class Still(LocalAlgorithm):
    """Plain training."""


class Half(Fp16):
    """As fp16."""

    name = "half"
'''
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "atoll-island"
version = "1.0"

[tool.setuptools]
py-modules = ["atoll_island"]

[project.entry-points."atoll.strategies"]
calm = "atoll_island:Calm"

[project.entry-points."atoll.aggregators"]
halved = "atoll_island:Halved"
needy = "atoll_island:Needy"

[project.entry-points."atoll.outers"]
slow = "atoll_island:Slow"

[project.entry-points."atoll.locals"]
still = "atoll_island:Still"

[project.entry-points."atoll.codecs"]
half = "atoll_island:Half"
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package in it."""
    source = tmp_path_factory.mktemp("island")
    (source / "atoll_island.py").write_text(CODE)
    (source / "pyproject.toml").write_text(PROJECT)
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    built = subprocess.run(
        [*pip, "--no-build-isolation", "--target", str(target), str(source)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return target


def fl_server(target: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "atoll.server", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=target)


def test_every_slot_takes_a_part_of_an_installed_package(target: Path) -> None:
    told = fl_server(
        target, "simulate", "--strategy", "calm:min_clients=4", "--aggregator", "halved",
        "--outer", "slow:lr=2", "--local", "still", "--codec", "up=half,down=fp32",
        "--versions", "5", "--json",
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    data = json.loads(told.stdout)["data"]
    assert (data["versions"], data["steps"]) == (5, 200)
    assert data["accuracy"] > 0.3


def test_a_listing_has_it_with_its_package(target: Path) -> None:
    told = fl_server(target, "strategies", "calm")
    assert "FedAvg of ten steps." in told.stdout
    assert "from package 'atoll-island'" in told.stdout
    assert re.search(r"^  steps +10 +local steps$", told.stdout, re.MULTILINE)
    assert re.search(r"^  rounds +None", told.stdout, re.MULTILINE)  # FedAvg's


def test_what_it_needs_is_asked_for_at_start(target: Path) -> None:
    told = fl_server(target, "start", "--aggregator", "needy", "--state", str(target / "state"))
    assert told.returncode == 78
    assert "FL-S104: aggregator needy needs lagoon, which this run does not give" in told.stderr
    assert not (target / "state").exists()
