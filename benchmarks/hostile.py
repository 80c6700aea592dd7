"""Hostile: a member of the run that holds its secret, takes part, and torments all the others.

It claims a speed and a bandwidth beyond all bounds, and commits that were never made: it says what
`lies.py` has, and sends what is no message at all to every handler.
"""

import asyncio
import random
from collections.abc import Callable
from typing import Any

from atoll.p2p import bulk, direct, gate, newcomers, post
from atoll.p2p.lies import NONE, lies
from atoll.protocols.errors import RemoteError

PAUSE = 0.02  # seconds between two deeds
KEPT = 500  # letters that are said again


async def torment(peer: Any, tell: Callable[..., None]) -> None:
    """Until it is cancelled. `peer`: a `Peer` that is up."""
    rng = random.Random(1)
    heard: list[Any] = []
    driver, take = peer._driver, peer._driver.heard

    def listen(who: str, letter: Any) -> None:
        if not isinstance(letter, post.Part):
            heard.append(letter)
        del heard[:-KEPT]
        take(who, letter)

    driver.heard = listen
    await peer._gate.tell(bandwidth=1e-320)  # nothing can be divided by it
    while True:
        for entry in peer._gate.roster.entries():
            kind, name, said = rng.choice(deeds(driver, entry.peer, heard, rng))
            try:
                await _say(peer._node, entry.peer, name, said)
            except RemoteError as error:
                tell("hostile", kind=kind, answer=error.code)
            else:
                tell("hostile", kind=kind, answer="")
            await asyncio.sleep(PAUSE)
        await asyncio.sleep(PAUSE)


def deeds(
    driver: Any, to: str, heard: list[Any], rng: random.Random
) -> list[tuple[str, str, bytes]]:
    """(what it is, the call, its bytes)."""
    machine = driver._machine
    letters: dict[str, list[Any]] = {**lies(machine, to, heard)}
    letters["shape"].append(post.Part(f"{machine.stand.chain}/1/{machine.me}", machine.size, NONE))
    found = [
        (kind, post.NAME, post.write(rng.choice(some))) for kind, some in letters.items() if some
    ]
    noise = rng.randbytes(rng.randint(1, 5000))
    deep = b"[" * 100_000
    true = post.write(rng.choice(letters["weight"]))
    found += [
        ("garbage", name, said)
        for name in (post.NAME, gate.HELLO, newcomers.MANIFEST, direct.NAME)
        for said in (noise, deep, b"", true.replace(b"1.0", b"NaN"), true[:-7])
    ]
    found += [("oversize", post.NAME, b" " * n) for n in (300 << 10, 900 << 10)]
    found += [("oversize", post.NAME, b"x" * (3 << 20))]
    asked = (noise, deep, b'{"blob": "state/x/0", "offset": -1}', b'{"blob": 7, "offset": 0}')
    found += [("bulk", bulk.NAME, said) for said in asked]
    return found


async def _say(node: Any, to: str, name: str, said: bytes) -> None:
    """Past our own bound on what may be said in one call."""
    from google.protobuf.wrappers_pb2 import BytesValue
    from hivemind.p2p import PeerID

    from atoll.p2p.calls import unwrap, within

    p2p, peer = node._up_p2p(), PeerID.from_base58(to)
    message = BytesValue(value=said)
    if name == bulk.NAME:
        async for _ in node.stream(to, name, said, 2.0):
            pass
        return
    answer = await within(3.0, p2p.call_protobuf_handler(peer, name, message, BytesValue), to)
    unwrap(bytes(answer.value))
