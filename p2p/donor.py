"""Donor: models that a peer gives to those behind it, and how it gets one from many at once.

A model travels in pieces, `state/CHAIN/NUMBER`, which any peer at that commit can give, for all
hold the same bits. What came is checked as a whole against the digest that the group said; where
it is another, one donor after the other is tried alone, and who gave other bits is doubted.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from atoll.aggregation.sync_engine import SyncState
from atoll.p2p.reducing import blob
from atoll.protocols.blobs import Blob
from atoll.protocols.codecs import as_bytes
from atoll.protocols.errors import RemoteError

PIECE = 4 << 20  # bytes, a whole number of elements
AT_ONCE = 2  # pieces on their way from one donor
MOST = 4  # donors at a time
KEEP = 10.0  # seconds after the last request for an old model, until it is let go

Fetch = Callable[[str, str, memoryview], Awaitable[object]]  # (peer, blob id, where to)

logger = logging.getLogger(__name__)


class Shelved:
    """The models that can be given: the newest, and older ones while they are being fetched."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._models: dict[str, SyncState] = {}
        self._asked: dict[str, float] = {}

    def put(self, chain: str, model: SyncState) -> None:
        """The newest; others go unless somebody is at them."""
        since = self._clock() - KEEP
        used = {c: m for c, m in self._models.items() if self._asked.get(c, -KEEP) > since}
        self._models = {**dict(list(used.items())[-2:]), chain: model}
        self._asked = {c: at for c, at in self._asked.items() if c in self._models}

    def find(self, name: str) -> Blob:
        """RemoteError FL-P402 where it is not here."""
        _, chain, number = [*name.split("/"), "", ""][:3]
        model = self._models.get(chain)
        if model is None or not number.isdecimal() or len(number) > 9:
            raise RemoteError("FL-P402", f"no {name[:80]!r} here", "ask another peer")
        self._asked[chain] = self._clock()
        views = list(_pieces(model))
        if int(number) >= len(views):
            raise RemoteError("FL-P402", f"no {name[:80]!r} here", "ask another peer")
        return blob(name, views[int(number)])


@dataclass
class Found:
    """A download's end: the model, or None, and who gave nothing or other bits."""

    model: SyncState | None = None
    doubted: list[str] = field(default_factory=list)


async def download(
    fetch: Fetch, like: SyncState, chain: str, epoch: int, donors: Sequence[str], bits: str
) -> Found:
    """The model of `chain`, whose digest is `bits`, shaped `like` this peer's own."""
    found = Found()
    tries = [list(donors[:MOST])]
    if len(donors) > 1:
        tries += [[donor] for donor in donors]
    for these in tries:
        these = [donor for donor in these if donor not in found.doubted]
        model, failed = await _from(fetch, like, chain, epoch, these)
        found.doubted += failed
        if model is None:
            continue
        if await asyncio.to_thread(lambda m=model: m.digest) == bits:  # type: ignore[misc]
            found.model = model
            return found
        logger.warning("chain=%s from %s: other bits than the group's", chain, ", ".join(these))
        if len(these) == 1:
            found.doubted += these
    return found


async def _from(
    fetch: Fetch, like: SyncState, chain: str, epoch: int, donors: Sequence[str]
) -> tuple[SyncState | None, list[str]]:
    """Pieces from all of them; who fails drops out. None where all have."""
    anchor = torch.empty_like(like.anchor)
    model = SyncState(anchor, {n: torch.empty_like(t) for n, t in like.outer.items()}, epoch)
    views = list(_pieces(model))
    left, failed = list(range(len(views)))[::-1], []
    there = asyncio.Event()
    held = 0

    async def work(donor: str) -> None:
        nonlocal held
        while held < len(views):
            if not left:  # others are at the rest, and may fail
                there.clear()
                await there.wait()
                continue
            number = left.pop()
            try:
                await fetch(donor, f"state/{chain}/{number}", views[number])
            except RemoteError as error:
                left.append(number)
                there.set()
                if error.code != "FL-P402" and donor not in failed:  # it has gone on: no fault
                    failed.append(donor)
                return
            except BaseException:
                left.append(number)
                raise
            held += 1
            there.set()

    await asyncio.gather(*(work(donor) for donor in donors for _ in range(AT_ONCE)))
    return (model if held == len(views) else None), failed


def _pieces(model: SyncState) -> Iterator[memoryview]:
    tensors: list[Tensor] = [model.anchor, *(model.outer[name] for name in sorted(model.outer))]
    for tensor in tensors:
        view = as_bytes(tensor)
        for start in range(0, len(view), PIECE):
            yield view[start : start + PIECE]
