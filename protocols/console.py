"""What the three command lines share: data on stdout, talk on stderr, errors as one screen.

Imports click alone; rich only when something rich is shown, and never torch, grpc or hivemind, so
that `--help` is quick. A command raises AtollError and knows nothing of screens: `run` turns it
into text or, with `--json`, into the envelope, and into an exit code.
"""

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from atoll.protocols import helptext
from atoll.protocols.errors import AtollError, ServerError, UsageError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

F = TypeVar("F", bound=Callable[..., Any])

# ANSI sequences whole, then what is left of C0, C1 and the marks that turn text around
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]+")


def not_empty(context: click.Context, option: click.Parameter, value: str) -> str:
    """For an option whose absence means something: `--dp "$UNSET"` is not the same."""
    given = context.get_parameter_source(option.name or "")
    if not value and given is ParameterSource.COMMANDLINE:
        raise click.BadParameter("it is empty: say what you mean, or leave the option out")
    return value


def json_option(command: F) -> F:
    """Give a command `--json` (argument `as_json`) and `-v` (see `verbosity`)."""
    verbose = click.option(
        "-v",
        "--verbose",
        count=True,
        expose_value=False,
        callback=_remember_verbosity,
        help="Say more; with errors, the traceback.",
    )
    as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
    return as_json(verbose(command))


def verbosity() -> int:
    """How many `-v` the running command was given."""
    context = click.get_current_context(silent=True)
    return int(context.meta.get("atoll.verbose", 0)) if context else 0


def emit(data: object, as_json: bool, human: "str | RenderableType | None" = None) -> None:
    """The command's result on stdout: the envelope, or `human`, or one line per field of `data`."""
    if as_json:
        click.echo(_envelope({"v": 1, "ok": True, "data": plain(data)}))
    elif human is None:
        click.echo(_listing(plain(data)))
    elif isinstance(human, str):
        click.echo(human)
    else:
        console(stderr=False).print(human)


def say(text: str) -> None:
    """One line of talk, on stderr."""
    click.echo(text, err=True)


def console(stderr: bool = True) -> "Console":
    """A rich console that honours NO_COLOR and TERM=dumb."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, no_color=None if colourful() else True)


def width() -> int | None:
    """Columns of the terminal that stdout is; None where it is none, and nothing is wrapped."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def interactive() -> bool:
    """Whether stderr is a terminal on which something may be redrawn."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def colourful() -> bool:
    """Whether colour and wide Unicode are welcome on stderr."""
    return interactive() and not os.environ.get("NO_COLOR")


def run(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit code: `sys.exit(run(cli))`.

    AtollError becomes the error screen and its own code, a click usage error FL-S108, Ctrl-C 130,
    and anything else FL-S100 with a crash file and no traceback unless `-v` was given. A command
    that returns an int has chosen its exit code itself.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    helptext.dress(command)
    as_json, lines, verbose = _asked(given)
    told = functools.partial(report, as_json=as_json, final=lines)
    try:
        code = command.main(given, prog_name=_program(command), standalone_mode=False)
        return code if type(code) is int else 0
    except AtollError as error:
        if verbose:
            traceback.print_exc()
        return told(error)
    except (click.Abort, KeyboardInterrupt):  # click makes an Abort of the latter
        return told(AtollError("FL-S208", "interrupted"))
    except SystemExit as stop:
        if _raised_by(stop) == "click.core":  # the reader of our output went away
            return 1
        if verbose:
            traceback.print_exc()
        what = f"code that this command runs calls sys.exit({stop.code!r})"
        hint = "take it out of your module: -v shows where"
        return told(UsageError("FL-S103", what, hint))
    except click.ClickException as error:
        return _report_usage(error, as_json, lines)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return told(_full(error) if full else _crash(error, verbose))
    except Exception as error:  # noqa: BLE001 - the last line of defence of a process
        return told(_crash(error, verbose))


# ---- errors --------------------------------------------------------------------------------


def screen(error: AtollError) -> str:
    """`error FL-…: what`, the remedy and the page: three lines, safe to print."""
    head = click.style(f"error {error.code}:", fg="red", bold=True)
    lines = [f"{head} {clean(error.message)}"]
    if error.hint:
        lines.append(f"  fix    {clean(error.hint)}")
    lines.append(f"  docs   {error.docs}")
    text = "\n".join(lines)
    return text if colourful() else click.unstyle(text)


def failure(error: AtollError) -> dict[str, object]:
    """The envelope of an error, as plain data."""
    told = {
        "code": error.code,
        "message": clean(error.message),
        "hint": clean(error.hint),
        "docs": error.docs,
    }
    return {"v": 1, "ok": False, "error": told}


def report(error: AtollError, as_json: bool, final: bool = False) -> int:
    """Tell of it as a command does; its exit code. `final`: as the last line of a stream."""
    try:
        if as_json or final:
            click.echo(_envelope(failure(error) | ({"final": True} if final else {})))
        else:
            say(screen(error))
    except OSError:  # stdout lies on a full disk, or both do
        with contextlib.suppress(OSError):
            say(screen(error))
    _hush()
    return error.exit_code


def _hush() -> None:
    """What could not be written is dropped: Python tries once more when it ends, and then ends with
    a code of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _report_usage(error: click.ClickException, as_json: bool, final: bool) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "the command"
    if type(error).__name__ == "NoArgsIsHelpError" and not (as_json or final):
        say(error.format_message())
        return error.exit_code
    message = "no command given" if type(error).__name__ == "NoArgsIsHelpError" else ""
    told = UsageError("FL-S108", message or error.format_message(), f"see `{path} --help`")
    report(told, as_json, final)
    return error.exit_code if isinstance(error, click.UsageError) else told.exit_code


