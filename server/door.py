"""Door: one server in a state directory, and its address: who has it, and that nobody else does."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atoll.protocols.errors import ServerError
from atoll.server.claim import folder_made


class locked:  # noqa: N801  # reads as a verb
    """The state directory, ours alone while this lasts. FL-S202 names the other's pid."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        while not self._taken():
            os.close(self._fd)  # its file was removed between the two: that lock keeps nobody out

    def _taken(self) -> bool:
        path = self.folder / "lock"
        try:
            folder_made(self.folder)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ServerError(
                "FL-S206",
                f"state directory {self.folder}: {error.strerror}",
                "give another --state",
            ) from error
        try:
            _lock(self._fd)
        except OSError as error:
            os.close(self._fd)
            pid = read_note(self.folder).get("pid")
            raise ServerError(
                "FL-S202",
                f"state directory {self.folder} is in use by another server"
                + (f" (pid {pid})" if pid else ", which is starting"),
                f"stop it{f' (kill {pid})' if pid else ''} or give another --state",
            ) from error
        try:
            return os.path.samestat(os.fstat(self._fd), path.stat())
        except FileNotFoundError:
            return False

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # as after a kill: it names one who holds no lock
            (self.folder / "server.json").unlink()
        os.close(self._fd)


@contextlib.contextmanager
def beginning(folder: Path, run: str) -> Iterator[None]:
    """Around the start of a run: one that could not begin leaves the folder as it was.

    Nothing is done where it began, or was there before, or is another server's.
    """
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    fresh = not (folder / "run.json").exists()
    try:
        yield
    except BaseException as error:
        ours = fresh and folder.exists()
        if ours and getattr(error, "code", "") not in ("FL-S202", "FL-S109"):
            with contextlib.suppress(OSError, ServerError):  # what went wrong first is worth more
                with locked(folder):
                    _withdraw(folder, run)
                for made in missing:
                    made.rmdir()
        raise


def _withdraw(folder: Path, run: str) -> None:
    """Forget a run that has no version; of another one that was begun meanwhile, nothing."""
    path = folder / "run.json"
    if any((folder / "versions").glob("*")) or (path.exists() and run not in path.read_text()):
        return
    for name in ("run.json", "server.json", "history.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("journal.sqlite*"):
        path.unlink()
    for name in ("updates", "versions", "rows"):
        with contextlib.suppress(OSError):
            (folder / name).rmdir()
    (folder / "lock").unlink(missing_ok=True)  # last: nobody comes in before


def _lock(fd: int) -> None:
    """OSError where a server has it: a look (`held`) has it for a moment only."""
    for _ in range(3):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.02)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def held(folder: Path) -> bool:
    """Whether a server has the state directory: it lives, if it answers or not."""
    try:
        fd = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two looks are in nobody's way
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(fd)
    return False


def bind(server: Any, address: str) -> str:
    host = address.rpartition(":")[0]
    port, reason = 0, _taken(address)
    if not reason:
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            reason = str(error)
    if not port:
        raise ServerError(
            "FL-S201",
            f"cannot listen on {address}: {reason}",
            "another process has the port, or the address is not this machine's: choose another",
        )
    return f"{host}:{port}"


def _taken(address: str) -> str:
    """Why nothing can listen there; empty: it can. Asked before gRPC, which logs what it meets."""
    host, _, port = address.rpartition(":")
    reason = "no such address"
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        return str(error.strerror)
    for family, kind, protocol, _, place in found:
        try:
            with socket.socket(family, kind, protocol) as door:
                door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                door.bind(place)
                door.listen(1)
        except OSError as error:
            reason = str(error.strerror)
        else:
            return ""
    return reason


def write_note(folder: Path, address: str) -> None:
    path = folder / "server.json"
    try:
        path.write_text(json.dumps({"pid": os.getpid(), "address": address}))
    except OSError as error:
        what = f"{path} cannot be written: {error.strerror}"
        raise ServerError("FL-S203", what, "free space on its disk and start again") from error


def read_note(folder: Path) -> dict[str, Any]:
    """Who serves a state directory: {"pid", "address"}; empty where nobody does."""
    try:
        found = json.loads((folder / "server.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
