"""`fl-peer status`, `invite`, `leave`, `doctor`: look at a peer and its run, and end it."""

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from atoll.p2p import folder as folders
from atoll.p2p.line import near_members, waits
from atoll.protocols import console, places
from atoll.protocols.errors import PeerError, UsageError

if TYPE_CHECKING:
    import psutil

_FOLDER = click.argument("folder", type=places.Place(), default=folders.DEFAULT)


@click.command()
@_FOLDER
@console.json_option
def status(folder: Path, as_json: bool) -> None:
    """Where the peer in FOLDER and its run stand."""
    about = folders.read(folder)
    told = folders.status(folder)
    told["running"] = folders.running(folder)
    told["folder"], told["name"] = str(folder), about.name
    if told["running"] and told.get("pid") != folders.pid(folder):
        told["state"] = "starting"  # what lies there was said by its last life
    try:
        screen = "" if as_json else _screen(told)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PeerError(
            "FL-P405",
            f"{folder / folders.STATUS} is not what a peer writes: {error!r}",
            "a peer that runs there writes it anew; was it another release's?",
        ) from error
    console.emit(told, as_json, screen)


def _screen(told: dict[str, Any]) -> str:
    if "round" not in told:
        state = "it has just been started" if told["running"] else "it has not run yet"
        return f"{told['name']}: {state}; fl-peer start {told['folder']} runs it"
    age = max(0.0, time.time() - float(told.get("at", 0)))
    state = told["state"] if told["running"] else "not running"
    rounds = f"/{told['rounds']}" if told.get("rounds") else ""
    loss = told.get("loss")
    lines = [
        f"{told['name']}  {state}   round {told['round']}{rounds}   "
        f"loss {'-' if loss is None else f'{loss:.4f}'}   "
        f"up {console.size(told.get('bytes_out', 0))}   "
        f"down {console.size(told.get('bytes_in', 0))}   {console.duration(age)} ago",
        f"run {told['run']}   model {told.get('digest', '')[:16] or '-'}",
    ]
    rows: list[tuple[str, ...]] = [("PEER", "NAME", "ROUND", "HEARD", "STATE")]
    near = near_members(told)
    rows += [_row(member, told, near) for member in told.get("members", ())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if told["running"] and waits(told):
        lines.append(waits(told))
    if told.get("why"):
        lines.append(f"last round put off: {told['why']}")
    return console.clean_lines("\n".join(lines))


def _row(member: dict[str, Any], told: dict[str, Any], near: list[str]) -> tuple[str, ...]:
    silent = member.get("silent")
    heard = "never" if silent is None else console.duration(silent)
    at, what = member.get("round", -1), "ready" if member.get("ready") else "training"
    if member["peer"] == told["peer"]:
        at, heard, what = told["round"], "-", "this peer"
    elif member.get("left"):  # the roster has it until its entry is too old
        heard, what = "-", "left"
    elif member["peer"] not in near:
        what = "silent"
    round_ = "-" if at == -1 else str(at)  # it has said none yet
    return member["peer"][-8:], console.clean(member["name"]), round_, heard, what


@click.command()
@_FOLDER
@console.json_option
def invite(folder: Path, as_json: bool) -> None:
    """Print an invite to the run of the peer in FOLDER, with the addresses known now."""
    from dataclasses import replace

    from atoll.p2p.invite import ADDRESSES, read, write

    papers = read(folders.read(folder).invite)
    known = folders.status(folder).get("addresses", ())
    told_there = [a for a in known if isinstance(a, str)] if isinstance(known, list) else []
    places = tuple(dict.fromkeys((*told_there, *papers.addresses)))[:ADDRESSES]
    text = write(replace(papers, addresses=places))
    told = {"invite": text, "run": papers.run, "addresses": places, "manifest": papers.manifest}
    console.emit(told, as_json, text)


@click.command()
@_FOLDER
@click.option(
    "--timeout", default=60.0, show_default=True, metavar="SECONDS", help="To wait for its end."
)
@console.json_option
def leave(folder: Path, timeout: float, as_json: bool) -> None:
    """Have the peer in FOLDER say goodbye and end."""
    import psutil

    if not timeout >= 0:
        raise UsageError("FL-S108", f"--timeout {timeout}", "give seconds, 0 or more")
    folders.read(folder)
    pid = folders.pid(folder)
    if pid is None:
        raise PeerError(
            "FL-P310", f"no peer runs in {folder}", f"start it with: fl-peer start {folder}"
        )
    process = psutil.Process(pid) if psutil.pid_exists(pid) else None
    with contextlib.suppress(psutil.NoSuchProcess):  # it ended just now
        if process is not None:
            process.terminate()
    end = time.monotonic() + timeout
    while folders.running(folder) or _alive(process):  # it writes its model last
        if time.monotonic() > end:
            raise PeerError(
                "FL-P311",
                f"the peer in {folder} (process {pid}) has not ended in {timeout:g} s",
                f"wait longer with --timeout, or: kill -9 {pid}",
            )
        time.sleep(0.05)
    last = folders.status(folder)
    left = last.get("state") == "left"  # with a goodbye; who is alone says none
    told = {**last, "running": False, "left": left, "folder": str(folder)}
    after = f"after {told.get('round', 0)} rounds"
    human = f"left {after}" if left else f"stopped {after}; go on with   fl-peer start {folder}"
    console.emit(told, as_json, human)


def _alive(process: "psutil.Process | None") -> bool:
    import psutil

    try:
        return process is not None and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@click.command()
@click.argument("invite", default="")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=None,
    help="TCP port for other peers.  [default: as `fl-peer join` would]",
)  # fmt: skip
@console.json_option
def doctor(invite: str, port: int | None, as_json: bool) -> None:
    """Check whether this machine can take part in a run.

    The daemon, the port and the addresses; with INVITE also the way to the run's members, the way
    back, the clock and the secret.
    """
    from atoll.p2p.invite import read, typed

    papers = None
    if invite:
        papers = read(typed(sys.stdin) if invite == "-" else invite)
    from atoll.p2p.doctor import examine
    from atoll.protocols.loops import run

    checks = run(examine(papers, port))
    problems = [check for check in checks if check.verdict == "problem"]
    marks = {"good": "ok", "problem": "NO", "note": "--"}
    lines = []
    for check in checks:
        lines.append(f"{marks[check.verdict]:<3} {check.name:<9} {check.said}")
        lines += [f"{'':<13} do   {check.remedy}"] if check.remedy else []
    told = {"checks": checks, "problems": len(problems)}
    console.emit(told, as_json, console.clean_lines("\n".join(lines)))
    if problems:
        what = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        error = PeerError("FL-P312", what, "see above")
        if as_json:  # the checks are the one object
            click.get_current_context().exit(error.exit_code)
        raise error
