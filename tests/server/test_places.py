"""Places of the command lines: one that cannot be, or says nothing, is refused before anything."""

import json
from pathlib import Path

import click
import pytest

from atoll.client.cli import cli as client
from atoll.p2p.cli import cli as peer
from atoll.protocols import console
from atoll.server.cli import cli as server

Capsys = pytest.CaptureFixture[str]

LONG = "s" * 5000
DEEP = "/".join(["d" * 100] * 40)  # each part may be, with what lies in it the whole may not
STATES = [
    ("start", "--state"),
    ("status", "--state"),
    ("run", "show"),
    ("run", "watch"),
    ("run", "export"),
]
OTHERS: list[tuple[click.Group, tuple[str, ...]]] = [
    (server, ("start", "--init")),
    (server, ("run", "ls")),
    (server, ("run", "export", "-o")),
    (server, ("simulate", "--out")),
    (server, ("demo", "--out")),
    (client, ("start", "127.0.0.1:1", "--dir")),
    (peer, ("demo", "--out")),
    (peer, ("init", "--folder")),
    (peer, ("status",)),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refusal(capsys: Capsys, cli: click.Group, *arguments: str) -> tuple[int, str, str, str]:
    code = console.run(cli, [*arguments, "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    return code, error["code"], error["message"], error["hint"]


@pytest.mark.parametrize("command", STATES, ids=" ".join)
@pytest.mark.parametrize(
    ("path", "wrong"),
    [(LONG, "File name too long"), (DEEP, "File name too long"), ("a\0b", "it holds a NUL")],
    ids=["long", "deep", "nul"],
)
def test_a_state_directory_that_can_never_be(
    capsys: Capsys, command: tuple[str, ...], path: str, wrong: str
) -> None:
    """It was an unexpected error, with a crash file and the whole name."""
    code, name, message, hint = refusal(capsys, server, *command, path)
    assert (code, name, hint) == (78, "FL-S206", "give another --state")
    assert message.startswith(f"state directory {path[:1]}")
    assert wrong in message
    assert len(message) < 120


@pytest.mark.parametrize(("cli", "command"), OTHERS)
@pytest.mark.parametrize("path", [LONG, "a\0b"], ids=["long", "nul"])
def test_another_path_that_can_never_be(
    capsys: Capsys, cli: click.Group, command: tuple[str, ...], path: str
) -> None:
    code, name, message, _ = refusal(capsys, cli, *command, path)
    assert (code, name) == (2, "FL-S108")
    assert message.endswith(("File name too long", "it holds a NUL character"))
    assert len(message) < 160


@pytest.mark.parametrize(
    ("cli", "command"),
    [*((server, command) for command in STATES), *OTHERS,
     (client, ("start", "127.0.0.1:1", "--name")),
     (client, ("start", "127.0.0.1:1", "--data")),
     (client, ("test", "--data"))],
)  # fmt: skip
def test_an_empty_value_is_not_the_default(
    tmp_path: Path, capsys: Capsys, cli: click.Group, command: tuple[str, ...]
) -> None:
    """`--out "$UNSET"` was the folder one is in, which a demo then cleared of its `state`."""
    code, name, message, _ = refusal(capsys, cli, *command, "")
    assert (code, name) == (2, "FL-S108")
    assert "it is empty" in message
    assert not any(tmp_path.iterdir())


def test_the_help_of_a_client_says_which_names_are_allowed(capsys: Capsys) -> None:
    assert console.run(client, ["start", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "lower case letters, digits, - . _" in told
