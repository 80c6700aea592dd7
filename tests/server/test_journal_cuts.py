"""Whatever is cut off, and when: a journal comes back with all that it acknowledged, and once."""

import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from atoll.protocols.blobs import BlobInfo, Section
from atoll.protocols.errors import ServerError
from atoll.protocols.events import Event, TimerFired
from atoll.server.ahead import Ahead
from atoll.server.journal import Journal
from atoll.server.payloads import Payload
from tests.seeds import seeds

PAGE = 512  # bytes that a disk writes wholly or not at all


@dataclass
class Known:
    """What was acknowledged."""

    nows: list[float] = field(default_factory=list)
    payloads: dict[str, bytes] = field(default_factory=dict)
    meta: str | None = None

    def after(self, now: float, came: dict[str, bytes], gone: list[str]) -> "Known":
        kept = {k: v for k, v in {**self.payloads, **came}.items() if k not in gone}
        return Known([*self.nows, now], kept, str(now))


def found(book: Journal) -> Known:
    payloads = {p.id: bytes(p.data or b"") for p in book.payloads()}
    return Known([row.now for row in book.rows()], payloads, book.meta("newest"))


def payload(update: str, data: bytes) -> Payload:
    section = Section("trainable", "fp32", 1, len(data))
    return Payload(update, BlobInfo(f"u/{update}", len(data), b"", (section,)), data)


class Disk:
    """Tears a write where it is told to; remembers SQLite as of its last commit."""

    def __init__(self, rng: random.Random, saved: Path, patch: pytest.MonkeyPatch) -> None:
        self.tears, self._rng, self._saved = False, rng, saved
        self._pwritev, self._write = os.pwritev, Ahead.write
        patch.setattr(os, "pwritev", self.pwritev)
        patch.setattr(Ahead, "write", lambda *given: self.commit(*given))

    def pwritev(self, fd: int, parts: Sequence[bytes], at: int) -> int:
        if not self.tears:
            return self._pwritev(fd, parts, at)
        data, share = b"".join(parts), self._rng.choice([0.0, 0.5, 0.9, 1.0])
        first = at - at % PAGE
        for page in range(first, at + len(data), PAGE):
            lo, hi = max(page, at), min(page + PAGE, at + len(data))
            if self._rng.random() < share:
                self._pwritev(fd, [data[lo - at : hi - at]], lo)
        raise OSError(5, "the disk fails")

    def commit(self, ahead: Ahead, base: object, *where: object) -> list[int]:
        forgotten = self._write(ahead, base, *where)  # type: ignore[arg-type]
        shutil.rmtree(self._saved, ignore_errors=True)
        self._saved.mkdir()
        (folder,) = {Path(row[2]).parent for row in base.execute("PRAGMA database_list")}  # type: ignore[attr-defined]
        for path in folder.glob("journal.sqlite*"):
            shutil.copy(path, self._saved)
        return forgotten


@pytest.mark.parametrize("seed", seeds(4, of=12))
def test_after_any_cut_all_that_was_acknowledged_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr("atoll.server.journal.FOLLOW", rng.choice([2, 5, 64]))
    saved, lives = tmp_path / "saved", 0
    disk = Disk(rng, saved, monkeypatch)

    def opened(folder: Path) -> Journal:
        book = Journal(folder / "journal.sqlite", "run", durable=False)
        book._log._segment = rng.choice([500, 3000, 8000])
        return book

    folder = tmp_path / "0"
    folder.mkdir()
    book, known = opened(folder), Known()
    book.note("newest", "")
    book.follow()
    known.meta = ""
    made, torn = 0, list[Known]()
    for step in range(150):
        events: list[tuple[float, Event]] = [(float(step), TimerFired("t"))]
        came = {f"u{made + i}": rng.randbytes(rng.randrange(1500)) for i in range(rng.randrange(3))}
        made += len(came)
        gone = rng.sample(sorted(known.payloads), rng.randrange(len(known.payloads) + 1) // 2)
        maybe = known.after(float(step), came, gone)
        disk.tears = rng.random() < 0.2
        sent = [payload(name, data) for name, data in came.items()]
        if disk.tears:
            with pytest.raises(ServerError):
                book.append(events, sent, gone, [("newest", str(float(step)))])
            disk.tears = False
            torn.append(maybe)
        else:
            book.append(events, sent, gone, [("newest", str(float(step)))])
            known, torn = maybe, []
        if rng.random() < 0.15:
            book.follow()
        if rng.random() < 0.05:
            book.snapshot(float(step), "state")
        if rng.random() < 0.25:  # a kill, or a power cut
            lives += 1
            left = Path(shutil.copytree(folder, tmp_path / str(lives)))
            if rng.random() < 0.5:
                for path in left.glob("journal.sqlite*"):
                    path.unlink()
                shutil.copytree(saved, left, dirs_exist_ok=True)
            book.abandon()
            folder, book = left, opened(left)
            there = found(book)
            assert there in (known, *torn)  # of what was torn all of one may be there
            known, torn = there, []
    assert lives > 10
    assert found(book) == known
    book.close()
