"""Peer: one member of a run without a server, from its directory and an invite.

    result = await Peer(folder, invite, signed).run()   # until the run's last round, or `leave()`

It brings up the node, the gate and the training half, and hands them to the driver. Started again
in the same directory it is the same peer, with what it promised, and where its last model was.
"""

import asyncio
import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atoll.aggregation.meter import Meter
from atoll.aggregation.rendezvous_events import Admitted, Lost, Removed
from atoll.p2p import bulk, direct, ports, post
from atoll.p2p import folder as folders
from atoll.p2p.daemon import LOOKING, unreachable
from atoll.p2p.direct import Direct
from atoll.p2p.driver import Driver
from atoll.p2p.gate import Gate
from atoll.p2p.invite import Invite
from atoll.p2p.labour import Training
from atoll.p2p.manifest import Manifest, verify
from atoll.p2p.memory import Memory
from atoll.p2p.newcomers import fetch_manifest
from atoll.p2p.node import Node, started
from atoll.p2p.post import Post
from atoll.p2p.roads import Roads
from atoll.p2p.roster import Entry, local_steps, weight
from atoll.p2p.tally import Tally
from atoll.p2p.terms import Terms
from atoll.p2p.work import Work
from atoll.protocols.blobs import Blob
from atoll.protocols.channel import tune_malloc
from atoll.protocols.codecspec import parse_ways
from atoll.protocols.errors import PeerError

MOST = 10.0  # medians of length that a peer's part of a mean may have
LISTEN = ("/ip4/0.0.0.0/tcp/0",)
PLACES = 16  # addresses of others that are kept over restarts
BENCH = 1.0  # seconds in which a peer measures its speed, once

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PeerResult:
    """How it ended."""

    peer: str
    rounds: int  # of the model it ends with
    joined: int  # rounds whose mean its work is in
    digest: str  # SHA-256 of the model and its outer state
    loss_first: float | None
    loss_last: float | None
    steps: int
    tokens: int
    downloads: int
    healed: int
    aborts: int
    bytes_in: int
    bytes_out: int


@dataclass
class _Habits:
    """What is worth keeping over restarts, and binds nobody."""

    listen: tuple[str, ...] = ()  # where others know it
    places: tuple[str, ...] = ()  # where members were
    speed: float = 0.0


