"""Offline: what a state directory tells when no server runs. Never writes to it."""

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from atoll.protocols import places
from atoll.protocols.errors import ServerError, UsageError
from atoll.server.history import History
from atoll.server.rules import Rules
from atoll.server.spec import RunSpec
from atoll.server.status import ClientStatus, Status

DEPTH = 4  # folders below the one asked for in which runs are looked for


def find(folder: Path) -> Path:
    """The state directory in `folder` or in its `state/`, as a demo leaves it. FL-S107: none."""
    for candidate in (folder, folder / "state"):
        if (candidate / "run.json").is_file():
            return candidate
    raise ServerError(
        "FL-S107",
        f"no run in {folder}",
        "name the state directory of a run; `fl-server run ls` lists them",
    )


def runs(folder: Path) -> Iterator[Path]:
    """Every state directory in and below `folder`, in order of their paths."""
    for root, folders, files in os.walk(folder):
        here = Path(root)
        if "run.json" in files:
            folders.clear()
            yield here
        deep = len(here.relative_to(folder).parts) >= DEPTH
        folders[:] = [] if deep else sorted(f for f in folders if not f.startswith("."))


def history(state: Path) -> History:
    """What happened so far; empty for a run that has not begun. ServerError FL-S206."""
    path = state / "history.jsonl"
    try:
        return History.read(path) if path.exists() else History()
    except (OSError, ValueError) as error:
        raise unread(path, error) from error


def unread(path: Path, error: OSError | ValueError) -> ServerError:
    """A history that cannot be read; a ValueError names the line."""
    what = f"{path} cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
    return ServerError("FL-S206", what, "restore it from a backup")


def status(state: Path) -> Status:
    """Where the run stands, by what was written down. ServerError FL-S107, FL-S206."""
    state = find(state)
    spec, told = RunSpec.read(state / "run.json"), history(state)
    return end_of(
        Status(
            spec.id, spec.name, spec.strategy, "stopped",
            f"no server runs; go on with: fl-server start --state {shlex.quote(str(state))}",
            max(versions(state), default=0),
            clients=tuple(_client(told, name) for name in sorted(told.clients)),
            state_dir=str(state),
        ),
        told,
    )  # fmt: skip


def end_of(status: Status, told: History) -> Status:
    """The same run as its history leaves it."""
    rules, used, over = judged(told), _used(told), told.finished is not None
    return replace(
        status,
        state="finished" if over else status.state,
        reason=told.finished or status.reason,
        version=max(told.version, status.version),
        updates=len(used),
        steps=sum(used.values()),
        elapsed_s=round(told.now, 3),
        metric=rules.metric,
        target=told.limits.get("target"),
        latest=rules.latest,
        latest_version=None if rules.latest is None else rules.latest_version,
        best=rules.best,
        best_version=rules.best_version,
        clients=tuple(_counted(client, told) for client in status.clients),
        epsilon=told.epsilon,
        groups=(),
    )


def judged(told: History) -> Rules:
    """Which version was best: by what its limits look at, else by accuracy, else by loss."""
    asked = told.limits.get("metric")
    measured = {name for _, _, metrics in told.evaluations for name in metrics}
    usual = "loss" if "accuracy" not in measured and "loss" in measured else "accuracy"
    rules = Rules(metric=asked if asked in measured else usual)
    for now, version, metrics in told.evaluations:
        rules.evaluated(version, metrics, now)
    return rules


def _used(told: History) -> Mapping[str, int]:
    """Local steps of every update that is part of a version."""
    steps = {row["update"]: row["steps"] for row in told.rows if row["kind"] == "update"}
    merged = (row for row in told.rows if row["kind"] == "merged")
    dropped = {update for row in merged for update, _ in row.get("dropped", ())}
    items = (item for row in told.rows if row["kind"] == "aggregate" for item in row["items"])
    return {update: steps.get(update, 0) for update, _ in items if update not in dropped}


def _client(told: History, name: str) -> ClientStatus:
    totals = told.clients[name]
    why = "no server runs" if told.finished is None else "the run is over"
    return ClientStatus(
        name,
        "offline" if totals.here else "left",
        why if totals.here else _last_words(told, name),
        seconds_per_step=1 / totals.pace if totals.pace else None,
        updates=totals.updates,
        bytes_up=totals.bytes_up,
        bytes_down=totals.bytes_down,
    )


def _counted(client: ClientStatus, told: History) -> ClientStatus:
    totals = told.clients.get(client.name)
    return client if totals is None else replace(client, updates=totals.updates)


