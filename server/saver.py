"""Saver: keeps the newest version, and the best, on disk, without ever holding anybody up.

Saving may take a tenth of the time: where versions come faster than that, those between two saves
are made again from kept updates after a crash.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from atoll.protocols.errors import AtollError
from atoll.server.uploads import order_of
from atoll.server.workshop import Workshop

PAUSE = 9.0  # times a save's duration, before the next
LEAST = 0.1  # seconds of a pause: a few dozen versions of a small model are soon made again


class Saver:
    """`published` and `best` say which version is the newest and the best, `ordered` which one each
    client still trains from, `awaited` which orders may still have a result; `freed` hears of
    updates that need not be kept any longer."""

    def __init__(
        self,
        workshop: Workshop,
        every: int,
        *,
        published: Callable[[], int],
        best: Callable[[], int | None],
        ordered: Callable[[], Mapping[str, int]],
        awaited: Callable[[], set[str]],
        freed: Callable[[list[str]], None],
        failed: Callable[[AtollError], None],
    ) -> None:
        self._workshop = workshop
        self._every = every
        self._published, self._best, self._ordered = published, best, ordered
        self._awaited = awaited
        self._freed, self._failed = freed, failed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def offer(self, version: int) -> None:
        """A version was published."""
        if self._task is None and version % self._every == 0:
            self._task = asyncio.get_running_loop().create_task(self._save())

    @property
    def busy(self) -> bool:
        return self._task is not None

    async def close(self, *, save: bool) -> None:
        """Let a running save end; `save`: then save the newest version too."""
        self._closing.set()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        if save:
            await self._save()
        self._thread.shutdown()

    async def _save(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                newest, began = self._published(), loop.time()
                await self._once(newest)
                pause = max(LEAST, PAUSE * (loop.time() - began))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), pause)
                if self._published() == newest or self._published() % self._every:
                    return
        except AtollError as error:
            self._failed(error)
        finally:
            self._task = None

    async def _once(self, newest: int) -> None:
        loop, workshop = asyncio.get_running_loop(), self._workshop
        await loop.run_in_executor(self._thread, workshop.save, newest)
        spent = workshop.settle()
        workshop.forget(spent)
        self._freed(spent)
        best = self._best()
        if best is not None and best != workshop.best and best in workshop.store.numbers():
            await loop.run_in_executor(self._thread, workshop.save, best)
            workshop.best = best
        ordered = self._ordered()
        await loop.run_in_executor(self._thread, workshop.prune, ordered)
        # In this order: what is announced from now on is of an order that is awaited.
        coming = workshop.uploads.unfinished()
        awaited = self._awaited()
        given_up = [update for update in coming if order_of(update) not in awaited]
        await loop.run_in_executor(self._thread, workshop.forget, given_up)
