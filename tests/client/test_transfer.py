"""Transfers: one of a closed line ends as a lost connection does, one that waits is heard of."""

from collections.abc import Callable

import grpc
import pytest

from atoll.client import transfer
from atoll.client.line import BROKEN, Line
from atoll.protocols import refusals
from atoll.protocols.blobs import BlobInfo, Section
from atoll.protocols.errors import AtollError, ClientError, RefusedError, RemoteError
from atoll.protocols.messages import Result

INFO = BlobInfo("u-o1", 4, b"", (Section("trainable", "fp32", 1, 4),))


def fetch(line: Line) -> None:
    line.fetch(INFO, memoryview(bytearray(4)))


def send(line: Line, waits: Callable[[AtollError], None] | None = None) -> None:
    made, view = Result("o1", 0, 10, 320, 1.5, INFO, {}), memoryview(bytes(4))
    transfer.upload(line.bulk, line.token, line.run, made, view, line.patience, waits)


@pytest.mark.parametrize("move", [fetch, send])
def test_a_transfer_of_a_closed_line_is_interrupted(move: Callable[[Line], None]) -> None:
    """gRPC raises a ValueError there: an upload ended in a traceback, an order in FL-S100."""
    line = Line(bulk=transfer.connect("127.0.0.1:1"))
    line.close()
    with pytest.raises(ClientError, match="FL-S208") as ended:
        move(line)
    assert ended.value.code in BROKEN


@pytest.mark.parametrize("move", [fetch, send])
def test_an_error_of_another_kind_is_not_taken_for_it(move: Callable[[Line], None]) -> None:
    line = Line(bulk=transfer.connect("127.0.0.1:1"))
    line.bulk.close()
    with pytest.raises(ValueError, match="Cannot invoke RPC"):
        move(line)


class Full(grpc.RpcError):  # type: ignore[misc]
    """What a call raises that a server without room refuses."""

    def trailing_metadata(self) -> object:
        told = RemoteError("FL-W109", "no room: 5 bytes are free", "wait", retry_seconds=0.0)
        return refusals.error_metadata(told)


class Refusing:
    """A channel to such a server; no other call comes to it."""

    def unary_unary(self, method: str) -> Callable[..., bytes]:
        def call(request: bytes, **options: object) -> bytes:
            raise Full

        return call


def test_an_upload_that_must_wait_for_room_is_heard_of() -> None:
    heard: list[str] = []
    line = Line(bulk=Refusing(), patience=transfer.Patience(retries=2, first_wait=0.001))
    with pytest.raises(RefusedError, match="FL-W109"):
        send(line, lambda error: heard.append(error.message))
    assert heard == ["no room: 5 bytes are free"] * 3
