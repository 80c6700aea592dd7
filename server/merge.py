"""Merge: updates become the next version, in one pass over mapped bytes.

For each tile of a million elements: decode and combine the updates in their order, take the outer
optimizer's step, write the tile of the new version. (A rule that needs distances measures them in a
pass before.) Tiles are spread over threads; nothing is
model-sized but mapped files. Everything is elementwise and in a fixed order, so the result has the
same bits whatever the tile size and the number of threads (tested). Where the process is ours,
call `torch.set_num_threads(1)` at its start: torch's own threads only get in the way of these.

An update that holds NaN or Inf is found by the sum it spoils, and the merge starts again without
it: honest updates are read once, and nothing that is not a number enters a model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from atoll.aggregation.aggregator import Aggregator, is_learner, remembers
from atoll.aggregation.half import Half, Turn, Work
from atoll.aggregation.outer import STEPS, Outer, Sgd
from atoll.aggregation.proxy import InterruptedMergeError, Proxy
from atoll.protocols.codecs import TILE, Decoder, all_finite
from atoll.protocols.errors import RemoteError
from atoll.protocols.manifest import TRAVELLING, Manifest
from atoll.protocols.tensors import EXTRA
from atoll.server.buffers import Buffers, buffer_tiles, buffers_to_be, checked
from atoll.server.combine import MEAN, MEMORY, Plan, Source, plan, summed
from atoll.server.draft import Draft, Version
from atoll.server.items import Item, said, spoilt
from atoll.server.passes import Area, Crew, NotFiniteError, scratch
from atoll.server.privacy import Privacy, fits
from atoll.server.rewrite import rewrite
from atoll.server.table import Table

__all__ = ["PLAIN", "InterruptedMergeError", "MergeStats", "Merger", "scaled"]

PLAIN = Sgd()
NORM_WHOLE = 1 << 15  # elements
FAINT = 1e-12  # a norm
NORM_BLOCK = 1 << 12  # elements; norms add up block by block, alike for every number of threads


@dataclass(slots=True)
class MergeStats:
    """What a merge did, for `Merged`."""

    used: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...]  # (update id, reason)
    # delta_norm: L2 of the merged delta; fallback 1: a rule had too few updates and gave way to the
    # mean; coefficient/<update id>: how much of it a rule took (0: nothing); with central DP
    # dp_clip, dp_noise (standard deviation), dp_below, epsilon, budget_spent (1: no more versions);
    # and what the rule tells
    stats: Mapping[str, float] = field(default_factory=dict)


class Merger:
    """Makes versions out of updates. One at a time; `close` ends its threads.

    `tile`: elements a thread takes at once. `buffers`: what becomes of the clients' buffers
    (`server/buffers.py`). `privacy`: central DP.
    """

    def __init__(
        self,
        manifest: Manifest,
        aggregator: Aggregator = MEAN,
        outer: Outer = PLAIN,
        buffers: Buffers = "weighted_mean",
        threads: int = 2,
        tile: int = TILE,
        privacy: Privacy | None = None,
        half: Half | None = None,
        table: Table | None = None,
    ) -> None:
        checked(buffers)
        self.manifest = manifest
        self.aggregator = aggregator
        self.outer = outer
        self.buffers = buffers
        if privacy is not None:
            fits(aggregator, manifest, buffers, half)
        self.tile = tile
        self.privacy = privacy
        self.half = half  # the server's part of the local algorithm
        self.table = table  # of vectors that it keeps for each client
        self.crew = Crew(threads)

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of the vectors kept beside the model, for `VersionStore.draft`."""
        memory = [MEMORY] if remembers(self.aggregator) else []
        return (*self.outer.vectors, *memory, *(self.half.vectors if self.half else ()))

    @property
    def learns(self) -> bool:
        """Whether a merge also trains something, and so takes its time."""
        return self._proxy() is not None

    def interrupt(self) -> None:
        """Let go of a merge that waits for others, if it does: it ends by InterruptedMergeError."""
        proxy = self._proxy()
        if proxy is not None:
            proxy.interrupt()

    def close(self) -> None:
        self.crew.close()

    def noisy(self, base: Version) -> bool:
        """Whether even a merge of nothing moves the model: nobody may see that none was drawn."""
        if self.privacy is None or self.privacy.sampling is None:
            return False
        return not self.privacy.over(base.facts.books or self.privacy.opened())

    def merge(
        self,
        base: Version,
        draft: Draft,
        items: Sequence[Item],
        use_outer: bool = True,
        known: int = 0,
        told: Mapping[str, float] = MappingProxyType({}),
    ) -> MergeStats:
        """Write base - step(sum of weight * delta) into `draft`, all groups and the outer state.

        `use_outer` False: the sum is taken as it is, and the outer state stays what it was. Items
        that cannot be used are dropped, each with its reason; where none is left the model and the
        state are the base's. `known`: clients that have ever been in the run. `told`: the stats of
        this merge as it was made before, where clients were asked: they are not asked again.
        ServerError FL-S203 where the disk does not take the draft, FL-S210 where the run diverges.
        """
        dropped = self._unaffordable(base, items)
        live = [item for item in items if item[0].id not in dropped]
        while True:
            try:
                step = _Step(self, base, draft, live, use_outer, known, told)
                stats = self._once(base, step)
            except (NotFiniteError, RemoteError):  # or bytes that no codec made
                whole = {update.id: "the merged model would not be finite" for update, _ in live}
                dropped.update(spoilt(self.manifest, live) or whole)
                live = [item for item in live if item[0].id not in dropped]
                draft.rewind()
                continue
            used = tuple(update.id for update, _ in live)
            return MergeStats(used, tuple(dropped.items()), stats)

    def _unaffordable(self, base: Version, items: Sequence[Item]) -> dict[str, str]:
        """What may not be merged, as its client has no budget left for it."""
        if self.privacy is None:
            return {}
        books = base.facts.books or self.privacy.opened()
        refused = self.privacy.refused(books, [update.client for update, _ in items])
        why = "its client's privacy budget is spent"
        return {u.id: why for (u, _), no in zip(items, refused, strict=True) if no}

    def _once(self, base: Version, step: "_Step") -> dict[str, float]:
        proxy, draft, items = self._proxy(), step.draft, step.items
        squares: dict[int, float] = {}
        count = self.manifest.counts["trainable"]
        largest = step.plan.largest
        size = max(1, count) if largest is None else min(self.tile, largest)

        def work(lo: int, area: Area) -> None:
            squares[lo] = step.tile(lo, min(lo + size, count), area)

        self.crew.spread(range(0, count, size), work)
        if STEPS in step.new_state:
            draft.write_outer(STEPS, 0, step.new_state[STEPS])
        for group in TRAVELLING[1:]:
            if not self.manifest.counts[group]:
                continue
            if group == "buffers_float" and step.taken is not None and proxy is not None:
                anew = proxy.settle()
                if anew is not None:
                    draft.write(group, 0, anew)
                    continue
            tiles = buffer_tiles(self.buffers, group, base, items, step.plan.robust)
            for lo, tile in tiles:
                draft.write(group, lo, tile)
        norm = math.sqrt(math.fsum(squares.values()))
        draft.numbers = base.facts.numbers
        if step.turn is None or self.half is None:
            return {"delta_norm": norm, **step.plan.stats} if step.moved else {}
        numbers = self.half.after(norm, step.turn.numbers)
        draft.numbers = {**numbers, **self._rewritten(base, items, step.turn)}
        return {"delta_norm": norm, **step.plan.stats, **step.turn.stats}

    def _rewritten(self, base: Version, items: Sequence[Item], turn: Turn) -> dict[str, float]:
        """The rows of those whose change counts, and what the new version says of them."""
        if not any(turn.rows):
            return {}
        assert self.half is not None
        assert self.half.own is not None
        assert self.table is not None, "a half that keeps rows has a table"
        section = EXTRA + self.half.own[1]
        changes = (
            (update.client, update.payload.decoder(section))
            for (update, _), counts in zip(items, turn.rows, strict=True)
            if counts
        )
        return rewrite(self.table, self.crew, base.facts.numbers, changes, self.tile)

    def _proxy(self) -> Proxy | None:
        """What the rule learns by; None: it learns nothing."""
        return self.aggregator.proxy if is_learner(self.aggregator) else None


