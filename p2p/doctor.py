"""Doctor: what stands between this machine and a run, each in a sentence with what to do."""

import ipaddress
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atoll.p2p.gate import by_peer
from atoll.p2p.invite import Invite
from atoll.p2p.node import Node
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
    try:
        async with _trial(invite, port, host) as (node, seen):
            found += seen
            found.append(_addresses(await node.addresses()))
            if invite is None:
                what = "no invite given: the way to a run, the way back and the clock are not tried"
                found.append(Check("run", "note", what, "fl-peer doctor INVITE tries them"))
            else:
                found += await _run(node, invite)
    except AtollError as error:
        name = "run" if error.code == "FL-P202" else "daemon"
        found.append(Check(name, "problem", error.message, error.hint))
    return found


@asynccontextmanager
async def _trial(
    invite: Invite | None, port: int | None, host: str
) -> AsyncIterator[tuple[Node, list[Check]]]:
    """A node of its own, for a moment."""
    from atoll.p2p.cli_run import PORT, free

    seen = []
    if port is None:
        port = PORT if free(host, PORT) else 0
        if not port:
            seen.append(Check("port", "note", f"{PORT} is taken: another is used", "see --port"))
    bootstrap = invite.addresses if invite is not None else ()
    with tempfile.TemporaryDirectory(prefix="atoll-doctor-") as folder:
        node = Node(Path(folder), listen=(f"/ip4/{host}/tcp/{port}",), bootstrap=bootstrap)
        await node.start()
        try:
            used = node.listen[0].split("/")[4]
            seen.insert(0, Check("daemon", "good", "p2pd starts and answers"))
            seen.append(Check("port", "good", f"TCP {used} can be listened on"))
            yield node, seen
        finally:
            await node.stop()


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


async def _run(node: Node, invite: Invite) -> list[Check]:
    """The way to the run's members and back, and the clock."""
    from atoll.p2p.gate import fetch_manifest

    found, answered = [], False
    for peer in by_peer(invite.addresses):
        try:
            ahead, reaches = await node.asked(peer)
        except RemoteError as error:
            found.append(Check("run", "note", f"…{peer[-8:]}: {error.message}"))
            continue
        answered = True
        found.append(Check("run", "good", f"…{peer[-8:]} answers"))
        found.append(
            Check("way back", "good", f"…{peer[-8:]} can connect to this machine")
            if reaches
            else Check(
                "way back", "problem", f"…{peer[-8:]} cannot connect to this machine",
                "open the port in its firewall, or join with --no-listen",
            )
        )  # fmt: skip
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
