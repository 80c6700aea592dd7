"""A loop whose clock jumps to the next timer when nothing is being done, and stands still else.

Nobody waits, and what a machine with other work to do takes long for is never late.
"""

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

THREAD = 0.001  # seconds on the loop's clock between a thread's work and whoever waits for it


class _Selector(selectors.DefaultSelector):
    def __init__(self, idle: Callable[[float], bool]) -> None:
        super().__init__()
        self._idle = idle

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout:
            timeout = 0 if self._idle(timeout) else None
        return super().select(timeout)


class Jumping(asyncio.SelectorEventLoop):
    """Work in threads of `asyncio.to_thread` counts as being done, and takes `THREAD`."""

    def __init__(self) -> None:
        self._now, self._working = 0.0, 0
        super().__init__(_Selector(self._idle))

    def time(self) -> float:
        return self._now

    def _idle(self, seconds: float) -> bool:
        """Until the next timer, if nothing is being done before."""
        if self._working:
            return False
        self._now += seconds
        return True

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> "asyncio.Future[T]":
        inner = super().run_in_executor(executor, func, *args)
        outer: asyncio.Future[T] = self.create_future()
        self._working += 1

        def worked(_: object) -> None:
            self._working -= 1
            self.call_later(THREAD, _hand_on, inner, outer)

        inner.add_done_callback(worked)
        outer.add_done_callback(lambda _: inner.cancel())
        return outer

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109
        self._working += 1
        await super().shutdown_default_executor()


def _hand_on(inner: "asyncio.Future[T]", outer: "asyncio.Future[T]") -> None:
    if outer.done():
        return
    if inner.cancelled():
        outer.cancel()
    elif error := inner.exception():
        outer.set_exception(error)
    else:
        outer.set_result(inner.result())


def run(work: Callable[[], Awaitable[T]], seconds: float = 600.0) -> T:
    """`work` in such a loop. TimeoutError after so many seconds on its clock."""

    async def inside() -> T:
        async with asyncio.timeout(seconds):
            return await work()

    with asyncio.Runner(loop_factory=Jumping) as runner:
        return runner.run(inside())
