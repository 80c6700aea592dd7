"""Room: a client's files: all of one is there or the former, and a mapped one has its place."""

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from atoll.protocols.durable import place
from atoll.protocols.errors import ClientError
from atoll.protocols.places import plainly


def map_new(path: Path, size: int) -> memoryview:
    """A file of `size` bytes, mapped to be written; what it held stays. Its room is taken at once:
    a write into a map for which the disk has none would kill the process. ClientError FL-S203."""
    with disk(path.parent), open(path, "ab+") as file:
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        return memoryview(mmap.mmap(file.fileno(), size))


def rewrite(path: Path, data: bytes, durable: bool = False) -> None:
    """Write beside and rename, so that a reader finds all of it or the former one. `durable`: also
    after a power cut. OSError."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(data)
    if durable:
        place(path)
    else:
        beside.replace(path)


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[None]:
    """ClientError FL-S203 where the disk does not take it."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise ClientError(
            "FL-S203",
            f"client folder {folder} cannot be written: {reason(error, folder)}",
            "free space on its disk and start this client again"
            if full
            else "mend that, or give another --dir",
        ) from error


def reason(error: OSError, folder: Path) -> str:
    """What is wrong, and with which file of `folder`."""
    where = Path(str(error.filename or folder))
    name = "" if where == folder else f"{where.name}: "
    return f"{name}{plainly(error)}"
