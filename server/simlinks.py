"""Simlinks: how models come down to simulated clients, by the chains of a real server.

A client holds exactly x^ of its version, so its model is the server's own bytes of it; what it
holds is remembered by label and version, and what comes down is counted as it would travel.
"""

import tempfile
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from atoll.protocols import chains
from atoll.protocols.links import PLAIN, Allowed, Link
from atoll.protocols.manifest import TRAVELLING
from atoll.protocols.tensors import Payload, unflatten
from atoll.server.links import Held, Links
from atoll.server.run import Order
from atoll.server.versions import VersionStore


class SimLinks:
    """The down-links of all clients, of codec `down`."""

    def __init__(self, store: VersionStore, down: str) -> None:
        self._store = store
        self._link = Link(PLAIN, down)
        with tempfile.TemporaryDirectory() as folder:  # never used: every version is a small one
            self._links = Links(Allowed.of(PLAIN, down), store, Path(folder) / "chains")
        self._held: dict[str, Held] = {}
        self._models: dict[str, memoryview] = {}  # order -> what was sent for it

    def follow(self, number: int, needed: Collection[int]) -> None:
        """A version was made; x^ of `needed` ones is still trained from."""
        self._links.follow(number)
        self._links.keep(needed)

    def size(self, order: Order) -> int:
        """Bytes that an order of now would bring down."""
        return self._links.size(self._link, order.version, self._held.get(order.client))

    def send(self, order: Order, newest: int) -> tuple[int, bool]:
        """An order goes down: its bytes, and whether it begins from another model than it did."""
        number, held = order.version, self._held.get(order.client)
        load = self._links.load(self._link, number, newest, held)
        label = load.sent.base.partition("@")[0]
        self._held[order.client] = (label, number) if label else None
        view = self._links.view(self._link, number, label)
        view = self._store.open(number).view if view is None else view
        anew = self._models.get(order.id) is not view
        self._models[order.id] = view
        return load.size, anew

    def forget(self, order: str) -> None:
        """Nobody will train it any more."""
        self._models.pop(order, None)

    def died(self, client: str) -> None:
        """What its process held is gone."""
        self._held.pop(client, None)

    def model(self, order: Order) -> Payload:
        """What a client trains from: the bytes of the version that it was sent."""
        view = self._models.get(order.id)
        view = self._store.open(order.version).view if view is None else view
        return Payload(chains.whole(self._store.manifest), view, chains.FP32)

    def tensors(self, model: Payload) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for group in TRAVELLING:
            if model.has(group):
                named |= unflatten(self._store.manifest, group, model.read(group))
        return named
