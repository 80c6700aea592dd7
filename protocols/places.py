"""Places: the paths that a user names, refused at once where nothing can ever lie there."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import click

from atoll.protocols.errors import AtollError, ServerError, UsageError

BELOW = "/" + 80 * "x"  # of a folder: as long as what a run or a client has in it
BESIDE = ".part"  # of a file: what is written before it has its name
SHOWN = 60  # characters of a path that can be none

Refusal = Callable[[str, str], AtollError]  # (the path as it is shown, what is wrong with it)


class Place(click.Path):
    """A folder, or else a file, of a command line. Empty, too long, or with a NUL it is refused:
    UsageError FL-S108, unless `refusal` says otherwise of one that can be no path."""

    def __init__(self, *, folder: bool = True, refusal: Refusal | None = None) -> None:
        super().__init__(path_type=Path, file_okay=not folder, dir_okay=folder)
        self._more, self._refusal = BELOW if folder else BESIDE, refusal

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str | bytes | os.PathLike[str]:
        named = os.fspath(value)
        if not named:  # Path("") is the current folder: `--out "$UNSET"` does not mean it
            self.fail("it is empty: say what you mean, or leave it out", param, ctx)
        if named.endswith("/") and not self.dir_okay:
            self.fail(f"{shown(named)!r} names a folder: name a file in it", param, ctx)
        if wrong := _wrong(named + self._more):
            if self._refusal is not None:
                raise self._refusal(shown(named), wrong)
            self.fail(f"{shown(named)!r}: {wrong}", param, ctx)
        return super().convert(value, param, ctx)


def state_directory(path: str, wrong: str) -> ServerError:
    """The refusal of a --state."""
    return ServerError("FL-S206", f"state directory {path}: {wrong}", "give another --state")


def plainly(error: OSError) -> str:
    """What the system says, in words; of a folder that cannot be made it says `File exists`."""
    if isinstance(error, FileExistsError) and error.filename:
        path = Path(os.fsdecode(error.filename))
        nothing = path.is_symlink() and not path.exists()
        return "it is a link to nothing" if nothing else "it is there, and is no folder"
    return error.strerror or str(error)


def shown(path: str, most: int = SHOWN) -> str:
    """`path`, or its beginning: one that is too long is a page."""
    return path if len(path) <= most else f"{path[: most - 1]}…"


def _wrong(path: str) -> str:
    """Why no file can ever have that name; empty: one can."""
    try:
        os.lstat(path)
    except ValueError:
        return "it holds a NUL character"
    except OSError as error:
        return os.strerror(error.errno) if error.errno == errno.ENAMETOOLONG else ""
    return ""


def target(path: Path) -> Path:
    """Where a file goes that a user named `path`: a link is followed, not replaced.

    Only a regular file may be replaced: a device, as root, would be gone. UsageError FL-S108.
    """
    found = Path(os.path.realpath(path))
    try:
        regular = stat.S_ISREG(found.stat().st_mode)
        wrong = "" if regular else "it is there, and is no regular file"
    except FileNotFoundError:
        return found
    except OSError as error:
        wrong = str(error.strerror)
    if wrong:
        raise UsageError("FL-S108", f"cannot write {path}: {wrong}", "name another file")
    return found
