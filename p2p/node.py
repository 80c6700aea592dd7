"""Node: one peer on the network, in our own event loop: identity, calls, and the shared directory.

hivemind's `P2P` and `DHTNode`, and none of its forked classes, over a daemon that is watched and
replaced. What is said is bytes; what they mean, and who may say it, is the caller's affair
(`roster.py`).
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

from atoll.p2p import calls, ports
from atoll.p2p.calls import CALL_SECONDS, Answer, Stream, no_answer, within
from atoll.p2p.daemon import Daemon, unreachable
from atoll.p2p.folder import disk
from atoll.p2p.identity import Identity, make
from atoll.protocols.errors import PeerError, RemoteError

RECORD = 4 << 10  # bytes of a record in the directory
PING_SECONDS = 3.0  # between two looks at the daemon, and for its answer
FROZEN = 2  # looks without an answer after which it is taken for frozen

logger = logging.getLogger(__name__)


class Node:
    """`start` it in a running loop; `stop` it there. It is itself again after each restart of its
    daemon: same id, same handlers, the same directory."""

    def __init__(
        self,
        folder: Path,
        *,
        listen: Sequence[str] = ("/ip4/0.0.0.0/tcp/0",),
        bootstrap: Sequence[str] = (),
    ) -> None:
        """`folder` keeps the identity; nobody else may read it. Multiaddrs in the rest.

        `listen` (): it calls others and answers over those connections, but nobody can connect to
        it. `bootstrap` may be set anew: a daemon that is replaced looks there.
        """
        self.folder = folder.absolute()
        self.listen = tuple(listen)
        self.bootstrap = tuple(bootstrap)
        self.id = ""
        self.restarts = 0
        self.lost = asyncio.Event()  # it could not be brought back
        self._daemon: Daemon | None = None
        self._p2p: Any = None
        self._dht: Any = None
        self._answers: dict[str, Answer] = {}
        self._streams: dict[str, Stream] = {}
        self._watch: asyncio.Task[None] | None = None
        self._stopping = False

    # ---- life ----------------------------------------------------------------------------------

    async def start(self) -> None:
        """PeerError FL-P201 (no daemon), FL-P202 (none of `bootstrap` answers) or FL-P405."""
        identity = self.folder / "identity.key"
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.folder.chmod(0o700)
            if not identity.exists():
                make(identity)
        except OSError as error:
            raise disk(self.folder, error) from error
        _look_at(identity)
        await self._up(self.bootstrap)
        self._watch = asyncio.create_task(self._watching())

    async def stop(self) -> None:
        self._stopping = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await self._down()

    async def addresses(self) -> list[str]:
        """Multiaddrs under which others may reach this node, its id in each; [] where none can."""
        if not self.listen:
            return []
        p2p = self._up_p2p()
        found = await within(CALL_SECONDS, p2p.get_visible_maddrs(latest=True), "the daemon")
        return [str(address) for address in found]

    @property
    def daemon(self) -> Daemon:
        assert self._daemon is not None, "start it first"
        return self._daemon

    async def meet(self, addresses: Sequence[str]) -> bool:
        """Connect to the peer of these addresses, all of the same, and share a directory with it
        from now on. False where it cannot be reached."""
        from hivemind.p2p import PeerID
        from hivemind.utils.multiaddr import Multiaddr

        try:
            peer = PeerID.from_base58(addresses[0].rpartition("/p2p/")[2])
            bare = [Multiaddr(one.rpartition("/p2p/")[0]) for one in addresses]
            client = self._up_p2p()._client  # hivemind has no public way to connect
            await within(CALL_SECONDS, client.connect(peer, bare), f"peer {peer}")
            pinged = self._up_dht().protocol.call_ping(peer)
            return await within(CALL_SECONDS, pinged, f"peer {peer}") is not None
        except (RemoteError, ValueError):  # nobody there, or no address at all
            return False

    async def ahead(self, peer: str) -> float:
        """How many seconds its clock is ahead of ours. RemoteError FL-P203 where it is silent."""
        from hivemind.p2p import PeerID
        from hivemind.proto.dht_pb2 import PingRequest

        protocol = self._up_dht().protocol
        request = PingRequest(peer=protocol.node_info)
        began = time.time()
        asked = protocol.get_stub(PeerID.from_base58(peer)).rpc_ping(request, timeout=CALL_SECONDS)
        answer = await within(CALL_SECONDS, asked, f"peer {peer}")
        return float(answer.dht_time) - (began + time.time()) / 2

    async def _up(self, bootstrap: Sequence[str]) -> None:
        from hivemind.dht.node import DHTNode
        from hivemind.p2p import P2P
        from hivemind.utils.multiaddr import Multiaddr

        self._daemon = Daemon(self.folder, self.listen, bootstrap)
        try:
            await self._daemon.start()
            # Its sockets lie beside the daemon's, not in /tmp where all may see them.
            prefix = {"_UNIX_SOCKET_PREFIX": f"/unix{self._daemon.sockets}/"}
            mine: Any = type("P2PInFolder", (P2P,), prefix)
            control = Multiaddr(self._daemon.control)
            self._p2p = await within(CALL_SECONDS, mine.replicate(control), "the daemon")
            self._p2p._client.control._pending_calls = calls.Waiting()
            self.id = self._p2p.peer_id.to_base58()
            for name, answer in self._answers.items():
                await calls.serve(self._p2p, name, answer)
            for name, stream in self._streams.items():
                await calls.serve_stream(self._p2p, name, stream)
            self._dht = await self._directory(DHTNode, Multiaddr, bootstrap)
            self.listen = await self._ports()  # where others know it, after a restart too
        except BaseException:
            await self._down()
            raise

    async def _ports(self) -> tuple[str, ...]:
        """`listen`, with the port that was found in place of 0."""
        seen = {}
        for address in await self.addresses():
            parts = address.split("/")
            if len(parts) > 4:
                seen[parts[3]] = parts[4]  # "tcp" -> its port
        return tuple(
            one
            if len(p := one.split("/")) < 5 or p[4] != "0"
            else "/".join([*p[:4], seen.get(p[3], "0"), *p[5:]])
            for one in self.listen
        )

    async def _directory(self, kind: Any, address: Any, bootstrap: Sequence[str]) -> Any:
        known = [address(b) for b in bootstrap] or None
        try:
            made = kind.create(p2p=self._p2p, initial_peers=known, client_mode=not self.listen)
            return await within(CALL_SECONDS, made, "the swarm")
        except Exception as error:  # hivemind raises what it finds
            if isinstance(error, asyncio.CancelledError | AssertionError):
                raise
            raise unreachable(bootstrap, str(error)) from error

    async def _down(self) -> None:
        dht, p2p, daemon = self._dht, self._p2p, self._daemon
        self._dht = self._p2p = None
        with contextlib.suppress(Exception):
            if dht is not None:
                await asyncio.wait_for(dht.shutdown(), 2.0)
        with contextlib.suppress(Exception):
            if p2p is not None:
                await asyncio.wait_for(p2p.shutdown(), 2.0)
                await asyncio.wait_for(_ended(p2p), 2.0)
        for _ in range(3):
            await asyncio.sleep(0)  # sockets that were closed are gone a turn of the loop later
        if daemon is not None:
            await daemon.stop()

    async def _watching(self) -> None:
        """A daemon that has died or does not answer is replaced."""
        silent = 0
        while not self._stopping:
            try:
                async with asyncio.timeout(PING_SECONDS):
                    await self.daemon.gone.wait()
            except TimeoutError:
                silent = 0 if await self._answers_ping() else silent + 1
                if silent < FROZEN:
                    continue
                logger.warning("peer=%s the daemon does not answer, it is replaced", self.id)
                self.daemon.kill()
            silent = 0
            await self._down()
            try:
                await self._up_again()
            except PeerError as error:
                logger.error("peer=%s the daemon cannot be brought back: %s", self.id, error)
                self.lost.set()
                return
            self.restarts += 1
            logger.info("peer=%s the daemon was restarted", self.id)

    async def _up_again(self) -> None:
        """Alone where nobody answers: whoever looks for it will meet it."""
        try:
            await self._up(self.bootstrap)
        except PeerError as error:
            if error.code != "FL-P202":
                raise
            await self._up(())

    async def _answers_ping(self) -> bool:
        """Over a connection of its own; that of the calls must be there as well."""
        p2p = self._p2p
        if p2p is None or p2p._client.control._read_task.done():
            return False
        try:
            async with asyncio.timeout(PING_SECONDS):
                await p2p.list_peers()
        except Exception:  # noqa: BLE001  # whatever it is, it is no answer
            return False
        return True

    # ---- calls ---------------------------------------------------------------------------------

    async def serve(self, name: str, answer: Answer) -> None:
        """Answer calls of `name`. A RemoteError that it raises reaches the caller."""
        self._answers[name] = answer
        await calls.serve(self._up_p2p(), name, answer)

    async def serve_stream(self, name: str, stream: Stream) -> None:
        """Answer with many messages, none of which begins with `calls.REFUSED`; the caller ends the
        stream (`bulk.py` says why)."""
        self._streams[name] = stream
        await calls.serve_stream(self._up_p2p(), name, stream)

    async def call(self, peer: str, name: str, said: bytes, seconds: float = CALL_SECONDS) -> bytes:
        """What `peer` answers. RemoteError FL-P203 where it does not, or what it refused with."""
        return await calls.call(self._up_p2p(), peer, name, said, seconds)

    def stream(
        self, peer: str, name: str, said: bytes, seconds: float = CALL_SECONDS
    ) -> AsyncGenerator[bytes, None]:
        """Its messages, each within `seconds` of the one before. Close it when you have all.
        RemoteError FL-P203, or what the peer refused with."""
        return calls.stream(self._up_p2p(), peer, name, said, seconds)

    def _up_p2p(self) -> Any:
        if self._p2p is None:
            raise no_answer("this peer's daemon", "it is being restarted")
        return self._p2p

    # ---- the directory -------------------------------------------------------------------------

    async def note(self, key: str, subkey: str, record: bytes, seconds: float) -> bool:
        """Write a record that all may read for `seconds`; False where the swarm did not take it."""
        if len(record) > RECORD:
            raise ValueError(f"a record of {len(record)} bytes, at most {RECORD}")
        until = time.time() + seconds  # hivemind's records end by the clock on the wall
        stored = self._up_dht().store(key, record, until, subkey=subkey)
        return bool(await within(CALL_SECONDS, stored, "the swarm"))

    async def look(self, key: str) -> Mapping[str, bytes]:
        """The records under `key`, by subkey. Garbage is left out; {} where there is none."""
        asked = self._up_dht().get(key, latest=True)
        found = await within(CALL_SECONDS, asked, "the swarm")
        if found is None or not hasattr(found.value, "items"):
            return {}
        return {
            str(subkey): bytes(entry.value)
            for subkey, entry in found.value.items()
            if isinstance(subkey, str)
            and isinstance(entry.value, bytes)
            and len(entry.value) <= RECORD
        }

    def _up_dht(self) -> Any:
        if self._dht is None:
            raise no_answer("this peer's daemon", "it is being restarted")
        return self._dht


async def started(folder: Path, listen: Sequence[str], bootstrap: Sequence[str] = ()) -> Node:
    """A node that is up; on any port where another program took its own since that was found free.
    PeerError as Node.start."""
    node = Node(folder, listen=listen, bootstrap=bootstrap)
    try:
        await node.start()
    except PeerError as error:
        taken = "in use" in error.message or not ports.all_free(listen)  # perhaps for a moment
        if error.code != "FL-P201" or not taken:
            raise
        logger.warning("%s: another program has its port, it takes another", folder)
        return await started(folder, ports.any_port(listen), bootstrap)
    return node


async def _ended(p2p: Any) -> None:
    """hivemind cancels its tasks and leaves them; they close their sockets when they end, and what
    they failed with, their daemon being gone, is no news."""
    control = getattr(getattr(p2p, "_client", None), "control", None)
    found = [getattr(control, name, None) for name in ("_read_task", "_write_task")]
    found += [getattr(p2p, name, None) for name in ("_listen_task", "_reader_task")]
    await asyncio.gather(*(t for t in found if isinstance(t, asyncio.Task)), return_exceptions=True)


def _look_at(identity: Path) -> None:
    """Before the daemon does, which says of a key that it cannot read as little as of a port."""
    try:
        Identity(identity)
    except OSError as error:
        raise disk(identity, error) from error
    except ValueError as error:
        raise PeerError(
            "FL-P405",
            f"{identity} holds no key of a peer: {error}",
            "put the right one back, or remove it: the peer joins anew under another name",
        ) from error
