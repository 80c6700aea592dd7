"""Trains, and obeys orders: the training half for everyone, and the half that connects."""

from typing import TYPE_CHECKING

from atoll.protocols.lazy import exports

if TYPE_CHECKING:
    from atoll.client.client import Client as Client
    from atoll.client.trainer import Trainer as Trainer

__getattr__ = exports(__name__, {"Client": "client", "Trainer": "trainer"})
