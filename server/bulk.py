"""Bulk: the four calls that move bytes, as raw gRPC handlers without protobuf objects for chunks.

Whoever runs a server says by four functions who may call, what can be fetched, which uploads are
wanted and what becomes of a finished one; everything else (resuming, back-pressure, verifying in
worker threads, giving up on what stalls) is here. A transfer is judged by its progress alone: it
may take hours, but each chunk must pass within `idle_seconds`.
"""

import asyncio
import functools
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from atoll.protocols import bounds, frames, messages, refusals, wire_pb2
from atoll.protocols.blobs import CHUNK, Blob
from atoll.protocols.channel import SERVICE
from atoll.protocols.errors import AtollError, RemoteError
from atoll.protocols.messages import Result
from atoll.server.uploads import StoredUpdate, Uploads

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
T = TypeVar("T")
Context = Any  # grpc.aio.ServicerContext; grpc ships no types
Handler = Callable[["Bulk", bytes, Context], Awaitable[T]]

STATUS = {  # what a client in another language goes by; ours reads the Refusal
    "FL-W101": grpc.StatusCode.INVALID_ARGUMENT,
    "FL-W102": grpc.StatusCode.FAILED_PRECONDITION,
    "FL-W103": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "FL-W105": grpc.StatusCode.DATA_LOSS,
    "FL-W107": grpc.StatusCode.NOT_FOUND,
    "FL-W109": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "FL-W110": grpc.StatusCode.UNAUTHENTICATED,
    "FL-W111": grpc.StatusCode.OUT_OF_RANGE,
    "FL-W112": grpc.StatusCode.DEADLINE_EXCEEDED,
}


async def refuse(context: Context, error: AtollError) -> None:
    """End the call with `error` as gRPC status and as a Refusal in the trailing metadata."""
    status = STATUS.get(error.code, grpc.StatusCode.FAILED_PRECONDITION)
    details = bounds.text(str(error), 200)  # the whole is in the metadata, which has a limit
    await context.abort(status, details, refusals.error_metadata(error))


def _refusing(handler: "Handler[T]") -> "Handler[T | None]":
    """A handler whose AtollErrors are told to the client instead of raised."""

    @functools.wraps(handler)
    async def call(bulk: "Bulk", request: bytes, context: Context) -> T | None:
        try:
            return await handler(bulk, request, context)
        except AtollError as error:
            logger.info("call=%s refused: %s", handler.__name__, error)
            await refuse(context, error)
            return None  # not reached: abort raises

    return call


