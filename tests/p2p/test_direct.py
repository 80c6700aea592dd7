"""Direct bulk: a connection that breaks off is one that another road takes over from."""

import asyncio
from typing import Any

import grpc
import pytest

from atoll.p2p.direct import Direct, _Line
from atoll.protocols.errors import RemoteError


def closed() -> _Line:
    """As it is when another transfer over it broke off."""
    channel = grpc.insecure_channel("127.0.0.1:1")
    channel.close()
    return _Line(channel, "token")


async def find(peer: str, name: str) -> Any:
    raise AssertionError("nobody asks here")


def test_a_connection_that_another_transfer_closed_is_a_broken_one() -> None:
    """gRPC raises a ValueError then: the attempt of a mean failed, with a traceback, where a daemon
    would have carried its part."""

    async def play() -> None:
        direct = Direct(None, find)  # type: ignore[arg-type]  # the line is there: no node is asked
        direct._lines["b"] = closed()
        with pytest.raises(RemoteError) as broken:
            await direct.fetch("b", "in/1", memoryview(bytearray(4)))
        assert broken.value.code == "FL-P203"
        assert not direct._lines
        await direct.close()

    asyncio.run(play())


def test_who_hears_late_that_a_connection_broke_leaves_the_next_one_alone() -> None:
    async def play() -> None:
        direct = Direct(None, find)  # type: ignore[arg-type]
        direct._lines["b"] = closed()
        taking = asyncio.create_task(direct.fetch("b", "in/1", memoryview(bytearray(4))))
        await asyncio.sleep(0)
        direct._lines["b"] = anew = closed()
        with pytest.raises(RemoteError):
            await taking
        assert direct._lines == {"b": anew}
        await direct.close()

    asyncio.run(play())
