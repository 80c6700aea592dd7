"""Labour: a peer's local work for one round, again until it is finite, and what of it can be given.

What a codec with error feedback leaves out of one round is added to the next one's.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from atoll.aggregation.allreduce import Part
from atoll.aggregation.rendezvous_events import StepsDone
from atoll.aggregation.rendezvous_messages import Stand
from atoll.aggregation.sync_engine import SyncEngine
from atoll.p2p.contribution import Contribution
from atoll.p2p.tally import Tally, Trained
from atoll.p2p.work import Facts
from atoll.protocols.codecspec import Chain

if TYPE_CHECKING:
    from torch import Tensor

AGAIN = 1.0  # seconds between work that must not count and the next

logger = logging.getLogger(__name__)


class Training(Protocol):
    """What does the local work, as `work.Work`."""

    @property
    def engine(self) -> SyncEngine: ...
    @property
    def facts(self) -> Facts: ...
    async def train(self, steps: int) -> Trained: ...
    def bench(self, seconds: float) -> float: ...  # local steps a second; blocks
    def close(self) -> None: ...


class Labour:
    """`begin` a round's, `stop` it; the driver has `task` cancelled at the end."""

    def __init__(
        self,
        me: str,
        work: Training,
        tally: Tally,
        up: Chain,
        *,
        steps: Callable[[], int],
        say: Callable[[StepsDone], None],
        ended: Callable[[asyncio.Task[None]], None],
    ) -> None:
        """`steps()`: of a round, of this peer. `say`: to the rendezvous. `ended(task)`: a round's
        work is over, or has failed."""
        self._me, self._work, self._tally, self._up = me, work, tally, up
        self._steps, self._say, self._ended = steps, say, ended
        self.task: asyncio.Task[None] | None = None
        self._ready: tuple[str, Contribution] | None = None  # the chain it was trained from
        self._residual: Tensor | None = None

    def begin(self, stand: Stand) -> None:
        """From the engine's model, that of `stand`."""
        self.task = asyncio.create_task(self._train(stand))
        self.task.add_done_callback(self._ended)

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
            self.task = None

    def ready(self, chain: str) -> Contribution | None:
        """What there is to give to the round that follows `chain`."""
        return self._ready[1] if self._ready is not None and self._ready[0] == chain else None

    def take(self) -> Contribution | None:
        """What was ready, which is not any more: its round is over."""
        taken, self._ready = self._ready, None
        return taken and taken[1]

    async def left_out(
        self, given: Contribution, parts: Sequence[Part], payloads: Sequence[memoryview]
    ) -> None:
        """These payloads are in the mean that was applied."""
        self._residual = await asyncio.to_thread(given.left_out, parts, payloads)

    async def _train(self, stand: Stand) -> None:
        self._tally.state = "training"
        while True:
            done = await self._work.train(self._steps())
            self._tally.count(done)
            if done.factor > 0:
                break
            logger.warning("peer=%s round=%d: its work is not finite", self._me, stand.epoch)
            await asyncio.sleep(AGAIN)
        given = await asyncio.to_thread(Contribution, done.delta, self._up, self._residual)
        length = await asyncio.to_thread(lambda: given.length)
        self._ready = stand.chain, given
        self._tally.state = "averaging"
        self._say(StepsDone(stand.chain, length))