class Bulk(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Register with `add_generic_rpc_handlers`, and no generated AtollServicer beside it: gRPC
    would prefer that one's methods. The other calls need a handler of their own.

    authorize(metadata): the client whose session it names; raises FL-W110.
    find_blob(client, id): the blob, held until its stream ends; raises FL-W107.
    may_upload(client, result): the id to store it under, None where it was accepted before (the
        client is told so); raises FL-W102 (unknown order), FL-W104 (does not fit).
    accepted(client, result, stored): all bytes are here and right. Runs once per update, to its
        end even if the client hangs up; when it raises, the bytes are freed and the client told.
    workers: verify, hash and write; None takes the loop's default executor.
    """

    def __init__(
        self,
        uploads: Uploads,
        *,
        authorize: Callable[[Mapping[str, str | bytes]], str],
        find_blob: Callable[[str, str], Blob],
        may_upload: Callable[[str, Result], str | None],
        accepted: Callable[[str, Result, StoredUpdate], Awaitable[None]],
        run: str = "",
        workers: Executor | None = None,
        idle_seconds: float = 120.0,  # 9 KiB/s with chunks of 1 MiB; dead links go by keepalive
    ) -> None:
        self.uploads = uploads
        self.authorize = authorize
        self.find_blob = find_blob
        self.may_upload = may_upload
        self.accepted = accepted
        self.run = run
        self.workers = workers
        self.idle_seconds = idle_seconds
        self._open: dict[tuple[str, str], str] = {}  # (client, blob id) -> update id
        self._commits: dict[str, asyncio.Task[None]] = {}  # update id -> being accepted
        self._settling: set[asyncio.Task[None]] = set()  # a task that nobody holds may vanish
        self._methods = {
            f"/{SERVICE}/Download": grpc.unary_stream_rpc_method_handler(self.download),
            f"/{SERVICE}/OpenUpload": grpc.unary_unary_rpc_method_handler(self.open_upload),
            f"/{SERVICE}/PutChunks": grpc.stream_unary_rpc_method_handler(self.put_chunks),
            f"/{SERVICE}/CommitUpload": grpc.unary_unary_rpc_method_handler(self.commit_upload),
        }

    def service(self, handler_call_details: Any) -> Any:
        return self._methods.get(handler_call_details.method)

    @_refusing
    async def download(self, request: bytes, context: Context) -> None:
        client = self._client(context)
        asked = _read(wire_pb2.BlobRequest, request)
        self._check_run(asked.run)
        blob = self.find_blob(client, asked.blob)
        size = len(blob.view)
        digest = blob.info.sha256 or hashlib.sha256(blob.view).digest()
        if asked.offset > size or (asked.offset % CHUNK and asked.offset != size):
            raise RemoteError(
                "FL-W111",
                f"offset {asked.offset} of blob {asked.blob} with {size} bytes",
                f"resume at a multiple of {CHUNK}",
            )
        for frame in frames.chunks(
            blob.view, blob.info.id, asked.offset, crcs=blob.crcs, digest=digest
        ):
            # Waits while the client is slower than we are: at most one frame is in our hands.
            await self._within(context.write(frame), f"{client} takes no bytes of {asked.blob}")

    @_refusing
    async def open_upload(self, request: bytes, context: Context) -> bytes:
        client = self._client(context)
        asked = _read(wire_pb2.UploadOpen, request)
        self._check_run(asked.run)
        result = messages.result_from_wire(asked.result)
        payload = result.payload
        update = self.may_upload(client, result)
        if update is None:
            return _state(payload.id, payload.size, committed=True)
        held = await self._work(self.uploads.open, update, payload.size)
        self._open = {k: u for k, u in self._open.items() if self.uploads.knows(u)}
        self._open[client, payload.id] = update
        return _state(payload.id, held)

    @_refusing
    async def put_chunks(self, _: object, context: Context) -> bytes:
        client = self._client(context)
        pending: asyncio.Future[int] | None = None
        blob = update = ""
        held = 0
        try:
            while True:
                message = await self._within(context.read(), f"{client} sends no bytes")
                if message is grpc.aio.EOF:
                    break
                chunk = frames.parse(message)
                if not update:
                    blob, update = chunk.blob, self._uploading(client, chunk.blob)
                elif chunk.blob not in ("", blob):
                    raise RemoteError("FL-W101", f"blob {chunk.blob} in a stream of {blob}")
                if pending:  # the next chunk arrives while this one is verified; never two at once
                    held = await asyncio.shield(pending)
                pending = self._work(self.uploads.put, update, chunk)
            if pending:
                held = await asyncio.shield(pending)
            return _state(blob, held)
        finally:  # also when the client hung up, which may cancel us once more right here
            task = asyncio.create_task(self._settle(pending, update))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)
            await asyncio.shield(task)

    @_refusing
    async def commit_upload(self, request: bytes, context: Context) -> bytes:
        client = self._client(context)
        asked = _read(wire_pb2.UploadCommit, request)
        self._check_run(asked.run)
        result = messages.result_from_wire(asked.result)
        if not result.payload.sha256:
            raise RemoteError("FL-W101", "a commit without SHA-256", "set payload.sha256")
        update = self.may_upload(client, result)
        if update is not None:
            await self._accept(client, result, update)
        self._open.pop((client, result.payload.id), None)
        return _state(result.payload.id, result.payload.size, committed=True)

    # ---- below --------------------------------------------------------------------------------

    async def _settle(self, pending: "asyncio.Future[int] | None", update: str) -> None:
        """Close the file of a stream that ended, not before the worker let go of it."""
        if pending:
            await asyncio.wait([pending])
            pending.exception()  # the stream has raised it, or the client is gone
        if update:
            await self._work(self.uploads.pause, update)

    async def _accept(self, client: str, result: Result, update: str) -> None:
        """Once, however often the commit is repeated, and to the end if the client hangs up."""
        task = self._commits.get(update)
        if task is None:
            task = asyncio.create_task(self._commit(client, result, update))
            self._commits[update] = task
            task.add_done_callback(functools.partial(self._committed, update))
        await asyncio.shield(task)

    async def _commit(self, client: str, result: Result, update: str) -> None:
        stored = await self._work(self.uploads.commit, update, result.payload.sha256)
        try:
            await self.accepted(client, result, stored)
        except AtollError:
            await self._work(self.uploads.free, update)
            raise

    def _committed(self, update: str, task: "asyncio.Task[None]") -> None:
        self._commits.pop(update, None)
        if not task.cancelled():
            task.exception()  # whoever still waits has raised it

    def _client(self, context: Context) -> str:
        return self.authorize(dict(context.invocation_metadata() or ()))

    def _check_run(self, run: str) -> None:
        if run and self.run and run != self.run:
            raise RemoteError("FL-S107", f"no run {bounds.text(run, 64)} here", f"ask {self.run}")

    def _uploading(self, client: str, blob: str) -> str:
        update = self._open.get((client, blob))
        if update is None:
            raise RemoteError(
                "FL-W107", f"no upload {blob!r} of {client} is open", "open it", retry_seconds=0.0
            )
        return update

    def _work(self, job: Callable[..., T], *args: object) -> "asyncio.Future[T]":
        return asyncio.get_running_loop().run_in_executor(self.workers, job, *args)

    async def _within(self, step: Awaitable[T], stalled: str) -> T:
        try:
            async with asyncio.timeout(self.idle_seconds):
                return await step
        except TimeoutError as error:
            raise RemoteError(
                "FL-W112",
                f"{stalled} for {self.idle_seconds:g} s",
                "what is held is kept: resume",
                retry_seconds=1.0,
            ) from error


def _read(kind: type[M], request: bytes) -> M:
    try:
        message = kind.FromString(request)
    except DecodeError as error:
        raise RemoteError("FL-W101", f"{len(request)} bytes that are no {kind.__name__}") from error
    return message


def _state(blob: str, offset: int, committed: bool = False) -> bytes:
    state = wire_pb2.UploadState(blob=blob, offset=offset, committed=committed)
    return bytes(state.SerializeToString())
