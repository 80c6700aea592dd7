"""Claim: a run begins in a folder of its own, and one that cannot begin leaves it as it was."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from atoll.protocols.errors import ServerError

TOLERATED = ("lock", "lost+found")  # in a folder in which a run begins


def refuse_foreign(folder: Path) -> None:
    """A run is begun in a folder of its own: what else lies there is somebody's."""
    try:
        found = sorted(p.name for p in folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise ServerError(
            "FL-S206", f"state directory {folder}: {error.strerror}", "give another --state"
        ) from error
    foreign = [name for name in found if name not in TOLERATED]
    if foreign:
        raise ServerError(
            "FL-S109",
            f"{folder} is not empty and holds no run: {', '.join(foreign[:3])}"
            + (", ..." if len(foreign) > 3 else ""),
            "give a --state that is new or empty; or is its run.json missing?",
        )


def folder_made(folder: Path) -> Path:
    """There, and ours alone to read. ServerError FL-S206."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ServerError(
            "FL-S206", f"{folder} cannot be made: {error.strerror}", "give another --state"
        ) from error
    return folder


@contextlib.contextmanager
def beginning(folder: Path) -> Iterator[None]:
    """Around the start of a run: one that could not begin leaves the folder as it was.

    Nothing is done where it began, or was there before, or is another server's (FL-S202).
    """
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    fresh = not (folder / "run.json").exists()
    try:
        yield
    except BaseException as error:
        if fresh and getattr(error, "code", "") not in ("FL-S202", "FL-S109"):
            with contextlib.suppress(OSError):  # what went wrong first is worth more
                _withdraw(folder)
                for made in missing:
                    made.rmdir()
        raise


def _withdraw(folder: Path) -> None:
    """Forget a run that has no version."""
    if any((folder / "versions").glob("*")):
        return
    for name in ("run.json", "lock", "server.json", "history.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("journal.sqlite*"):
        path.unlink()
    for name in ("updates", "versions", "rows"):
        with contextlib.suppress(OSError):
            (folder / name).rmdir()
