"""Reducing: one attempt at a group's mean on the network, as `allreduce.py` decides it.

It packs this peer's contribution, fetches what it reduces and what others reduced, takes the mean
of its own parts off the loop, and gives each part to whoever should have it: an input to the
reducer of its part alone, a result to the group. All of a group hold the same bits, also where a
codec is lossy: what a reducer sends is what it uses itself.
"""

import asyncio
import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
import torch

from atoll.aggregation.allreduce import (
    AllReduce,
    Arrived,
    Beat,
    Combine,
    Combined,
    Done,
    Fail,
    Go,
    Missed,
    Part,
    PartReady,
    Plan,
    Pull,
    ReduceEvent,
    Tell,
    What,
)
from atoll.aggregation.part_mean import part_mean
from atoll.p2p.bulk import Got
from atoll.p2p.contribution import Contribution, gain, unpack
from atoll.protocols import codecs
from atoll.protocols.blobs import Blob, BlobInfo
from atoll.protocols.codecs import Codec, as_bytes
from atoll.protocols.errors import RemoteError

logger = logging.getLogger(__name__)

AHEAD = 2  # parts on their way from one peer: in order, so that the first are soon reduced
WAIT = 5.0  # seconds that somebody who asks for what is being made waits for it
# (peer, blob id, where to, may it be shorter); RemoteError where it cannot be had
Fetch = Callable[[str, str, memoryview, bool], Awaitable[Got]]


@dataclass(frozen=True)
class Packed:
    """The parts of a mean as they travelled: who missed them gets the same bytes."""

    digest: str  # over the parts' digests
    parts: tuple[Part, ...]
    digests: tuple[str, ...]  # SHA-256 of each payload, hex
    payloads: tuple[memoryview, ...]


@dataclass(frozen=True)
class Mean(Packed):
    """A mean, ready to be applied."""

    values: torch.Tensor  # flat fp32, decoded