def _full(error: OSError) -> AtollError:
    what = error.filename or "what this command says or makes"
    return ServerError("FL-S203", f"{what} cannot be written: {error.strerror}", "free space there")


def _crash(error: Exception, verbose: bool) -> AtollError:
    """Write the traceback where it can be sent from, and say where."""
    text = "".join(traceback.format_exception(error))
    if verbose:
        click.echo(text, err=True)
    try:
        handle, path = tempfile.mkstemp(prefix="atoll-crash-", suffix=".txt")
        with os.fdopen(handle, "w") as file:
            file.write(f"{' '.join(sys.argv)}\n\n{text}")
        hint = f"this is a bug: please report it with {path}"
    except OSError as full:
        hint = f"this is a bug; no crash file could be written ({full}): run again with -v"
    return AtollError("FL-S100", f"{type(error).__name__}: {error}", hint)


def _raised_by(error: BaseException) -> str:
    """The module that raised it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"])


def _asked(arguments: list[str]) -> tuple[bool, bool, bool]:
    """(--json, --jsonl, -v) as typed, since a usage error comes before click has parsed them."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    verbose = any(re.fullmatch(r"-v+|--verbose", a) for a in options)
    return "--json" in options, "--jsonl" in options, verbose


def _program(command: click.Command) -> str:
    return command.name or "atoll"


def _remember_verbosity(context: click.Context, option: click.Parameter, value: int) -> int:
    context.meta["atoll.verbose"] = value
    return value


# ---- data and text -------------------------------------------------------------------------


def plain(value: object) -> Any:
    """JSON data for dataclasses, mappings, sets, paths; numbers that are not finite become null."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Set):
        return [plain(v) for v in sorted(value)]
    if isinstance(value, Sequence):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be printed as JSON: {value!r}")


def _envelope(data: dict[str, object]) -> str:
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


def _listing(data: object) -> str:
    if not isinstance(data, dict):
        return clean(str(data))
    width = max((len(k) for k in data), default=0)
    return "\n".join(f"{k:<{width}}  {clean(str(v))}" for k, v in data.items())


def clean(text: str) -> str:
    """`text` without control characters and escape sequences: a remote's words, safe to print."""
    return _CONTROLS.sub(" ", _ESCAPES.sub("", text)).strip()


def clean_lines(text: str) -> str:
    """The same for a text of several lines, whose breaks and indents stay."""
    return "\n".join(_CONTROLS.sub(" ", _ESCAPES.sub("", one)).rstrip() for one in text.split("\n"))


def number(value: float) -> str:
    """1234567 -> "1,234,567"."""
    return f"{value:,.0f}"


def size(count: float) -> str:
    """Bytes for people, powers of 1000: 4100000 -> "4.1 MB"."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while abs(count) >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    digits = 1 if abs(count) < 99.95 and units[0] != "B" else 0
    return f"{count:.{digits}f} {units[0]}"


def duration(seconds: float) -> str:
    """0.42 -> "0.4s", 185 -> "3m 05s", 7500 -> "2h 05m", 300000 -> "3d 11h"."""
    if seconds - seconds != 0:  # infinite, or not a number
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def percent(share: float) -> str:
    """0.9523 -> "95.2%"."""
    return f"{100 * share:.1f}%"
