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


@pytest.mark.parametrize(
    "given",
    [
        ("start", "127.0.0.1:99999"),  # gRPC takes the low 16 bits, and calls on a stranger
        ("start", "127.0.0.1:0"),
        ("start", ":7447"),
        ("start", "localhost"),
        ("start", "127.0.0.1:7447", "--patience", "nan"),
        ("start", "127.0.0.1:7447", "--patience", "-1"),
        ("start", "127.0.0.1:7447", "--validate", "0.6"),
        ("start", "127.0.0.1:7447", "--validate", "-0.1"),
        ("start", "127.0.0.1:7447", "--validate", "nan"),
        ("start", "127.0.0.1:7447", "--validate", "0.1", "--local-dp", "clip=1,noise=1"),
        ("bench", "--seconds", "nan"),
        ("bench", "--seconds", "-1"),
        ("bench", "--seconds", "inf"),
        ("test", "--run", "127.0.0.1:99999"),
    ],
    ids=" ".join,
)
def test_what_nobody_can_mean_is_refused(
    given: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = failure(capsys, *given)
    assert (code, error["code"]) == (2, "FL-S108")
    assert given[-1] in error["message"]
