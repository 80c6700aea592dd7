"""Bulk transport over real gRPC on loopback: what arrives, what is refused, what resumes."""

import asyncio
import contextlib
import functools
import hashlib
import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import grpc
import pytest

from atoll.client import transfer
from atoll.client.line import Line
from atoll.client.transfer import Patience
from atoll.protocols import frames, messages, refusals, wire_pb2
from atoll.protocols.blobs import CHUNK, Blob, BlobInfo, Section
from atoll.protocols.channel import SERVER_OPTIONS, SERVICE
from atoll.protocols.errors import AtollError, ClientError, RefusedError, RemoteError
from atoll.protocols.messages import Result
from atoll.server.bulk import Bulk
from atoll.server.uploads import StoredUpdate, Uploads

pytestmark = pytest.mark.slow

QUICK = Patience(idle_seconds=5.0, retries=3, first_wait=0.01, longest_wait=0.05)
SESSION = (("atoll-session", "s-a"),)
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


class Recorded(Uploads):
    """Uploads that remember the offsets of the chunks they were given."""

    offsets: list[int]

    def put(self, update: str, chunk: frames.Chunk) -> int:
        self.offsets.append(chunk.offset)
        return super().put(update, chunk)


class Server:
    """A Bulk on an asyncio server of its own thread; everything it decides is a plain field."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.idle_seconds = options.pop("idle_seconds", 5.0)
        self.uploads = Recorded(folder, **{"min_free": 0, **options})
        self.uploads.offsets = []
        self.uploads.sweep({f"o{n}.0" for n in range(100)})
        self.blobs: dict[str, Blob] = {}
        self.done: dict[str, StoredUpdate] = {}  # accepted
        self.orders = {f"o{n}" for n in range(100)}
        self.refuse_on_accept: AtollError | None = None
        self.slow_accept = 0.0
        self.begun: list[str] = []  # accepted or in the middle of it
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

    def find_blob(self, client: str, name: str) -> Blob:
        if name not in self.blobs:
            raise RemoteError("FL-W107", f"no blob {name}", "take the newest order")
        return self.blobs[name]

    def may_upload(self, client: str, answer: Result) -> str | None:
        if answer.order not in self.orders:
            raise RemoteError("FL-W102", f"order {answer.order} is not open", "wait for the next")
        return None if answer.update in self.done else answer.update

    async def accepted(self, client: str, answer: Result, stored: StoredUpdate) -> None:
        self.begun.append(answer.update)
        await asyncio.sleep(self.slow_accept)
        if self.refuse_on_accept is not None:
            raise self.refuse_on_accept
        assert answer.update not in self.done, "accepted twice"
        self.done[answer.update] = stored

    def bytes_of(self, update: str) -> bytes:
        return bytes(self.done[update].view())


def connect(server: Server) -> Any:
    return transfer.connect(f"127.0.0.1:{server.port}")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as running:
        yield running


@pytest.fixture
def channel(server: Server) -> Iterator[Any]:
    made = connect(server)
    yield made
    made.close()


class Proxy:
    """A TCP proxy that cuts its first connections after so many bytes, then lets all pass."""

    def __init__(self, port: int, cuts: Sequence[int]) -> None:
        self.port = port
        self.cuts = list(cuts)
        self.door = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.door.getsockname()[1]}"
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> "Proxy":
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._hang_up(self.door)
        self._threads[0].join(10)  # from here on no socket is added
        for end in self._sockets:
            self._hang_up(end)
        for thread in self._threads:
            thread.join(10)

    @staticmethod
    def _hang_up(end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()

    def _start(self, job: Callable[..., None], *args: object) -> None:
        self._threads.append(threading.Thread(target=job, args=args))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self.door.accept()[0]
                self._sockets.append(near)  # the next line raises once the server is gone
                far = socket.create_connection(("127.0.0.1", self.port))
                self._sockets.append(far)
                budget = [self.cuts.pop(0) if self.cuts else 1 << 60]
                self._start(self._pump, near, far, budget)
                self._start(self._pump, far, near, budget)

    def _pump(self, source: socket.socket, sink: socket.socket, budget: list[int]) -> None:
        with contextlib.suppress(OSError):
            while (piece := source.recv(1 << 16)) and budget[0] > 0:
                budget[0] -= len(piece)
                sink.sendall(piece)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def call(channel: Any, method: str, message: Any) -> bytes:
    multi = channel.unary_unary(f"/{SERVICE}/{method}")
    return bytes(multi(message.SerializeToString(), metadata=SESSION, timeout=5))


def open_upload(channel: Any, answer: Result) -> wire_pb2.UploadState:
    opened = wire_pb2.UploadOpen(run="r1", result=messages.result_to_wire(answer))
    return wire_pb2.UploadState.FromString(call(channel, "OpenUpload", opened))


def put(channel: Any, sent: Iterator[bytes]) -> wire_pb2.UploadState:
    multi = channel.stream_unary(f"/{SERVICE}/PutChunks")
    return wire_pb2.UploadState.FromString(multi(sent, metadata=SESSION, timeout=5))


def refusal(act: Callable[[], object]) -> RefusedError:
    with pytest.raises(grpc.RpcError) as caught:
        act()
    error: Any = caught.value
    refused = refusals.error_from_metadata(error.trailing_metadata())
    assert refused is not None, error
    return refused


def status(error: Any) -> object:
    return error.code()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def files_open_in(folder: Path) -> int:
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{number}").startswith(f"{folder}/")
    return found


# ---- what arrives ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_blob_arrives_as_it_was(server: Server, channel: Any, size: int) -> None:
    data = payload(size)
    server.blobs["m1"] = blob("m1", data)
    dest = bytearray(size)
    transfer.download(channel, "s-a", "r1", server.blobs["m1"].info, memoryview(dest), QUICK)
    assert dest == data


def test_a_blob_that_nobody_has_hashed_yet_arrives_with_its_digest(
    server: Server, channel: Any
) -> None:
    """Small models are hashed when somebody asks, and go out inline."""
    data = payload(1000)
    whole = blob("m1", data)
    server.blobs["m1"] = replace(whole, info=replace(whole.info, sha256=b""))
    call = channel.unary_stream(f"/{SERVICE}/Download")
    asked = wire_pb2.BlobRequest(run="r1", blob="m1").SerializeToString()
    last = frames.parse(list(call(asked, metadata=SESSION, timeout=5))[-1])
    assert (last.last, last.sha256) == (True, whole.info.sha256)


@pytest.mark.parametrize("size", SIZES)
def test_an_upload_arrives_as_it_was(server: Server, channel: Any, size: int) -> None:
    data = payload(size)
    sent = transfer.upload(channel, "s-a", "r1", result(1, size), memoryview(data), QUICK)
    assert sent.payload.sha256 == hashlib.sha256(data).digest()
    assert server.bytes_of("o1.0") == data


def test_an_upload_may_be_repeated_and_is_accepted_once(server: Server, channel: Any) -> None:
    data = payload(3 * CHUNK)
    for _ in range(3):
        transfer.upload(channel, "s-a", "r1", result(1, len(data)), memoryview(data), QUICK)
    assert server.uploads.offsets == [0, CHUNK, 2 * CHUNK]
    assert server.bytes_of("o1.0") == data


def test_commits_that_overlap_are_accepted_once(server: Server, channel: Any) -> None:
    """A client whose line broke commits again while its first commit is still being looked at."""
    data = payload(2 * CHUNK)
    answer = result(1, len(data), hashlib.sha256(data).digest())
    open_upload(channel, answer)
    put(channel, frames.chunks(memoryview(data), answer.payload.id))
    server.slow_accept = 0.2
    commit = wire_pb2.UploadCommit(run="r1", result=messages.result_to_wire(answer))
    multi = channel.unary_unary(f"/{SERVICE}/CommitUpload")
    with pytest.raises(grpc.RpcError):  # hangs up before the answer
        multi(commit.SerializeToString(), metadata=SESSION, timeout=0.05)
    state = wire_pb2.UploadState.FromString(call(channel, "CommitUpload", commit))
    assert state.committed
    assert server.begun == ["o1.0"]
    assert server.bytes_of("o1.0") == data


def test_four_clients_at_once_do_not_mix(server: Server) -> None:
    datas = [payload(3 * CHUNK + n, seed=n) for n in range(4)]
    server.blobs["m1"] = blob("m1", payload(2 * CHUNK + 9))

    def client(n: int) -> None:
        channel, dest = transfer.connect(f"127.0.0.1:{server.port}"), bytearray(2 * CHUNK + 9)
        info = server.blobs["m1"].info
        transfer.download(channel, f"s-{n}", "r1", info, memoryview(dest), QUICK)
        assert dest == payload(2 * CHUNK + 9)
        answer = result(n, len(datas[n]))
        transfer.upload(channel, f"s-{n}", "r1", answer, memoryview(datas[n]), QUICK)
        channel.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(client, range(4)))
    assert [server.bytes_of(f"o{n}.0") for n in range(4)] == datas


# ---- what resumes ------------------------------------------------------------------------------


def test_an_interrupted_upload_sends_only_the_rest(server: Server, channel: Any) -> None:
    data = payload(5 * CHUNK + 7)
    answer = result(1, len(data))
    open_upload(channel, answer)

    def three_then_silence() -> Iterator[bytes]:
        for number, frame in enumerate(frames.chunks(memoryview(data), answer.payload.id)):
            if number == 3:
                broken.cancel()
                return
            yield frame

    multi = channel.stream_unary(f"/{SERVICE}/PutChunks")
    opened = threading.Event()

    def sent() -> Iterator[bytes]:
        opened.wait(5)
        yield from three_then_silence()

    broken = multi.future(sent(), metadata=SESSION)
    opened.set()
    with pytest.raises(grpc.FutureCancelledError):
        broken.result()
    held = wait_for(lambda: open_upload(channel, answer).offset, lambda n: n >= 2 * CHUNK)
    assert wait_for(lambda: files_open_in(server.uploads.folder), lambda n: n == 0) == 0
    server.uploads.offsets.clear()
    transfer.upload(channel, "s-a", "r1", answer, memoryview(data), QUICK)
    assert server.uploads.offsets == list(range(held, len(data), CHUNK))
    assert server.bytes_of("o1.0") == data


def test_an_upload_goes_on_with_a_restarted_server(tmp_path: Path) -> None:
    data = payload(4 * CHUNK + 1)
    answer = result(1, len(data))
    with Server(tmp_path) as first, contextlib.closing(connect(first)) as channel:
        open_upload(channel, answer)
        put(channel, iter(list(frames.chunks(memoryview(data), answer.payload.id))[:3]))
    with Server(tmp_path) as second, contextlib.closing(connect(second)) as channel:
        transfer.upload(channel, "s-a", "r1", answer, memoryview(data), QUICK)
        assert second.uploads.offsets == [3 * CHUNK, 4 * CHUNK]
        assert second.bytes_of("o1.0") == data


@pytest.mark.parametrize("cuts", [[5_000_000], [3_000_000, 4_000_000, 3_000_000, 2_500_000]])
def test_a_line_that_is_cut_costs_little(server: Server, cuts: list[int]) -> None:
    size = 10_000_000
    data = payload(size)
    server.blobs["m1"] = blob("m1", data)
    dest = bytearray(size)
    patience = replace(QUICK, retries=2)  # fewer than the cuts: only standing still is counted
    with Proxy(server.port, cuts) as down:
        channel = transfer.connect(down.address)
        info = server.blobs["m1"].info
        transfer.download(channel, "s-a", "r1", info, memoryview(dest), patience)
        channel.close()
        assert not down.cuts
    assert dest == data
    with Proxy(server.port, cuts) as up:
        channel = transfer.connect(up.address)
        transfer.upload(channel, "s-a", "r1", result(1, size), memoryview(data), patience)
        channel.close()
        assert not up.cuts
    assert server.bytes_of("o1.0") == data
    assert sorted(set(server.uploads.offsets)) == list(range(0, size, CHUNK))
    assert len(server.uploads.offsets) <= 10 + len(cuts)  # at most a chunk twice for each cut


def test_a_chunk_out_of_place_is_refused_with_the_place_to_go_on(
    server: Server, channel: Any
) -> None:
    data = payload(3 * CHUNK)
    answer = result(1, len(data))
    open_upload(channel, answer)
    sent = list(frames.chunks(memoryview(data), answer.payload.id))
    assert put(channel, iter(sent[:1])).offset == CHUNK
    third = frames.frame(answer.payload.id, 2 * CHUNK, data[2 * CHUNK :], 0, True)
    refused = refusal(lambda: put(channel, iter([third])))
    assert (refused.code, refused.fatal) == ("FL-W111", False)
    assert str(CHUNK) in refused.hint
    transfer.upload(channel, "s-a", "r1", answer, memoryview(data), QUICK)
    assert server.bytes_of("o1.0") == data


def test_downloads_begin_at_any_whole_chunk(server: Server, channel: Any) -> None:
    data = payload(2 * CHUNK + 5)
    server.blobs["m1"] = blob("m1", data)

    def fetch(offset: int) -> bytes:
        multi = channel.unary_stream(f"/{SERVICE}/Download")
        request = wire_pb2.BlobRequest(run="r1", blob="m1", offset=offset)
        stream = multi(request.SerializeToString(), metadata=SESSION, timeout=5)
        return b"".join(bytes(frames.parse(m).data) for m in stream)

    for offset in (0, CHUNK, 2 * CHUNK, len(data)):
        assert fetch(offset) == data[offset:]
    for offset in (1, len(data) + 1, 3 * CHUNK, 2**63):
        assert refusal(functools.partial(fetch, offset)).code == "FL-W111"


# ---- what is refused ---------------------------------------------------------------------------


def test_a_corrupt_chunk_is_refused_and_the_rest_is_kept(server: Server, channel: Any) -> None:
    data = payload(3 * CHUNK)
    answer = result(1, len(data))
    open_upload(channel, answer)
    sent = list(frames.chunks(memoryview(data), answer.payload.id))
    sent[1] = sent[1][:-1] + bytes([sent[1][-1] ^ 1])
    refused = refusal(lambda: put(channel, iter(sent)))
    assert (refused.code, refused.fatal) == ("FL-W105", False)
    assert open_upload(channel, answer).offset == CHUNK
    transfer.upload(channel, "s-a", "r1", answer, memoryview(data), QUICK)
    assert server.bytes_of("o1.0") == data


def test_a_payload_that_is_not_what_was_promised_is_refused(server: Server, channel: Any) -> None:
    data = payload(2 * CHUNK)
    lie = result(1, len(data), hashlib.sha256(b"other").digest())
    with pytest.raises(RefusedError, match="FL-W105"):
        transfer.upload(channel, "s-a", "r1", lie, memoryview(data), HASTY)
    assert not server.done
    transfer.upload(channel, "s-a", "r1", result(1, len(data)), memoryview(data), QUICK)
    assert server.bytes_of("o1.0") == data


def test_a_blob_that_is_not_what_was_promised_is_refused(server: Server, channel: Any) -> None:
    good = blob("m1", payload(2 * CHUNK))
    rotten = bytearray(good.view)
    rotten[CHUNK + 1] ^= 1
    server.blobs["m1"] = replace(good, view=memoryview(rotten))  # its CRCs are of what it was
    dest = memoryview(bytearray(2 * CHUNK))
    with pytest.raises(RemoteError, match=r"FL-W105.*CRC"):
        transfer.download(channel, "s-a", "r1", good.info, dest, QUICK)
    other = blob("m1", bytes(rotten))
    server.blobs["m1"] = other
    with pytest.raises(RemoteError, match=r"FL-W105.*SHA-256"):
        transfer.download(channel, "s-a", "r1", good.info, dest, QUICK)
    server.blobs["m1"] = good  # and it heals when the server does
    transfer.download(channel, "s-a", "r1", good.info, dest, QUICK)
    assert dest == good.view


@pytest.mark.parametrize("size", [CHUNK, 3 * CHUNK])
def test_a_blob_of_another_size_is_refused(server: Server, channel: Any, size: int) -> None:
    server.blobs["m1"] = blob("m1", payload(size))
    told = replace(server.blobs["m1"].info, size=2 * CHUNK)
    with pytest.raises(RemoteError, match=r"FL-W1(05|11)"):
        transfer.download(channel, "s-a", "r1", told, memoryview(bytearray(2 * CHUNK)), QUICK)


def test_more_bytes_than_announced_are_refused(server: Server, channel: Any) -> None:
    answer = result(1, CHUNK)
    open_upload(channel, answer)
    too_many = list(frames.chunks(memoryview(payload(2 * CHUNK)), answer.payload.id))
    assert refusal(lambda: put(channel, iter(too_many))).code == "FL-W111"
    with pytest.raises(grpc.RpcError) as caught:  # the limit of gRPC, before we see it
        put(channel, iter([bytes(frames.MAX_MESSAGE + 1)]))
    assert status(caught.value) is grpc.StatusCode.RESOURCE_EXHAUSTED
    large = frames.frame(answer.payload.id, 0, bytes(CHUNK + 1), 0)
    assert refusal(lambda: put(channel, iter([large]))).code == "FL-W103"


def test_unknown_blobs_sessions_orders_and_runs_are_refused(server: Server, channel: Any) -> None:
    server.blobs["m1"] = blob("m1", payload(5))
    info, dest, data = server.blobs["m1"].info, memoryview(bytearray(5)), memoryview(bytes(5))
    missing = replace(info, id="m2")
    calls: dict[str, Callable[[], object]] = {
        "FL-W107": lambda: transfer.download(channel, "s-a", "r1", missing, dest, QUICK),
        "FL-W110": lambda: transfer.download(channel, "x", "r1", info, dest, QUICK),
        "FL-S107": lambda: transfer.download(channel, "s-a", "r2", info, dest, QUICK),
        "FL-W102": lambda: transfer.upload(channel, "s-a", "r1", result(100, 5), data, QUICK),
    }
    for code, act in calls.items():
        with pytest.raises(RefusedError) as caught:
            act()
        assert (caught.value.code, caught.value.fatal) == (code, True)


def test_malformed_requests_are_refused(server: Server, channel: Any) -> None:
    for method in ("OpenUpload", "CommitUpload"):
        multi: Any = channel.unary_unary(f"/{SERVICE}/{method}")
        for request in (b"\xff\xff", b""):
            refused = refusal(functools.partial(multi, request, metadata=SESSION, timeout=5))
            assert refused.code == "FL-W101"
    commit = wire_pb2.UploadCommit(run="r1", result=messages.result_to_wire(result(1, 5)))
    assert refusal(lambda: call(channel, "CommitUpload", commit)).code == "FL-W101"
    assert refusal(lambda: put(channel, iter([b"\xff"]))).code == "FL-W101"
    assert refusal(lambda: put(channel, iter([frames.frame("u-o9", 0, b"x", 0)]))).code == "FL-W107"


def test_a_stream_carries_one_blob(server: Server, channel: Any) -> None:
    for n in (1, 2):
        open_upload(channel, result(n, 2 * CHUNK))
    first = next(frames.chunks(memoryview(payload(2 * CHUNK)), "u-o1"))
    other = frames.frame("u-o2", CHUNK, b"x", 0)
    assert refusal(lambda: put(channel, iter([first, other]))).code == "FL-W101"


def test_an_update_that_is_not_accepted_is_freed_and_its_client_told(
    server: Server, channel: Any
) -> None:
    good, bad = payload(2 * CHUNK, seed=1), payload(2 * CHUNK, seed=2)
    transfer.upload(channel, "s-a", "r1", result(1, len(good)), memoryview(good), QUICK)
    server.refuse_on_accept = RemoteError("FL-W106", "nan in fc.weight", "lower the rate")
    with pytest.raises(RefusedError, match="FL-W106: nan in fc"):
        transfer.upload(channel, "s-b", "r1", result(2, len(bad)), memoryview(bad), QUICK)
    assert not server.uploads.knows("o2.0")
    assert server.bytes_of("o1.0") == good


def test_a_server_that_is_short_of_room_says_when_to_come_back(tmp_path: Path) -> None:
    room = [CHUNK]
    data = payload(2 * CHUNK)
    options = {"min_free": 0, "free": lambda _: room[0]}
    with Server(tmp_path, **options) as server, contextlib.closing(connect(server)) as channel:
        with pytest.raises(RefusedError) as caught:
            transfer.upload(channel, "s-a", "r1", result(1, len(data)), memoryview(data), HASTY)
        assert (caught.value.code, caught.value.retry_seconds) == ("FL-W109", 5.0)
        room[0] = 4 * CHUNK
        transfer.upload(channel, "s-a", "r1", result(1, len(data)), memoryview(data), HASTY)
        assert server.bytes_of("o1.0") == data


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a disk of 4 MiB")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_one_client_its_patience_and_nobody_anything(tiny_disk: Path) -> None:
    good, late = payload(2 * CHUNK, seed=1), payload(3 * CHUNK, seed=2)
    options = {"min_free": 0, "free": lambda _: 1 << 40}  # as if another process took the room
    with Server(tiny_disk, **options) as server, contextlib.closing(connect(server)) as channel:
        transfer.upload(channel, "s-a", "r1", result(1, len(good)), memoryview(good), QUICK)
        with pytest.raises(RefusedError, match=r"FL-W109.*the disk is full"):
            transfer.upload(channel, "s-b", "r1", result(2, len(late)), memoryview(late), HASTY)
        assert server.bytes_of("o1.0") == good
        server.uploads.free("o1.0")
        server.uploads.offsets.clear()
        transfer.upload(channel, "s-b", "r1", result(2, len(late)), memoryview(late), HASTY)
        assert server.bytes_of("o2.0") == late
        assert server.uploads.offsets[0] > 0  # what was held is not sent again


class Liar(grpc.GenericRpcHandler):  # type: ignore[misc]
    """A server that answers each download with the next of some prepared streams."""

    def __init__(self, streams: Sequence[Sequence[bytes]]) -> None:
        self.streams = list(streams)

    def service(self, handler_call_details: Any) -> Any:
        return grpc.unary_stream_rpc_method_handler(self.download)

    def download(self, request: bytes, context: Any) -> Iterator[bytes]:
        yield from self.streams.pop(0)


def hear(streams: Sequence[Sequence[bytes]], info: BlobInfo) -> bytes:
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, handlers=[Liar(streams)], options=SERVER_OPTIONS)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        channel, dest = transfer.connect(f"127.0.0.1:{port}"), bytearray(info.size)
        try:
            patience = replace(HASTY, retries=len(streams) - 1)
            transfer.download(channel, "s-a", "r1", info, memoryview(dest), patience)
        finally:
            channel.close()
            server.stop(None).wait()
    return bytes(dest)


def test_a_server_that_sends_chunks_out_of_order_is_not_believed() -> None:
    good = blob("m1", payload(3 * CHUNK))
    sent = list(frames.chunks(good.view, "m1"))
    for wrong in ([sent[1], sent[0], sent[2]], [sent[0], sent[0]], [sent[0], sent[2]]):
        with pytest.raises(RemoteError, match=r"FL-W111: chunk at"):
            hear([wrong], good.info)
    for wrong in ([], sent[:2]):
        with pytest.raises(RemoteError, match=r"FL-W105: .* ended at"):
            hear([wrong], good.info)


def test_a_server_that_lied_once_is_heard_again_from_the_start() -> None:
    good, other = blob("m1", payload(2 * CHUNK)), blob("m1", payload(2 * CHUNK, seed=1))
    streams = [list(frames.chunks(b.view, "m1")) for b in (other, good)]
    assert hear(streams, good.info) == good.view


# ---- what stands still -------------------------------------------------------------------------


def test_an_upload_that_stalls_is_given_up_and_its_bytes_are_kept(tmp_path: Path) -> None:
    data = payload(3 * CHUNK)
    answer = result(1, len(data))
    over = threading.Event()
    with (
        Server(tmp_path, idle_seconds=0.3) as server,
        contextlib.closing(connect(server)) as channel,
    ):
        open_upload(channel, answer)

        def one_then_silence() -> Iterator[bytes]:
            yield next(frames.chunks(memoryview(data), answer.payload.id))
            over.wait(5)

        refused = refusal(lambda: put(channel, one_then_silence()))
        over.set()
        assert (refused.code, refused.fatal) == ("FL-W112", False)
        assert open_upload(channel, answer).offset == CHUNK


def test_a_client_that_takes_no_bytes_is_given_up(tmp_path: Path) -> None:
    class Counted(Sequence[int]):
        """Checksums that know how many frames were made from them."""

        made = 0

        @overload
        def __getitem__(self, at: int) -> int: ...
        @overload
        def __getitem__(self, at: slice) -> Sequence[int]: ...
        def __getitem__(self, at: int | slice) -> int | Sequence[int]:
            Counted.made += 1
            return 0

        def __len__(self) -> int:
            return 64

    with (
        Server(tmp_path, idle_seconds=0.4) as server,
        contextlib.closing(connect(server)) as channel,
    ):
        large = blob("m1", bytes(64 * CHUNK))
        server.blobs["m1"] = replace(large, crcs=Counted())
        request = wire_pb2.BlobRequest(blob="m1").SerializeToString()
        stream = channel.unary_stream(f"/{SERVICE}/Download")(request, metadata=SESSION, timeout=9)
        next(stream)
        time.sleep(1)
        assert Counted.made < 32  # back-pressure: not all 64 were made for one that was taken
        assert refusal(lambda: list(stream)).code == "FL-W112"


def test_a_server_that_says_nothing_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        channel = transfer.connect(f"127.0.0.1:{mute.getsockname()[1]}")
        patience = Patience(idle_seconds=0.3, retries=1, first_wait=0.01)
        info = blob("m1", b"12345").info
        begun = time.monotonic()
        with pytest.raises(AtollError, match=r"FL-(W112|C101)"):
            transfer.download(channel, "s-a", "r1", info, memoryview(bytearray(5)), patience)
        assert time.monotonic() - begun < 5
        channel.close()


def test_a_server_that_is_not_there_is_told_as_such() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        address = f"127.0.0.1:{door.getsockname()[1]}"
    channel = transfer.connect(address)
    with pytest.raises(ClientError, match="FL-C101"):
        transfer.upload(channel, "s-a", "r1", result(1, 5), memoryview(bytes(5)), QUICK)
    channel.close()


def test_a_transfer_can_be_stopped_from_another_thread() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        channel = transfer.connect(f"127.0.0.1:{mute.getsockname()[1]}")
        patience = Patience(idle_seconds=30)
        threading.Timer(0.2, patience.stop.set).start()
        info = blob("m1", b"12345").info
        with pytest.raises(ClientError, match="FL-S208"):
            transfer.download(channel, "s-a", "r1", info, memoryview(bytearray(5)), patience)
        channel.close()


class Silent(grpc.GenericRpcHandler):  # type: ignore[misc]
    """A server that opens any upload and then takes no bytes of it."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.asked = threading.Event()

    def service(self, handler_call_details: Any) -> Any:
        if handler_call_details.method.endswith("/OpenUpload"):
            state = wire_pb2.UploadState().SerializeToString()
            return grpc.unary_unary_rpc_method_handler(lambda request, context: state)
        return grpc.stream_unary_rpc_method_handler(self.put)

    def put(self, chunks: Iterator[bytes], context: Any) -> bytes:
        self.asked.set()
        self.over.wait(20)
        return b""


