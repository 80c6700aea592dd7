"""Roads: by which way bulk comes from each peer: directly, or through the daemons' streams.

Both are measured on the first large blobs of each peer, and the faster one is used from then on.
Where the direct one cannot be had (a firewall, another network) streams are all there is.
"""

import asyncio
import math
from collections import defaultdict

from atoll.p2p import bulk
from atoll.p2p.bulk import Got, Moved, unheard
from atoll.p2p.direct import Direct
from atoll.p2p.node import Node
from atoll.protocols.blobs import CHUNK
from atoll.protocols.errors import RemoteError

LARGE = 4 << 20  # bytes from which on a transfer tells something about the road
SMOOTH = 0.3  # weight of the newest rate


class Roads:
    """`fetch` is what an `Exchange` wants. `direct`: None where there is none."""

    def __init__(self, node: Node, direct: Direct | None, took: Moved = unheard) -> None:
        self._node, self._direct, self._took = node, direct, took
        self.rates: dict[str, dict[str, float]] = defaultdict(dict)  # peer -> road -> bytes/s
        self.taken = 0  # bytes that came

    async def fetch(self, peer: str, name: str, dest: memoryview, shorter: bool) -> Got:
        """RemoteError of the peer's own, or FL-P203 where neither road leads there."""
        road = self._road(peer, len(dest))
        if road == "direct":
            assert self._direct is not None
            try:
                found = await self._direct.fetch(peer, name, dest, shorter=shorter)
            except RemoteError as error:
                if error.code != "FL-P203":
                    raise
                road = "stream"
        if road == "stream":
            found = await bulk.fetch(self._node, peer, name, dest, shorter=shorter)
        self.taken += found.length
        ended = asyncio.get_running_loop().time()
        self._took(found.length - CHUNK, ended - found.seconds, ended)
        if found.length >= LARGE:
            rate = found.length / max(1e-6, found.seconds)
            known = self.rates[peer].get(road, rate)
            self.rates[peer][road] = known + SMOOTH * (rate - known)
        return found

    def _road(self, peer: str, size: int) -> str:
        rates = self.rates[peer]
        if self._direct is None:
            return "stream"
        if "direct" not in rates or size < LARGE:
            return "direct"
        return "direct" if rates["direct"] >= rates.get("stream", math.inf) else "stream"
