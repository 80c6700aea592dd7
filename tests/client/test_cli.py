"""fl-client as it is typed: what is not built yet says so, and what cannot be is told at once."""

import json

import pytest

from atoll.client.cli import cli
from atoll.protocols import console


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, str]]:
    code = console.run(cli, [*arguments, "--json"])
    error: dict[str, str] = json.loads(capsys.readouterr().out)["error"]
    return code, error


def test_enrolment_says_that_it_is_to_come(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = failure(capsys, "join", "an-invite")
    assert (code, error["code"]) == (2, "FL-C106")
    assert error["hint"] == "until then: fl-client start ADDRESS"
