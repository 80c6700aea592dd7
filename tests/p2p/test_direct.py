"""Direct bulk: a connection that breaks off is one that another road takes over from."""

import asyncio
import subprocess
import sys
from pathlib import Path
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


PORT_SCANNED = """
import asyncio, contextlib

async def play():
    from atoll.p2p.direct import Direct
    direct = Direct(None, None)
    await direct.open("127.0.0.1")
    reader, writer = await asyncio.open_connection("127.0.0.1", direct._port)
    writer.write(b"GET / HTTP/1.1\\r\\n\\r\\n")
    with contextlib.suppress(OSError):
        await reader.read()  # until it is hung up on
    writer.close()
    await direct.close()

def main():
    asyncio.run(play())
"""


def test_a_stranger_at_the_port_writes_nothing_on_the_terminal(tmp_path: Path) -> None:
    """Each handshake that failed was a line of gRPC's there: a port scan filled the screen."""
    (tmp_path / "scanned.py").write_text(PORT_SCANNED)
    code = "from atoll.protocols.entry import start; start('scanned')"
    run = [sys.executable, "-c", code]
    ended = subprocess.run(
        run, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
