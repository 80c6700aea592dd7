"""The floor of a round: the same bytes over bare sockets, hashed at both ends, read once to merge.

No federation can be faster than this on the same machine: every client process fetches `size`
bytes and sends `size` bytes over a blocking socket with buffers that are reused, SHA-256 is taken
of all of them at both ends (of the model once at the server), and at the end every update is read
once. Run alone it prints one JSON line; `round.py` and `transport.py` run it between their rounds.
"""

import hashlib
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
from harness import Result, main

PIECE = 1 << 20  # bytes hashed at a time, while they are in the cache


class Floor:
    """Client processes at bare sockets; `round()` as often as wanted between start and end."""

    def __init__(self, size: int, clients: int) -> None:
        self.size = size
        self.clients = clients
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lines: list[socket.socket] = []

    def __enter__(self) -> Self:
        self.model = np.random.default_rng(0).integers(0, 255, self.size, np.uint8)
        self._updates = [bytearray(self.size) for _ in range(self.clients)]
        self._pool = ThreadPoolExecutor(self.clients + 1)
        with socket.create_server(("127.0.0.1", 0)) as door:
            command = [sys.executable, __file__, "--client", str(door.getsockname()[1])]
            for _ in range(self.clients):
                self._processes.append(subprocess.Popen([*command, str(self.size)]))
            self._lines = [door.accept()[0] for _ in range(self.clients)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for line in self._lines:
            line.close()
        for process in self._processes:
            process.wait(10)
        self._pool.shutdown()

    def round(self) -> float:
        """Wall seconds of one round."""
        begun = time.perf_counter()
        model = self._pool.submit(_hash, self.model.data)
        served = [self._pool.submit(self._serve, n) for n in range(self.clients)]
        digests = [job.result() for job in served]
        assert all(d == model.result() for d in digests), "a client sent back something else"
        list(self._pool.map(_read_once, self._updates))
        return time.perf_counter() - begun

    def _serve(self, n: int) -> bytes:
        line = self._lines[n]
        line.sendall(self.model.data)
        return _receive(line, memoryview(self._updates[n]))


def floor(size: int, clients: int, rounds: int) -> float:
    """Median wall seconds of a round, after one round to warm up."""
    with Floor(size, clients) as running:
        running.round()
        return statistics.median(running.round() for _ in range(rounds))


def _hash(view: memoryview) -> bytes:
    return hashlib.sha256(view).digest()


def _read_once(update: bytearray) -> int:
    return int(np.frombuffer(update, np.uint64, len(update) // 8).max(initial=0))


def _receive(line: socket.socket, into: memoryview) -> bytes:
    """Fill `into` from the socket; the SHA-256 of it, taken piece by piece as it comes."""
    sha, at = hashlib.sha256(), 0
    while at < len(into):
        end = min(at + PIECE, len(into))
        filled = at
        while filled < end:
            got = line.recv_into(into[filled:end])
            if not got:
                raise EOFError
            filled += got
        sha.update(into[at:end])
        at = end
    return sha.digest()


def _client(port: int, size: int) -> None:
    buffer = memoryview(bytearray(size))
    with socket.create_connection(("127.0.0.1", port)) as line:
        while True:
            try:
                _receive(line, buffer)
            except (EOFError, ConnectionError):
                return
            sha = hashlib.sha256()
            for at in range(0, size, PIECE):
                sha.update(buffer[at : at + PIECE])
                line.sendall(buffer[at : at + PIECE])


def run(quick: bool) -> Result:
    """The floor has none itself; its limit only tells a machine that is far too busy."""
    return Result("floor", floor(100_000_000, 4, 3 if quick else 7), "s", 30.0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        _client(int(sys.argv[2]), int(sys.argv[3]))
    else:
        main(run)
