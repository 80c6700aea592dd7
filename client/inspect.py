"""Inspect: ask a server about its run without taking part. Imports grpc, never torch."""

import json
from typing import Any

import grpc

from atoll.protocols import refusals, wire_pb2
from atoll.protocols.channel import CHANNEL_OPTIONS, SERVICE
from atoll.protocols.errors import ClientError
from atoll.protocols.runinfo import RunInfo


def ask(address: str, what: str, seconds: float = 10.0, **arguments: Any) -> Any:
    """The server's answer, as JSON data. Raises ClientError FL-C101, or what the server refused."""
    request = wire_pb2.InspectRequest(what=what, arguments=json.dumps(arguments))
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        call = channel.unary_unary(f"/{SERVICE}/Inspect")
        try:
            reply = call(request.SerializeToString(), timeout=seconds)
        except grpc.RpcError as error:
            refused = refusals.error_from_metadata(error.trailing_metadata())
            if refused is not None:
                raise refused from error
            raise ClientError(
                "FL-C101",
                f"no server answers at {address}: {error.code().name.lower()}",
                "check the address and that `fl-server start` runs there",
            ) from error
    return json.loads(wire_pb2.InspectReply.FromString(reply).data)


def run_info(address: str) -> RunInfo:
    return RunInfo.of(ask(address, "run"))
