"""Help for every command of every command line: it exists, and imports nothing heavy."""

import importlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from atoll.protocols import console

HEAVY = {"torch", "grpc", "hivemind", "numpy", "matplotlib", "sklearn", "cryptography", "sqlite3"}
PROGRAMS = {"fl-server": "server", "fl-client": "client", "fl-peer": "p2p"}


def built() -> dict[str, click.Group]:
    """The command lines that exist: script -> its click group."""
    found = {}
    for script, folder in PROGRAMS.items():
        if importlib.util.find_spec(f"atoll.{folder}.cli") is not None:
            found[script] = importlib.import_module(f"atoll.{folder}.cli").cli
    return found


def commands() -> Iterator[tuple[str, click.Command]]:
    for script, group in built().items():
        yield from walk(script, group)


def walk(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from walk(f"{path} {name}", child)


COMMANDS = dict(commands())
LEAVES = {path: c for path, c in COMMANDS.items() if not isinstance(c, click.Group)}


def test_every_script_is_declared() -> None:
    declared = {p.name for p in importlib.metadata.entry_points(group="console_scripts")}
    assert set(PROGRAMS) <= declared


@pytest.mark.parametrize("path", COMMANDS)
def test_a_command_says_what_it_does_in_a_sentence(path: str) -> None:
    said = (COMMANDS[path].help or "").strip().split("\n")[0]
    assert said, f"{path} has no help"
    assert said.endswith("."), f"{path}: {said!r} is no sentence"


@pytest.mark.parametrize("path", LEAVES)
def test_a_command_has_json_and_verbose(path: str) -> None:
    options = {name for option in LEAVES[path].params for name in option.opts}
    assert {"--json", "-v"} <= options


@pytest.mark.parametrize("path", LEAVES)
def test_every_option_is_explained(path: str) -> None:
    for option in LEAVES[path].params:
        if isinstance(option, click.Option) and not option.hidden:
            assert option.help, f"{path}: {option.opts[0]} has no help"


@pytest.mark.parametrize("script", built())
def test_help_of_all_its_commands_imports_nothing_heavy(script: str) -> None:
    """One process per script asks each command for its help, as a user's first minutes do."""
    program = (
        "import sys\n"
        "from atoll.protocols import console\n"
        f"from atoll.{PROGRAMS[script]}.cli import cli\n"
        "import click\n"
        "def ask(command, path):\n"
        "    assert console.run(cli, [*path, '--help']) == 0, path\n"
        "    for name in getattr(command, 'commands', {}):\n"
        "        ask(command.commands[name], [*path, name])\n"
        "ask(cli, [])\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert told.stderr == "[]\n"
    assert told.stdout.count("Usage: ") == len([p for p in COMMANDS if p.split()[0] == script])


@pytest.mark.parametrize("path", COMMANDS)
def test_help_reads_well_at_80_columns(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Sentences ended in "...", and commands were broken into `fl-` and `server`."""
    script, *names = path.split()
    assert console.run(built()[script], [*names, "--help"]) == 0
    shown = capsys.readouterr().out
    for line in shown.splitlines():
        assert len(line) <= 80
        assert not line.endswith("-"), line
    assert "..." not in shown.partition("Commands:\n")[2]
