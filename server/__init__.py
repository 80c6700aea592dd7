"""A strategy meets the world: runs it for real, over gRPC, or in virtual time."""

from typing import TYPE_CHECKING

from atoll.protocols.lazy import exports

if TYPE_CHECKING:
    from atoll.server.server import Server as Server
    from atoll.server.simulator import simulate as simulate

__getattr__ = exports(__name__, {"Server": "server", "simulate": "simulator"})
