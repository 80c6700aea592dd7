"""Doctor: what stands between this machine and a run, each in a sentence with what to do."""

import ipaddress
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atoll.p2p import ports
from atoll.p2p.invite import Invite
from atoll.p2p.newcomers import by_peer, fetch_manifest, reached_by
from atoll.p2p.node import Node, started
from atoll.protocols import console
from atoll.protocols.errors import AtollError, PeerError, RemoteError

CLOCK = 3.0  # seconds: hivemind refuses a peer whose clock differs by more
ROOM = 2e9  # bytes free, under which a warning is due


@dataclass(frozen=True)
class Check:
    name: str
    verdict: Literal["good", "problem", "note"]
    said: str
    remedy: str = ""


async def examine(invite: Invite | None, port: int | None, host: str = "0.0.0.0") -> list[Check]:
    """`invite` None: what can be seen from here alone. `port` None: as `fl-peer join` takes one."""
    found = [_disk()]
    name = "daemon"
    try:
        with tempfile.TemporaryDirectory(prefix="atoll-doctor-") as folder:
            async with _door(Path(folder), port, host) as (door, seen):
                found += seen
                addresses = await door.addresses()
                found.append(_addresses(addresses))
                if invite is None:
                    what = "no invite given: the run, the way back and the clock are not tried"
                    found.append(Check("run", "note", what, "fl-peer doctor INVITE tries them"))
                else:
                    name = "run"
                    asks = Node(Path(folder) / "asks", listen=(), bootstrap=invite.addresses)
                    async with _up(asks):
                        found += await _run(asks, invite, addresses)
    except AtollError as error:
        found.append(Check(name, "problem", error.message, error.hint))
    return found


@asynccontextmanager
async def _up(node: Node) -> AsyncIterator[Node]:
    await node.start()
    try:
        yield node
    finally:
        await node.stop()


@asynccontextmanager
async def _door(
    folder: Path, port: int | None, host: str
) -> AsyncIterator[tuple[Node, list[Check]]]:
    """A node that listens, for a moment, and knows nobody: who wants to talk to it must connect."""
    wanted = ports.USUAL if port is None else port
    if port is not None:
        ports.check(host, port)
    usable = wanted if port is not None or ports.free(host, wanted) else 0
    door = await started(folder / "door", (f"/ip4/{host}/tcp/{usable}",))
    try:
        seen = [Check("daemon", "good", "p2pd starts and answers")]
        used = int(door.listen[0].split("/")[4])
        if wanted not in (0, used):
            said = f"{wanted} is taken: another is used"
            seen.append(Check("port", "note", said, "see --port"))
        seen.append(Check("port", "good", f"TCP {used} can be listened on"))
        yield door, seen
    finally:
        await door.stop()


def _disk() -> Check:
    room = shutil.disk_usage(".").free
    said = f"{console.size(room)} free here"
    return (
        Check("disk", "good", said)
        if room > ROOM
        else Check("disk", "note", said, "a peer keeps a few copies of the model: is that enough?")
    )


def _addresses(addresses: list[str]) -> Check:
    """Who can reach them, as far as an address tells."""
    hosts = sorted({a.split("/")[2] for a in addresses if a.startswith(("/ip4/", "/ip6/"))})
    kinds: dict[str, list[str]] = {"public": [], "private": [], "loopback": []}
    for host in hosts:
        address = ipaddress.ip_address(host)
        kind = "loopback" if address.is_loopback else "public" if address.is_global else "private"
        kinds[kind].append(host)
    if kinds["public"]:
        said = f"{', '.join(kinds['public'])}: from anywhere, if no firewall is in between"
        return Check("address", "good", said)
    if kinds["private"]:
        said = (
            f"{', '.join(kinds['private'])}: from this network; from outside only where a router "
            "forwards the port"
        )
        return Check("address", "note", said)
    said = "this machine has no address but loopback: only peers on it can connect to it"
    return Check("address", "problem", said, "connect it to a network")


async def _run(node: Node, invite: Invite, addresses: Sequence[str]) -> list[Check]:
    """The way to the run's members, the way back to `addresses`, and the clock."""
    found, answered = [], False
    for peer in by_peer(invite.addresses):
        try:
            ahead = await node.ahead(peer)
        except RemoteError as error:
            found.append(Check("run", "note", f"…{peer[-8:]}: {error.message}"))
            continue
        answered = True
        found.append(Check("run", "good", f"…{peer[-8:]} answers"))
        found += await _way_back(node, invite, peer, addresses)
        said = f"{abs(ahead):.1f} s {'behind' if ahead > 0 else 'ahead of'} …{peer[-8:]}"
        found.append(
            Check("clock", "good", said)
            if abs(ahead) < CLOCK
            else Check("clock", "problem", said, "set both clocks, e.g. by NTP")
        )
        break
    try:
        await fetch_manifest(node, invite)
        found.append(Check("secret", "good", "the invite's secret is taken"))
    except PeerError as error:
        if answered or error.code != "FL-P202":
            found.append(Check("secret", "problem", error.message, error.hint))
        else:
            found.append(Check("run", "problem", error.message, error.hint))
    return found


async def _way_back(node: Node, invite: Invite, peer: str, addresses: Sequence[str]) -> list[Check]:
    """None where the member cannot say: it does not take the invite's secret."""
    try:
        for address in addresses:
            if await reached_by(node, invite, peer, address):
                host = address.split("/")[2]
                said = f"…{peer[-8:]} can connect to this machine at {host}"
                return [Check("way back", "good", said)]
    except RemoteError:
        return []
    return [
        Check(
            "way back", "problem", f"…{peer[-8:]} cannot connect to this machine",
            "open the port in its firewall, or join with --no-listen",
        )
    ]  # fmt: skip