class Peer:
    """Constructor and `leave` do no I/O; `run` it once, in a loop of its own."""

    def __init__(
        self,
        folder: Path,
        invite: Invite,
        signed: bytes = b"",
        *,
        name: str = "",
        listen: Sequence[str] = LISTEN,
        speed_factor: float = 1.0,
        device: str = "cpu",
        watch: Callable[[dict[str, object]], None] = lambda status: None,
        training: Callable[[Manifest, str], Training] | None = None,
    ) -> None:
        """`signed`: the manifest as its founder signed it; empty: members have it, or the directory
        of a peer that was here before. `listen` (): it cannot be connected to, and reduces nothing.
        `watch`: hears at each beat what `status.json` says. `training(manifest, peer id)` makes
        what does the local work; it blocks; None: the manifest's model on its data.
        """
        self.folder, self._invite, self._signed = folder, invite, signed
        self._name, self._listen = name, tuple(listen)
        self._speed_factor, self._device, self._watch = speed_factor, device, watch
        self._training = training
        self._leaving = asyncio.Event()
        self.bytes_out = 0
        self._memory = Memory(folder)
        self._habits = _Habits()
        self._meter, self._metered = Meter(), 0  # the round as of its last turn
        self._telling: set[asyncio.Task[None]] = set()
        self._news: asyncio.Queue[Admitted | Removed] = asyncio.Queue()  # for the driver
        self._keys: dict[str, str] = {}  # of members' seals, as they lie on the disk
        self._node: Node
        self._gate: Gate
        self._direct: Direct
        self._roads: Roads
        self._work: Training
        self._driver: Driver
        self._manifest: Manifest

    def leave(self) -> None:
        """End with a goodbye; `run` returns soon after."""
        self._leaving.set()

    async def run(self) -> PeerResult:
        """PeerError where it cannot start, or cannot go on."""
        tune_malloc()
        await asyncio.to_thread(self._memory.open)
        try:
            if await asyncio.to_thread(self._memory.forgot):
                await asyncio.to_thread(self._memory.retire)
            async with contextlib.AsyncExitStack() as stack:
                if not await self._up(stack):
                    logger.warning("%s: its memory is not whole, it joins anew", self.folder)
                    await stack.aclose()
                    await asyncio.to_thread(self._memory.retire)
                    assert await self._up(stack), "nothing is left to remember"
                return await self._live()
        finally:
            self._memory.close()

    # ---- getting up ----------------------------------------------------------------------------

    async def _up(self, stack: contextlib.AsyncExitStack) -> bool:
        """False where what it remembers is not whole, and it must not come back as itself."""
        self._recall_habits()
        known = self._signed or self._habits.places or (self.folder / folders.SIGNED).exists()
        try:
            async with asyncio.timeout(None if known else LOOKING):
                await self._up_node()
                stack.push_async_callback(self._node.stop)
                signed = await self._known_manifest()
        except TimeoutError as error:
            what = f"nothing came within {LOOKING:g} s"
            raise unreachable(self._invite.addresses, what) from error
        invite, manifest = self._invite, self._manifest
        self._work = await asyncio.to_thread(self._made_work)
        stack.callback(self._work.close)
        speed = self._habits.speed or await asyncio.to_thread(self._work.bench, BENCH)
        self._habits.speed = speed
        self._gate = Gate(
            self._node, invite, signed, name=self._name, schema=manifest.schema, speed=speed,
            on_admitted=self._admitted,
            on_removed=self._removed,
            places=self._habits.places,
        )  # fmt: skip
        self._keys = await asyncio.to_thread(self._memory.keys)
        for member, key in self._keys.items():  # one that is dead seals no more
            self._gate.sealing.know(member, key)
        letters = Post(
            self._gate.call,
            lambda peer, letter: self._driver.heard(peer, letter),
            lambda peer: self._driver.say(Lost(peer)),
        )
        stack.push_async_callback(letters.close)
        self._direct = Direct(self._node, self._find, self._meter.gave)
        stack.push_async_callback(self._direct.close)
        self._roads = Roads(self._node, self._direct, self._meter.took)
        terms = Terms(
            invite.manifest, manifest.init, manifest.peer, manifest.rounds,
            parse_ways(manifest.codec), manifest.patience, MOST,
            float(manifest.local_steps * manifest.batch),
        )  # fmt: skip
        self._driver = Driver(
            self._node.id, terms, self._work, self._memory,
            steps=lambda: local_steps(self._gate.me, manifest),
            post=letters, fetch=self._roads.fetch, watch=self._tell, seals=self._gate.sealing,
        )  # fmt: skip
        logger.info("peer=%s node and training are up", self._node.id)
        if not await self._driver.recall():
            return False
        self._driver.say(self._member(self._gate.me))
        await bulk.Shelf(self._gate, self._find, self._meter.gave).open()
        await self._gate.serve(post.NAME, letters.answer)
        if self._node.listen:
            await self._direct.open()
            await self._gate.serve(direct.NAME, self._direct.offer)
        stack.push_async_callback(self._gate.close)
        await self._gate.open()
        return True

    async def _up_node(self) -> None:
        """Where it was before, if that is free; beside whoever answers, or alone where it was
        a member already and nobody does: the others will look for it."""
        places = tuple(dict.fromkeys((*self._habits.places, *self._invite.addresses)))
        founding, listens = bool(self._signed), self._listens()
        tries = [
            (listen, bootstrap)
            for bootstrap in (
                [places, ()] if places and (founding or self._habits.places) else [places]
            )
            for listen in listens
        ]
        for i, (listen, bootstrap) in enumerate(tries):
            try:
                self._node = await started(self.folder, listen if self._listen else (), bootstrap)
            except PeerError:
                if i == len(tries) - 1:
                    raise
            else:
                self._habits.listen = self._node.listen
                return

    def _listens(self) -> list[tuple[str, ...]]:
        """Where to listen: as before, or as asked for; where others do so by now, on any port."""
        wanted = list(dict.fromkeys((self._habits.listen or self._listen, self._listen)))
        found = [listen for listen in wanted if ports.all_free(listen)]
        if not found:
            logger.warning("%s: another program has its port, it takes another", self.folder)
        return found or [ports.any_port(self._listen)]

    async def _known_manifest(self) -> bytes:
        path = self.folder / folders.SIGNED
        signed = self._signed or (path.read_bytes() if path.exists() else b"")
        if not signed:
            signed = await fetch_manifest(self._node, self._invite)
        self._manifest = verify(signed, self._invite.manifest, self._invite.founder)
        _write(path, signed)
        return signed

    def _made_work(self) -> Training:
        """Blocks. PeerError FL-P408 where it trains another model than the run's."""
        manifest, me = self._manifest, self._node.id
        if self._training is not None:
            work = self._training(manifest, me)
        else:
            factor, device = self._speed_factor, self._device
            work = Work(manifest, self.folder, shard=me, device=device, speed_factor=factor)
        for what in ("elements", "schema"):
            here, run = getattr(work.facts, what), getattr(manifest, what)
            if here != run:
                work.close()
                raise PeerError(
                    "FL-P408",
                    f"{what} of the model: {str(here)[:12]} here, {str(run)[:12]} in the run",
                    "use the founder's version of the model, and the same data",
                )
        return work

    # ---- living --------------------------------------------------------------------------------

    async def _live(self) -> PeerResult:
        driver = self._driver
        ends: dict[str, Coroutine[Any, Any, object]] = {
            "run": driver.run(),
            "leave": self._leaving.wait(),
            "lost": self._node.lost.wait(),
            "admit": self._admit(),
            "doubled": self._gate.until_doubled(),
        }
        tasks = {name: asyncio.create_task(work) for name, work in ends.items()}
        try:
            await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_COMPLETED)
            if tasks["lost"].done() and not tasks["run"].done():
                raise PeerError(
                    "FL-P201", "the peer daemon is gone and does not start again", "see its log"
                )
            for name in ("doubled", "admit"):  # without a goodbye: it goes on there; its disk fails
                if tasks[name].done():
                    await tasks[name]
            driver.leave()
            await tasks["run"]
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), *self._telling, return_exceptions=True)
        tally = driver.tally
        return PeerResult(
            self._node.id, tally.round, tally.rounds_joined, tally.digest, tally.loss_first,
            tally.loss, tally.steps, tally.tokens, tally.downloads, tally.healed, tally.aborts,
            self.bytes_in, self.bytes_out,
        )  # fmt: skip

    @property
    def joined(self) -> int:
        """Rounds whose mean its work is in."""
        return self._driver.tally.rounds_joined

    @property
    def work(self) -> Training:
        """For who wants to see what the model writes, once `run` is over."""
        return self._work

    def _admitted(self, entry: Entry) -> None:
        logger.info("peer=%s admits %s, %s", self._node.id, entry.peer, entry.name)
        self._news.put_nowait(self._member(entry))

    async def _admit(self) -> None:
        """Tell the driver who is a member, in order. PeerError FL-P405."""
        while True:
            news, keys = await self._news.get(), dict(self._gate.sealing.keys)
            if keys != self._keys:  # before it takes part: without its key its seals are none
                await asyncio.to_thread(self._memory.keep_keys, keys)
                self._keys = keys
            self._driver.say(news)

    def _member(self, entry: Entry) -> Admitted:
        bandwidth = (entry.bandwidth or math.inf) if entry.accepts else 0.0
        return Admitted(entry.peer, weight(entry, self._manifest), bandwidth)

    def _removed(self, peer: str) -> None:
        self._direct.forget(peer)
        self._news.put_nowait(Removed(peer))

    @property
    def bytes_in(self) -> int:
        """Of bulk."""
        return self._roads.taken

    async def _find(self, peer: str, name: str) -> Blob:
        found = await self._driver.find(peer, name)
        self.bytes_out += len(found.view)
        return found

    # ---- what others may read ------------------------------------------------------------------

    def _tell(self, tally: Tally) -> None:
        """At each beat."""
        members = [self._gate.me, *self._gate.roster.entries()]
        stands = self._driver.others()
        status = {
            "peer": self._node.id, "name": self._name, "run": self._manifest.run,
            "pid": os.getpid(), "at": time.time(), "rounds": self._manifest.rounds,
            **asdict(tally), "bytes_in": self.bytes_in, "bytes_out": self.bytes_out,
            "addresses": self._gate.addresses(),
            "members": [
                {"peer": e.peer, "name": e.name, "bandwidth": e.bandwidth, **stands.get(e.peer, {})}
                for e in members
            ],
        }  # fmt: skip
        _write(self.folder / "status.json", json.dumps(status).encode())
        self._keep_habits()
        self._measure(tally.round)
        self._watch(status)

    def _measure(self, made: int) -> None:
        """When a round is over: the rate of this peer's line, for the splits of the next ones."""
        if made == self._metered:
            return
        self._metered = made
        if bandwidth := self._meter.turn():
            telling = asyncio.create_task(self._tell_bandwidth(bandwidth))
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)

    async def _tell_bandwidth(self, bandwidth: float) -> None:
        logger.info("peer=%s its line moves %.1f MB a second", self._node.id, bandwidth / 1e6)
        await self._gate.tell(bandwidth=bandwidth)
        self._driver.say(self._member(self._gate.me))

    def _recall_habits(self) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError, AttributeError):
            plain = json.loads((self.folder / folders.HABITS).read_text())
            self._habits = _Habits(
                tuple(plain["listen"]),
                tuple(plain["places"]),
                float(plain["speed"]),
            )

    def _keep_habits(self) -> None:
        others = [e.addresses for e in self._gate.roster.entries()]
        now = [a for addresses in others for a in addresses]
        # Who is alone keeps where others were: they may be looking for it there.
        self._habits.places = tuple(dict.fromkeys((*now, *self._habits.places)))[:PLACES]
        _write(self.folder / folders.HABITS, json.dumps(asdict(self._habits)).encode())


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all for who reads it; not made durable."""
    with contextlib.suppress(OSError):  # nothing of this is needed to go on
        beside = path.with_name(f"{path.name}.tmp")
        beside.write_bytes(data)
        beside.replace(path)
