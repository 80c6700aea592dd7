"""Post: what peers say to each other as bytes and back, and a queue for each so that nobody waits.

A letter is JSON of one of the rendezvous' messages, or of an all-reduce's. What comes in is read
strictly and within bounds: a field too many, a number that is none, a text too long are refused
with FL-W101, and the sender alone notices. Delivery is not promised; the machines expect that.
"""

import asyncio
import dataclasses
import json
import logging
import math
import re
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from atoll.aggregation.allreduce import PartReady
from atoll.aggregation.rendezvous_messages import (
    Accept,
    Accepted,
    Announce,
    Begin,
    Commit,
    Failed,
    Goodbye,
    Message,
    Path,
    Prepare,
    Promise,
    Reduced,
    Refuse,
    Stand,
    Value,
    Whence,
)
from atoll.protocols import state
from atoll.protocols.errors import RemoteError

NAME = "atoll.post"
LETTER = 256 << 10  # bytes of one: a group of a thousand
BATCH = 512 << 10  # bytes of letters in one call
MEMBERS = 256  # that can have sealed a mean, each once
CHAIN = re.compile("[0-9a-z]{0,64}")
TEXT = 512  # characters of a name, a digest, a reason
COUNT = 1 << 53  # no number of ours is larger
KEPT = 64  # letters that wait for one peer; then the oldest are lost
AT_ONCE = 1.0  # seconds within which a call fails where nobody listens
SECONDS = 3.0  # that a call may take: a frozen peer's letters wait no longer

KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Announce, Prepare, Promise, Refuse, Begin, Reduced, Failed, Accept, Accepted, Commit,
        Goodbye, Whence, Path,
    )
}  # fmt: skip

Call = Callable[[str, str, bytes, float], Awaitable[bytes]]  # as Node.call

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the all-reduce `attempt` can be fetched from who says so."""

    attempt: str
    part: int
    digest: str

    @classmethod
    def of(cls, attempt: str, ready: PartReady) -> "Part":
        return cls(attempt, ready.part, ready.digest)


Letter = Message | Part


def write(letter: Letter) -> bytes:
    return state.encode({"kind": type(letter).__name__, "says": state.dump(letter)}).encode()


def read(data: bytes) -> Letter:
    """RemoteError FL-W101 where it is no letter of ours."""
    if len(data) > LETTER:
        raise _malformed(f"{len(data)} bytes, at most {LETTER}")
    try:
        plain = json.loads(data)
        if not isinstance(plain, dict) or plain.keys() != {"kind", "says"}:
            raise ValueError("not kind and says")
        kind = Part if plain["kind"] == "Part" else KINDS[plain["kind"]]
        letter: Letter = state.load(kind, plain["says"])
        _bounded(letter)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise _malformed(str(error)[:200]) from error
    return letter


def _bounded(value: object) -> None:
    """No text too long or none at all, no number that is none or too large, however deep."""
    match value:
        case str():
            if len(value) > TEXT:
                raise ValueError(f"a text of {len(value)} characters")
            value.encode()  # JSON has halves of characters, of which nothing can make a hash
        case int() | float():
            if not math.isfinite(value) or abs(value) > COUNT:
                raise ValueError(f"the number {value}")
        case tuple():
            for one in value:
                _bounded(one)
        case None:
            pass
        case _:
            if isinstance(value, Value) and not _fits(value):
                raise ValueError("a group whose weights do not fit")
            if isinstance(value, Stand) and not CHAIN.fullmatch(value.chain):
                raise ValueError("a chain that is none")  # models' files are named so
            for name in type(value).__dataclass_fields__:  # type: ignore[attr-defined]
                _bounded(getattr(value, name))


def _fits(value: Value) -> bool:
    alike = len(value.group) == len(value.weights) == len({*value.group})
    once = all(
        len({*peers}) == len(peers) <= MEMBERS
        for peers in ([peer for peer, _ in value.seals], [one.peer for one in value.gone])
    )
    return alike and once and min(value.weights, default=-1) >= 0


def _malformed(why: str) -> RemoteError:
    return RemoteError("FL-W101", f"a malformed letter: {why}", "is it a peer of this version?")


class Post:
    """`send` never waits: each peer has a queue and a worker of its own, `close` ends them."""

    def __init__(
        self,
        call: Call,
        heard: Callable[[str, Letter], None],
        gone: Callable[[str], None] = lambda peer: None,
    ) -> None:
        """`gone(peer)`: a call to it failed at once, so it is dead rather than slow."""
        self._call, self._heard, self._gone = call, heard, gone
        self._boxes: dict[str, _Box] = {}
        self.lost = 0  # letters that no call took
        self.refused = 0  # that came and were none

    async def answer(self, peer: str, said: bytes) -> bytes:
        """For `Node.serve`: letters of a peer, one a line. Those that are none are left out."""
        wrong: RemoteError | None = None
        for line in said.split(b"\n"):
            try:
                letter = read(line)
            except RemoteError as error:
                self.refused += 1
                wrong = error
            else:
                self._heard(peer, letter)
        if wrong is not None:
            raise wrong
        return b""

    def send(self, peer: str, letter: Letter) -> None:
        box = self._boxes.get(peer)
        if box is None:
            box = self._boxes[peer] = _Box()
            box.worker = asyncio.create_task(self._deliver(peer, box))
        box.put(letter)

    def forget(self, peer: str) -> None:
        box = self._boxes.pop(peer, None)
        if box is not None and box.worker is not None:
            box.worker.cancel()

    async def flush(self, seconds: float) -> None:
        """Wait until all that was said is out, at most so long."""
        until = asyncio.get_running_loop().time() + seconds
        while any(box.letters or box.busy for box in self._boxes.values()):
            if asyncio.get_running_loop().time() >= until:
                return
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        workers = [box.worker for box in self._boxes.values() if box.worker is not None]
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        self._boxes.clear()

    async def _deliver(self, peer: str, box: "_Box") -> None:
        while True:
            await box.filled.wait()
            count, batch = box.take()
            clock = asyncio.get_running_loop().time
            began = clock()
            try:
                await self._call(peer, NAME, batch, SECONDS)
            except RemoteError as error:
                self.lost += count
                logger.debug("peer=%s letters=%d lost: %s", peer, count, error)
                if error.code == "FL-P203" and clock() < began + AT_ONCE:
                    self._gone(peer)
            finally:
                box.busy = False


@dataclass
class _Box:
    """What waits for one peer. Of its announcements the last is enough."""

    letters: deque[Letter] = dataclasses.field(default_factory=deque)
    filled: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    worker: asyncio.Task[None] | None = None
    busy: bool = False

    def put(self, letter: Letter) -> None:
        if isinstance(letter, Announce):
            rest = [one for one in self.letters if not isinstance(one, Announce)]
            self.letters = deque(rest)
        self.letters.append(letter)
        while len(self.letters) > KEPT:
            self.letters.popleft()
        self.filled.set()

    def take(self) -> tuple[int, bytes]:
        """As many as go into one call, in order; one at least."""
        lines: list[bytes] = []
        size = 0
        while self.letters:
            line = write(self.letters[0])
            if lines and size + len(line) + 1 > BATCH:
                break
            self.letters.popleft()
            lines.append(line)
            size += len(line) + 1
        if not self.letters:
            self.filled.clear()
        self.busy = True
        return len(lines), b"\n".join(lines)
