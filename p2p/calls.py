"""Calls: how peers ask each other and answer, over hivemind's `P2P`, with a timeout on everything.

hivemind puts no timeout on a call, and waits for ever for a daemon that is gone. An answer's first
byte says whether it is one, or a refusal with its code, message and hint.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from google.protobuf.message import DecodeError
from google.protobuf.wrappers_pb2 import BytesValue

from atoll.protocols.errors import RemoteError

T = TypeVar("T")
Answer = Callable[[str, bytes], Awaitable[bytes]]  # (peer, what it says) -> what it hears
Stream = Callable[[str, bytes], AsyncIterator[bytes]]

MOST = 1 << 20  # bytes said in one call: an answer over 4 MiB would make its caller wait for ever
CALL_SECONDS = 20.0
REFUSED = b"\x01"  # begins a message that says why there is no answer

logger = logging.getLogger(__name__)


# ---- asking ------------------------------------------------------------------------------------


class Waiting(dict[Any, Any]):
    """Calls that wait for their answers, in place of hivemind's own dict.

    Its loop that reads all answers died of one that came in the turn in which its call was given
    up, as when a machine that has slept wakes up: that peer heard and was heard no more.
    """

    def __contains__(self, call: object) -> bool:
        found = self.get(call)
        return found is not None and not found.done()


async def call(p2p: Any, peer: str, name: str, said: bytes, seconds: float) -> bytes:
    """What `peer` answers. RemoteError FL-P203 where it does not, or what it refused with."""
    if len(said) > MOST:
        raise ValueError(f"{len(said)} bytes in one call, at most {MOST}: send them in bulk")
    from hivemind.p2p import PeerID

    asked = p2p.call_protobuf_handler(
        PeerID.from_base58(peer), name, BytesValue(value=said), BytesValue
    )
    answer = await within(seconds, asked, f"peer {peer}")
    return unwrap(bytes(answer.value))


async def stream(
    p2p: Any, peer: str, name: str, said: bytes, seconds: float
) -> AsyncGenerator[bytes, None]:
    """Its messages, each within `seconds` of the one before. RemoteError as `call`."""
    from hivemind.p2p import PeerID

    asked = p2p.iterate_protobuf_handler(
        PeerID.from_base58(peer), name, BytesValue(value=said), BytesValue
    )
    messages = await within(seconds, asked, f"peer {peer}")
    try:
        while True:
            try:
                found = await within(seconds, anext(messages), f"peer {peer}")
            except StopAsyncIteration:
                return
            if found.value[:1] == REFUSED:
                unwrap(found.value)
            yield found.value
    finally:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(messages.aclose(), 2.0)


async def within(seconds: float, work: Awaitable[T], who: str) -> T:
    """RemoteError FL-P203 where it takes longer or fails."""
    try:
        async with asyncio.timeout(seconds):  # wait_for may swallow that it is cancelled
            return await work
    except TimeoutError as error:
        raise no_answer(who, f"nothing for {seconds:g} s") from error
    except (StopAsyncIteration, RemoteError):
        raise
    except DecodeError as error:
        raise no_answer(who, f"malformed answer: {error}") from error
    except Exception as error:  # hivemind raises a dozen kinds, and EOFError and OSError
        raise no_answer(who, f"{type(error).__name__}: {error}") from error


def no_answer(who: str, why: str) -> RemoteError:
    return RemoteError("FL-P203", f"{who} does not answer: {why}", "it is tried again")


def unwrap(said: bytes) -> bytes:
    """An answer without its first byte. RemoteError: the refusal that it is, or FL-P203."""
    if said[:1] == b"\x00":
        return said[1:]
    if said[:1] == REFUSED:
        parts = said[1:].decode(errors="replace").split("\n")[:3]
        if len(parts) == 3 and parts[0].isascii() and len(parts[0]) <= 16:
            raise RemoteError(parts[0], parts[1][:500], parts[2][:500])
    raise RemoteError("FL-P203", "a malformed answer", "is it a peer of this version?")


# ---- answering ---------------------------------------------------------------------------------


async def serve(p2p: Any, name: str, answer: Answer) -> None:
    """Answer calls of `name`. A RemoteError that it raises reaches the caller."""

    async def handle(request: BytesValue, context: Any) -> BytesValue:
        peer = context.remote_id.to_base58()
        try:
            said = _wrap(await answer(peer, request.value))
        except RemoteError as error:
            said = _refusal(error)
        except Exception:
            logger.exception("peer=%s call=%s failed", peer, name)
            said = _refusal(RemoteError("FL-P203", "the peer failed", "see its log"))
        return BytesValue(value=said)

    added = p2p.add_protobuf_handler(name, handle, BytesValue)
    await within(CALL_SECONDS, added, "the daemon")


async def serve_stream(p2p: Any, name: str, stream: Stream) -> None:
    """Answer calls of `name` with the messages of `stream`, none of which begins with REFUSED."""

    async def handle(requests: Any, context: Any) -> AsyncIterator[BytesValue]:
        peer = context.remote_id.to_base58()
        async for request in requests:
            try:
                async for message in stream(peer, request.value):
                    yield BytesValue(value=message)
            except RemoteError as error:
                yield BytesValue(value=_refusal(error))
            # Who closes first may cut off what the other has not read: the reader closes.
            await asyncio.sleep(CALL_SECONDS)
            return

    added = p2p.add_protobuf_handler(
        name, handle, BytesValue, stream_input=True, stream_output=True
    )
    await within(CALL_SECONDS, added, "the daemon")


def _wrap(answer: bytes) -> bytes:
    if len(answer) >= MOST:
        raise ValueError(f"an answer of {len(answer)} bytes, at most {MOST - 1}")
    return b"\x00" + answer


def _refusal(error: RemoteError) -> bytes:
    return REFUSED + "\n".join((error.code, error.message, error.hint)).encode()[:4096]
