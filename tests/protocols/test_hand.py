"""Hand: one thread's work, seen from an event loop."""

import asyncio
import subprocess
import sys
import threading
from functools import partial

import pytest

from atoll.protocols.hand import Hand


def test_work_is_done_in_order_by_one_thread() -> None:
    def place(number: int) -> tuple[int, str]:
        return number, threading.current_thread().name

    async def main() -> list[tuple[int, str]]:
        hand = Hand("worker")
        try:
            made = [hand.do(partial(place, number)) for number in range(5)]
            return list(await asyncio.gather(*made))
        finally:
            hand.close()

    assert asyncio.run(main()) == [(i, "worker") for i in range(5)]


def test_what_work_raises_is_raised_where_it_is_awaited_and_the_next_is_done() -> None:
    async def main() -> int:
        hand = Hand("worker")
        try:
            with pytest.raises(ZeroDivisionError):
                await hand.do(lambda: 1 // 0)
            return await hand.do(lambda: 7)
        finally:
            hand.close()

    assert asyncio.run(main()) == 7


def test_what_has_not_begun_at_the_close_is_never_done() -> None:
    begun, go = threading.Event(), threading.Event()
    done: list[int] = []

    def long() -> None:
        begun.set()
        go.wait(10)
        done.append(1)

    async def main() -> None:
        hand = Hand("worker")
        first = hand.do(long)
        second = hand.do(lambda: done.append(2))
        begun.wait(10)
        hand.close(wait=False)
        go.set()
        await first
        hand.close()
        assert not second.done()
        with pytest.raises(RuntimeError, match="closed"):
            hand.do(long)

    asyncio.run(main())
    assert done == [1]


def test_nobody_hears_of_work_that_was_cancelled_or_whose_loop_has_ended() -> None:
    go = threading.Event()
    hand = Hand("worker")

    async def cancel() -> int:
        waited = hand.do(lambda: go.wait(10))
        waited.cancel()
        go.set()
        return await hand.do(lambda: 3)

    async def leave() -> None:
        go.clear()
        hand.do(lambda: go.wait(10))

    assert asyncio.run(cancel()) == 3
    asyncio.run(leave())
    go.set()
    hand.close()


def test_a_process_ends_although_nobody_closed_its_hand() -> None:
    code = """
import asyncio
from atoll.protocols.hand import Hand
async def main():
    print(await Hand("worker").do(lambda: 5))
asyncio.run(main())
"""
    made = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert made.stdout == "5\n"
