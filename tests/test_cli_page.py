"""docs/cli.md keeps its word: exit codes as in the catalogue, every command and option named."""

import re
from pathlib import Path

import click
import pytest

from atoll.client.cli import cli as client
from atoll.p2p.cli import cli as peer
from atoll.protocols.errors import CATALOGUE
from atoll.server.cli import cli as server
from atoll.server.cli_simulate import simulate

PAGE = (Path(__file__).parents[1] / "docs" / "cli.md").read_text()
ROWS = dict(re.findall(r"^\| (\d+) \| (.*)\|$", PAGE, re.MULTILINE))


def test_every_exit_code_of_the_catalogue_stands_in_the_table() -> None:
    used = {str(entry.exit_code) for entry in CATALOGUE.values()}
    assert used - set(ROWS) == set()
    assert set(ROWS) - used == {"0"}


def test_the_codes_in_a_row_have_that_exit_code() -> None:
    named = [(code, row) for row, text in ROWS.items() for code in re.findall(r"FL-\w+", text)]
    assert len(named) > 20
    for code, row in named:
        assert str(CATALOGUE[code].exit_code) == row, code


@pytest.mark.parametrize("group", [server, client, peer], ids=["fl-server", "fl-client", "fl-peer"])
def test_every_command_is_named(group: click.Group) -> None:
    for name, command in group.commands.items():
        for leaf in command.commands if isinstance(command, click.Group) else [name]:
            if leaf != "join":  # it says itself that it is not built yet
                assert re.search(rf"`[^`\n]*\b{leaf}\b", PAGE), leaf


def test_every_option_of_simulate_is_named() -> None:
    common = {"--json", "--verbose", "--lease", "--partition", "--threads"}
    for option in simulate.params:
        long = next(name for name in reversed(option.opts) if name.startswith("--"))
        assert long in common or f"`{long}" in PAGE or f" {long}" in PAGE, long
