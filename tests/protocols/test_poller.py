"""How gRPC waits for its sockets in our commands."""

import os
import subprocess
import sys
from importlib import metadata

import pytest

from atoll.protocols import poller


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process in which nobody has spoken of gRPC."""
    monkeypatch.setenv(poller.VARIABLE, "")  # so that what is set in the test is taken back
    monkeypatch.delenv(poller.VARIABLE)
    monkeypatch.delitem(sys.modules, "grpc", raising=False)
    return monkeypatch


def test_the_older_way_is_taken_where_it_is_known(fresh: pytest.MonkeyPatch) -> None:
    assert poller.read_where_we_wait()
    assert os.environ[poller.VARIABLE] == poller.OLDER
    assert not poller.read_where_we_wait()  # once is enough


def test_what_the_user_says_stands(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv(poller.VARIABLE, "")
    assert not poller.read_where_we_wait()
    assert os.environ[poller.VARIABLE] == ""


def test_it_is_too_late_where_grpc_is_there(fresh: pytest.MonkeyPatch) -> None:
    fresh.setitem(sys.modules, "grpc", sys)
    assert not poller.read_where_we_wait()
    assert poller.VARIABLE not in os.environ


@pytest.mark.parametrize(
    ("version", "older"), [("1.71.2", True), ("1.86.0", False), ("2.0.1", False)]
)
def test_releases_newer_than_those_tried_are_left_as_they_are(
    fresh: pytest.MonkeyPatch, version: str, older: bool
) -> None:
    fresh.setattr(metadata, "version", lambda _: version)
    assert poller.read_where_we_wait() is older
    assert (poller.VARIABLE in os.environ) is older


def test_grpc_knows_the_names_and_says_nothing() -> None:
    program = (
        "from atoll.protocols import poller; poller.read_where_we_wait(); import grpc; "
        "grpc.insecure_channel('127.0.0.1:1').close()"
    )
    clean = {k: v for k, v in os.environ.items() if k != poller.VARIABLE}
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
