"""Ports: whether one is free.

Asked before a daemon is started, which says less of why it cannot listen. Of two that are started
at once both may find it free; the second daemon is refused then.
"""

import errno
import socket
from collections.abc import Sequence

from atoll.protocols.errors import PeerError

USUAL = 7448  # taken where it is free and none is asked for


def free(host: str, port: int) -> bool:
    """Whether nobody listens there. An address that is not this machine's is free: to listen on it
    fails with a reason of its own."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections do not count
        try:
            trial.bind((host, port))
            trial.listen(1)
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def check(host: str, port: int) -> None:
    """PeerError FL-P201 where another program listens there."""
    if not free(host, port):
        raise PeerError(
            "FL-P201",
            f"another program listens on TCP {port} of {host}",
            "stop it, or choose another --port",
        )


def all_free(listen: Sequence[str]) -> bool:
    """Of multiaddrs."""
    parts = [address.split("/") for address in listen]
    return all(free(p[2], int(p[4])) for p in parts if len(p) > 4 and p[3] == "tcp")


def any_port(listen: Sequence[str]) -> tuple[str, ...]:
    """The same addresses, with whatever port is free."""
    return tuple("/".join([*address.split("/")[:4], "0"]) for address in listen)