class Reducing:
    """One attempt. `over` is called once, in the loop, unless it was dropped before."""

    def __init__(
        self,
        me: str,
        attempt: str,
        plan: Plan,
        deadline: float,
        mine: Contribution | None,
        *,
        up: Codec,
        down: Codec,
        fetch: Fetch,
        tell: Callable[[str, PartReady], None],
        over: Callable[[Done | Fail], None],
        clock: Callable[[], float],
        most: float = math.inf,
    ) -> None:
        """`mine`: None where this peer's weight in `plan` is 0. `up`, `down`: codecs of inputs and
        results. `most`: no peer's part counts for more than so many median lengths."""
        self.me, self.attempt, self.plan = me, attempt, plan
        self.payloads: tuple[memoryview, ...] = ()  # what this peer contributed
        self.mean: Mean | None = None
        self._machine = AllReduce(me, plan, deadline, plan.longest(most * gain(up) * gain(down)))
        self._mine, self._up, self._down, self._most = mine, up, down, most
        self._fetch, self._tell, self._over, self._clock = fetch, tell, over, clock
        self._values = vector(plan.parts[-1].stop)
        self._inputs: dict[tuple[int, str], memoryview] = {}
        self._results: dict[int, tuple[str, memoryview]] = {}
        self._turns: dict[tuple[str, What], asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(AHEAD)
        )
        self._news = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._spawn(self._pack())
        self._handle(Go())

    def hear(self, message: PartReady) -> None:
        self._handle(message)

    def beat(self) -> None:
        self._handle(Beat())

    def drop(self) -> None:
        """Stop; what is done already can still be fetched."""
        self._machine.over = True
        for task in self._tasks:
            task.cancel()

    async def find(self, peer: str, what: str, part: int) -> Blob:
        """What `peer` may have of this attempt, as soon as it is there.

        RemoteError FL-P402 where it may not, or must ask again.
        """
        name = f"{what}/{self.attempt}/{part}"
        if peer not in self.plan.group or not 0 <= part < len(self.plan.parts):
            raise RemoteError("FL-P402", f"{name} is not for {peer}", "ask your group")
        mine = self.plan.parts[part].reducer == self.me
        if not mine if what == "out" else self.plan.parts[part].reducer != peer:
            raise RemoteError("FL-P402", f"{name} is not for {peer}", "ask its reducer")
        try:
            async with asyncio.timeout(WAIT), self._news:
                await self._news.wait_for(
                    lambda: part in self._results if what == "out" else bool(self.payloads)
                )
        except TimeoutError as error:
            raise RemoteError("FL-P402", f"{name} is not there yet", "ask again") from error
        if what == "out":
            digest, payload = self._results[part]
            return blob(name, payload, bytes.fromhex(digest))
        return blob(name, self.payloads[part])

    # ---- the machine ---------------------------------------------------------------------------

    def _handle(self, event: ReduceEvent) -> None:
        for action in self._machine.handle(event, self._clock()):
            match action:
                case Pull(peer, what, part):
                    self._spawn(self._pull(peer, what, part))
                case Combine(part, order):
                    self._spawn(self._combine(part, order))
                case Tell(peer, message):
                    self._tell(peer, message)
                case Done(digest):
                    self.mean = self._made(digest)
                    self._over(action)
                case Fail():  # pragma: no branch
                    self._over(action)

    def _made(self, digest: str) -> Mean:
        found = [self._results[i] for i in range(len(self.plan.parts))]
        digests, payloads = tuple(d for d, _ in found), tuple(p for _, p in found)
        return Mean(digest, self.plan.parts, digests, payloads, self._values)

    async def _pack(self) -> None:
        if self._mine is None:
            return
        payloads = await asyncio.to_thread(self._mine.packed, self.plan.parts)
        async with self._news:
            self.payloads = payloads
            self._news.notify_all()

    async def _pull(self, peer: str, what: What, part: int) -> None:
        place = self.plan.parts[part]
        values = self._values[place.start : place.stop]
        codec = self._up if what == "input" else self._down
        straight = what == "result" and codec is codecs.FP32
        dest = as_bytes(values) if straight else space(codec.size(len(values)))
        name = f"{'in' if what == 'input' else 'out'}/{self.attempt}/{part}"
        try:
            shorter = bool(getattr(codec, "variable", False))
            async with self._turns[peer, what]:
                sha256, length, _ = await self._fetch(peer, name, dest, shorter)
            payload, digest = dest[:length], sha256.hex()
            if what == "result":
                long = await asyncio.to_thread(unpack, codec, payload, values)
                if not math.isfinite(long):
                    raise RemoteError("FL-P403", f"{name} of {peer} is not finite", "try again")
                self._results[part] = digest, payload
            else:
                self._inputs[part, peer] = payload
        except RemoteError:
            self._handle(Missed(peer, what, part))
        else:
            result = what == "result"
            self._handle(Arrived(peer, what, part, *((digest, long) if result else ())))

    async def _combine(self, part: int, order: tuple[tuple[str, float], ...]) -> None:
        if self._mine is not None:
            async with self._news:
                await self._news.wait_for(lambda: bool(self.payloads))
            self._inputs[part, self.me] = self.payloads[part]
        digest, payload, spoiled, long = await asyncio.to_thread(self._mean_of, part, order)
        for peer, _ in order:
            self._inputs.pop((part, peer), None)
        if not spoiled:
            async with self._news:
                self._results[part] = digest, payload
                self._news.notify_all()
        self._handle(Combined(part, digest, spoiled, long))

    def _mean_of(
        self, part: int, order: tuple[tuple[str, float], ...]
    ) -> tuple[str, memoryview, tuple[str, ...], float]:
        """Its digest, its payload, whose input was none, and its length."""
        place = self.plan.parts[part]
        values = self._values[place.start : place.stop]
        inputs, spoiled = [], []
        for peer, _ in order:
            payload = self._inputs[part, peer]
            if self._up is codecs.FP32:
                inputs.append(codecs.as_tensor(payload, torch.float32))
                continue
            inputs.append(torch.empty_like(values))
            try:
                unpack(self._up, payload, inputs[-1])
            except RemoteError:
                spoiled.append(peer)
        if spoiled:
            return "", memoryview(b""), tuple(spoiled), 0.0
        _, bad = part_mean(inputs, [weight for _, weight in order], self._most, out=values)
        if bad:
            return "", memoryview(b""), tuple(order[i][0] for i in bad), 0.0
        payload = self._down.encode(values)
        long = unpack(self._down, payload, values)  # what others will read is used here too
        if not math.isfinite(long):
            return "", memoryview(b""), tuple(peer for peer, _ in order), 0.0
        return hashlib.sha256(payload).hexdigest(), payload, (), long

    def _spawn(self, work: Awaitable[None]) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("attempt=%s failed", self.attempt, exc_info=error)
            if not self._machine.over:
                self.drop()
                self._over(Fail(f"{self.me} failed: {error}"))


def vector(elements: int) -> torch.Tensor:
    """Flat fp32, of any values. numpy asks the kernel for large pages: fewer faults by far."""
    return torch.from_numpy(np.empty(elements, np.float32))


def space(size: int) -> memoryview:
    """Bytes of any values."""
    return memoryview(np.empty(size, np.uint8))  # type: ignore[arg-type]  # a buffer


def blob(name: str, view: memoryview, sha256: bytes = b"") -> Blob:
    """For the shelf; its SHA-256 is taken on the way where it is not known."""
    return Blob(BlobInfo(name, len(view), sha256, ()), view, ())