def _last_words(told: History, name: str) -> str:
    left = (r for r in reversed(told.rows) if r["kind"] == "leave" and r["client"] == name)
    return str(next(left)["reason"])


def files(state: Path) -> dict[str, int]:
    """What else lies there, in bytes: files, and the table's rows together."""
    found = {p.name: p.stat().st_size for p in sorted(state.iterdir()) if p.is_file()}
    found.pop("lock", None)
    rows = 0
    for path in (state / "rows").glob("*"):
        with contextlib.suppress(FileNotFoundError):  # forgotten by the server meanwhile
            rows += path.stat().st_size
    return {**found, "rows/": rows} if rows else found


# ---- versions --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kept:
    """A version on disk, by its own account."""

    version: int
    path: Path
    bytes: int
    payload_sha256: str  # of the tensors, without the file's header
    metrics: Mapping[str, float] = field(default_factory=dict)


def versions(state: Path) -> dict[int, Path]:
    """The models on disk, by version."""
    folder = state / "versions"
    found = {int(p.name): p for p in folder.glob("*") if p.name.isdecimal()}
    files = {n: p / "model.safetensors" for n, p in sorted(found.items())}
    return {n: p for n, p in files.items() if p.exists()}


def kept(state: Path, told: History) -> list[Kept]:
    """The versions on disk, oldest first, with what they were found to be worth."""
    worth = {version: metrics for _, version, metrics in told.evaluations}
    return [
        Kept(number, path, path.stat().st_size, sha256_of(path), worth.get(number, {}))
        for number, path in versions(state).items()
    ]


def sha256_of(model: Path) -> str:
    """What the version's own record says. ServerError FL-S206 where it says nothing."""
    path = model.with_name("version.json")
    try:
        return str(json.loads(path.read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ServerError(
            "FL-S206", f"{path} cannot be read: {error!r}", "export another version"
        ) from error


def pick(state: Path, wanted: str) -> int:
    """The number of version "best", "last" or "N". ServerError FL-S107 where it is not kept."""
    numbers = list(versions(state))
    if not numbers:
        raise ServerError("FL-S107", f"no version in {state}", "its server makes the first")
    found: int | None
    if wanted == "last":
        found = numbers[-1]
    elif wanted == "best":
        found = judged(history(state)).best_version
        found = numbers[-1] if found is None else found  # nothing was evaluated
    else:
        found = int(wanted) if wanted.isdecimal() else None
    if found not in numbers:
        raise ServerError(
            "FL-S107", f"version {wanted} is not kept in {state}",
            f"kept: {', '.join(map(str, numbers))}; or best, or last",
        )  # fmt: skip
    return found


def export(state: Path, number: int, target: Path) -> str:
    """Copy a version's model, checked against its record, to `target`; its SHA-256 there, hex.

    Atomic. UsageError FL-S108 where nothing can be put there, ServerError FL-S206 where the version
    is damaged, FL-S203 where the disk does not take it.
    """
    target = places.target(target)
    if not target.parent.is_dir():
        hint = f"make it (mkdir -p {shlex.quote(str(target.parent))}), or give another --output"
        raise UsageError("FL-S108", f"no folder {target.parent}", hint)
    if not os.access(target.parent, os.W_OK):
        hint = "give an --output that you may write"
        raise UsageError("FL-S108", f"{target.parent} may not be written", hint)
    from atoll.server.regions import disk, map_file, write_file

    model = versions(state)[number]
    expected = sha256_of(model)
    try:
        head, data = map_file(model, sha=True)
    except (OSError, ValueError) as error:
        raise _damaged(number, str(error)) from error
    if data.sha256.hex() != expected:
        raise _damaged(number, f"SHA-256 is {data.sha256.hex()[:12]}, written was {expected[:12]}")
    with disk(target):
        part = target.with_name(target.name + ".part")
        try:
            write_file(part, [head, data.view], durable=False)
            os.replace(part, target)
        except OSError:
            part.unlink(missing_ok=True)
            raise
    return expected


def _damaged(number: int, what: str) -> ServerError:
    return ServerError("FL-S206", f"version {number} is damaged: {what}", "export another version")


def best_model(state: Path, history: History, metric: str = "accuracy") -> Path:
    """The kept version with the highest `metric`, else the newest. ServerError FL-S107."""
    found = versions(state)
    if not found:
        raise ServerError("FL-S107", f"no version in {state}", "name the state directory of a run")
    judged = [p for p in history.series(metric) if p.version in found]
    best = max(judged, key=lambda p: p.value, default=None)
    return found[best.version if best else max(found)]
