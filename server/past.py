"""Past: the history of a run whose server died, made whole again from its journal.

Rows reach `history.jsonl` a moment after their input is journaled, so a killed process leaves fewer
rows than inputs, and perhaps half of the last input's. These are cut off, and come again while the
journal is replayed.
"""

import json
import math
import os
from collections.abc import Container, Sequence
from pathlib import Path

from atoll.protocols.errors import ServerError
from atoll.protocols.events import Action, Event
from atoll.server.history import History, line
from atoll.server.rows import Recorder
from atoll.server.run import Effect, Run

INPUTS = frozenset(
    "join leave update aggregate train discard started merged evaluated finish".split()  # noqa: SIM905
)
JOURNALED = frozenset({"join", "leave", "update"})  # their inputs are on disk before their rows


class Past:
    """Open it before the journal is replayed and give `heard` every input that is.

    `replayed`: the run clock of the first input that will be. `sizes`: bytes of an update and of a
    model, for the rows that come again. `journaled`: the run clock of the last input there is.
    """

    def __init__(
        self, path: Path, replayed: float, sizes: tuple[int, int], journaled: float = math.inf
    ) -> None:
        """Raises ServerError FL-S206 where the file is no history, or knows more than the journal,
        OSError where the disk fails."""
        self.recorder = Recorder()
        self._sizes = sizes
        self._since = replayed
        if path.exists():
            os.truncate(path, self._whole(path.read_bytes(), replayed, journaled))
        self.history = _read(path) if path.exists() else History()
        self.file = path.open("a", buffering=1 << 16)

    def _whole(self, data: bytes, replayed: float, journaled: float) -> int:
        """How many bytes are rows of inputs of which all rows are there, or no more will come."""
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        if max((_time(one, JOURNALED) for one in lines), default=-math.inf) > journaled:
            raise ServerError(
                "FL-S206",
                "journal.sqlite is older than history.jsonl: its newest part is missing",
                "copy a state directory whole, with journal.sqlite-wal, or restore a backup",
            )
        times = [_time(one, INPUTS) for one in lines]
        last = max(times, default=-math.inf)
        keep = len(lines)
        if last > replayed:
            self._since = last
            keep = times.index(last)
        return sum(len(one) for one in lines[:keep])

    def heard(
        self, run: Run, now: float, event: Event, actions: Sequence[Action], effects: list[Effect]
    ) -> None:
        """An input of the journal, handled again: the rows that are missing are written."""
        up, down = self._sizes
        rows = list(self.recorder.rows(run, now, event, actions, effects, up, lambda order: down))
        if now >= self._since:
            for row in rows:
                self.history.append(row)
                self.file.write(line(row))


def _read(path: Path) -> History:
    try:
        return History.read(path)
    except (ValueError, KeyError, TypeError) as error:
        raise ServerError(
            "FL-S206",
            f"{path} cannot be read: {error}",
            "restore it from a backup, or move it away: a run goes on without it",
        ) from error


def _time(text: bytes, kinds: Container[str]) -> float:
    """The run clock of a row of one of these kinds; others do not count."""
    try:
        row = json.loads(text)
        return float(row["t"]) if row["kind"] in kinds else -math.inf
    except (ValueError, KeyError, TypeError):
        return -math.inf  # whoever reads the history says what is wrong with it
