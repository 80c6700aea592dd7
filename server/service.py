"""Service: the control stream and the inspection call, as thin shells over the host.

Handlers do nothing but translate: bytes to checked values, errors to refusals. They answer before
torch is imported: a caller waits until the host is there, not for a connection.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from atoll.protocols import bounds, lifted, messages, refusals, wire_pb2
from atoll.protocols.blobs import Bulk
from atoll.protocols.channel import SERVICE
from atoll.protocols.errors import AtollError, RemoteError
from atoll.protocols.events import MAX_COUNT

if TYPE_CHECKING:
    from atoll.server.host import Host
    from atoll.server.sessions import Session

logger = logging.getLogger(__name__)

HELLO_SECONDS = 10.0  # a stream that does not say hello in this time is closed


class Service(grpc.GenericRpcHandler):  # type: ignore[misc]
    """`host` is a future: set when the run is ready to take clients."""

    def __init__(
        self, host: "asyncio.Future[Host]", inspect: Callable[[str, dict[str, float]], object]
    ) -> None:
        self._host = host
        self._inspect = inspect
        self._methods = {
            f"/{SERVICE}/Control": grpc.stream_stream_rpc_method_handler(
                self.control,
                request_deserializer=None,  # a malformed message is refused, not a stack trace
                response_serializer=None,  # a session packs its messages itself
            ),
            f"/{SERVICE}/Inspect": grpc.unary_unary_rpc_method_handler(
                self.inspect,
                request_deserializer=None,
                response_serializer=wire_pb2.InspectReply.SerializeToString,
            ),
        }

    def service(self, handler_call_details: Any) -> Any:
        return self._methods.get(handler_call_details.method)

    async def control(self, _: Any, context: Any) -> None:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                first = await context.read()
        except TimeoutError:
            await self._abort(context, RemoteError("FL-W101", "no Hello came", "say hello first"))
        host = await asyncio.shield(self._host)
        try:
            first = wire_pb2.ClientMessage() if first is grpc.aio.EOF else _parse(first)[0]
            if first.WhichOneof("kind") != "hello":
                raise RemoteError("FL-W101", "the first message is not Hello", "say hello first")
            session = await host.reception.greet(messages.hello_from_wire(first.hello))
        except AtollError as error:
            logger.info("hello refused: %s", error)
            await self._abort(context, error)
        await self._converse(host, session, context)

    async def _converse(self, host: "Host", session: "Session", context: Any) -> None:
        reason = "its connection broke"
        writer = asyncio.create_task(_write(session, context))
        reader = asyncio.create_task(_read(host, session, context))
        cut = asyncio.create_task(session.cut.wait())
        try:
            await asyncio.wait((writer, reader, cut), return_when=asyncio.FIRST_COMPLETED)
            if reader.done() and (error := reader.exception()) is not None:
                if isinstance(error, AtollError):
                    reason = str(error)
                    if error.code == "FL-W101":
                        logger.warning("client=%s is cut off: %s", session.client, reason)
                    await self._abort(context, error)
                raise error
        finally:
            host.reception.gone(session, reason)
            for task in (writer, reader, cut):
                task.cancel()
            await asyncio.gather(writer, reader, cut, return_exceptions=True)

    async def inspect(self, data: bytes, context: Any) -> Any:
        await asyncio.shield(self._host)
        try:
            request = _read_request(data)
            found = self._inspect(request.what, _arguments(request.arguments))
            if isawaitable(found):  # it waits for news
                found = await found
        except AtollError as error:
            await self._abort(context, error)
        return wire_pb2.InspectReply(data=json.dumps(found))

    async def _abort(self, context: Any, error: AtollError) -> None:
        metadata = refusals.error_metadata(error)
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.message, metadata)


def _arguments(text: str) -> dict[str, float]:
    """Of numbers alone. RemoteError FL-W101."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    numbers = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(n, int | float) and abs(n) <= MAX_COUNT for n in numbers):
        what = f"malformed message: arguments {bounds.text(text, 40)!r}"
        raise RemoteError("FL-W101", what, 'send a JSON object of numbers, as {"after": 0}')
    return found  # type: ignore[no-any-return]


async def _write(session: "Session", context: Any) -> None:
    while (message := await session.next()) is not None:
        await context.write(message)


async def _read(host: "Host", session: "Session", context: Any) -> None:
    while (data := await context.read()) is not grpc.aio.EOF:
        host.message(session, *_parse(data))


def _parse(data: bytes) -> tuple[wire_pb2.ClientMessage, Bulk]:
    try:
        return lifted.client_message(data)
    except DecodeError as error:
        what = f"{len(data)} bytes that are no ClientMessage"
        raise RemoteError("FL-W101", what, "see protocols/wire.proto") from error


def _read_request(data: bytes) -> wire_pb2.InspectRequest:
    try:
        return wire_pb2.InspectRequest.FromString(data)
    except DecodeError as error:
        what = f"{len(data)} bytes that are no InspectRequest"
        raise RemoteError("FL-W101", what, "see protocols/wire.proto") from error
