"""Ledger: a run's `history.jsonl` while its server runs: rows written many at once, read by number.

No row stays in memory once it is on its way to the disk: a run of months has more of them than a
machine has memory.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from atoll.protocols.errors import ServerError
from atoll.server.history import line
from atoll.server.totals import Row

EVERY = 500  # rows from one whose place is known to the next


class Ledger:
    """Where it was left: `marks` are the places in the file of rows 0, EVERY, 2 EVERY, ..., `rows`
    says how many there are, and `size` their bytes. Raises OSError where the disk fails."""

    def __init__(self, path: Path, marks: list[int], rows: int, size: int) -> None:
        self._path = path
        self._file = path.open("ab", buffering=1 << 16)
        self._marks, self._rows, self._size = marks, rows, size
        self._new: list[Row] = []  # not in the file yet
        self._news: asyncio.Event | None = None  # set with the next row; made when one waits

    def extend(self, rows: Sequence[Row]) -> None:
        self._new += rows
        if self._news is not None and rows:
            self._news.set()
            self._news = None

    def flush(self) -> None:
        """Into the file, for all to read. Raises OSError; what was not written then never is."""
        new, self._new = list(map(line, self._new)), []
        for text in new:
            if self._rows % EVERY == 0:
                self._marks.append(self._size)
            self._rows += 1
            self._size += len(text)
        self._file.write(b"".join(new))
        self._file.flush()

    def __len__(self) -> int:
        return self._rows + len(self._new)

    @property
    def waiting(self) -> int:
        """Rows not in the file yet."""
        return len(self._new)

    def lines(self, after: int, most: int) -> list[str]:
        """Those from number `after` on, at most so many; also when it is closed. FL-S206."""
        found: list[bytes] = []
        if after < self._rows:
            try:
                with self._path.open("rb") as file:
                    file.seek(self._marks[after // EVERY])
                    found += islice(file, after % EVERY, after % EVERY + most)
            except OSError as error:  # somebody moved it away
                what = f"{self._path} cannot be read: {error.strerror}"
                raise ServerError("FL-S206", what, "put it back, or restart the server") from error
        new = max(0, after - self._rows)
        found += map(line, self._new[new : new + most - len(found)])
        return [text.decode() for text in found]

    async def news(self, after: int, seconds: float) -> None:
        """Wait until there is a row of this number, at most so long."""
        if after >= len(self):
            self._news = self._news or asyncio.Event()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._news.wait()

    def close(self) -> None:
        """Without what was not flushed; where the disk is full that was said already."""
        with contextlib.suppress(OSError):
            self._file.close()
