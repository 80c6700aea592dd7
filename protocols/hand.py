"""Hand: one thread that does what it is given, one after the other, for an event loop.

An executor of the standard library does the same with a future and its locks on either side, at
several times the price: in a small round that is a tenth of a client's time.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

LOOK = 1.0  # seconds after which an idle thread looks whether the process ends


class Hand:
    """Its thread begins with its first work, and ends at `close`, or with the main thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def do(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        """Do this, behind all that was given before; asked for in the loop's thread. What is
        returned holds its result or what it raised. RuntimeError where it is closed."""
        if self._closed:
            raise RuntimeError(f"{self._name} is closed")
        if self._thread is None:
            # No daemon: such a thread is torn out of torch's C++ when the process ends.
            self._thread = threading.Thread(target=self._run, name=self._name)
            self._thread.start()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def act() -> None:
            found, wrong = None, None
            try:
                found = work()
            except BaseException as error:  # noqa: BLE001  # whoever waits hears of it
                wrong = error
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(_tell, done, found, wrong)

        self._work.put(act)
        return done

    def close(self, *, wait: bool = True) -> None:
        """End with what is being done; what has not begun never will. May be repeated."""
        self._closed = True
        self._work.put(None)
        if wait and self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        main = threading.main_thread()
        while True:
            try:
                work = self._work.get(timeout=LOOK)
            except Empty:
                if main.is_alive():
                    continue
                return
            if work is None or self._closed:
                return
            work()
            del work  # what it holds is let go of, not kept until the next


def _tell(done: "asyncio.Future[Any]", found: object, wrong: BaseException | None) -> None:
    if done.cancelled():
        return
    if wrong is None:
        done.set_result(found)
    else:
        done.set_exception(wrong)
