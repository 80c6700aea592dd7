"""Inbox: in order, to a reader that may wait, and may be cancelled while it does."""

import asyncio

from atoll.protocols.inbox import Inbox


def test_what_was_put_comes_out_in_order() -> None:
    async def both() -> tuple[list[int], list[int], int | None, int]:
        box: Inbox[int] = Inbox()
        for number in range(5):
            box.put(number)
        first = [await box.get(), await box.get()]
        seen = box.peek()
        box.drop()
        return first, await box.all(), seen, len(box)

    assert asyncio.run(both()) == ([0, 1], [3, 4], 2, 0)


def test_a_reader_waits_until_there_is_something() -> None:
    async def wait() -> tuple[list[str], list[str]]:
        box: Inbox[str] = Inbox()
        reading = [asyncio.create_task(box.all())]
        await asyncio.sleep(0)
        assert not reading[0].done()
        assert box.peek() is None
        box.put("a")
        box.put("b")
        return await reading[0], box.rest()

    assert asyncio.run(wait()) == (["a", "b"], [])


def test_what_comes_after_a_reader_was_cancelled_is_for_the_next() -> None:
    async def cancelled() -> str:
        box: Inbox[str] = Inbox()
        first = asyncio.create_task(box.get())
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        box.put("a")
        return await asyncio.wait_for(box.get(), 5)

    assert asyncio.run(cancelled()) == "a"
