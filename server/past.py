"""Past: the history of a run whose server died, made whole again from its journal.

Rows reach `history.jsonl` a moment after their input is journaled, so a killed process leaves fewer
rows than inputs, and perhaps half of the last input's. These are cut off, and come again while the
journal is replayed.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from atoll.protocols.errors import ServerError
from atoll.protocols.events import Action, Event
from atoll.server.history import parse, take
from atoll.server.ledger import EVERY, Ledger
from atoll.server.rows import Recorder
from atoll.server.run import Effect, Run
from atoll.server.totals import Row, Totals

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
        self.history = Totals()
        self._sizes = sizes
        self._since = replayed
        self._marks: list[int] = []
        self._rows = self._size = 0
        if path.exists():
            self._read(path, replayed, journaled)
            os.truncate(path, self._size)
        self.ledger = Ledger(path, self._marks, self._rows, self._size)

    def _read(self, path: Path, replayed: float, journaled: float) -> None:
        """Take in the rows of inputs of which all rows are there, or no more will come."""
        held: list[bytes] = []  # from the first row on of the last input so far
        with path.open("rb") as file:
            for text in file:
                if not text.endswith(b"\n"):
                    break  # torn
                kind, t = _told(text)
                if kind in JOURNALED and t > journaled:
                    raise _older()
                if kind in INPUTS and t > self._since:
                    self._since = t
                    self._take(path, held)
                    held = []
                if self._since > replayed:
                    held.append(text)
                else:
                    self._take(path, [text])

    def _take(self, path: Path, lines: list[bytes]) -> None:
        for text in lines:
            try:
                take(self.history, text, f"{path}:{self._rows + 1}")
            except ValueError as error:
                raise ServerError(
                    "FL-S206",
                    str(error),
                    "restore it from a backup, or move it away: a run goes on without it",
                ) from error
            if self._rows % EVERY == 0:
                self._marks.append(self._size)
            self._rows += 1
            self._size += len(text)

    def heard(
        self, run: Run, now: float, event: Event, actions: Sequence[Action], effects: list[Effect]
    ) -> None:
        """An input of the journal, handled again: the rows that are missing are written."""
        up, down = self._sizes
        rows = self.recorder.rows(run, now, event, actions, effects, up, lambda order: down)
        if now >= self._since:
            for row in rows:
                self.history.append(row)
            self.ledger.extend(rows)
            if self.ledger.waiting >= EVERY:
                self.ledger.flush()


def _older() -> ServerError:
    return ServerError(
        "FL-S206",
        "journal.sqlite is older than history.jsonl: its newest part is missing",
        "copy a state directory whole, with journal.sqlite-wal, or restore a backup",
    )


def _told(text: bytes) -> tuple[str, float]:
    """Kind and run clock of a row; nothing of what is none: who takes it in says so."""
    try:
        row: Row = parse(text, "")
        return str(row["kind"]), float(row["t"])
    except (ValueError, TypeError):
        return "", -math.inf
