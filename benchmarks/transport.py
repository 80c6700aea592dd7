"""The transport alone against its floor: 100 MB down and up for four client processes over gRPC.

A round here is: seal a version (CRC and SHA-256), four downloads verified, four uploads verified,
spilled and committed, every update read once. No strategy, no merge, no training; `round.py` has
those. Rounds of both kinds alternate in one run, because this machine's speed drifts.
"""

import asyncio
import hashlib
import importlib
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
from floor import Floor
from harness import Result, main, say

from atoll.client import transfer
from atoll.protocols import frames
from atoll.protocols.blobs import Blob, BlobInfo, Section
from atoll.protocols.channel import SERVER_OPTIONS, tune_malloc
from atoll.protocols.messages import Result as Report
from atoll.server.bulk import Bulk
from atoll.server.uploads import StoredUpdate, Uploads

LIMIT = 1.8  # of the floor; 1.55-1.65 when nothing else runs
WORKERS = 2
SIZE = 100_000_000  # bytes
CLIENTS = 4


class Ours:
    """The server's half of a round, in this process; the clients are processes of their own."""

    def __init__(self, size: int, clients: int, folder: Path) -> None:
        self.size = size
        self.clients = clients
        self.workers = ThreadPoolExecutor(WORKERS)
        self.uploads = Uploads(folder, min_free=0)
        self.blob: Blob | None = None
        self.model = np.random.default_rng(0).integers(0, 255, size, np.uint8)
        self._stored: dict[str, StoredUpdate] = {}
        self._complete = asyncio.Event()
        self._processes: list[asyncio.subprocess.Process] = []

    async def start(self) -> None:
        for n in range(self.clients):  # before gRPC has threads that a fork would disturb
            command = [sys.executable, __file__, "--client", str(n)]
            process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE)
            self._processes.append(process)
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        bulk = Bulk(
            self.uploads,
            authorize=self._authorize,
            find_blob=self._find_blob,
            may_upload=self._may_upload,
            accepted=self._accepted,
            workers=self.workers,
        )
        self._server.add_generic_rpc_handlers((bulk,))
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        for process in self._processes:
            self._tell(process, str(port))

    async def stop(self) -> None:
        for process in self._processes:
            assert process.stdin
            process.stdin.close()
            await process.wait()
        await self._server.stop(1)
        self.workers.shutdown()

    async def round(self, number: int) -> float:
        begun = time.perf_counter()
        loop = asyncio.get_running_loop()
        view = self.model.data
        digest = loop.run_in_executor(self.workers, lambda: hashlib.sha256(view).digest())
        crcs = await loop.run_in_executor(self.workers, frames.checksums, view)
        section = Section("trainable", "fp32", self.size // 4, self.size)
        self.blob = Blob(BlobInfo(f"m{number}", self.size, await digest, (section,)), view, crcs)
        self._complete.clear()
        for process in self._processes:
            self._tell(process, f"{number} {self.blob.info.sha256.hex()}")
        await self._complete.wait()
        stored, self._stored = self._stored, {}
        await asyncio.gather(
            *(loop.run_in_executor(self.workers, _read_once, s) for s in stored.values())
        )
        seconds = time.perf_counter() - begun
        assert all(s.sha256 == self.blob.info.sha256 for s in stored.values())
        for name in stored:
            await loop.run_in_executor(self.workers, self.uploads.free, name)
        return seconds

    def _tell(self, process: asyncio.subprocess.Process, line: str) -> None:
        assert process.stdin
        process.stdin.write(f"{line}\n".encode())

    def _authorize(self, metadata: Mapping[str, str | bytes]) -> str:
        return str(metadata["atoll-session"])

    def _find_blob(self, client: str, name: str) -> Blob:
        assert self.blob
        assert self.blob.info.id == name
        return self.blob

    def _may_upload(self, client: str, result: Report) -> str:
        return f"{result.update}.{client}"

    async def _accepted(self, client: str, result: Report, stored: StoredUpdate) -> None:
        self._stored[stored.id] = stored
        if len(self._stored) == self.clients:
            self._complete.set()


def _read_once(stored: StoredUpdate) -> int:
    view = stored.view()
    return int(np.frombuffer(view, np.uint64, len(view) // 8).max(initial=0))


def _client(name: str, size: int) -> None:
    tune_malloc()
    channel = transfer.connect(f"127.0.0.1:{sys.stdin.readline().strip()}")
    buffer = memoryview(bytearray(size))
    sections = (Section("trainable", "fp32", size // 4, size),)
    for line in sys.stdin:
        number, digest = line.split()
        info = BlobInfo(f"m{number}", size, bytes.fromhex(digest), sections)
        transfer.download(channel, f"c{name}", "", info, buffer)
        payload = BlobInfo(f"u{number}", size, b"", sections)
        result = Report(f"o{number}", 0, 1, 1, 0.0, payload)
        transfer.upload(channel, f"c{name}", "", result, buffer)


async def _compare(size: int, clients: int, rounds: int) -> tuple[list[float], list[float]]:
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder, Floor(size, clients) as floor:
        stack = Ours(size, clients, Path(folder))
        await stack.start()
        for number in range(rounds + 1):
            theirs.append(await asyncio.to_thread(floor.round))
            ours.append(await stack.round(number))
        await stack.stop()
    return ours[1:], theirs[1:]  # the first of each warms up


def run(quick: bool) -> Result:
    tune_malloc()
    loop = None
    if importlib.util.find_spec("uvloop"):
        loop = importlib.import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=loop) as runner:
        ours, floors = runner.run(_compare(SIZE, CLIENTS, 5 if quick else 15))
    say(f"rounds {[round(s, 2) for s in ours]}, floors {[round(s, 2) for s in floors]}")
    floor = statistics.median(floors)
    return Result("transport", statistics.median(ours), "s", LIMIT, floor=floor)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        _client(sys.argv[2], SIZE)
    else:
        main(run)
