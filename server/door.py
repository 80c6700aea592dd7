"""Door: one server in a state directory, and its address: who has it, and that nobody else does."""

import contextlib
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

from atoll.protocols.errors import ServerError
from atoll.server.claim import folder_made


class locked:  # noqa: N801  # reads as a verb
    """The state directory, ours alone while this lasts. FL-S202 names the other's pid."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        try:
            folder_made(self.folder)
            self._fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ServerError(
                "FL-S206",
                f"state directory {self.folder}: {error.strerror}",
                "give another --state",
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            pid = read_note(self.folder).get("pid", "?")
            raise ServerError(
                "FL-S202",
                f"state directory {self.folder} is in use by another server (pid {pid})",
                f"stop it (kill {pid}) or give another --state",
            ) from error

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # as after a kill: it names one who holds no lock
            (self.folder / "server.json").unlink()
        os.close(self._fd)


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
