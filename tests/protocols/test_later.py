"""Later: at the earliest moment asked for, once, unless it is taken back."""

import asyncio

from atoll.protocols.later import Later
from tests.jumping import run


def test_the_earliest_moment_counts() -> None:
    async def waits() -> None:
        loop, acted = asyncio.get_running_loop(), list[float]()
        began = loop.time()
        later = Later(lambda: acted.append(round(loop.time() - began, 2)))
        later.within(0.5)
        later.within(0.2)
        later.within(0.9)
        await asyncio.sleep(2.0)
        assert acted == [0.2]
        later.within(0.5)
        await asyncio.sleep(2.0)
        assert acted == [0.2, 2.5]

    run(waits)


def test_what_went_with_something_else_is_taken_back_and_the_next_has_its_whole_time() -> None:
    async def waits() -> None:
        loop, acted = asyncio.get_running_loop(), list[float]()
        began = loop.time()
        later = Later(lambda: acted.append(round(loop.time() - began, 2)))
        later.within(0.5)
        later.done()
        await asyncio.sleep(0.3)
        later.within(0.5)  # the timer that stands comes before
        await asyncio.sleep(2.0)
        assert acted == [0.8]
        later.within(0.5)
        later.done()
        await asyncio.sleep(2.0)  # it comes, and finds nothing due
        assert acted == [0.8]

    run(waits)


def test_closed_no_timer_stays() -> None:
    async def waits() -> None:
        acted = list[str]()
        later = Later(lambda: acted.append("late"))
        later.close()
        later.within(0.5)
        later.close()
        await asyncio.sleep(2.0)
        assert acted == []

    run(waits)
