"""The end of a run: whoever has the last model stays for those who have not."""

import asyncio
from pathlib import Path

from tests.jumping import run
from tests.p2p.swarm import PATIENCE, Swarm


def test_one_that_was_down_at_the_end_gets_the_last_model_of_one_that_comes_back(
    tmp_path: Path,
) -> None:
    """It ended as soon as it was started, having met nobody, and the other waited for ever."""

    async def work() -> None:
        loop = asyncio.get_running_loop()
        shut = 0.0

        def cut(*_: str) -> bool:
            return loop.time() < shut

        async with Swarm(tmp_path, rounds=5, first=2, names=("a", "b"), cut=cut) as swarm:
            for name in "ab":
                await swarm.start(name, pause=0.05)
            await swarm.until(lambda: swarm.drivers["b"].tally.round >= 2)
            await swarm.kill("b")
            await swarm.ended()
            assert swarm.drivers["a"].tally.round == 5
            await swarm.kill("a")
            await swarm.start("b")
            await asyncio.sleep(3)
            assert swarm.drivers["b"].tally.round < 5
            shut = loop.time() + 2 * PATIENCE.silence  # until they have met
            await swarm.start("a")
            await swarm.ended()
            assert {d.tally.round for d in swarm.drivers.values()} == {5}
            assert len(swarm.digests) == 1

    run(work)


def test_one_that_comes_back_to_nobody_ends_all_the_same(tmp_path: Path) -> None:
    async def work() -> None:
        async with Swarm(tmp_path, rounds=2, names=("a",)) as swarm:
            await swarm.start("a")
            await swarm.ended()
            await swarm.kill("a")
            await swarm.start("a")
            await swarm.ended(30)

    run(work)


def test_a_newcomer_that_is_slow_to_load_the_last_model_is_waited_for(tmp_path: Path) -> None:
    """Two silences after the last round all who had it were gone, and it had nobody to ask."""

    async def work() -> None:
        loop = asyncio.get_running_loop()
        shut = 0.0

        def cut(asks: str, _: str, what: str) -> bool:
            return asks == "c" and what.startswith("state/") and loop.time() < shut

        async with Swarm(tmp_path, rounds=6, first=2, cut=cut) as swarm:
            for name in "ab":
                await swarm.start(name, pause=0.05)
            await swarm.until(lambda: swarm.drivers["a"].tally.round >= 3)
            shut = loop.time() + 6 * PATIENCE.silence
            await swarm.start("c")
            await swarm.ended()
            assert {d.tally.round for d in swarm.drivers.values()} == {6}
            assert len(swarm.digests) == 1

    run(work)
