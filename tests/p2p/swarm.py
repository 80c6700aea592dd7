"""A swarm of drivers in one loop: real disks and timers, calls and fetches without a network."""

import asyncio
import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from atoll.aggregation.circle import Patience
from atoll.aggregation.outer import Nesterov
from atoll.aggregation.rendezvous_events import Admitted, Lost
from atoll.aggregation.seals import Named
from atoll.aggregation.sync_engine import SyncEngine, SyncState
from atoll.p2p.bulk import Got
from atoll.p2p.driver import Driver
from atoll.p2p.memory import Memory
from atoll.p2p.post import Post
from atoll.p2p.terms import Terms
from atoll.p2p.work import Facts
from atoll.protocols.codecspec import parse_ways
from atoll.protocols.errors import RemoteError

SIZE = 40_000
RUN = "5eed" * 16
FIRST = "1" * 64  # hash of the first model
# Timers that hurry: nothing is lost here but what a test loses.
PATIENCE = Patience(beat=0.05, silence=1.0, ready=3.0, reply=0.5, reduce=5.0, fetch=3.0, load=5.0)


@dataclass
class Done:
    delta: Tensor
    factor: float = 1.0
    steps: int = 5
    tokens: int = 50
    loss: float = 1.0


@dataclass
class Trainee:
    """Its work is a function of its name and the round."""

    name: str
    pause: float = 0.0
    engine: SyncEngine = field(init=False)
    low: float = -1.0  # where its first model begins
    spoiled: set[int] = field(default_factory=set)  # rounds whose work is not finite, once

    def __post_init__(self) -> None:
        outer = Nesterov(lr=0.7, momentum=0.9)
        self.engine = SyncEngine(outer, torch.linspace(self.low, 1, SIZE))

    @property
    def facts(self) -> Facts:
        return Facts(SIZE, "", FIRST if self.low == -1.0 else "other")

    def bench(self, seconds: float) -> float:
        return 1.0

    def close(self) -> None:
        pass

    async def train(self, steps: int) -> Done:
        await asyncio.sleep(self.pause)
        round_ = self.engine.state.round
        if round_ in self.spoiled:
            self.spoiled.discard(round_)
            return Done(torch.zeros(SIZE), 0.0)
        return Done(work_of(self.name, round_))


def work_of(name: str, round_: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(f"{name} {round_}".encode()).digest()[:4])
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


class Mortal(Memory):
    """Writes nothing any more when its peer is dead: threads cannot be killed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.dead, self.writing = False, threading.Lock()

    def _write(self, name: str, write: Callable[[IO[bytes]], object]) -> None:
        with self.writing:
            if not self.dead:
                super()._write(name, write)

    def keep_model(self, chain: str, model: SyncState) -> None:
        with self.writing:
            if not self.dead:
                super().keep_model(chain, model)

    def remove(self, paths: Sequence[Path]) -> None:
        with self.writing:
            if not self.dead:
                super().remove(paths)

    async def die(self) -> None:
        await asyncio.to_thread(self.writing.acquire)
        self.dead = True
        self.writing.release()
        self.close()


@dataclass
class Swarm:
    folder: Path
    rounds: int = 4
    codec: str = "fp32"
    first: int = 1
    trainees: dict[str, Trainee] = field(default_factory=dict)
    drivers: dict[str, Driver] = field(default_factory=dict)
    posts: dict[str, Post] = field(default_factory=dict)
    memories: dict[str, Mortal] = field(default_factory=dict)
    runs: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    cut: Callable[[str, str, str], bool] = lambda a, b, what: False
    spoil: Callable[[str, str, memoryview], None] = lambda giver, name, data: None
    names: tuple[str, ...] = ("a", "b", "c")

    async def start(self, name: str, pause: float = 0.0, low: float = -1.0) -> Driver:
        """For the first time, or again."""
        assert await self.recalled(name, pause, low)
        driver = self.drivers[name]
        for peer in self.names:
            driver.say(Admitted(peer, 1.0, 100.0))
        self.runs[name] = asyncio.create_task(driver.run())
        return driver

    async def recalled(self, name: str, pause: float = 0.0, low: float = -1.0) -> bool:
        """Whether it comes as itself."""
        memory = self.memories[name] = Mortal(self.folder / name)
        memory.open()

        async def call(peer: str, kind: str, said: bytes, seconds: float) -> bytes:
            await asyncio.sleep(0.001)
            if peer not in self.posts or self.cut(name, peer, kind):
                raise RemoteError("FL-P203", f"{peer} does not answer", "")
            return await self.posts[peer].answer(name, said)

        async def fetch(peer: str, what: str, dest: memoryview, shorter: bool) -> Got:
            await asyncio.sleep(0.001)
            if peer not in self.drivers or self.cut(name, peer, what):
                raise RemoteError("FL-P203", f"{peer} does not answer", "")
            found = await self.drivers[peer].find(name, what)
            dest[: len(found.view)] = found.view
            self.spoil(peer, what, dest)
            return Got(hashlib.sha256(dest[: len(found.view)]).digest(), len(found.view))

        patience = Patience(**{**PATIENCE.__dict__, "first": self.first})
        terms = Terms(RUN, FIRST, "a", self.rounds, parse_ways(self.codec), patience, 1e9, 1.0)
        post = Post(
            call,
            lambda peer, letter: driver.heard(peer, letter),
            lambda peer: driver.say(Lost(peer)),
        )
        trainee = self.trainees[name] = Trainee(name, pause, low)
        driver = Driver(
            name, terms, trainee, memory, steps=lambda: 5, post=post, fetch=fetch, seals=Named(name)
        )  # fmt: skip
        found = await driver.recall()
        if found:
            self.drivers[name], self.posts[name] = driver, post
        return found

    async def kill(self, name: str) -> None:
        """As kill -9: nothing more is said, heard or written."""
        self.drivers.pop(name)
        post, run = self.posts.pop(name), self.runs.pop(name)
        run.cancel()
        await post.close()
        await asyncio.gather(run, return_exceptions=True)
        await self.memories.pop(name).die()

    async def ended(self, seconds: float = 60.0) -> None:
        async with asyncio.timeout(seconds):
            await asyncio.gather(*self.runs.values())

    async def until(self, true: Callable[[], bool], seconds: float = 60.0) -> None:
        """PeerError or whatever ended a driver meanwhile."""
        async with asyncio.timeout(seconds):
            while not true():
                for run in self.runs.values():
                    if run.done():
                        run.result()
                await asyncio.sleep(0.002)

    async def __aenter__(self) -> "Swarm":
        return self

    async def __aexit__(self, *_: object) -> None:
        for name in list(self.runs):
            if name in self.drivers:
                await self.kill(name)
        for memory in self.memories.values():  # of drivers that did not start
            memory.close()

    @property
    def round(self) -> int:
        """The newest."""
        return max(driver.tally.round for driver in self.drivers.values())

    def end_in(self, rounds: int) -> int:
        """The last round, so many from now."""
        last = self.round + rounds
        for driver in self.drivers.values():
            driver.terms = replace(driver.terms, rounds=last)
        return last

    @property
    def digests(self) -> set[str]:
        return {driver.tally.digest for driver in self.drivers.values()}
