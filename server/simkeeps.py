"""Simkeeps: what simulated clients keep from order to order, as a real client's disk would.

The private state of their local algorithms, by the rules of a real client's (`client/keep.py`), and
what their codecs left out. Both change when it is known what became of an update.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from atoll.client.keep import Keep, Named, Rule, life_of
from atoll.protocols import feedback as feedbacks
from atoll.server.items import UpdateBytes
from atoll.server.run import Fate
from atoll.server.simlinks import SimLinks


class SimKeeps:
    """Of all clients. `rules`: of each kind of private state; `seed`: for the lives of it."""

    def __init__(self, links: SimLinks, rules: Mapping[str, Rule], seed: int) -> None:
        self.of: dict[str, Keep] = {}  # client -> its private state
        self._links, self._rules, self._seed = links, rules, seed
        self._found: dict[str, dict[str, Named]] = {}  # order -> that state as it found it
        self._left: dict[str, feedbacks.State] = {}  # client -> what its codec left out, and such
        self._open: set[str] = set()  # updates of which nobody knows yet whether they are used

    def keep(self, client: str) -> Keep:
        if client not in self.of:
            keep = self.of[client] = Keep(None, life_of(self._seed, client))
            for kind, rule in self._rules.items():
                keep.register(kind, rule)
        return self.of[client]

    def now(self, client: str) -> dict[str, Named]:
        """Private state as it is now."""
        return {kind: self.keep(client).now(kind) for kind in self._rules}

    def begin(self, order: str, client: str) -> None:
        self._found[order] = self.now(client)

    def found(self, order: str) -> dict[str, Named]:
        """Private state as an order found it at its beginning."""
        return self._found[order]

    def end(self, order: str) -> None:
        del self._found[order]

    def sender(self, client: str, final: bool) -> feedbacks.Sender:
        """What packs one update of `client`. A snapshot's work comes again with the whole, so
        nothing that was left out before goes along."""
        rule = self._links.rule(client) if final else None
        return feedbacks.Sender(self._links.codec(client), rule, self._left.get(client, {}))

    def sent(self, update: str, client: str, after: feedbacks.State) -> None:
        """A finished update went out, which left the codec's state as `after`."""
        self._left[client] = after
        self._open.add(update)

    def used(self, updates: Iterable[str]) -> None:
        """They are in a version: what was sent stays sent."""
        self._open.difference_update(updates)

    def settle(self, update: UpdateBytes, fate: Fate) -> None:
        """What becomes of an update is known: private state changes, what was sent for nothing
        comes back."""
        client, payload = update.client, update.payload
        self.of[client].settle(update.id, fate, payload.read)
        if update.id in self._open:
            self._open.remove(update.id)
            codec, left = self._links.codec(client), self._left[client]
            self._left[client] = feedbacks.restore(codec, left, payload.section("trainable"))

    def residual(self, client: str) -> Tensor | None:
        """What the codec of `client` has left out so far; None: nothing, or it is not kept."""
        return self._left.get(client, {}).get(feedbacks.RESIDUAL)
