"""Learning: what a simulated run does with tensors. Nothing at all, or all of it, in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from atoll.aggregation.strategy import Strategy
from atoll.protocols.events import Merged
from atoll.server.run import Fate, Merge, Order


@dataclass(frozen=True, slots=True)
class Worked:
    """What one order came to."""

    examples: int
    metrics: Mapping[str, float]
    bytes: int | None = None  # of the update as it travels; None: as the simulation was told


class Learning(Protocol):
    """The simulator says when; this says what comes of it. Takes no virtual time."""

    def check(self, strategy: Strategy, clients: int) -> list[str]:
        """Warnings. UsageError FL-S104 where a strategy cannot go with what is here."""

    def examples(self, client: str) -> int | None:
        """How many training examples it holds; None: as its model says."""

    def upload(self, client: str) -> int | None:
        """Bytes of an update of its, at most; None: as the simulation was told."""

    def given(self, order: Order) -> None:
        """The order can be fetched: its version will be wanted."""

    def download(self, order: Order) -> int | None:
        """Bytes that bring the order's model to its client; None: as the simulation was told."""

    def sent(self, order: Order) -> int | None:
        """The same, and now it goes down to its client."""

    def died(self, client: str) -> None:
        """A client's process ended, and what it held in memory with it."""

    def train(self, client: str, order: Order, steps: int, update: str, final: bool) -> Worked:
        """`steps` local steps of `order`; keep the delta under `update`. Not final: a snapshot."""

    def merge(self, merge: Merge) -> Merged:
        """Make a version of kept deltas."""

    def evaluate(self, version: int) -> Mapping[str, float]:
        """Metrics of the newest version; empty where it cannot be evaluated."""

    def forget(self, update: str, fate: Fate) -> None:
        """The update is decided, and its client told: its delta is not needed any more."""


class NoLearning:
    """No tensors: for what depends on time alone, a hundred thousand updates in seconds."""

    _NOTHING = Worked(0, {})

    def check(self, strategy: Strategy, clients: int) -> list[str]:
        return []

    def examples(self, client: str) -> int | None:
        return None

    def upload(self, client: str) -> int | None:
        return None

    def given(self, order: Order) -> None:
        pass

    def download(self, order: Order) -> int | None:
        return None

    def sent(self, order: Order) -> int | None:
        return None

    def died(self, client: str) -> None:
        pass

    def train(self, client: str, order: Order, steps: int, update: str, final: bool) -> Worked:
        return self._NOTHING

    def merge(self, merge: Merge) -> Merged:
        return Merged(merge.version, tuple([update for update, _ in merge.items]))

    def evaluate(self, version: int) -> Mapping[str, float]:
        return {}

    def forget(self, update: str, fate: Fate) -> None:
        pass
