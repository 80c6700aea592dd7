"""The console: what lands on stdout and stderr, which exit code, and nothing a remote may draw."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from atoll.protocols import console
from atoll.protocols.errors import AtollError, ClientError, RemoteError

Say = Callable[[], object]


def command(act: Say) -> click.Group:
    """A command line with one command, `go`, that does `act`."""

    @click.group(name="fl-test")
    def cli() -> None:
        """A test."""

    @cli.command()
    @click.option("--count", type=int, default=1)
    @console.json_option
    def go(count: int, as_json: bool) -> object:
        """Go."""
        made = act()
        if made is None:
            console.emit({"count": count}, as_json)
        return made

    return cli


def fail(error: BaseException) -> Say:
    def act() -> object:
        raise error

    return act


def test_json_result_is_one_envelope_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(command(lambda: None), ["go", "--json"]) == 0
    assert capsys.readouterr().out == '{"v":1,"ok":true,"data":{"count":1}}\n'


def test_without_json_a_result_is_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(command(lambda: None), ["go", "--count", "3"]) == 0
    assert capsys.readouterr().out == "count  3\n"


def test_talk_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_a_command_may_choose_its_exit_code() -> None:
    assert console.run(command(lambda: 5), ["go"]) == 5
    assert console.run(command(lambda: True), ["go"]) == 0


def test_an_error_is_a_screen_with_its_remedy_and_its_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = ClientError("FL-C101", "no server at 10.0.0.1:7000", "start one: fl-server start")
    assert console.run(command(fail(error)), ["go"]) == 69
    assert capsys.readouterr() == (
        "",
        "error FL-C101: no server at 10.0.0.1:7000\n"
        "  fix    start one: fl-server start\n"
        "  docs   docs/errors.md#fl-c101\n",
    )


def test_an_error_in_json_is_the_envelope_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    error = ClientError("FL-C101", "no server", "start one")
    assert console.run(command(fail(error)), ["go", "--json"]) == 69
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == {
        "v": 1,
        "ok": False,
        "error": {
            "code": "FL-C101",
            "message": "no server",
            "hint": "start one",
            "docs": "docs/errors.md#fl-c101",
        },
    }


@pytest.mark.parametrize("arguments", [["go", "--nope"], ["go", "--count", "x"], ["gone"]])
def test_a_usage_error_is_fl_s108_and_exit_2_also_in_json(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.run(command(lambda: None), [*arguments, "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["error"]["code"] == "FL-S108"
    assert "--help" in told["error"]["hint"]
    assert console.run(command(lambda: None), arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error FL-S108: ")


def test_a_stream_ends_with_a_line_that_says_so_also_when_it_could_not_begin(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A wrong option was told on stderr, to a program that reads lines of JSON on stdout."""
    for wrong, code in ((["go", "--jsonl", "--nope"], 2), (["gone", "--jsonl"], 2)):
        assert console.run(command(lambda: None), wrong) == code
        out, err = capsys.readouterr()
        told = json.loads(out)
        assert (told["error"]["code"], told["final"], err) == ("FL-S108", True, "")


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(command(lambda: None), []) == 2
    assert "Commands:" in capsys.readouterr().err
    assert console.run(command(lambda: None), ["--json"]) == 2


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(command(lambda: None), ["go", "--help"]) == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), click.Abort()])
def test_ctrl_c_is_130(stop: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(command(fail(stop)), ["go"]) == 130
    assert "FL-S208" in capsys.readouterr().err


def test_a_bug_leaves_a_crash_file_and_no_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert console.run(command(fail(ZeroDivisionError("by zero"))), ["go"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error FL-S100: ZeroDivisionError: by zero\n")
    assert "Traceback" not in err
    (crash,) = tmp_path.iterdir()
    assert str(crash) in err
    assert "Traceback" in crash.read_text()


def test_a_full_disk_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    """A simulation that could not write its plots asked to be reported."""
    full = OSError(errno.ENOSPC, "No space left on device", "out/timeline.png")
    assert console.run(command(fail(full)), ["go"]) == 74
    assert capsys.readouterr().err.startswith(
        "error FL-S203: out/timeline.png cannot be written: No space left on device\n"
    )


@pytest.mark.parametrize("given", [["go"], ["go", "--json"]])
def test_a_full_disk_under_stdout_is_told_on_stderr(given: list[str]) -> None:
    """With --json it was a traceback, of the error and of the attempt to tell it."""
    program = (
        "import sys; from tests.protocols.test_console import command; "
        "from atoll.protocols import console; "
        f"sys.exit(console.run(command(lambda: None), {given}))"
    )
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full, stderr=subprocess.PIPE, text=True, env=buffered,
        )  # fmt: skip
        silent = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=full, env=buffered
        )
    assert ended.stderr.startswith("error FL-S203: ")
    assert "Traceback" not in ended.stderr
    assert (ended.returncode, silent.returncode) == (74, 74)  # not 120, of Python's last flush


def test_a_bug_that_cannot_write_its_crash_file_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert console.run(command(fail(ZeroDivisionError("by zero"))), ["go"]) == 1
    assert "no crash file could be written" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), ClientError("FL-C101", "none")])
