"""Holding: the model that a peer holds, changed by one task in the order of the rendezvous' words.

An outer step takes long, and no vote may wait for one: who decides says what is to be done, and
`change` does it, one after the other. Whatever model that makes is offered to those who are behind,
and written to the disk beside.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from atoll.aggregation.rendezvous_events import Digested, Downloaded, NotDownloaded, PeerEvent
from atoll.aggregation.rendezvous_messages import Stand
from atoll.aggregation.sync_engine import SyncEngine, SyncState
from atoll.p2p.donor import Shelved, download
from atoll.p2p.memory import Memory
from atoll.p2p.reducing import Fetch
from atoll.p2p.tally import Tally

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


class Holding:
    """`start` it, then run `change` beside: it never ends. PeerError where the disk fails."""

    def __init__(
        self,
        me: str,
        engine: SyncEngine,
        memory: Memory,
        tally: Tally,
        *,
        fetch: Fetch,
        say: Callable[[PeerEvent], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        tidy: Callable[[Stand], Awaitable[None]],
    ) -> None:
        """`say`: to the rendezvous. `spawn`: does work beside, whose failure ends the peer.
        `tidy(stand)`: that model is on the disk now, older ones may go."""
        self._me, self._engine, self._memory, self._tally = me, engine, memory, tally
        self._fetch, self._say, self._spawn, self._tidy = fetch, say, spawn, tidy
        self._queue: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self.shelved = Shelved(asyncio.get_running_loop().time)
        self.saved = asyncio.Event()  # the model is on disk
        self.wanted = ""  # the chain of a model that is being downloaded
        self._chain = ""  # of the model as of the last `commit` or `load`
        self._downloaded: tuple[str, SyncState] | None = None

    async def start(self, stand: Stand) -> None:
        """The engine's model is that of `stand`."""
        self._chain = stand.chain
        if stand.epoch > 0:
            await asyncio.to_thread(self._memory.keep_model, stand.chain, self._engine.state)
        self.saved.set()

    async def change(self) -> None:
        while True:
            job = await self._queue.get()
            await job()
            self._queue.task_done()

    async def settled(self) -> None:
        """All that was asked is done and kept."""
        await self._queue.join()
        await self.saved.wait()

    def then(self, job: Callable[[], Awaitable[None]]) -> None:
        """Do this after all that was asked before."""
        self._queue.put_nowait(job)

    def commit(self, stand: Stand, mean: "Tensor") -> None:
        """The outer step with `mean`; `stand` is where it leads."""
        self._chain = stand.chain

        async def job() -> None:
            try:
                state = await asyncio.to_thread(self._engine.commit, mean)
            except ValueError as error:
                logger.warning("peer=%s round=%d changes nothing: %s", self._me, stand.epoch, error)
                state = self._engine.state
            await self.digest(stand, state)
            self._spawn(self._save(stand, state))

        self.then(job)

    def load(self, stand: Stand) -> bool:
        """Take what was downloaded. False where it is the same model, with other bits than here."""
        assert self._downloaded is not None, "nothing was downloaded"
        chain, model = self._downloaded
        assert chain == stand.chain, "another model was downloaded"
        another, self._chain = chain != self._chain, chain

        async def job() -> None:
            self._engine.load(model)
            await self.digest(stand, model)
            self.saved.set()  # before it was offered

        self.then(job)
        return another

    async def digest(self, stand: Stand, model: SyncState) -> None:
        """Offer it, and say what bits it has."""
        bits = await asyncio.to_thread(lambda: model.digest)
        self.shelved.put(stand.chain, model)
        self._tally.digest, self._tally.digested = bits, stand.epoch
        self._say(Digested(stand.chain, bits))

    async def _save(self, stand: Stand, model: SyncState) -> None:
        await asyncio.to_thread(self._memory.keep_model, stand.chain, model)
        self.saved.set()
        await self._tidy(stand)

    async def download(self, stand: Stand, donors: tuple[str, ...], bits: str) -> None:
        """For `load`; the rendezvous hears whether it came."""
        self._tally.state, self.wanted = "downloading", stand.chain

        async def fetch(peer: str, name: str, dest: memoryview) -> None:
            await self._fetch(peer, name, dest, False)

        like = self._engine.state
        logger.info("peer=%s downloads round %d from %d", self._me, stand.epoch, len(donors))
        found = await download(fetch, like, stand.chain, stand.epoch, donors, bits)
        if found.model is None:
            self._say(NotDownloaded(stand.chain, tuple(found.doubted)))
            return
        await asyncio.to_thread(self._memory.keep_model, stand.chain, found.model)
        logger.info("peer=%s has round %d", self._me, stand.epoch)
        self._downloaded = stand.chain, found.model
        self._say(Downloaded(stand.chain))

    def let_go(self) -> None:
        """What was downloaded is taken by now, or not wanted any more."""
        self._downloaded = None
