"""Rewrite: the rows of a table that one merge changes, each by what its client's update brought.

One row after another, so that only one file is open whatever the number of clients; the tiles of a
row are shared out to the merge's threads.
"""

from collections.abc import Iterable

from torch import Tensor

from atoll.aggregation.half import Numbers, generation
from atoll.protocols.codecs import TILE, Decoder, all_finite
from atoll.server.passes import Area, Crew, NotFiniteError, scratch
from atoll.server.table import CHECK, Key, Table

Change = tuple[str, Decoder]  # a client, and what is added to its row


def rewrite(
    table: Table, crew: Crew, former: Numbers, changes: Iterable[Change], tile: int = TILE
) -> dict[str, float]:
    """row := row + change, as the next generation; returns what the new version must say of it.

    `former`: numbers of the version before; `changes`: no client twice. Where it fails, no row is
    left. NotFiniteError; ServerError FL-S203, FL-S206.
    """
    done: list[Key] = []
    checks: dict[str, float] = {}
    try:
        for client, change in changes:
            key = Key(client, generation(former, client) + 1)
            checks[CHECK + client] = _one(table, crew, key, table.row(former, client), change, tile)
            done.append(key)
    except BaseException:
        table.forget(done)
        raise
    return checks


def _one(table: Table, crew: Crew, key: Key, row: Tensor | None, change: Decoder, tile: int) -> int:
    region = table.begin(key)

    def work(lo: int, area: Area) -> None:
        hi = min(lo + tile, table.count)
        new = scratch(area, "row", hi - lo)
        new.copy_(change(lo, hi, new))
        if row is not None:
            new.add_(row[lo:hi])
        if not all_finite(new):
            raise NotFiniteError
        table.write(key, region, lo, new)

    try:
        crew.spread(range(0, table.count, tile), work)
        return table.seal(key, region)
    except BaseException:
        table.abandon(key, region)
        raise
