"""Bulk: large blobs between peers, whole or not at all, resumed where a stream broke.

Measured: a libp2p stream whose sender closes first loses its tail in silence. So the last chunk
says that it is the last and carries the SHA-256 of the whole, the receiver closes, and what the
sender must know (that it arrived) is a call of its own. Frames are those of `frames.py`.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from atoll.p2p.calls import CALL_SECONDS, Stream
from atoll.p2p.node import Node
from atoll.protocols import frames
from atoll.protocols.blobs import CHUNK, Blob
from atoll.protocols.errors import RemoteError

NAME = "atoll.bulk"
PATIENCE = 30.0  # seconds without any progress after which a transfer is given up
PAUSE = 0.3  # seconds between a stream that broke and the next


class Got(NamedTuple):
    """What a transfer brought."""

    sha256: bytes
    length: int
    seconds: float = 0.0  # from its first chunk on: waiting for it to be made does not count


Find = Callable[[str, str], Awaitable[Blob]]
# (bytes, began, ended), seconds of the loop's clock: of what follows a transfer's first chunk
Moved = Callable[[float, float, float], None]


def unheard(size: float, began: float, ended: float) -> None:
    """Nobody wants to know."""


def timed(frames: Iterable[bytes], moved: Moved) -> Iterator[bytes]:
    """Those frames; `moved` hears how the transport took what follows the first. In a loop."""
    clock = asyncio.get_running_loop().time
    size, times = 0, [0.0]
    try:
        for frame in frames:
            yield frame
            times.append(clock())  # the transport has taken it
            size += len(frame) if len(times) > 2 else 0
    finally:  # also where the receiver closes, as it does when it has all
        if size:
            moved(size, times[1], times[-1])


class Serving(Protocol):
    """A node, or a gate before one."""

    async def serve_stream(self, name: str, stream: Stream) -> None: ...


class Shelf:
    """What this node gives to others: `find(peer, blob id)` is the blob, RemoteError where none.

    It may wait for one that is being made, but less long than `CALL_SECONDS`.
    """

    def __init__(self, node: Serving, find: Find, gave: Moved = unheard) -> None:
        self._node, self._find, self._gave = node, find, gave

    async def open(self) -> None:
        await self._node.serve_stream(NAME, self._give)

    async def _give(self, peer: str, said: bytes) -> AsyncIterator[bytes]:
        blob, offset = _asked(said)
        found = await self._find(peer, blob)
        if offset % CHUNK or offset > len(found.view):
            raise RemoteError("FL-W111", f"offset {offset} of {blob}", "resume at a whole chunk")
        coming = frames.chunks(
            found.view, blob, offset, crcs=found.crcs or None, digest=found.info.sha256 or None
        )
        for frame in timed(coming, self._gave):
            yield frame


async def fetch(
    node: Node,
    peer: str,
    blob: str,
    dest: memoryview,
    *,
    sha256: bytes = b"",
    shorter: bool = False,
    seconds: float = CALL_SECONDS,
    patience: float = PATIENCE,
) -> Got:
    """Fill `dest` with a peer's blob. Goes on where a stream broke.

    `shorter`: it may end before `dest` does. `seconds` may pass between two messages, `patience`
    without progress over several streams. RemoteError FL-P203 where the peer stops answering,
    FL-W105 where the bytes are others than `sha256` says, FL-W103 where there are more than `dest`
    holds, or too few.
    """
    coming, clock = _Coming(dest, shorter), asyncio.get_running_loop().time
    until = clock() + patience
    while not coming.sha256:
        before = coming.held
        try:
            await coming.go_on(node, peer, blob, seconds)
        except RemoteError as error:
            if coming.held > before:
                until = clock() + patience
            if error.code not in ("FL-P203", "FL-W105") or clock() >= until:
                raise
            await asyncio.sleep(PAUSE)
    whole = dest[: coming.held]
    found = await asyncio.to_thread(lambda: hashlib.sha256(whole).digest())
    if found != coming.sha256 or (sha256 and found != sha256):
        raise RemoteError("FL-W105", f"{blob} has SHA-256 {found.hex()}", "ask another peer for it")
    return Got(found, coming.held, clock() - coming.began)


class _Coming:
    """A blob on its way: what has arrived whole, and at the end what it should hash to."""

    def __init__(self, dest: memoryview, shorter: bool) -> None:
        self._dest = dest
        self._shorter = shorter
        self.held = 0
        self.began = 0.0  # when the first chunk was there
        self.sha256 = b""

    async def go_on(self, node: Node, peer: str, blob: str, seconds: float) -> None:
        """One stream, from where the last one broke."""
        asked = json.dumps({"blob": blob, "offset": self.held}).encode()
        messages = node.stream(peer, NAME, asked, seconds)
        try:
            async for message in messages:
                self.began = self.began or asyncio.get_running_loop().time()
                self._take(blob, frames.parse(message))
                if self.sha256:
                    return
        finally:
            await messages.aclose()
        raise RemoteError("FL-P203", f"{blob}: the stream ended at {self.held}", "tried again")

    def _take(self, blob: str, chunk: frames.Chunk) -> None:
        chunk.verify()
        end = self.held + len(chunk.data)
        whole = len(chunk.sha256) == 32 and (self._shorter or end == len(self._dest))
        if chunk.offset != self.held or end > len(self._dest) or (chunk.last and not whole):
            where = f"{blob}: bytes {chunk.offset} to {end}, expected {self.held} on"
            raise RemoteError("FL-W103", f"{where}, {len(self._dest)} in all", "ask another peer")
        self._dest[self.held : end] = chunk.data
        self.held = end
        self.sha256 = chunk.sha256 if chunk.last else b""


def _asked(said: bytes) -> tuple[str, int]:
    try:
        plain = json.loads(said)
        blob, offset = plain["blob"], plain["offset"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RemoteError("FL-W101", "a malformed request", "send blob and offset") from error
    if not isinstance(blob, str) or not isinstance(offset, int) or offset < 0 or len(blob) > 128:
        raise RemoteError("FL-W101", "a malformed request", "send blob and offset")
    return blob, offset
