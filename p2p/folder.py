"""Folder: a peer's directory as its commands see it. Nothing here imports torch or hivemind.

peer.json         the invite with its secret, and how this machine takes part: mode 0600
founder.key       the founder's alone: what the manifest was signed with
status.json       written by the peer as it runs
model.safetensors the model, when it ended
lock              held while a peer runs
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.protocols import state
from atoll.protocols.durable import put_private
from atoll.protocols.errors import PeerError
from atoll.protocols.places import plainly

DEFAULT = Path("atoll-peer")
ABOUT, STATUS, LOCK, MODEL = "peer.json", "status.json", "lock", "model.safetensors"
KEY, SIGNED, IDENTITY, HABITS = "founder.key", "manifest.signed", "identity.key", "habits.json"
SEALS = "seals.json"  # the keys of members' seals
TOLERATED = {LOCK, "lost+found"}  # in a directory in which a peer begins
SAME_MACHINE = 64  # directories that are looked at for a free one


@dataclass(frozen=True)
class About:
    """peer.json."""

    invite: str
    name: str
    listen: tuple[str, ...]  # multiaddrs; (): it cannot be connected to
    device: str = "auto"
    speed_factor: float = 1.0


def write(folder: Path, about: About) -> None:
    """PeerError FL-P405 where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        put_private(folder / ABOUT, state.dumps(about).encode())
    except OSError as error:
        raise disk(folder, error) from error


def read(folder: Path) -> About:
    """PeerError FL-P308 where no peer lives there."""
    try:
        return state.loads(About, (folder / ABOUT).read_text())
    except FileNotFoundError as error:
        raise PeerError(
            "FL-P308",
            f"{folder} is not a peer's directory",
            "name it; `fl-peer init` and `fl-peer join` make one and say where",
        ) from error
    except OSError as error:
        raise disk(folder, error) from error
    except ValueError as error:
        raise PeerError(
            "FL-P405", f"{folder / ABOUT} cannot be read: {error}", "join anew in another directory"
        ) from error


def signed(folder: Path) -> bytes:
    """The run's manifest, with the founder's signature, in its founder's directory; elsewhere
    empty: who joins has it from a member."""
    try:
        return (folder / SIGNED).read_bytes() if (folder / KEY).exists() else b""
    except OSError as error:
        raise disk(folder, error) from error


def withdraw(folder: Path) -> None:
    """Forget what a peer wrote that never came to take part; the directory too, if it is empty."""
    with contextlib.suppress(OSError):  # what went wrong before is worth more
        for path in [*folder.glob("*.tmp"), *folder.glob("*.sock")]:
            path.unlink(missing_ok=True)
        for name in (IDENTITY, KEY, SIGNED, HABITS, SEALS, ABOUT, LOCK):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def empty(folder: Path) -> bool:
    """Whether nothing is there yet."""
    return not _content(folder)


def running(folder: Path) -> bool:
    """Whether a peer runs there."""
    try:
        with open(folder / LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def pid(folder: Path) -> int | None:
    """Of the peer that runs there; None where none does, or it has not said so yet."""
    if not running(folder):
        return None
    try:
        found = int((folder / LOCK).read_text())
    except (OSError, ValueError):
        return None
    return found if found > 1 else None


def free(folder: Path) -> None:
    """PeerError FL-P406 where a peer runs there."""
    if running(folder):
        raise in_use(folder)


def in_use(folder: Path) -> PeerError:
    """FL-P406."""
    who = pid(folder)
    return PeerError(
        "FL-P406",
        f"{folder} is in use by another peer{f' (process {who})' if who else ''}",
        f"stop it (fl-peer leave {folder}), or give another --folder",
    )


def status(folder: Path) -> dict[str, Any]:
    """What the peer said last; {} where it has not said anything."""
    try:
        told = json.loads((folder / STATUS).read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def new(folder: Path | None) -> Path:
    """A directory for another run. PeerError FL-P309 where something lies in it."""
    for path in [folder] if folder is not None else _numbered():
        if not _content(path):
            return path
        if folder is not None:
            break
    raise _taken(folder or DEFAULT)


def for_run(folder: Path | None, run: str) -> Path:
    """Where this machine takes part in the run: where it did before and no peer is running now,
    else a new directory. `run`: its id."""
    for path in [folder] if folder is not None else _numbered():
        content = _content(path)
        if not content:
            return path
        if ABOUT in content and run_of(path) == run and (folder is not None or not running(path)):
            return path
        if folder is not None:
            break
    raise _taken(folder or DEFAULT)


def run_of(folder: Path) -> str:
    """The id of the run that the peer there is in; "" where its invite cannot be read."""
    from atoll.p2p import invite

    try:
        return invite.read(read(folder).invite).run
    except PeerError:
        return ""


def _numbered() -> Iterator[Path]:
    yield DEFAULT
    yield from (Path(f"{DEFAULT}-{i}") for i in range(2, SAME_MACHINE))


def _content(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()} - TOLERATED
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise disk(folder, error) from error


def _taken(folder: Path) -> PeerError:
    peer = (folder / ABOUT).exists()
    what = "holds a peer of another run" if peer else "is not empty and holds no peer"
    return PeerError(
        "FL-P309",
        f"{folder} {what}",
        f"give a new one with --folder{f'; go on with: fl-peer start {folder}' if peer else ''}",
    )


def disk(folder: Path, error: OSError) -> PeerError:
    """FL-P405."""
    return PeerError(
        "FL-P405",
        f"{folder}: {plainly(error)}",
        "is there room, and is the directory this user's?",
    )
