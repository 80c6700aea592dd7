"""A strategy meets the world: runs it for real, over gRPC, or in virtual time."""

from typing import TYPE_CHECKING

from atoll.protocols.lazy import exports

if TYPE_CHECKING:
    from atoll.server.rules import Rules as Rules
    from atoll.server.server import Server as Server
    from atoll.server.simulator import simulate as simulate
    from atoll.server.training import Training as Training

__getattr__ = exports(
    __name__,
    {"Rules": "rules", "Server": "server", "Training": "training", "simulate": "simulator"},
)
