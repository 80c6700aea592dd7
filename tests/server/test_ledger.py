"""The history's file while a server writes it: rows by number, none of them in memory."""

import asyncio
from pathlib import Path

import pytest

from atoll.protocols.errors import ServerError
from atoll.server.history import line
from atoll.server.ledger import EVERY, Ledger
from atoll.server.totals import Row


def row(number: int) -> Row:
    return {"t": number / 4, "kind": "back", "client": "c" * (number % 7)}


def text(number: int) -> str:
    return line(row(number)).decode()


@pytest.mark.parametrize("flushed", [0, 1, EVERY - 1, EVERY, EVERY + 1, 2 * EVERY + 3])
def test_rows_are_told_by_number_wherever_they_are(tmp_path: Path, flushed: int) -> None:
    ledger, count = Ledger(tmp_path / "h", [], 0, 0), 2 * EVERY + 10
    for number in range(count):
        ledger.extend([row(number)])
        if number + 1 == flushed:
            ledger.flush()
    assert (len(ledger), ledger.waiting) == (count, count - flushed)
    for after in (0, 1, EVERY - 1, EVERY, EVERY + 1, flushed, count - 1, count, count + 5):
        for most in (1, EVERY, 3 * EVERY):
            expected = [text(n) for n in range(after, min(after + most, count))]
            assert ledger.lines(after, most) == expected, (after, most)
    ledger.close()
    assert ledger.lines(0, count) == list(map(text, range(count)))
    assert (tmp_path / "h").read_text() == "".join(map(text, range(flushed)))


def test_it_goes_on_where_it_was_left(tmp_path: Path) -> None:
    path = tmp_path / "h"
    path.write_text(text(0) + text(1))
    ledger = Ledger(path, [0], 2, path.stat().st_size)
    for number in range(2, EVERY + 2):
        ledger.extend([row(number)])
        ledger.flush()
    assert ledger.lines(EVERY - 1, 2) == [text(EVERY - 1), text(EVERY)]
    ledger.close()
    assert path.read_text() == "".join(map(text, range(EVERY + 2)))


def test_a_file_that_somebody_moved_away_is_told(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "h", [], 0, 0)
    ledger.extend([row(0)])
    ledger.flush()
    (tmp_path / "h").rename(tmp_path / "elsewhere")
    with pytest.raises(ServerError, match="put it back") as lost:
        ledger.lines(0, 1)
    assert lost.value.code == "FL-S206"
    assert ledger.lines(1, 1) == []
    ledger.close()


def test_who_waits_for_a_row_hears_of_it_or_of_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "h", [], 0, 0)

    async def waited() -> int:
        await ledger.news(0, 0.01)
        nothing = len(ledger)
        asyncio.get_running_loop().call_later(0.01, ledger.extend, [row(0)])
        await ledger.news(0, 60.0)
        await ledger.news(0, 60.0)  # it is there
        return nothing

    assert asyncio.run(waited()) == 0
    assert ledger.lines(0, 5) == [text(0)]
    ledger.close()
