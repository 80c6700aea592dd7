"""Joint: a server that makes its versions together with peers, as one of them.

The strategy decides as ever when to merge what; the weighted mean of its clients' deltas then goes
into the peers' mean instead of the outer step, and the version is the model that the peers made of
it, with its outer state. All weights but those between the clients are the peers' affair.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from atoll.aggregation.mean import Mean
from atoll.aggregation.outer import Outer
from atoll.aggregation.sync_engine import SyncState
from atoll.protocols.errors import UsageError
from atoll.protocols.manifest import Manifest
from atoll.server.draft import Draft, Version
from atoll.server.items import Item, spoilt
from atoll.server.merge import InterruptedMergeError, Merger, MergeStats

MEAN = Mean()
LATE = "the peers went on without it"


class Answer(Protocol):
    @property
    def state(self) -> SyncState: ...
    @property
    def counted(self) -> bool: ...


class Group(Protocol):
    """The peers, as `atoll.p2p.behalf.Behalf`."""

    def average(self, base: Tensor, delta: Tensor) -> Answer | None: ...
    def interrupt(self) -> None: ...


class JointMerger(Merger):
    """A Merger by the plain mean whose outer step is the peers'. `merge` blocks for their round."""

    def __init__(self, manifest: Manifest, outer: Outer, group: Group) -> None:
        super().__init__(manifest, outer=outer, buffers="keep_server")
        if manifest.counts["buffers_float"] or manifest.counts["buffers_other"]:
            raise UsageError(
                "FL-S104", "the model has buffers, which peers do not average", "take one without"
            )
        self._group = group

    @property
    def learns(self) -> bool:
        """It waits for others, so never in the event loop."""
        return True

    def interrupt(self) -> None:
        self._group.interrupt()

    def merge(
        self,
        base: Version,
        draft: Draft,
        items: Sequence[Item],
        use_outer: bool = True,
        known: int = 0,
        told: Mapping[str, float] = MappingProxyType({}),
    ) -> MergeStats:
        """As `Merger.merge`; items whose base the peers have left behind are dropped."""
        anchor = base.flat("trainable")
        dropped = spoilt(self.manifest, items)
        live = [item for item in items if item[0].id not in dropped]
        if live:
            delta = self._mean(live, anchor)
            answer = self._group.average(anchor, delta)
            if answer is None:
                raise InterruptedMergeError
            state, counted = answer.state, answer.counted
        else:
            delta, state, counted = torch.zeros(1), SyncState(anchor, base.outer), False
        draft.write("trainable", 0, state.anchor)
        for name, values in state.outer.items():
            draft.write_outer(name, 0, values)
        draft.numbers = base.facts.numbers
        if not counted:
            dropped |= {update.id: LATE for update, _ in live}
            return MergeStats((), tuple(dropped.items()), {})
        norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
        return MergeStats(
            tuple(u.id for u, _ in live), tuple(dropped.items()), {"delta_norm": norm}
        )

    def _mean(self, items: Sequence[Item], like: Tensor) -> Tensor:
        """In the order of the items, as every merge."""
        whole = math.fsum(weight for _, weight in items)
        count, total = like.numel(), torch.empty_like(like)
        spare = torch.empty_like(like)
        for i, (update, weight) in enumerate(items):
            delta = update.payload.decoder("trainable")(0, count, spare)
            MEAN.add(total, delta, weight / whole, first=i == 0)
        return total