@pytest.fixture
def silent() -> Iterator[tuple[Silent, str]]:
    handler = Silent()
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool, handlers=[handler], options=SERVER_OPTIONS)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield handler, address
        handler.over.set()
        server.stop(None).wait()


def test_an_upload_of_which_no_bytes_are_taken_is_given_up(silent: tuple[Silent, str]) -> None:
    """What cancels it made gRPC raise what is no RpcError, and the client never tried again."""
    patience = Patience(idle_seconds=0.3, retries=1, first_wait=0.01)
    with contextlib.closing(transfer.connect(silent[1])) as channel:
        view = memoryview(bytes(5))
        with pytest.raises(RemoteError, match=r"FL-W112: upload of o1\.0: nothing moved"):
            transfer.upload(channel, "s-a", "r1", result(1, 5), view, patience)


@pytest.mark.parametrize("close", [True, False])
def test_an_upload_ends_with_its_line(silent: tuple[Silent, str], close: bool) -> None:
    """Closed, or told to stop: whichever its thread sees first."""
    line = Line(bulk=transfer.connect(silent[1]))

    def end() -> None:
        silent[0].asked.wait(20)
        if close:
            line.close()
        line.patience.stop.set()

    ending = threading.Thread(target=end)
    ending.start()
    with pytest.raises(ClientError, match="FL-S208"):
        transfer.upload(line.bulk, "s-a", "r1", result(1, 5), memoryview(bytes(5)), line.patience)
    ending.join()
    line.close()


