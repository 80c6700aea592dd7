"""Gate: who may speak to this peer, and how it gets to know the others.

Every handler is behind it: a caller that has not shown the run's secret is refused (whoever is new
shows it with each question, to `newcomers.py`). Peers say hello to each other with their own entry
and with those they know, in pairs and again and again, so the roster spreads also where the
directory (hivemind's DHT) fails or is in two halves; the directory is only where a newcomer finds
more of them sooner. Nothing there is believed (`roster.py`).
"""

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from atoll.p2p import roster
from atoll.p2p.calls import CALL_SECONDS, Answer, Stream
from atoll.p2p.identity import Identity
from atoll.p2p.invite import ADDRESSES, Invite
from atoll.p2p.manifest import verify
from atoll.p2p.newcomers import Desk, by_peer, directory_key
from atoll.p2p.node import Node
from atoll.p2p.roster import Entry, Roster
from atoll.p2p.sealing import Sealing
from atoll.protocols.errors import PeerError, RemoteError

HELLO = "atoll.hello"
BEAT = 2.0  # seconds between two rounds of hellos and looks into the directory
SECONDS = 5.0  # that one of those may take
RENEW = 60.0  # seconds after which the own entry is written anew
KEPT = 300.0  # seconds for which the directory keeps it
LETTERS = 512 << 10  # bytes of entries in one hello
AT_ONCE = 8  # hellos under way

logger = logging.getLogger(__name__)


