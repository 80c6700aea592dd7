"""Connections on which nothing is said for a while."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from atoll.protocols.channel import CHANNEL_OPTIONS, SERVER_OPTIONS

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_a_connection_without_data_outlives_its_keepalives() -> None:
    """A server that takes a ping each half minute for abuse hangs up at the fourth, and whatever
    goes on over that connection ends with it. Here they come as often as a server must bear."""
    released = threading.Event()

    def wait(request: bytes, context: object) -> Iterator[bytes]:
        yield b"begun"
        released.wait(120)
        yield b"end"

    handler = grpc.method_handlers_generic_handler(
        "x", {"Wait": grpc.unary_stream_rpc_method_handler(wait)}
    )
    server = grpc.server(ThreadPoolExecutor(1), (handler,), options=SERVER_OPTIONS)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    often = {**dict(CHANNEL_OPTIONS), "grpc.keepalive_time_ms": 10_500}
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=list(often.items())) as client:
        said = client.unary_stream("/x/Wait")(b"")
        assert next(said) == b"begun"
        assert not released.wait(50), "four pings"
        released.set()
        assert list(said) == [b"end"]
    server.stop(None)
