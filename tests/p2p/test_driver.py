"""Drivers on real disks and timers: the same bits for all, kills at any moment, no fork."""

import asyncio
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from atoll.aggregation.outer import Nesterov
from atoll.aggregation.seals import RECENT
from atoll.aggregation.sync_engine import SyncState
from atoll.p2p import donor
from atoll.p2p.memory import Memory
from atoll.protocols.errors import PeerError
from tests.jumping import run
from tests.p2p.swarm import RUN, SIZE, Swarm, work_of
from tests.seeds import seeds


def expected(rounds: int, names: str) -> SyncState:
    """The model after so many rounds of all these, computed without any of the machines."""
    outer, anchor = Nesterov(lr=0.7, momentum=0.9), torch.linspace(-1, 1, SIZE)
    state = outer.initial(anchor)
    for round_ in range(rounds):
        mean = torch.zeros(SIZE)
        for name in names:
            mean.add_(work_of(name, round_), alpha=1 / len(names))
        anchor, state = outer.step(anchor, mean, state)
    return SyncState(anchor, state, rounds)


def _beyond(swarm: Swarm, round_: int) -> bool:
    return swarm.round > round_


def test_three_peers_end_with_the_bits_that_the_arithmetic_gives(tmp_path: Path) -> None:
    async def work() -> None:
        async with Swarm(tmp_path, rounds=4, first=3) as swarm:
            for name in "abc":
                await swarm.start(name)
            await swarm.ended()
            assert swarm.digests == {expected(4, "abc").digest}
            assert {d.tally.rounds_joined for d in swarm.drivers.values()} == {4}

    run(work)


def test_who_draws_another_first_model_takes_the_founders(tmp_path: Path) -> None:
    """As another version of torch may. It was sent away."""

    async def work() -> None:
        async with Swarm(tmp_path, rounds=4, first=2) as swarm:
            for name, low in (("a", -1.0), ("b", -2.0), ("c", -3.0)):
                await swarm.start(name, low=low)
            await swarm.ended()
            assert len(swarm.digests) == 1
            assert [swarm.drivers[name].tally.downloads for name in "abc"] == [0, 1, 1]

    run(work)


def test_a_founder_that_draws_another_first_model_than_it_promised_is_refused(
    tmp_path: Path,
) -> None:
    async def work() -> None:
        async with Swarm(tmp_path) as swarm:
            await swarm.start("a", low=-2.0)

    with pytest.raises(PeerError, match="FL-P408: the first model here is other"):
        run(work)


def test_codecs_that_lose_leave_all_with_the_same_bits(tmp_path: Path) -> None:
    async def work() -> None:
        async with Swarm(tmp_path, rounds=3, first=3, codec="up=topk:0.05+ef,down=int8") as swarm:
            for name in "abc":
                await swarm.start(name)
            await swarm.ended()
            assert len(swarm.digests) == 1
            assert swarm.digests != {expected(3, "abc").digest}

    run(work)


@pytest.mark.parametrize("seed", seeds(2, of=6))
def test_a_peer_that_is_killed_at_any_moment_comes_back_as_itself(
    tmp_path: Path, seed: int
) -> None:
    """Three times one of three is killed, wherever its tasks stand then, and started again."""

    async def work() -> None:
        rng = random.Random(seed)
        async with Swarm(tmp_path, rounds=0, first=3) as swarm:
            for name in "abc":
                await swarm.start(name, pause=0.05)
            for _ in range(3):
                name = rng.choice("abc")
                at = swarm.round
                handled = rng.randrange(100)
                await swarm.until(partial(_beyond, swarm, at))
                for _ in range(handled):
                    await asyncio.sleep(0.001)
                before = swarm.drivers[name].tally.round
                await swarm.kill(name)
                await asyncio.sleep(rng.choice((0.0, 0.1, 1.2)))
                again = await swarm.start(name, pause=0.05)
                assert again.tally.round >= before
            last = swarm.end_in(3)
            await swarm.ended()
            assert len(swarm.digests) == 1
            assert {d.tally.round for d in swarm.drivers.values()} == {last}
            assert not any(d.tally.healed for d in swarm.drivers.values())

    run(work)


