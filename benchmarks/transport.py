"""The transport alone against its floor: 100 MB down and up for four client processes over gRPC.

A round here is: seal a version (CRC and SHA-256), four downloads verified, four uploads verified,
spilled and committed, every update read once. No strategy, no merge, no training; `round.py` has
those. Rounds of both kinds alternate in one run, because this machine's speed drifts.
"""

import argparse
import asyncio
import hashlib
import importlib.util
import json
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

from atoll.client import transfer
from atoll.protocols import frames
from atoll.protocols.blobs import Blob, BlobInfo, Section
from atoll.protocols.channel import SERVER_OPTIONS, tune_malloc
from atoll.protocols.messages import Result
from atoll.server.bulk import Bulk
from atoll.server.uploads import StoredUpdate, Uploads

LIMIT = 1.6  # of the floor
WORKERS = 2


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
        for n in range(self.clients):
            command = [sys.executable, __file__, "--client", str(n), "--port", str(port)]
            process = await asyncio.create_subprocess_exec(
                *command, "--size", str(self.size), stdin=subprocess.PIPE
            )
            self._processes.append(process)

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
        view = memoryview(self.model)
        digest = loop.run_in_executor(self.workers, lambda: hashlib.sha256(view).digest())
        crcs = await loop.run_in_executor(self.workers, frames.checksums, view)
        section = Section("trainable", "fp32", self.size // 4, self.size)
        self.blob = Blob(BlobInfo(f"m{number}", self.size, await digest, (section,)), view, crcs)
        self._complete.clear()
        for process in self._processes:
            assert process.stdin
            line = f"{number} {self.blob.info.sha256.hex()}\n"
            process.stdin.write(line.encode())
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

    def _authorize(self, metadata: Mapping[str, str | bytes]) -> str:
        return str(metadata["atoll-session"])

    def _find_blob(self, name: str) -> Blob:
        assert self.blob
        assert self.blob.info.id == name
        return self.blob

    def _may_upload(self, client: str, result: Result) -> str:
        return f"{result.update}.{client}"

    async def _accepted(self, client: str, result: Result, stored: StoredUpdate) -> None:
        self._stored[stored.id] = stored
        if len(self._stored) == self.clients:
            self._complete.set()


def _read_once(stored: StoredUpdate) -> int:
    view = stored.view()
    return int(np.frombuffer(view, np.uint64, len(view) // 8).max(initial=0))


def _client(name: str, port: int, size: int) -> None:
    tune_malloc()
    channel = transfer.connect(f"127.0.0.1:{port}")
    buffer = memoryview(bytearray(size))
    sections = (Section("trainable", "fp32", size // 4, size),)
    for line in sys.stdin:
        number, digest = line.split()
        info = BlobInfo(f"m{number}", size, bytes.fromhex(digest), sections)
        transfer.download(channel, f"c{name}", "", info, buffer)
        payload = BlobInfo(f"u{number}", size, b"", sections)
        result = Result(f"o{number}", 0, 1, 1, 0.0, payload)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="five rounds instead of fifteen")
    parser.add_argument("--size", type=int, default=100_000_000, help="bytes of the model")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    parser.add_argument("--no-tune", action="store_true")
    options = parser.parse_args()
    if options.client:
        _client(options.client, options.port, options.size)
        return
    if not options.no_tune:
        tune_malloc()
    loop = None
    if options.loop == "uvloop" and importlib.util.find_spec("uvloop"):
        import uvloop

        loop = uvloop.new_event_loop
    rounds = 5 if options.quick else 15
    with asyncio.Runner(loop_factory=loop) as runner:
        ours, theirs = runner.run(_compare(options.size, options.clients, rounds))
    ratio = statistics.median(o / t for o, t in zip(ours, theirs, strict=True))
    line = {
        "bench": "transport",
        "value": round(statistics.median(ours), 4),
        "unit": "s",
        "floor": round(statistics.median(theirs), 4),
        "ratio_to_floor": round(ratio, 3),
        "limit": LIMIT,
        "ok": ratio <= LIMIT,
    }
    print(json.dumps(line))
    sys.exit(ratio > LIMIT)


if __name__ == "__main__":
    main()
