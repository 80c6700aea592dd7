"""Holding: changes one after the other, each model offered and on the disk, or downloaded."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import torch

from atoll.aggregation.outer import Nesterov
from atoll.aggregation.rendezvous_events import Digested, Downloaded, NotDownloaded, PeerEvent
from atoll.aggregation.rendezvous_messages import Stand
from atoll.aggregation.sync_engine import SyncEngine, SyncState
from atoll.p2p.bulk import Got
from atoll.p2p.holding import Holding
from atoll.p2p.memory import Memory
from atoll.p2p.tally import Tally
from atoll.protocols.codecs import as_bytes
from atoll.protocols.errors import RemoteError
from tests.jumping import run

SIZE = 8
STANDS = [Stand(epoch, f"chain{epoch}", float(epoch)) for epoch in range(3)]


def engine() -> SyncEngine:
    return SyncEngine(Nesterov(lr=0.7, momentum=0.9), torch.linspace(-1, 1, SIZE))


class Held:
    """A holding whose `change` runs; `theirs` are the models that the others give, by chain."""

    def __init__(self, folder: Path) -> None:
        self.said: list[PeerEvent] = []
        self.tidied: list[Stand] = []
        self.theirs: dict[str, SyncState] = {}
        self.engine, self.tally, self.memory = engine(), Tally(), Memory(folder)
        self._tasks: list[asyncio.Task[None]] = []
        self.holding = Holding(
            "a", self.engine, self.memory, self.tally,
            fetch=self._fetch, say=self.said.append, spawn=self._spawn, tidy=self._tidy,
        )  # fmt: skip

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    async def _tidy(self, stand: Stand) -> None:
        self.tidied.append(stand)

    async def _fetch(self, peer: str, name: str, dest: memoryview, shorter: bool) -> Got:
        _, chain, number = name.split("/")
        if chain not in self.theirs:
            raise RemoteError("FL-P203", f"{peer} does not answer", "")
        model = self.theirs[chain]
        tensors = [model.anchor, *(model.outer[n] for n in sorted(model.outer))]
        dest[:] = as_bytes(tensors[int(number)])
        return Got(b"", len(dest))

    async def __aenter__(self) -> "Held":
        self.memory.open()
        await self.holding.start(STANDS[0])
        self._spawn(self.holding.change())
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.memory.close()


def play(folder: Path, work: Callable[[Held], Awaitable[None]]) -> None:
    async def inside() -> None:
        async with Held(folder) as held:
            await work(held)

    run(inside)


def test_changes_are_made_in_the_order_in_which_they_were_asked(tmp_path: Path) -> None:
    async def work(held: Held) -> None:
        seen: list[int] = []

        async def look() -> None:
            seen.append(held.engine.state.round)

        for stand in STANDS[1:]:
            held.holding.then(look)
            held.holding.commit(stand, torch.ones(SIZE))
        held.holding.then(look)
        await held.holding.settled()
        assert seen == [0, 1, 2]
        twice = engine()
        bits = [twice.commit(torch.ones(SIZE)).digest for _ in STANDS[1:]]
        digests = zip(STANDS[1:], bits, strict=True)
        assert held.said == [Digested(stand.chain, found) for stand, found in digests]
        assert (held.tally.digest, held.tally.digested) == (bits[-1], 2)

    play(tmp_path, work)


def test_a_model_is_tidied_up_after_when_it_is_on_the_disk(tmp_path: Path) -> None:
    async def work(held: Held) -> None:
        held.holding.saved.clear()
        held.holding.commit(STANDS[1], torch.ones(SIZE))
        await held.holding.settled()
        kept = held.memory.model("chain1")
        assert kept is not None
        assert kept.digest == held.engine.state.digest
        assert held.tidied == [STANDS[1]]

    play(tmp_path, work)


def test_a_mean_that_cannot_be_applied_leads_to_a_model_with_the_bits_of_the_one_before(
    tmp_path: Path,
) -> None:
    async def work(held: Held) -> None:
        before = held.engine.state.digest
        held.holding.commit(STANDS[1], torch.full((SIZE,), torch.nan))
        await held.holding.settled()
        assert held.said == [Digested("chain1", before)]

    play(tmp_path, work)


def test_a_downloaded_model_is_another_or_the_same_with_other_bits(tmp_path: Path) -> None:
    async def work(held: Held) -> None:
        other = engine()
        held.theirs["chain1"] = other.commit(torch.ones(SIZE))
        bits = held.theirs["chain1"].digest
        for another in (True, False):
            await held.holding.download(STANDS[1], ("b",), bits)
            assert held.holding.load(STANDS[1]) is another
            held.holding.let_go()
            await held.holding.settled()
        assert held.said == [Downloaded("chain1"), Digested("chain1", bits)] * 2
        assert held.engine.state.digest == bits

    play(tmp_path, work)


def test_a_model_that_nobody_gives_changes_nothing(tmp_path: Path) -> None:
    async def work(held: Held) -> None:
        before = held.engine.state
        await held.holding.download(STANDS[1], ("b", "c"), "f" * 64)
        assert held.said == [NotDownloaded("chain1", ("b", "c"))]
        assert held.engine.state is before
        assert held.tally.state == "downloading"

    play(tmp_path, work)
