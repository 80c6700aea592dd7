"""`fl-server status` and `fl-server run ...`: where runs stand, and what is left of them."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from atoll.protocols import console, places
from atoll.protocols.errors import AtollError, UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from atoll.server.look import Place
    from atoll.server.status import Status

F = TypeVar("F", bound=Callable[..., Any])

STATE = Path("atoll-state")  # where `start` puts a run unless told otherwise
ADDRESS = "127.0.0.1:7447"
GLANCE = 2.0  # seconds that `run ls` gives a server

_ADDRESS = click.option(
    "--address", default=None, metavar="HOST:PORT", help=f"Of its server.  [default: {ADDRESS}]"
)
_JSONL = click.option(
    "--jsonl", is_flag=True, help='One JSON object a line; the last has "final": true.'
)
_FOLDER = places.Place(refusal=places.state_directory)


@click.command()
@_ADDRESS
@click.option(
    "--state", type=_FOLDER, default=None,
    help=f"State directory, of a running server or of none.  [default: {STATE} if it is there]",
)  # fmt: skip
@click.option("--watch", is_flag=True, help="Again and again, until the run is over.")
@_JSONL
@console.json_option
def status(
    address: str | None, state: Path | None, watch: bool, jsonl: bool, as_json: bool
) -> None:
    """Show where a run stands: one screen, each client with its state, reason and age."""
    from atoll.server.screen import status_screen

    stream = Stream(as_json, jsonl)
    place = place_of(address, state)
    found = _watch_status(place, stream) if watch or jsonl else place.status()
    stream.end(found, status_screen(found))


@click.group()
def run() -> None:
    """Look at runs, watch them, and take their models."""


@run.command()
@click.argument("folder", type=places.Place(), default=Path("."))
@console.json_option
def ls(folder: Path, as_json: bool) -> None:
    """List the runs whose state directories lie in or below FOLDER (this one, if not given)."""
    from atoll.server import offline
    from atoll.server.screen import runs_screen

    if not folder.is_dir():
        raise UsageError("FL-S108", f"no folder {folder}", "give the folder that holds your runs")
    found = [_summary(state) for state in offline.runs(folder)]
    console.emit({"runs": found}, as_json, _shown(runs_screen(found)))


@run.command()
@click.argument("state", type=_FOLDER, default=STATE)
@console.json_option
def show(state: Path, as_json: bool) -> None:
    """Show everything known of the run in STATE (atoll-state, if not given)."""
    from atoll.server import offline
    from atoll.server.look import Place
    from atoll.server.screen import run_screen
    from atoll.server.spec import RunSpec

    state = offline.find(state)
    spec, where = RunSpec.read(state / "run.json"), Place(state=state).status()
    kept = offline.kept(state, offline.history(state))
    files = offline.files(state)
    told = {"spec": spec, "status": where, "versions": kept, "files": files}
    console.emit(told, as_json, _shown(run_screen(spec, where, kept, files)))


@run.command("watch")
@click.argument("state", type=_FOLDER, required=False)
@_ADDRESS
@_JSONL
@console.json_option
def watch_run(
    state: Path | None, address: str | None, jsonl: bool, as_json: bool
) -> None:  # fmt: skip
    """Watch a run until it is over: a live table, or one line per event where there is no terminal.

    STATE is its state directory; without it, and without --address, atoll-state is looked for.
    """
    from atoll.server.live import Live
    from atoll.server.look import Watch
    from atoll.server.screen import worth

    stream = Stream(as_json, jsonl)
    place = place_of(address, state)
    found = Watch(place, Live(quiet=as_json or jsonl), stream.row).run()
    ended = found.reason or "it goes on"
    stream.end(found, f"{found.state}: {ended}\nv{found.version}, {worth(found)}")


@run.command()
@click.argument("state", type=_FOLDER, default=STATE)
@click.option(
    "--version", "wanted", default="best", show_default=True, help="best, last, or a number."
)
@click.option(
    "-o", "--output", type=places.Place(folder=False), default=None,
    help="[default: NAME-vN.safetensors]",
)  # fmt: skip
@click.option(
    "--format", "kind", type=click.Choice(["safetensors"]), default="safetensors",
    show_default=True, help="Of the file.",
)  # fmt: skip
@console.json_option
def export(state: Path, wanted: str, output: Path | None, kind: str, as_json: bool) -> None:
    """Copy a version's model out of the run in STATE, checked against its SHA-256."""
    from atoll.server import offline
    from atoll.server.spec import RunSpec

    state = offline.find(state)
    number = offline.pick(state, wanted)
    name = RunSpec.read(state / "run.json").name.replace("/", "-")
    target = output or Path(f"{name}-v{number}.{kind}")
    payload = offline.export(state, number, target)
    written = places.target(target)
    size = written.stat().st_size
    with written.open("rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest()
    told = {
        "version": number, "file": target, "format": kind, "bytes": size, "sha256": whole,
        "payload_sha256": payload,
    }  # fmt: skip
    console.emit(told, as_json, f"v{number} -> {target} ({console.size(size)})")


# ---- parts -----------------------------------------------------------------------------------


def place_of(address: str | None, state: Path | None) -> "Place":
    """What was asked for; else `atoll-state` where there is one, else the usual address."""
    from atoll.server.look import Place

    if address is not None and state is not None:
        raise UsageError("FL-S108", "both an address and a state directory", "give one of them")
    if address is None and state is None:
        state = STATE if (STATE / "run.json").exists() else None
        address = ADDRESS if state is None else None
    return Place(address, state)


@dataclass
class Stream:
    """What a command that goes on says on stdout: with --jsonl each row, and always its end; where
    that is an error, `console.run` says it."""

    as_json: bool
    jsonl: bool

    def row(self, row: Mapping[str, Any]) -> None:
        if self.jsonl:
            click.echo(json.dumps(console.plain(row), separators=(",", ":")))

    def end(self, data: object, human: "Text | str") -> None:
        if self.jsonl:
            self.row({"v": 1, "ok": True, "final": True, "data": data})
        else:
            console.emit(data, self.as_json, _shown(human))


def _shown(text: "Text | str") -> "Text | str":
    """Styled on a terminal; in a pipe plain, and never cut to a width."""
    if isinstance(text, str) or sys.stdout.isatty():
        return text
    return text.plain


def _watch_status(place: "Place", stream: Stream) -> "Status":
    from atoll.server.look import ANSWER
    from atoll.server.screen import status_screen, worth

    live = _screen_on_terminal() if not (stream.as_json or stream.jsonl) else None
    said = ""
    try:
        while True:
            found = place.status(ANSWER)
            if live is not None:
                live.update(status_screen(found), refresh=True)
            stream.row(console.plain(found))
            line = f"{found.state} v{found.version}, {worth(found)}, {found.updates} updates"
            if live is None and not (stream.as_json or stream.jsonl) and line != said:
                console.say(line)
                said = line
            if found.state != "running":
                return found
            time.sleep(1.0)
    finally:
        if live is not None:
            live.stop()


def _screen_on_terminal() -> Any:
    if not console.interactive():
        return None
    from rich.live import Live

    live = Live(console=console.console(), auto_refresh=False, transient=True)
    live.start()
    return live


def _summary(state: Path) -> dict[str, object]:
    """A run in one line; a damaged one too."""
    try:
        found = _glance(state)
    except AtollError as error:
        return {
            "state_dir": str(state), "run": None, "name": "", "strategy": "", "state": "damaged",
            "reason": error.message, "version": None, "metric": "", "best": None, "updates": 0,
            "elapsed_s": 0.0,
        }  # fmt: skip
    kept = (
        "run", "name", "strategy", "state", "reason", "version", "metric", "best", "updates",
        "elapsed_s",
    )  # fmt: skip
    return {"state_dir": str(state), **{name: getattr(found, name) for name in kept}}


def _glance(state: Path) -> "Status":
    """Of a server that does not answer soon, as one that is just starting, what its files tell."""
    from atoll.server import offline
    from atoll.server.look import Place

    try:
        return Place(state=state).status(GLANCE)
    except AtollError as error:
        if error.code != "FL-S207":
            raise
        told = offline.status(state)
        if told.state == "finished":
            return told
        return replace(told, state="running", reason=error.message)