# ---- what is left behind -----------------------------------------------------------------------


def test_no_descriptor_and_no_part_file_is_left_behind(server: Server, channel: Any) -> None:
    data = payload(3 * CHUNK)
    server.blobs["m1"] = blob("m1", data)

    def everything(n: int) -> None:
        answer = result(n, len(data))
        dest = memoryview(bytearray(len(data)))
        transfer.download(channel, "s-a", "r1", server.blobs["m1"].info, dest, QUICK)
        open_upload(channel, answer)
        bad = frames.frame(answer.payload.id, 0, data[:CHUNK], 1)
        assert refusal(lambda: put(channel, iter([bad]))).code == "FL-W105"
        multi = channel.stream_unary(f"/{SERVICE}/PutChunks")
        frames_ = iter(list(frames.chunks(memoryview(data), answer.payload.id))[:2])
        multi.future(frames_, metadata=SESSION).cancel()
        transfer.upload(channel, "s-a", "r1", answer, memoryview(data), QUICK)
        server.done.clear()
        server.uploads.free(answer.update)

    everything(1)  # warms up threads and pools
    before = wait_for(descriptors, lambda _: True)
    for n in range(2, 12):
        everything(n)
    assert wait_for(descriptors, lambda n: n <= before) <= before
    names = [p.name for p in server.uploads.folder.iterdir()]
    assert all(name.startswith("_spare.") for name in names), names


def wait_for(look: Callable[[], int], good: Callable[[int], bool]) -> int:
    """What `look` says once it is good, or after two seconds."""
    for _ in range(100):
        if good(found := look()):
            return found
        time.sleep(0.02)
    return look()