def test_verbose_shows_the_traceback(
    error: Exception,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    console.run(command(fail(error)), ["go", "-v"])
    assert "Traceback" in capsys.readouterr().err


def test_verbosity_counts_the_vs() -> None:
    heard: list[int] = []
    assert console.run(command(lambda: heard.append(console.verbosity())), ["go", "-vv"]) == 0
    assert heard == [2]
    assert console.verbosity() == 0


def test_a_reader_that_went_away_is_not_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(command(fail(BrokenPipeError(32, "Broken pipe"))), ["go"]) == 1
    assert "FL-S100" not in capsys.readouterr().err


def test_a_users_module_that_calls_sys_exit_ends_no_command_without_a_word(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The exit code was the module's own, 0 too, and nothing was said."""
    assert console.run(command(fail(SystemExit(0))), ["go", "--json", "-v"]) == 78
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert (error["code"], error["hint"][:11]) == ("FL-S103", "take it out")
    assert "calls sys.exit(0)" in error["message"]
    assert "Traceback" in err


def test_other_trouble_of_clicks_is_told_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(command(fail(click.FileError("x.npz", "not readable"))), ["go"]) == 2
    assert "x.npz" in capsys.readouterr().err


def test_options_after_two_dashes_are_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(command(lambda: None), ["go", "--", "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_a_remotes_words_cannot_draw_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2Jgone\x1b]0;title\x07 \r\nerror\u202e reversed\x9b31m"
    assert console.run(command(fail(RemoteError("FL-W101", evil))), ["go"]) == 76
    head = capsys.readouterr().err.split("\n")[0]
    assert head == "error FL-W101: gone  error  reversed 31m"


def test_clean_keeps_words_and_letters_of_every_script() -> None:
    assert console.clean("größe 日本 é ✓") == "größe 日本 é ✓"


def test_the_screen_has_no_colour_where_stderr_is_no_terminal() -> None:
    assert "\x1b" not in console.screen(AtollError("FL-S100", "what"))


@pytest.mark.parametrize(
    ("environment", "colour", "redraw"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
        ({"TERM": "dumb"}, False, False),
    ],
)
def test_no_color_and_dumb_terminals_are_honoured(
    environment: dict[str, str], colour: bool, redraw: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (console.colourful(), console.interactive()) == (colour, redraw)
    assert ("\x1b" in console.screen(AtollError("FL-S100", "what"))) is colour


@dataclass
class Result:
    path: Path
    loss: float
    names: frozenset[str]


def test_plain_makes_json_of_what_results_are_made_of() -> None:
    made = console.plain(Result(Path("out/model"), float("nan"), frozenset({"b", "a"})))
    assert made == {"path": "out/model", "loss": None, "names": ["a", "b"]}
    assert console.plain({1: (1.5, float("inf"), True, None)}) == {"1": [1.5, None, True, None]}
    with pytest.raises(TypeError, match="object cannot be printed"):
        console.plain(object())


def test_emit_prints_text_and_rich_things_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    console.emit({}, False, "as it is")
    table = Table("name")
    table.add_row("fast")
    console.emit({}, False, table)
    console.emit([1, 2], False)
    out = capsys.readouterr().out
    assert out.startswith("as it is\n")
    assert "fast" in out
    assert out.endswith("[1, 2]\n")


def test_numbers_are_written_for_people() -> None:
    assert console.number(1234567) == "1,234,567"
    assert [console.size(n) for n in (0, 999, 1000, 4_100_000, 999_600, 212e6, 3e15)] == [
        "0 B", "999 B", "1.0 kB", "4.1 MB", "1.0 MB", "212 MB", "3000 TB",
    ]  # fmt: skip
    assert [console.duration(s) for s in (0.42, 9.96, 12, 59.7, 185, 7500, 300_000)] == [
        "0.4s", "10s", "12s", "1m 00s", "3m 05s", "2h 05m", "3d 11h",
    ]  # fmt: skip
    assert console.duration(float("inf")) == "-"
    assert console.percent(0.9523) == "95.2%"
