"""The floor of a small round: the same bytes over bare gRPC streams, checked, summed, nothing else.

One server and some client processes, grpc.aio at both ends on the loop that we use. A round: every
client is sent the model with its CRC-32 and SHA-256, compares both and sends as many bytes back
with theirs; the server compares them, adds them up and makes the next model. No membership, no
strategy, no journal, nothing on a disk, no word that is not needed: whoever does all that can only
be slower. Run alone it prints one JSON line; `rate.py` runs it between its own runs.
"""

import asyncio
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import torch
from harness import Result, main

from atoll.protocols import loops, poller
from atoll.protocols.channel import CHANNEL_OPTIONS, SERVER_OPTIONS
from atoll.protocols.codecs import as_bytes, as_tensor
from atoll.protocols.frames import crc32

FIRST = 50  # rounds that do not count
HEAD = 36  # bytes before the data: CRC-32 and SHA-256


def sealed(data: memoryview) -> bytes:
    return b"".join((crc32(data).to_bytes(4, "little"), hashlib.sha256(data).digest(), data))


def opened(message: bytes) -> memoryview:
    data = memoryview(message)[HEAD:]
    assert message[:4] == crc32(data).to_bytes(4, "little")
    assert message[4:HEAD] == hashlib.sha256(data).digest()
    return data


class Rounds:
    """The server: a round ends with the last client's bytes."""

    def __init__(self, floats: int, clients: int, rounds: int) -> None:
        self.clients, self.rounds = clients, rounds
        self.model = torch.zeros(floats)
        self.message = sealed(as_bytes(self.model))
        self.came: list[torch.Tensor] = []
        self.ends: list[float] = []
        self.next = asyncio.Event()
        self.over = asyncio.Event()
        self.here = 0

    async def stream(self, _: Any, context: Any) -> None:
        self.here += 1
        turn = self.next
        if self.here == self.clients:
            self._begin()
        await turn.wait()
        while len(self.ends) < self.rounds:
            turn = self.next
            await context.write(self.message)
            self.came.append(as_tensor(opened(await context.read()), torch.float32))
            if len(self.came) == self.clients:
                for delta in self.came:
                    self.model.add_(delta, alpha=1 / self.clients)
                self.came = []
                self.message = sealed(as_bytes(self.model))
                self.ends.append(time.perf_counter())
                self._begin()
            await turn.wait()
        self.over.set()

    def _begin(self) -> None:
        turn, self.next = self.next, asyncio.Event()
        turn.set()


class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, rounds: Rounds) -> None:
        self._handler = grpc.stream_stream_rpc_method_handler(rounds.stream)

    def service(self, _: Any) -> Any:
        return self._handler


async def _serve(floats: int, clients: int, rounds: int) -> float:
    command = [sys.executable, __file__, "--client"]
    processes = [  # before gRPC has threads that a fork would disturb
        await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE)
        for _ in range(clients)
    ]
    serving = Rounds(floats, clients, rounds)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((Handlers(serving),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(f"127.0.0.1:{port}\n".encode())
        await asyncio.wait_for(serving.over.wait(), 120)
        await server.stop(1)
        failed = [code for process in processes if (code := await process.wait())]
        assert not failed, f"clients failed: {failed}"
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
    return (rounds - FIRST) / (serving.ends[-1] - serving.ends[FIRST - 1])


async def _client(address: str) -> None:
    answers: asyncio.Queue[bytes] = asyncio.Queue()

    async def say() -> AsyncIterator[bytes]:
        while True:
            yield await answers.get()

    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        async for message in channel.stream_stream("/sketch/Rounds")(say()):
            answers.put_nowait(sealed(opened(message)))


def sketch(floats: int, clients: int, rounds: int) -> float:
    """Rounds a second."""
    torch.set_num_threads(1)
    return loops.run(_serve(floats, clients, rounds))


def polled(floats: int, clients: int, rounds: int) -> float:
    """The same in a process of its own, where gRPC reads as it does in our commands."""
    command = [sys.executable, __file__, "--polled", str(floats), str(clients), str(rounds)]
    environment = {**os.environ, poller.VARIABLE: poller.OLDER}
    return float(subprocess.run(command, env=environment, stdout=-1, check=True).stdout)


def run(quick: bool) -> Result:
    """The floor has none itself; its limit only tells a machine that is far too busy."""
    found = sketch(25_000, 4, 1000 if quick else 4000)
    return Result("sketch", found, "rounds/s", 50.0, better="higher")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        loops.run(_client(sys.stdin.readline().strip()))
    elif sys.argv[1:2] == ["--polled"]:
        print(sketch(*map(int, sys.argv[2:])))
    else:
        main(run)
