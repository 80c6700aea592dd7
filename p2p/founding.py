"""Founding: a new run, from what it shall be to a directory from which its first peer starts.

    invite = await found(Wish(model="charlm", data="topics"), folder, listen=...)

Everything a run is goes into its manifest, which the founder signs. The founder measures its own
speed: it is the unit in which all others' shares are counted.
"""

import asyncio
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from atoll.aggregation.circle import Patience
from atoll.aggregation.outer import outer
from atoll.p2p import folder as folders
from atoll.p2p import manifest
from atoll.p2p.contribution import packer
from atoll.p2p.invite import ADDRESSES, Invite, write
from atoll.p2p.node import started
from atoll.p2p.roster import MEMBERS
from atoll.p2p.work import Work, facts
from atoll.protocols.codecspec import parse_ways
from atoll.protocols.durable import put_private
from atoll.protocols.errors import UsageError
from atoll.protocols.ids import ulid

BENCH = 2.0  # seconds in which the founder measures its speed


@dataclass(frozen=True)
class Wish:
    """What a run shall be."""

    name: str = "atoll"
    model: str = "charlm"
    data: str = "topics"
    seed: int = 0
    local_steps: int = 50
    batch: int = 16
    lr: float = 1e-3
    outer: str = "nesterov:lr=0.7,momentum=0.9"
    codec: str = "fp32"
    rounds: int = 0
    first: int = 1  # peers that the first round waits for


async def found(
    wish: Wish,
    folder: Path,
    listen: Sequence[str],
    *,
    name: str,
    device: str = "auto",
    speed_factor: float = 1.0,
) -> tuple[Invite, manifest.Manifest]:
    """Write the run's papers into `folder`; its invite, and its manifest. UsageError or DataError
    where it cannot be, PeerError where the daemon does not start; then `folder` stays as it was."""
    draft = await asyncio.to_thread(_draft, wish, device, speed_factor)
    try:
        node = await started(folder, listen)
        try:
            places, listen, peer = await node.addresses(), node.listen, node.id
        finally:
            await node.stop()
        key = Ed25519PrivateKey.generate()
        public = key.public_key().public_bytes_raw()
        paper = replace(draft, peer=peer, founder=public.hex())
        data = manifest.dump(paper)
        invite = Invite(
            tuple(places[:ADDRESSES]), paper.run, manifest.digest(data), public,
            secrets.token_bytes(32),
        )  # fmt: skip
        put_private(folder / folders.KEY, key.private_bytes_raw())
        put_private(folder / folders.SIGNED, manifest.sign(data, key))
        habits = {"listen": list(listen), "places": [], "speed": paper.speed}
        (folder / folders.HABITS).write_text(json.dumps(habits))
        folders.write(
            folder, folders.About(write(invite), name, tuple(listen), device, speed_factor)
        )
    except BaseException as error:
        folders.withdraw(folder)
        if isinstance(error, OSError):
            raise folders.disk(folder, error) from error
        raise
    return invite, paper


def _draft(wish: Wish, device: str, speed_factor: float) -> manifest.Manifest:
    """All of the manifest but who founds it. Blocks: the model is made, and some steps tried."""
    if wish.first > MEMBERS:
        raise UsageError("FL-S108", f"--first {wish.first}", f"a run has {MEMBERS} members at most")
    outer(wish.outer)
    ways = parse_ways(wish.codec)
    for chain in (ways.up[0], ways.down[0]):
        packer(chain)
    known = facts(wish.model, wish.data, wish.seed)
    wished = dict(vars(wish))
    values: dict[str, Any] = {
        "run": ulid(), "elements": known.elements, "schema": known.schema, "init": known.init,
        "speed": 1.0, "founder": "0" * 64, "peer": "unknown",
        "patience": Patience(first=wished.pop("first")), **wished,
    }  # fmt: skip
    try:
        draft = manifest.Manifest(**values)
    except ValueError as error:
        raise UsageError("FL-S108", str(error), "see `fl-peer init --help`") from error
    work = Work(draft, None, shard="founder", device=device, speed_factor=speed_factor)
    try:
        return replace(draft, speed=work.bench(BENCH))
    finally:
        work.close()
