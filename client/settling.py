"""Settling: what a client does when it hears what became of an update.

First its private state takes the outcome in, then the outbox lets the update go, then the server
hears that the outcome is known: whoever is killed in between is told again, and does it again.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from atoll.client.keep import Keep
from atoll.client.outbox import Outbox
from atoll.client.work import Workbench
from atoll.protocols.errors import AtollError

ENDING = 5.0  # seconds a client that ends waits for it: the next life need not do it again then


class Settling:
    """All calls are from the loop's thread. `failed`: the state could not be written."""

    def __init__(
        self,
        keep: Keep,
        outbox: Outbox,
        acknowledge: Callable[[str], None],
        failed: Callable[[AtollError], None],
    ) -> None:
        self._keep, self._outbox = keep, outbox
        self._acknowledge, self._failed = acknowledge, failed
        self._open: set[str] = set()  # updates whose outcome private state is taking in
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="keep")  # in the order of outcomes

    def __contains__(self, update: str) -> bool:
        """Whether the outcome of `update` is still being taken in."""
        return update in self._open

    def begin(self, bench: Workbench | None, update: str, fate: str) -> None:
        """An order that comes meanwhile waits for the state: it is announced in this turn of the
        loop."""
        if not self._keep.announce(update) or bench is None:
            self._outbox.drop(update)
            return
        self._open.add(update)
        task = asyncio.get_running_loop().create_task(self._settle(bench, update, fate))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _settle(self, bench: Workbench, update: str, fate: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, bench.settle, update, fate)
        except AtollError as error:
            self._failed(error)
            return
        self._outbox.drop(update)
        self._open.discard(update)
        self._acknowledge(update)

    async def close(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=ENDING)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)
