"""Newcomers: what one who has an invite may ask of members before it is one, and what they answer.

It asks for the run's manifest, and whether they can connect to it. With each question it proves
that it holds the run's secret; whom to ask the invite says, and the directory.
"""

import asyncio
import contextlib
import hashlib
import hmac
from collections.abc import Sequence

from atoll.p2p import roster
from atoll.p2p.calls import CALL_SECONDS
from atoll.p2p.invite import Invite
from atoll.p2p.manifest import verify
from atoll.p2p.node import Node
from atoll.p2p.roster import Entry
from atoll.protocols.errors import PeerError, RemoteError

MANIFEST, REACH = "atoll.manifest", "atoll.reach"
SECONDS = 5.0  # that an answer, or a look into the directory, may take


class Desk:
    """A member's answers. `open` it over a started Node."""

    def __init__(self, node: Node, invite: Invite, signed: bytes, slots: asyncio.Semaphore) -> None:
        """`signed`: the manifest with its signature. `slots`: connections it may try at once."""
        self._node, self._invite, self._signed, self._slots = node, invite, signed, slots

    async def open(self) -> None:
        await self._node.serve(MANIFEST, self._give_manifest)
        await self._node.serve(REACH, self._reach)

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
