"""Claim: a run begins in a folder of its own."""

from pathlib import Path

from atoll.protocols.errors import ServerError
from atoll.protocols.places import plainly

TOLERATED = ("lock", "lost+found", "run.json.tmp")  # in a folder in which a run begins


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
            "FL-S206", f"{folder} cannot be made: {plainly(error)}", "give another --state"
        ) from error
    return folder
