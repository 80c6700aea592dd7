"""Bulk between peers over both roads: real hivemind, real TLS."""

import asyncio
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from atoll.aggregation.meter import Meter
from atoll.p2p import bulk
from atoll.p2p.direct import NAME, Direct, _connect, _take
from atoll.p2p.node import Node
from atoll.p2p.roads import LARGE, Roads
from atoll.protocols.blobs import CHUNK, Blob, BlobInfo
from atoll.protocols.errors import RemoteError
from tests.slow.nodes import MARKS, pair

pytestmark = MARKS
pytest.importorskip("hivemind")


def test_bulk_comes_by_the_faster_road_and_by_streams_where_there_is_no_other(
    tmp_path: Path,
) -> None:
    data = os.urandom(3 * LARGE + 5)

    async def work() -> None:
        async with pair(tmp_path) as (giver, taker):
            await both(giver, taker)

    async def both(giver: Node, taker: Node) -> None:
        asked: list[tuple[str, str]] = []

        async def find(peer: str, name: str) -> Blob:
            asked.append((peer, name))
            if name == "bad":
                return Blob(BlobInfo(name, len(data), b"\1" * 32, ()), memoryview(data), ())
            if name not in ("in/x/0", "out/x/0"):
                raise RemoteError("FL-P402", f"no {name!r} here", "ask again")
            sha256 = hashlib.sha256(data).digest() if name[0] == "o" else b""
            return Blob(BlobInfo(name, len(data), sha256, ()), memoryview(data), ())

        door, mine = Direct(giver, find), Direct(taker, find)
        try:
            await door.open()
            here = [c for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"]
            assert {c.laddr.ip.removeprefix("::ffff:") for c in here} == {"127.0.0.1"}, (
                "no further than the node listens"
            )
            await giver.serve(NAME, door.offer)
            await bulk.Shelf(giver, find).open()
            roads = Roads(taker, mine)
            for name in ("in/x/0", "out/x/0", "out/x/0"):
                dest = memoryview(bytearray(len(data) + 9))
                sha256, length, _ = await roads.fetch(giver.id, name, dest, True)
                assert dest[:length] == data
                assert name[0] == "i" or sha256 == hashlib.sha256(data).digest()
            assert set(roads.rates[giver.id]) == {"direct", "stream"}, "both were looked at"
            assert all(peer == taker.id for peer, _ in asked), "the token says who asks"

            dest = memoryview(bytearray(len(data)))
            for name, code in (("other", "FL-P402"), ("bad", "FL-W105")):
                with pytest.raises(RemoteError) as refused:
                    await mine.fetch(giver.id, name, dest)
                assert refused.value.code == code
            for size in (len(data) - 1, len(data) + 1):
                with pytest.raises(RemoteError) as other:
                    await mine.fetch(giver.id, "in/x/0", memoryview(bytearray(size)))
                assert other.value.code == "FL-W103"

            # A token of somebody who is out opens nothing, nor does one that was made up.
            answer = await taker.call(giver.id, NAME, b"")
            door.forget(taker.id)
            line = await asyncio.to_thread(_connect, giver.id, answer)
            with pytest.raises(RemoteError) as stranger:
                await asyncio.to_thread(_take, line, "in/x/0", dest, False)
            assert stranger.value.code == "FL-P203"
            line.channel.close()
            # Nor is another's certificate taken for this peer's.
            false = json.loads(await taker.call(giver.id, NAME, b""))
            false["certificate"] = mine._certificate.decode() or false["certificate"][::-1]
            with pytest.raises(RemoteError) as masked:
                await asyncio.to_thread(_connect, giver.id, json.dumps(false).encode())
            assert masked.value.code == "FL-P203"

            await door.close()
            dest = memoryview(bytearray(len(data)))
            await roads.fetch(giver.id, "in/x/0", dest, False)
            assert dest == data, "through the daemons, since nobody listens there any more"
        finally:
            await mine.close()
            await door.close()

    asyncio.run(asyncio.wait_for(work(), 120))


class Slow(Direct):
    """Its line moves so many bytes a second."""

    speed = 8e6

    async def _give(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        async for frame in super()._give(request, context):
            yield frame
            await asyncio.sleep(len(frame) / self.speed)


def test_a_slow_line_is_measured_at_both_its_ends(tmp_path: Path) -> None:
    data = os.urandom(8 << 20)

    async def work() -> None:
        async with pair(tmp_path) as (giver, taker):
            await both(giver, taker)

    async def both(giver: Node, taker: Node) -> None:
        async def find(peer: str, name: str) -> Blob:
            return Blob(BlobInfo(name, len(data), b"", ()), memoryview(data), ())

        gives, takes = Meter(), Meter()
        door, mine = Slow(giver, find, gives.gave), Direct(taker, find)
        try:
            await door.open()
            await giver.serve(NAME, door.offer)
            await bulk.Shelf(giver, find).open()
            roads = Roads(taker, mine, takes.took)
            roads.rates[giver.id]["stream"] = 0.0  # it need not be looked at
            for _ in range(2):
                dest = memoryview(bytearray(len(data)))
                await roads.fetch(giver.id, "in/x/0", dest, False)
                await asyncio.sleep(0.1)  # the giver's end of it
                for meter in (gives, takes):
                    meter.turn()
            assert gives.up.rate == pytest.approx(Slow.speed, rel=0.4)
            assert takes.down.rate == pytest.approx(Slow.speed, rel=0.4)
        finally:
            await mine.close()
            await door.close()

    asyncio.run(work())


@pytest.mark.long
def test_of_10000_transfers_of_mixed_size_under_load_none_is_lost_or_truncated(
    tmp_path: Path,
) -> None:
    rng = random.Random(0)
    sizes = [
        0,
        1,
        CHUNK - 1,
        CHUNK,
        CHUNK + 1,
        *(int(10 ** rng.uniform(0, 6.6)) for _ in range(95)),
    ]
    blobs = [rng.randbytes(size) for size in sizes]
    digests = [hashlib.sha256(data).digest() for data in blobs]
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]

    async def work() -> None:
        async with pair(tmp_path) as (giver, taker):

            async def find(_: str, name: str) -> Blob:
                i = int(name.split("/")[1])
                return Blob(BlobInfo(name, sizes[i], digests[i], ()), memoryview(blobs[i]), ())

            door, mine = Direct(giver, find), Direct(taker, find)
            await door.open("127.0.0.1")
            await giver.serve(NAME, door.offer)
            await bulk.Shelf(giver, find).open()
            todo = iter(range(10_000))

            async def some() -> None:
                for n in todo:
                    i = n * 7919 % len(sizes)
                    dest = memoryview(bytearray(sizes[i]))
                    if n % 2:
                        got = await bulk.fetch(taker, giver.id, f"b/{i}", dest)
                    else:
                        got = await mine.fetch(giver.id, f"b/{i}", dest)
                    assert dest == blobs[i], f"transfer {n}: blob {i} of {sizes[i]} bytes"
                    assert got[:2] == (digests[i], sizes[i])
                    counted.append(n)

            try:
                await asyncio.gather(*(some() for _ in range(8)))
            finally:
                await mine.close()
                await door.close()

    counted: list[int] = []
    try:
        asyncio.run(asyncio.wait_for(work(), 1200))
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert sorted(counted) == list(range(10_000))
