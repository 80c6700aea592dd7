"""Refusals: why a call failed, in words for people."""

import pytest

from atoll.protocols.refusals import plainly

GRPC = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:7447: "


@pytest.mark.parametrize(
    ("status", "details", "said"),
    [
        (
            "UNAVAILABLE", GRPC + "Failed to connect to remote host: Connection refused",
            "Failed to connect to remote host: Connection refused",
        ),
        (
            "UNAVAILABLE", "failed to connect to all addresses; last error: UNAVAILABLE: no",
            "no",
        ),
        ("INTERNAL", "a stream\x1b broke\n", "INTERNAL: a stream  broke"),
    ],
)  # fmt: skip
def test_why_there_is_no_connection_is_told_without_what_grpc_says_around_it(
    status: str, details: str, said: str
) -> None:
    assert plainly(status, details) == said