class Gate:
    """Admission over a started Node. `open` it, `close` it.

    `on_admitted(entry)`: a new member, or a known one that says something new of itself.
    `on_removed(peer)`: it was not heard for ten minutes.
    """

    def __init__(
        self,
        node: Node,
        invite: Invite,
        signed: bytes,
        *,
        name: str,
        schema: str,
        speed: float = 0.0,
        bandwidth: float = 0.0,
        bulk: str = "",
        on_admitted: Callable[[Entry], None] = lambda entry: None,
        on_removed: Callable[[str], None] = lambda peer: None,
        places: Sequence[str] = (),
        beat: float = BEAT,
    ) -> None:
        """`signed`: the manifest with the founder's signature, as `fetch_manifest` gives it.
        PeerError FL-P306 where it is not the invite's. `places`: multiaddrs at which members were
        in an earlier life of this peer."""
        self.manifest = verify(signed, invite.manifest, invite.founder)
        self.roster = Roster(invite, node.id)
        self._identity = Identity(node.folder / "identity.key")
        self.sealing = Sealing(self._identity)  # knows whoever was admitted
        self.on_admitted, self.on_removed = on_admitted, on_removed
        self.me = Entry(
            node.id,
            name[:64],
            bool(node.listen),
            bandwidth,
            speed,
            schema,
            (),
            bulk,
            self.sealing.public,
            0.0,
        )
        self._node, self._invite, self._beat = node, invite, beat
        self._letter, self._former = b"", tuple(places)
        self._tasks: set[asyncio.Task[None]] = set()
        self._greeting: set[str] = set()
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._desk = Desk(node, invite, signed, self._slots)
        self._unseen: dict[str, int] = {}  # member -> looks in which the directory lacked it
        self._changed = asyncio.Event()
        self.doubled = asyncio.Event()  # another process takes part as this peer, and goes on
        self._outdone = False  # a newer entry of this peer was heard than it had written
        self._closed = False

    async def open(self) -> None:
        await self._renew()
        await self._node.serve(HELLO, self._hello)
        await self._desk.open()
        self._spawn(self._living())

    async def close(self) -> None:
        self._closed = True  # what is cancelled as its wait ends may never hear of it
        self._changed.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- behind the gate -----------------------------------------------------------------------

    async def serve(self, name: str, answer: Answer) -> None:
        """As Node's, for members only: others hear FL-P304."""

        async def guarded(peer: str, said: bytes) -> bytes:
            self._admit(peer)
            return await answer(peer, said)

        await self._node.serve(name, guarded)

    async def serve_stream(self, name: str, stream: Stream) -> None:
        async def guarded(peer: str, said: bytes) -> AsyncIterator[bytes]:
            self._admit(peer)
            async for message in stream(peer, said):
                yield message

        await self._node.serve_stream(name, guarded)

    async def call(self, peer: str, name: str, said: bytes, seconds: float = CALL_SECONDS) -> bytes:
        """As Node's; a member that has forgotten us, or never knew us, hears a hello first."""
        try:
            return await self._node.call(peer, name, said, seconds)
        except RemoteError as error:
            if error.code != "FL-P304":
                raise
        await self._greet(peer)
        return await self._node.call(peer, name, said, seconds)

    async def stream(
        self, peer: str, name: str, said: bytes, seconds: float = CALL_SECONDS
    ) -> AsyncGenerator[bytes, None]:
        """As Node's, with a hello where one is wanted. Close it when you have all."""
        try:
            async with aclosing(self._node.stream(peer, name, said, seconds)) as messages:
                async for message in messages:
                    yield message
            return
        except RemoteError as error:
            if error.code != "FL-P304":
                raise
        await self._greet(peer)
        async with aclosing(self._node.stream(peer, name, said, seconds)) as messages:
            async for message in messages:
                yield message

    def _admit(self, peer: str) -> None:
        if not self.roster.holds(peer):
            raise roster.no_proof(peer)

    # ---- what this peer says of itself ---------------------------------------------------------

    async def tell(self, **changes: Any) -> None:
        """Something of `me` is new (speed, bandwidth, bulk): every member hears of it."""
        self.me = replace(self.me, **changes)
        await self._renew()
        for entry in self.roster.entries():
            self._hello_soon(entry)

    def forget(self, peer: str) -> None:
        """It said goodbye."""
        self.roster.forget(peer)

    def addresses(self) -> tuple[str, ...]:
        """Where members may be found, this peer first: for an invite."""
        others = itertools.chain.from_iterable(e.addresses for e in self.roster.entries())
        return tuple(dict.fromkeys((*self.me.addresses, *others)))[:ADDRESSES]

    async def _renew(self) -> None:
        """Write the own entry anew, where this peer is now."""
        with contextlib.suppress(RemoteError):  # its daemon is being restarted
            found = [a for a in await self._node.addresses() if roster.leads(a, self._node.id)]
            self.me = replace(self.me, addresses=tuple(found[: roster.ADDRESSES]))
        self.me = replace(self.me, at=max(time.time(), self.me.at + 1e-3))
        self._letter = roster.write(self.me, self._identity, self._invite)

    # ---- hellos --------------------------------------------------------------------------------

    async def _hello(self, peer: str, said: bytes) -> bytes:
        self._take(said, peer)
        return self._letters()

    def _take(self, said: bytes, peer: str) -> None:
        """The entries of a hello; RemoteError where the first is not the speaker's and true."""
        try:
            first, *more = roster.gossiped(said)
        except (ValueError, RecursionError) as error:
            raise RemoteError("FL-P305", f"not a hello: {error}", "send entries") from error
        self._hear(first, peer)
        for letter in more:
            with contextlib.suppress(RemoteError):
                self._hear(letter, None)

    def _hear(self, letter: bytes, caller: str | None) -> None:
        before = {e.peer: e for e in self.roster.entries()}
        entry = self.roster.hear(letter, time.time(), time.monotonic(), caller)
        if isinstance(entry, RemoteError):
            if caller is None:
                self._ask_itself(letter)
            raise entry
        known = before.get(entry.peer)
        if entry.peer == self._node.id:
            self._heard_of_me(entry)
        if entry.peer == self._node.id or entry == known:
            return
        self.sealing.know(entry.peer, entry.key)
        if known is None or replace(known, at=entry.at) != entry:
            self._changed.set()
            self.on_admitted(entry)
        if known is None and caller is None:
            self._hello_soon(entry)

    def _ask_itself(self, letter: bytes) -> None:
        """An entry that is true but for its date may be of a member whose clock is wrong, which
        cannot take ours from others either: without a hello no group could have us both."""
        entry = roster.read(letter, self._invite)
        if isinstance(entry, Entry) and not self.roster.holds(entry.peer):
            self._hello_soon(entry)

    def _heard_of_me(self, entry: Entry) -> None:
        """A newer one than this process wrote: of its former life, if the clock was set back since,
        or of another process, from a copy of its directory. Only that one answers what is newer
        still; so of two the one ends that was there before."""
        if entry.at <= self.me.at:
            return
        if self._outdone:
            self.doubled.set()
            return
        self._outdone = True
        self.me = replace(self.me, at=entry.at)
        self._spawn(self._renew())

    async def until_doubled(self) -> None:
        """Raises PeerError FL-P410 then."""
        await self.doubled.wait()
        raise PeerError(
            "FL-P410",
            f"{self._node.folder}: another process takes part as this peer, {self._node.id}, "
            "from a copy of this directory",
            "keep that one and remove this directory; a second peer joins in a new one",
        )

    def _letters(self) -> bytes:
        told, size = [self._letter], len(self._letter)
        for letter in self.roster.letters():
            size += len(letter) + 8
            if size > LETTERS:
                break
            told.append(letter)
        return roster.gossip(told)

    def _hello_soon(self, entry: Entry) -> None:
        if entry.peer not in self._greeting:
            self._greeting.add(entry.peer)
            self._spawn(self._hello_to(entry))

    async def _hello_to(self, entry: Entry) -> None:
        try:
            async with self._slots:
                try:
                    await self._greet(entry.peer)
                except RemoteError:
                    if entry.addresses and await self._node.meet(entry.addresses):
                        await self._greet(entry.peer)
        except RemoteError as error:
            logger.debug("peer=%s hello: %s", entry.peer, error)
        finally:
            self._greeting.discard(entry.peer)

    async def _greet(self, peer: str) -> None:
        answer = await self._node.call(peer, HELLO, self._letters(), SECONDS)
        self._take(answer, peer)

    # ---- the life of it ------------------------------------------------------------------------

    async def _living(self) -> None:
        turn, noted = 0, -math.inf
        while not self._closed:
            now, clock = time.time(), time.monotonic()
            if now - self.me.at > RENEW or now < self.me.at - roster.AHEAD:
                await self._renew()
            if clock - noted > RENEW / 2 and await self._note():
                noted = clock
            await self._look()
            for peer in self.roster.expire(clock):
                self.on_removed(peer)
            members = self.roster.entries()
            if members:
                self._hello_soon(members[turn % len(members)])
                turn += 1
            self._node.bootstrap = self._places()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._beat):
                    await self._changed.wait()
                await asyncio.sleep(0.1)
            self._changed.clear()

    async def _note(self) -> bool:
        try:
            async with asyncio.timeout(SECONDS):
                key = directory_key(self._invite)
                return await self._node.note(key, self._node.id, self._letter, KEPT)
        except (RemoteError, TimeoutError) as error:
            logger.debug("peer=%s directory: %s", self._node.id, error)
            return False

    async def _look(self) -> None:
        """Who is in the directory. Members that are not, while they can be met, are in another
        half of it; where nobody is known at all, the invite says whom to meet, and memory: all
        may have been started again at once, and each have found nobody."""
        seen = {}
        try:
            async with asyncio.timeout(SECONDS):
                seen = dict(await self._node.look(directory_key(self._invite)))
        except (RemoteError, TimeoutError) as error:
            logger.debug("peer=%s directory: %s", self._node.id, error)
        for record in list(seen.values())[: roster.MEMBERS]:
            with contextlib.suppress(RemoteError):
                self._hear(record, None)
        members = self.roster.entries()
        for entry in members:
            missed = 0 if entry.peer in seen else self._unseen.get(entry.peer, 0) + 1
            self._unseen[entry.peer] = missed
            if missed and missed % 5 == 0 and entry.addresses:
                self._spawn(self._meet(entry.addresses))
        self._unseen = {e.peer: self._unseen[e.peer] for e in members}
        if not members:
            known = (*self._former, *self._invite.addresses)
            for peer, addresses in by_peer(known).items():
                if peer != self._node.id:
                    self._spawn(self._meet(addresses, hello=peer))

    async def _meet(self, addresses: Sequence[str], hello: str = "") -> None:
        async with self._slots:
            if await self._node.meet(addresses) and hello:
                with contextlib.suppress(RemoteError):
                    await self._greet(hello)

    def _places(self) -> tuple[str, ...]:
        """Where a daemon that is replaced finds the others."""
        own = self._node.id
        return tuple(a for a in (*self.addresses(), *self._invite.addresses) if own not in a)

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
