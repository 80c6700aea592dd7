"""Gate: who may speak to this peer, and how it gets to know the others.

Every handler is behind it: a caller that has not shown the run's secret is refused. Peers say hello
to each other with their own entry and with those they know, in pairs and again and again, so the
roster spreads also where the directory (hivemind's DHT) fails or is in two halves; the directory is
only where a newcomer finds more of them sooner. Nothing there is believed (`roster.py`).
"""

import asyncio
import contextlib
import hashlib
import hmac
import itertools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from atoll.p2p import roster
from atoll.p2p.identity import Identity
from atoll.p2p.invite import ADDRESSES, Invite
from atoll.p2p.manifest import verify
from atoll.p2p.node import CALL_SECONDS, Answer, Node, Stream
from atoll.p2p.roster import Entry, Roster
from atoll.p2p.sealing import Sealing
from atoll.protocols.errors import PeerError, RemoteError

HELLO, MANIFEST, REACH = "atoll.hello", "atoll.manifest", "atoll.reach"
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
    `on_removed(peer)`: its entry was not renewed for ten minutes.
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
        self._node, self._invite, self._signed, self._beat = node, invite, signed, beat
        self._letter, self._former = b"", tuple(places)
        self._tasks: set[asyncio.Task[None]] = set()
        self._greeting: set[str] = set()
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._unseen: dict[str, int] = {}  # member -> looks in which the directory lacked it
        self._changed = asyncio.Event()
        self._closed = False

    async def open(self) -> None:
        await self._renew()
        await self._node.serve(HELLO, self._hello)
        await self._node.serve(MANIFEST, self._give_manifest)
        await self._node.serve(REACH, self._reach)
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
        entry = self.roster.hear(letter, time.time(), caller)
        if isinstance(entry, RemoteError):
            raise entry
        known = before.get(entry.peer)
        if entry.peer == self._node.id or entry == known:
            return
        self.sealing.know(entry.peer, entry.key)
        if known is None or replace(known, at=entry.at) != entry:
            self._changed.set()
            self.on_admitted(entry)
        if known is None and caller is None:
            self._hello_soon(entry)

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

    async def _give_manifest(self, peer: str, said: bytes) -> bytes:
        if not roster.proven(self._invite, peer, said[:128].decode(errors="replace")):
            raise roster.no_proof(peer)
        return self._signed

    async def _reach(self, peer: str, said: bytes) -> bytes:
        """Whether this peer can connect to an address: who is not here yet wants to know."""
        shown, _, address = said[:1024].decode(errors="replace").partition("\n")
        if not roster.proven(self._invite, peer, shown):
            raise roster.no_proof(peer)
        if not roster.leads(address, address.rpartition("/")[2]):
            raise RemoteError("FL-P305", f"no address: {address[:80]!r}", "send one of a peer")
        async with self._slots:
            return b"yes" if await self._node.meet([address]) else b"no"

    # ---- the life of it ------------------------------------------------------------------------

    async def _living(self) -> None:
        turn, noted = 0, 0.0
        while not self._closed:
            now = time.time()
            if now - self.me.at > RENEW or now < self.me.at - roster.AHEAD:
                await self._renew()
            if now - noted > RENEW / 2 and await self._note():
                noted = now
            await self._look()
            for peer in self.roster.expire(now):
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


async def reached_by(node: Node, invite: Invite, peer: str, address: str) -> bool:
    """Whether the member `peer` can connect to `address`, of a peer that it is not connected to.

    RemoteError FL-P203 where it does not answer, FL-P304 where it does not take our proof.
    """
    said = f"{roster.proof(invite, node.id)}\n{address}".encode()
    return await node.call(peer, REACH, said, 2 * CALL_SECONDS) == b"yes"


async def fetch_manifest(node: Node, invite: Invite) -> bytes:
    """The run's manifest with its signature, from any member that answers.

    PeerError FL-P202 where none does, FL-P304 where they do not take our proof, FL-P306 where what
    they give is not the invite's.
    """
    said = roster.proof(invite, node.id).encode()
    failed: list[RemoteError | PeerError] = []
    asked: set[str] = set()

    async def ask(peer: str) -> bytes | None:
        asked.add(peer)
        try:
            signed = await node.call(peer, MANIFEST, said, SECONDS)
            verify(signed, invite.manifest, invite.founder)
            return signed
        except (RemoteError, PeerError) as error:
            failed.append(error)
            return None

    for peer in by_peer(invite.addresses):
        if signed := await ask(peer):
            return signed
    with contextlib.suppress(RemoteError, TimeoutError):
        async with asyncio.timeout(SECONDS):
            records = await node.look(directory_key(invite))
        for record in list(records.values())[: roster.MEMBERS]:
            entry = roster.read(record, invite)
            if isinstance(entry, Entry) and entry.peer not in asked | {node.id}:
                await node.meet(entry.addresses) if entry.addresses else None
                if signed := await ask(entry.peer):
                    return signed
    telling = [e for e in failed if e.code in ("FL-P304", "FL-P306")]
    if telling:
        raise PeerError(telling[0].code, telling[0].message, telling[0].hint)
    why = failed[0].message if failed else "nobody is known"
    raise PeerError(
        "FL-P202",
        f"no member of the run gives its manifest: {why}",
        "does a peer of this run still run? ask for a newer invite: fl-peer invite",
    )


def directory_key(invite: Invite) -> str:
    """Where members are written; who does not hold the secret cannot guess it."""
    what = f"atoll-directory-v1\n{invite.run}\n{invite.manifest}".encode()
    return "atoll/" + hmac.new(invite.secret, what, hashlib.sha256).hexdigest()[:32]


def by_peer(addresses: Sequence[str]) -> dict[str, list[str]]:
    """Multiaddrs by the peer they end in; those that name none are left out."""
    found: dict[str, list[str]] = {}
    for address in addresses:
        _, named, peer = address.rpartition("/p2p/")
        if named and peer:
            found.setdefault(peer, []).append(address)
    return found
