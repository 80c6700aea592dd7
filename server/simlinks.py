"""Simlinks: what simulated clients pack with, and how models come down by a real server's chains.

Each has a pair of codecs, agreed as a real client's: what it asks for, or the best that the run
allows. So a phone and a server can be in one run.

A client holds exactly x^ of its version, so its model is the server's own bytes of it; what it
holds is remembered by label and version, and what comes down is counted as it would travel.
"""

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from atoll.protocols import chains
from atoll.protocols.codecs import FP32, Codec
from atoll.protocols.codecspec import ErrorFeedback, parse, parse_ways
from atoll.protocols.links import Allowed, Link, needs
from atoll.protocols.manifest import TRAVELLING
from atoll.protocols.payload import Payload
from atoll.protocols.tensors import unflatten
from atoll.server.links import Held, Links
from atoll.server.run import Order
from atoll.server.versions import VersionStore


class SimLinks:
    """The links of all clients, both ways."""

    def __init__(self, store: VersionStore, up: str, down: str, asked: Mapping[str, str]) -> None:
        """`up` and `down` are what the run allows, the best first; `asked` what single clients ask
        for, "up=int8,down=fp32". RemoteError FL-W108 where one asks for something else."""
        self._store = store
        allowed = Allowed.of(up, down)
        self._of = {client: _agreed(allowed, text) for client, text in asked.items()}
        self._best = Link(allowed.up[0], allowed.down[0])
        with tempfile.TemporaryDirectory() as folder:  # never used: every version is a small one
            self._links = Links(allowed, store, Path(folder) / "chains")
        self._held: dict[str, Held] = {}
        self._models: dict[str, memoryview] = {}  # order -> what was sent for it

    def link(self, client: str) -> Link:
        return self._of.get(client, self._best)

    def codec(self, client: str = "") -> Codec:
        """What the client packs updates with; without a name, who asked for nothing."""
        return self._links.codecs[self.link(client).up]

    def rule(self, client: str) -> ErrorFeedback | None:
        return parse(self.link(client).up).feedback

    def follow(self, number: int, needed: Collection[int]) -> None:
        """A version was made; x^ of `needed` ones is still trained from."""
        self._links.follow(number)
        self._links.keep(needed)

    def size(self, order: Order) -> int:
        """Bytes that an order of now would bring down."""
        return self._links.size(
            self.link(order.client), order.version, self._held.get(order.client)
        )

    def send(self, order: Order, newest: int) -> tuple[int, bool]:
        """An order goes down: its bytes, and whether it begins from another model than it did."""
        number, held = order.version, self._held.get(order.client)
        link = self.link(order.client)
        load = self._links.load(link, number, newest, held)
        label = load.sent.base.partition("@")[0]
        self._held[order.client] = (label, number) if label else None
        view = self._links.view(link, number, label)
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
        return Payload(chains.whole(self._store.manifest), view, FP32)

    def tensors(self, model: Payload) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for group in TRAVELLING:
            if model.has(group):
                named |= unflatten(self._store.manifest, group, model.read(group))
        return named


def _agreed(allowed: Allowed, text: str) -> Link:
    """A client of ours can do whatever the run allows."""
    can = {n for spec in allowed.up for n in needs("up", spec)}
    can |= {n for spec in allowed.down for n in needs("down", spec)}
    return allowed.agree(Link(*parse_ways(text, "").texts), can | needs("up", "fp32"))
