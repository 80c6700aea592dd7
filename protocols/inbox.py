"""Inbox: what others of its loop have put there for one task.

asyncio.Queue serves any number of readers and may be bounded. It takes 17 calls of Python to put
something in and to get it out again, this takes 7: a small round does so two dozen times.
"""

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """Unbounded, in order, for one reader at a time. All of it in the loop's thread."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._reader: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        self._items.append(item)
        reader = self._reader
        if reader is not None:
            self._reader = None
            if not reader.done():  # else it was cancelled
                reader.set_result(None)

    async def get(self) -> T:
        """The first, once there is one."""
        if not self._items:
            await self._something()
        return self._items.popleft()

    async def all(self) -> list[T]:
        """Everything, once there is something."""
        if not self._items:
            await self._something()
        return self.rest()

    def peek(self) -> T | None:
        """The first, if there is one."""
        return self._items[0] if self._items else None

    def drop(self) -> None:
        """Take the first away, which is there."""
        self._items.popleft()

    def rest(self) -> list[T]:
        """Everything that is there now."""
        items = list(self._items)
        self._items.clear()
        return items

    async def _something(self) -> None:
        self._reader = asyncio.get_running_loop().create_future()
        await self._reader
