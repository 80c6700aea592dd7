"""Room: whether a disk has place for what is coming in, and who is told where it has not.

Whoever sends waits and comes again every few seconds; whoever looks after the server reads once
that its disk holds somebody up.
"""

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

from atoll.protocols.errors import RemoteError

logger = logging.getLogger(__name__)

RETRY = 5.0  # seconds a client waits when there is no room
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_free(folder: Path) -> int:
    """Bytes that may still be written to the disk of `folder`."""
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


class Room:
    """On the disk of `folder`, of which `min_free` bytes must stay free; `capacity` bounds the
    bytes announced and not yet freed."""

    def __init__(
        self, folder: Path, capacity: int | None, min_free: int, free: Callable[[Path], int]
    ) -> None:
        self._folder = folder
        self._capacity, self._min_free = capacity, min_free
        self._free = free
        self._said = False

    def admit(self, size: int, announced: int) -> None:
        """RemoteError FL-W109 where so many bytes more than those `announced` are too many."""
        if self._capacity is not None and announced + size > self._capacity:
            taken = f"{announced} of {self._capacity} bytes are taken"
            raise _no_room(f"no room: {taken}, {size} more asked for")

    def on_disk(self, update: str, size: int, coming: int, clear: Callable[[], None]) -> None:
        """RemoteError FL-W109 where the disk has no place for it beside the bytes that are
        `coming`; `clear` frees what can be spared."""
        needed = coming + size + self._min_free
        if self._free(self._folder) < needed:
            clear()
            if (free := self._free(self._folder)) < needed:
                self._warn(update, size, free)
                raise _no_room(f"no room: {free} bytes are free, {needed} would have to be")

    def failed(self, update: str, size: int, error: OSError) -> RemoteError:
        """FL-W109: the disk did not take what it was given."""
        full = error.errno in FULL
        if full:
            self._warn(update, size, self._free(self._folder))
        else:
            logger.warning("update=%s the disk fails: %s", update, error)
        how = "is full" if full else "fails"
        return _no_room(f"update {update}: the disk {how}: {error.strerror}")

    def _warn(self, update: str, size: int, free: int) -> None:
        if not self._said:
            self._said = True
            logger.warning(
                "update=%s of %d bytes waits for room: %d bytes are free on the disk of %s, "
                "%d must stay free", update, size, free, self._folder, self._min_free,
            )  # fmt: skip


def _no_room(what: str) -> RemoteError:
    return RemoteError("FL-W109", what, "wait for room", retry_seconds=RETRY)