def test_one_that_missed_rounds_applies_their_means_and_downloads_nothing(tmp_path: Path) -> None:
    """What was applied lies on the disks of those who made it, for some rounds."""

    async def work() -> None:
        fetched: list[str] = []

        def listen(giver: str, name: str, data: memoryview) -> None:
            if name.startswith("mean/"):
                fetched.append(name.split("/")[1])

        async with Swarm(tmp_path, rounds=0, first=2, codec="int8") as swarm:
            for name in "abc":
                await swarm.start(name, pause=0.3)
            await swarm.until(lambda: swarm.drivers["c"].tally.round >= 2)
            await swarm.kill("c")
            left = swarm.round
            await swarm.until(lambda: swarm.round == left + 3)
            swarm.spoil = listen
            again = await swarm.start("c", pause=0.3)
            behind = swarm.round - again.tally.round
            assert behind > 1
            await swarm.until(lambda: again.tally.round == swarm.round)
            assert len(dict.fromkeys(fetched)) >= behind
            last = swarm.end_in(2)
            await swarm.ended()
            assert again.tally.downloads == 0
            assert len(swarm.digests) == 1
            assert {d.tally.round for d in swarm.drivers.values()} == {last}
            assert not any(d.tally.healed for d in swarm.drivers.values())
            for name in "ab":
                kept = list((tmp_path / name).glob("mean-*.bin"))
                assert len(kept) <= RECENT + 2  # and those voted for, and about to go

    run(work)


def test_a_late_joiner_finds_out_who_gives_other_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until b has lied nobody else gives anything."""
    monkeypatch.setattr(donor, "PIECE", 4096)
    poisoned = []

    def spoil(giver: str, what: str, data: memoryview) -> None:
        if giver == "b" and what.startswith("state/"):
            data[0] ^= 1
            poisoned.append(what)

    async def work() -> None:
        joiners = ("q", "r", "s", "t", "u", "v")
        async with Swarm(tmp_path, rounds=0, first=3, names=("a", "b", "c", *joiners)) as swarm:
            swarm.spoil = spoil
            swarm.cut = lambda _, giver, what: (
                what.startswith("state/") and giver in "ac" and not poisoned
            )
            for name in "abc":
                await swarm.start(name, pause=0.6)
            await swarm.until(lambda: swarm.drivers["a"].tally.round >= 4)  # else by the means
            for name in joiners:  # until one comes while b has the newest model like the others
                one = await swarm.start(name)
                await swarm.until(lambda one=one: one.tally.rounds_joined >= 2)  # type: ignore[misc]
                assert one.tally.downloads >= 1
                if poisoned:
                    break
            swarm.end_in(2)
            await swarm.ended()
            assert len(swarm.digests) == 1

    run(work)
    assert poisoned


def test_a_spoiled_memory_is_healed_from_the_others(tmp_path: Path) -> None:
    async def work() -> None:
        async with Swarm(tmp_path, rounds=8, first=3) as swarm:
            for name in "abc":
                await swarm.start(name, pause=0.2)
            b = swarm.drivers["b"]
            await swarm.until(lambda: 2 <= b.tally.round == b.tally.digested)  # no step under way
            state = swarm.trainees["b"].engine.state
            swarm.trainees["b"].engine.load(
                SyncState(state.anchor + 1e-6, state.outer, state.round)
            )
            await swarm.ended()
            assert b.tally.healed + b.tally.downloads >= 1
            assert len(swarm.digests) == 1

    run(work)


def test_work_that_is_not_finite_is_done_again_and_the_rest_goes_on(tmp_path: Path) -> None:
    async def work() -> None:
        async with Swarm(tmp_path, rounds=3, first=3) as swarm:
            for name in "abc":
                await swarm.start(name)
                swarm.trainees[name].spoiled = {1} if name == "b" else set()
            await swarm.ended()
            assert len(swarm.digests) == 1

    run(work)


def test_one_that_leaves_says_so_and_is_forgotten(tmp_path: Path) -> None:
    async def work() -> None:
        async with Swarm(tmp_path, rounds=6, first=3) as swarm:
            for name in "abc":
                await swarm.start(name, pause=0.05)
            await swarm.until(lambda: swarm.drivers["b"].tally.round >= 2)
            swarm.drivers["b"].leave()
            await swarm.runs["b"]
            assert not (tmp_path / "b" / "state.json").exists()
            left = swarm.drivers["b"]
            await swarm.kill("b")
            others = swarm.drivers["a"].others
            assert {peer: known["left"] for peer, known in others().items()} == {
                "b": True,
                "c": False,
            }
            await swarm.ended()
            assert left.tally.round < 6
            assert {d.tally.round for d in swarm.drivers.values()} == {6}
            assert len(swarm.digests) == 1

    run(work)


def test_one_that_was_killed_after_its_goodbye_does_not_come_back_as_itself(tmp_path: Path) -> None:
    async def work() -> None:
        async with Swarm(tmp_path, rounds=0, first=2) as swarm:
            for name in "ab":
                await swarm.start(name)
            await swarm.until(lambda: swarm.drivers["b"].tally.round >= 1)
            await swarm.kill("b")
            memory = Memory(tmp_path / "b")
            kept = memory.recall(RUN)
            assert kept is not None
            memory.bind(RUN, "b", replace(kept.bound, parted=True))
            assert not await swarm.recalled("b")

    run(work)
