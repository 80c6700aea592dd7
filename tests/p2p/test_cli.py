"""fl-peer: each command says what it will do, and exits 2."""

import json

import pytest

from atoll.p2p.cli import cli
from atoll.protocols import console


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_a_command_says_what_it_will_do_and_exits_2(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.run(cli, [command]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error FL-P100: not built yet: this command will ")
    assert console.run(cli, [command, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "FL-P100"
