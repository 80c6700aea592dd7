"""Exchange: the attempts and means of one peer, and what it gives of them to others.

    exchange = Exchange(node.id, up="int8", down="int8", fetch=..., tell=..., over=..., clock=...)
    exchange.begin(attempt, plan, deadline, contribution)  # hear `over(attempt, Done or Fail)`
    mean = await exchange.get(digest, holders)  # one that was missed
    exchange.turn(digest)  # applied: whatever else belongs to that epoch is forgotten

A mean that was applied is kept until the next one is, for those who missed it; those before it
that still lie on the disk are given from there.
"""

import asyncio
import hashlib
import json
import math
from collections.abc import Callable, Sequence

from atoll.aggregation.allreduce import Done, Fail, Part, PartReady, Plan, whole
from atoll.p2p.contribution import Contribution, packer, unpack
from atoll.p2p.reducing import Fetch, Mean, Packed, Reducing, blob, space, vector
from atoll.protocols.blobs import Blob
from atoll.protocols.codecspec import Chain
from atoll.protocols.errors import RemoteError

INDEX = 1 << 20  # bytes of a list of parts
BEGIN = 2.0  # seconds that somebody waits who was told of an attempt before us


class Exchange:
    """`find` is what a `bulk.Shelf` asks; ids are `in/ATTEMPT/PART`, `out/ATTEMPT/PART` and, of a
    finished mean, `mean/DIGEST/PART` and `mean/DIGEST/parts`."""

    def __init__(
        self,
        me: str,
        elements: int,
        *,
        up: Chain,
        down: Chain,
        fetch: Fetch,
        tell: Callable[[str, str, PartReady], None],
        over: Callable[[str, Done | Fail], None],
        clock: Callable[[], float],
        most: float = math.inf,
        kept: Callable[[str], Packed | None] = lambda digest: None,
    ) -> None:
        """`elements` of the vector. `tell(peer, attempt, message)` sends it to that peer.
        `kept(digest)`: a mean that lies on the disk."""
        self._me, self._elements, self._most = me, elements, most
        self._up, self._down = packer(up), packer(down)
        self._fetch, self._tell, self._over, self._clock = fetch, tell, over, clock
        self._kept = kept
        self._attempts: dict[str, Reducing] = {}
        self._means: dict[str, Mean] = {}
        self._begun = asyncio.Event()  # set when the next attempt begins, and then another

    # ---- attempts ------------------------------------------------------------------------------

    def begin(self, attempt: str, plan: Plan, deadline: float, mine: Contribution | None) -> None:
        """`mine`: None where this peer's weight in `plan` is 0."""
        one = Reducing(
            self._me, attempt, plan, deadline, mine, up=self._up, down=self._down,
            fetch=self._fetch, clock=self._clock, most=self._most,
            tell=lambda peer, message: self._tell(peer, attempt, message),
            over=lambda end: self._ended(attempt, end),
        )  # fmt: skip
        self._attempts[attempt] = one
        self._begun.set()
        self._begun = asyncio.Event()
        one.start()

    def hear(self, attempt: str, message: PartReady) -> None:
        """No-op where that attempt is not, or no longer, this peer's."""
        if attempt in self._attempts:
            self._attempts[attempt].hear(message)

    def beat(self) -> None:
        for one in list(self._attempts.values()):
            one.beat()

    def drop(self, attempt: str) -> None:
        """Stop it. What is done of it can still be fetched until `turn`."""
        if attempt in self._attempts:
            self._attempts[attempt].drop()

    def sent(self, digest: str) -> tuple[tuple[Part, ...], tuple[memoryview, ...]]:
        """What this peer contributed to that mean, for its `Contribution.left_out`; ((), ()) where
        it made it in no attempt of its own."""
        for one in self._attempts.values():
            if one.mean is not None and one.mean.digest == digest and one.payloads:
                return one.plan.parts, one.payloads
        return (), ()

    def mean(self, digest: str) -> Mean:
        """One that `over` or `get` brought."""
        return self._means[digest]

    def keep(self, mean: Mean) -> None:
        """One that was made in a former life."""
        self._means[mean.digest] = mean

    def digests(self) -> set[str]:
        """Of the means that lie here."""
        return set(self._means)

    def __contains__(self, digest: str) -> bool:
        return digest in self._means

    def turn(self, digest: str = "") -> None:
        """An epoch is over: all attempts end, and of the means only `digest` is kept."""
        for one in self._attempts.values():
            one.drop()
        self._attempts.clear()
        self._means = {d: mean for d, mean in self._means.items() if d == digest}

    def _ended(self, attempt: str, end: Done | Fail) -> None:
        mean = self._attempts[attempt].mean
        if mean is not None:
            self._means[mean.digest] = mean
        self._over(attempt, end)

    # ---- means that were missed ----------------------------------------------------------------

    async def get(self, digest: str, holders: Sequence[str]) -> Mean:
        """The mean of that digest from any of `holders`. RemoteError of the last where none has
        it."""
        if digest in self._means:
            return self._means[digest]
        error = RemoteError("FL-P404", f"nobody has the mean {digest[:12]}", "download the model")
        for holder in holders:
            try:
                self._means[digest] = await self._get(digest, holder)
                return self._means[digest]
            except RemoteError as refused:
                error = refused
        raise error

    async def _get(self, digest: str, holder: str) -> Mean:
        room = memoryview(bytearray(INDEX))
        _, length, _ = await self._fetch(holder, f"mean/{digest}/parts", room, True)
        parts, digests = self._index(bytes(room[:length]))
        if whole(iter(digests)) != digest:
            raise RemoteError("FL-W105", f"{holder} has another mean", "ask another peer")
        values, payloads = vector(self._elements), []
        for i, part in enumerate(parts):
            here = values[part.start : part.stop]
            dest = space(self._down.size(len(here)))
            shorter = bool(getattr(self._down, "variable", False))
            sha256, length, _ = await self._fetch(holder, f"mean/{digest}/{i}", dest, shorter)
            if sha256.hex() != digests[i]:
                raise RemoteError("FL-W105", f"part {i} of {holder} differs", "ask another peer")
            payloads.append(dest[:length])
            if not math.isfinite(await asyncio.to_thread(unpack, self._down, payloads[i], here)):
                raise RemoteError("FL-P403", f"part {i} of {holder} is not finite", "ask another")
        return Mean(digest, parts, digests, tuple(payloads), values)

    def _index(self, said: bytes) -> tuple[tuple[Part, ...], tuple[str, ...]]:
        try:
            found = [(str(r), int(a), int(b), str(d)) for r, a, b, d in json.loads(said)]
        except (ValueError, TypeError) as error:
            raise RemoteError("FL-W101", "a malformed list of parts", "ask another") from error
        ends = [0, *(stop for _, _, stop, _ in found)]
        if [start for _, start, _, _ in found] + [self._elements] != ends:
            raise RemoteError("FL-W101", "the parts are not the whole", "ask another peer")
        if not all(start < stop for _, start, stop, _ in found):
            raise RemoteError("FL-W101", "an empty part", "ask another peer")
        return tuple(Part(r, a, b) for r, a, b, _ in found), tuple(d for *_, d in found)

    # ---- given to others -----------------------------------------------------------------------

    async def find(self, peer: str, name: str) -> Blob:
        """RemoteError FL-P402 where there is none, or none for `peer`."""
        kind, _, rest = name.partition("/")
        of, _, part = rest.rpartition("/")
        if kind in ("in", "out") and part.isdecimal() and await self._have_begun(of):
            return await self._attempts[of].find(peer, kind, int(part))
        mean = (self._means.get(of) or self._kept(of)) if kind == "mean" else None
        if mean is not None:
            if part == "parts":
                rows = [
                    [p.reducer, p.start, p.stop, d]
                    for p, d in zip(mean.parts, mean.digests, strict=True)
                ]
                said = json.dumps(rows).encode()
                return blob(name, memoryview(said), hashlib.sha256(said).digest())
            if part.isdecimal() and int(part) < len(mean.parts):
                i = int(part)
                return blob(name, mean.payloads[i], bytes.fromhex(mean.digests[i]))
        raise RemoteError("FL-P402", f"no {name[:80]!r} here", "ask again, or another peer")

    async def _have_begun(self, attempt: str) -> bool:
        """Whether it is under way here; waits a little for one that others began before."""
        try:
            async with asyncio.timeout(BEGIN):
                while attempt not in self._attempts:
                    await self._begun.wait()
        except TimeoutError:
            return False
        return True
