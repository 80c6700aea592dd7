"""Durable: files that are whole, or the former ones, also after a power cut.

Written beside their name, made durable, then renamed; and the folder made durable, in which the
name stands.
"""

import os
from pathlib import Path


def place(path: Path) -> None:
    """Make durable what lies beside `path` as `.tmp`, and give it its name. OSError."""
    beside = path.with_name(f"{path.name}.tmp")
    sync(beside)
    beside.replace(path)
    sync(path.parent)


def put_private(path: Path, data: bytes) -> None:
    """`data` as `path`, for this user alone. OSError."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    place(path)


def sync(path: Path) -> None:
    """Make a file durable, or the names in a folder. OSError."""
    found = os.open(path, os.O_RDONLY)
    try:
        os.fsync(found)
    finally:
        os.close(found)
