"""Bulk between peers over both roads: real hivemind, real TLS."""

import asyncio
import gc
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.p2p import bulk
from atoll.p2p.direct import NAME, Direct, _connect, _take
from atoll.p2p.node import Node
from atoll.p2p.roads import LARGE, Roads
from atoll.protocols.blobs import Blob, BlobInfo
from atoll.protocols.errors import RemoteError

pytestmark = [
    pytest.mark.slow,
    # hivemind leaves connections to a daemon that is gone to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
pytest.importorskip("hivemind")

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """What it collects, it collects here: found in another test it would count against that one."""
    yield
    gc.collect()


def test_bulk_comes_by_the_faster_road_and_by_streams_where_there_is_no_other(
    tmp_path: Path,
) -> None:
    data = os.urandom(3 * LARGE + 5)

    async def work() -> None:
        giver = Node(tmp_path / "a", listen=LOOPBACK)
        await giver.start()
        taker = Node(tmp_path / "b", listen=LOOPBACK, bootstrap=await giver.addresses())
        await taker.start()
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
            await door.open("127.0.0.1")
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
            await taker.stop()
            await giver.stop()

    asyncio.run(asyncio.wait_for(work(), 120))