class _Step:
    """One attempt at the trainable tensors: what every tile of it shares."""

    def __init__(
        self,
        merger: Merger,
        base: Version,
        draft: Draft,
        items: Sequence[Item],
        use_outer: bool,
        known: int,
        told: Mapping[str, float],
    ) -> None:
        proxy = merger._proxy()
        if proxy is not None and not told:
            proxy.begin(buffers_to_be(merger.buffers, base, items))
        self.merger, self.draft, self.items, self.told = merger, draft, items, told
        self.outer = merger.outer if use_outer else PLAIN
        self.moved = bool(items) or merger.noisy(base)
        self.moves = use_outer and self.moved
        self.anchor = base.flat("trainable")
        self.state = dict(base.outer)
        self.new_state: dict[str, Tensor] = {}
        self.steps = int(self.state[STEPS]) if STEPS in self.state else 0
        if self.moves:
            self.steps += 1
        if merger.vectors:
            self.new_state[STEPS] = torch.tensor([self.steps])
        self.memory = self.state.get(MEMORY)
        self.turn: Turn | None = None
        if merger.half is not None and self.moves and items:
            half = merger.half
            works = [Work(u.id, u.client, w, said(half, u.payload)) for u, w in items]
            self.turn = half.begin(works, base.facts.numbers, known)
        self.plan = self._plan(base)
        self.taken = self._taken()
        self.memorises = self.moves and self.plan.remembers

    def _plan(self, base: Version) -> Plan:
        merger, items = self.merger, self.items
        scales = self.turn.scales if self.turn is not None else None
        sources = [
            Source(u.id, scaled(u.payload.decoder("trainable"), scales[i] if scales else 1.0), w)
            for i, (u, w) in enumerate(items)
        ]
        count = merger.manifest.counts["trainable"]
        if merger.privacy is None:
            rule, crew = merger.aggregator, merger.crew
            return plan(rule, sources, crew, count, self.memory, self.anchor, self.told)
        books = base.facts.books or merger.privacy.opened()
        if not self.moved:
            self.draft.books = books
            return Plan(summed(MEAN, []))
        clients = [u.client for u, _ in items]
        made, self.draft.books = merger.privacy.plan(
            self.draft.number, sources, clients, merger.crew, count, books
        )
        return made

    def _taken(self) -> Tensor | None:
        """Where the new model is also written, for its statistics to be taken anew."""
        rule, buffers = self.merger.aggregator, self.merger.manifest.counts["buffers_float"]
        if not self.items or not buffers or self.merger.buffers != "weighted_mean":
            return None
        if not is_learner(rule) or rule.proxy is None or rule.buffers != "recompute":
            return None
        return rule.proxy.vector

    def tile(self, lo: int, hi: int, area: Area) -> float:
        """Elements [lo, hi) from decoding to writing; returns the squared norm of their delta."""
        anchor = self.anchor[lo:hi]
        if not self.moved:
            self.draft.write("trainable", lo, anchor)
            self._keep_state(lo, hi, area)
            return 0.0
        delta = scratch(area, "delta", hi - lo)
        place = self.draft.place("trainable", lo, hi)
        if place is not None:
            out = place
        else:
            out = delta if self.outer.in_place else scratch(area, "out", hi - lo)
        self.plan.tile(lo, hi, anchor, delta, area)
        if self.memorises:
            self.draft.write_outer(MEMORY, lo, delta)
        if self.plan.damping != 1:
            delta.mul_(self.plan.damping)
        state = self._keep_state(lo, hi, area, write=not self.moves)
        if self.turn is not None:
            sums = {
                name: self._sum(name, weights, lo, hi, area)
                for name, weights in self.turn.sums.items()
            }
            self.turn.tile(anchor, delta, sums, state)
        square = _squared_norm(delta)
        if not math.isfinite(square):
            if not all_finite(delta):
                raise NotFiniteError
            square = float(delta.double().square().sum())  # squares beyond float32
        self.outer.kernel(anchor, delta, state, self.steps, out)
        if not all_finite(out) or not all(all_finite(v) for v in state.values()):
            raise NotFiniteError
        if place is None:
            self.draft.write("trainable", lo, out)
        if self.taken is not None:
            self.taken[lo:hi] = out
        if self.moves:
            for name, values in state.items():
                self.draft.write_outer(name, lo, values)
        return square

    def _sum(self, section: str, weights: Sequence[float], lo: int, hi: int, area: Area) -> Tensor:
        """A weighted sum over a section of the updates, of those whose weight is not 0."""
        total = scratch(area, f"sum of {section}", hi - lo).zero_()
        spare = scratch(area, "decoded", hi - lo)
        for (update, _), weight in zip(self.items, weights, strict=True):
            if weight:
                total.add_(update.payload.decoder(section)(lo, hi, spare), alpha=weight)
        return total

    def _keep_state(self, lo: int, hi: int, area: Area, write: bool = True) -> dict[str, Tensor]:
        """The old state's tile in scratch, to be changed there; written on as it is if `write`.

        The rule's memory is written on where this merge gives it no new one.
        """
        if remembers(self.merger.aggregator) and not self.memorises:
            none = scratch(area, MEMORY, hi - lo).zero_()
            self.draft.write_outer(MEMORY, lo, none if self.memory is None else self.memory[lo:hi])
        tiles = {}
        half = self.merger.half
        vectors = {**self.merger.outer.vectors, **dict.fromkeys(half.vectors if half else (), 0.0)}
        for name, at_first in vectors.items():
            tiles[name] = scratch(area, name, hi - lo)
            if name in self.state:
                tiles[name].copy_(self.state[name][lo:hi])
            else:
                tiles[name].fill_(at_first)
            if write:
                self.draft.write_outer(name, lo, tiles[name])
        return tiles


def scaled(decoder: Decoder, by: float) -> Decoder:
    """The same, each value times `by`."""
    if by == 1:
        return decoder
    return lambda lo, hi, out: torch.mul(decoder(lo, hi, out), by, out=out[: hi - lo])


def _squared_norm(values: Tensor) -> float:
    """In float64 over float32 blocks, so that neither threads nor alignment change a bit of it."""
    if values.numel() <= NORM_WHOLE:  # torch takes one thread for so few
        norm = float(torch.linalg.vector_norm(values))
        if norm < FAINT:  # squares may have been too small for float32
            norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
        return norm * norm
    whole = values.numel() // NORM_BLOCK * NORM_BLOCK
    norms = torch.linalg.vector_norm(values[:whole].view(-1, NORM_BLOCK), dim=1).double()
    rest = torch.linalg.vector_norm(values[whole:]).double()
    return float(norms.square().sum() + rest.square())
