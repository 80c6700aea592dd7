"""Bulk transport over real gRPC on loopback: what arrives, what is refused, what resumes."""

import asyncio
import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from atoll.client import transfer
from atoll.client.transfer import Patience
from atoll.protocols import frames, messages, wire_pb2
from atoll.protocols.blobs import CHUNK, Blob, BlobInfo, Section
from atoll.protocols.channel import SERVER_OPTIONS, SERVICE
from atoll.protocols.errors import AtollError, RemoteError
from atoll.protocols.messages import Result
from atoll.server.bulk import Bulk
from atoll.server.uploads import StoredUpdate, Uploads

pytestmark = pytest.mark.slow

QUICK = Patience(idle_seconds=5.0, retries=3, first_wait=0.01, longest_wait=0.05)
HASTY = Patience(idle_seconds=5.0, retries=0)
SIZES = [1, CHUNK - 1, CHUNK, CHUNK + 1, 10_000_000]


def payload(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def blob(name: str, data: bytes) -> Blob:
    view = memoryview(data)
    info = BlobInfo(name, len(data), hashlib.sha256(data).digest(), sections(len(data)))
    return Blob(info, view, frames.checksums(view))


def sections(size: int) -> tuple[Section, ...]:
    return (Section("trainable", "fp32", size // 4, size),) if size else ()


def result(order: int, size: int, sha256: bytes = b"") -> Result:
    info = BlobInfo(f"u-o{order}", size, sha256, sections(size))
    return Result(f"o{order}", 0, 10, 320, 1.5, info, {"loss": 0.5})


class Server:
    """A Bulk on an asyncio server of its own thread; everything it decides is a plain field."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.idle_seconds = options.pop("idle_seconds", 5.0)
        self.uploads = Uploads(folder, min_free=0, **options)
        self.blobs: dict[str, Blob] = {}
        self.done: dict[str, StoredUpdate] = {}  # accepted
        self.orders = {f"o{n}" for n in range(100)}
        self.refuse_on_accept: AtollError | None = None
        self.port = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    def __enter__(self) -> "Server":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(20)
        self._loop.close()

    async def _serve(self) -> None:
        with ThreadPoolExecutor(2) as workers:
            server = grpc.aio.server(options=SERVER_OPTIONS)
            bulk = Bulk(
                self.uploads,
                authorize=self.authorize,
                find_blob=self.find_blob,
                may_upload=self.may_upload,
                accepted=self.accepted,
                run="r1",
                workers=workers,
                idle_seconds=self.idle_seconds,
            )
            server.add_generic_rpc_handlers((bulk,))
            self.port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            self._ready.set()
            await self._stopping.wait()
            await server.stop(0.5)

    def authorize(self, metadata: Mapping[str, str | bytes]) -> str:
        session = str(metadata.get("atoll-session", ""))
        if not session.startswith("s-"):
            raise RemoteError("FL-W110", f"no session {session!r}", "say hello again")
        return session.removeprefix("s-")

    def find_blob(self, name: str) -> Blob:
        if name not in self.blobs:
            raise RemoteError("FL-W107", f"no blob {name}", "take the newest order")
        return self.blobs[name]

    def may_upload(self, client: str, answer: Result) -> str | None:
        if answer.order not in self.orders:
            raise RemoteError("FL-W102", f"order {answer.order} is not open", "wait for the next")
        return None if answer.update in self.done else answer.update

    async def accepted(self, client: str, answer: Result, stored: StoredUpdate) -> None:
        if self.refuse_on_accept is not None:
            raise self.refuse_on_accept
        assert answer.update not in self.done, "accepted twice"
        self.done[answer.update] = stored

    def bytes_of(self, update: str) -> bytes:
        return bytes(self.done[update].view())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as running:
        yield running


@pytest.fixture
def channel(server: Server) -> Iterator[Any]:
    made = transfer.connect(f"127.0.0.1:{server.port}")
    yield made
    made.close()


@pytest.mark.parametrize("size", SIZES)
def test_a_blob_arrives_as_it_was(server: Server, channel: Any, size: int) -> None:
    data = payload(size)
    server.blobs["m1"] = blob("m1", data)
    dest = bytearray(size)
    transfer.download(channel, "s-a", "r1", server.blobs["m1"].info, memoryview(dest), QUICK)
    assert dest == data


@pytest.mark.parametrize("size", SIZES)
def test_an_upload_arrives_as_it_was(server: Server, channel: Any, size: int) -> None:
    data = payload(size)
    sent = transfer.upload(channel, "s-a", "r1", result(1, size), memoryview(data), QUICK)
    assert sent.payload.sha256 == hashlib.sha256(data).digest()
    assert server.bytes_of("o1.0") == data
