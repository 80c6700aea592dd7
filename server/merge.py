"""Merge: updates become the next version, in one pass over mapped bytes.

For each tile of a million elements: decode and sum the updates in their order, take the outer
optimizer's step, write the tile of the new version. Tiles are spread over threads; nothing is
model-sized but mapped files. Everything is elementwise and in a fixed order, so the result has the
same bits whatever the tile size and the number of threads (tested). Where the process is ours,
call `torch.set_num_threads(1)` at its start: torch's own threads only get in the way of these.

An update that holds NaN or Inf is found by the sum it spoils, and the merge starts again without
it: honest updates are read once, and nothing that is not a number enters a model.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from atoll.aggregation.aggregator import Aggregator, SetAggregator, SumAggregator
from atoll.aggregation.mean import Mean
from atoll.aggregation.outer import STEPS, Outer, Sgd
from atoll.protocols.codecs import TILE, all_finite
from atoll.protocols.errors import RemoteError, UsageError
from atoll.protocols.manifest import TRAVELLING, Group, Manifest
from atoll.protocols.tensors import Payload, dtype_of, finite
from atoll.server.draft import Draft, Version

Buffers = Literal["weighted_mean", "keep_server", "personal"]
PLAIN = Sgd()
MEAN = Mean()
NORM_BLOCK = 1 << 12  # elements; norms add up block by block, alike for every number of threads


@dataclass(frozen=True, slots=True)
class UpdateBytes:
    """One update as it came, checked by `tensors.parse`."""

    id: str
    payload: Payload


Item = tuple[UpdateBytes, float]  # an update and its raw weight
Area = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class MergeStats:
    """What a merge did, for `Merged`."""

    used: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...]  # (update id, reason)
    stats: Mapping[str, float] = field(default_factory=dict)  # delta_norm: L2 of the merged delta


class _NotFiniteError(Exception):
    """What would be written is not a number somewhere; some update is to blame, or all are."""


class Merger:
    """Makes versions out of updates. One at a time; `close` ends its threads.

    `tile`: elements a thread takes at once. `buffers`: what becomes of the clients' buffers.
    "weighted_mean": float ones are averaged with the weights normalised to 1 and mixed into the
    server's by min(1, sum of the weights), of integer ones the largest is taken. "keep_server" and
    "personal": the server's stay as they are (and the clients' stay with them).
    """

    def __init__(
        self,
        manifest: Manifest,
        aggregator: Aggregator = MEAN,
        outer: Outer = PLAIN,
        buffers: Buffers = "weighted_mean",
        threads: int = 2,
        tile: int = TILE,
    ) -> None:
        if buffers not in get_args(Buffers):
            raise UsageError(
                "FL-S102", f"buffers={buffers!r}", f"one of {', '.join(get_args(Buffers))}"
            )
        self.manifest = manifest
        self.aggregator = aggregator
        self.outer = outer
        self.buffers = buffers
        self.tile = tile
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._areas: list[Area] = [{} for _ in range(threads)]  # scratch of each thread

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of the outer state's vectors, for `VersionStore.draft`."""
        return tuple(self.outer.vectors)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def merge(
        self, base: Version, draft: Draft, items: Sequence[Item], use_outer: bool = True
    ) -> MergeStats:
        """Write base - step(sum of weight * delta) into `draft`, all groups and the outer state.

        `use_outer` False: the sum is taken as it is, and the outer state stays what it was. Items
        that cannot be used are dropped, each with its reason; where none is left the model and the
        state are the base's. ServerError FL-S203 where the disk does not take the draft.
        """
        live, dropped = list(items), dict[str, str]()
        while True:
            try:
                stats = self._once(base, draft, live, use_outer)
            except _NotFiniteError:
                dropped.update(_culprits(self.manifest, live))
                live = [item for item in live if item[0].id not in dropped]
                draft.rewind()
                continue
            used = tuple(update.id for update, _ in live)
            return MergeStats(used, tuple(dropped.items()), stats)

    def _once(
        self, base: Version, draft: Draft, items: Sequence[Item], use_outer: bool
    ) -> dict[str, float]:
        step = _Step(self, base, draft, items, use_outer)
        squares: dict[int, float] = {}
        count = self.manifest.counts["trainable"]
        size = self.tile if step.by_tiles else max(1, count)

        def work(lo: int, area: Area) -> None:
            squares[lo] = step.tile(lo, min(lo + size, count), area)

        self._spread(range(0, count, size), work)
        if STEPS in step.new_state:
            draft.write_outer(STEPS, 0, step.new_state[STEPS])
        for group in TRAVELLING[1:]:
            self._merge_buffers(group, base, draft, items)
        stats = {"delta_norm": math.sqrt(math.fsum(squares.values()))} if items else {}
        return {**stats, "fallback": 1.0} if step.fell_back else stats

    def _spread(self, starts: range, work: Callable[[int, Area], None]) -> None:
        """Every tile once, in threads where there are several; the first error is raised."""
        todo = deque(starts)

        def run(area: Area) -> None:
            try:
                while True:
                    work(todo.popleft(), area)
            except IndexError:
                return
            except BaseException:
                todo.clear()
                raise

        helpers = min(self._threads, len(starts)) - 1
        if helpers < 1:
            run(self._areas[0])
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads - 1, "merge")
        others = [self._pool.submit(run, area) for area in self._areas[1 : helpers + 1]]
        try:
            run(self._areas[0])
        finally:
            for other in others:
                other.exception()  # wait: nobody may write into a draft that is rewound
        for other in others:
            other.result()

    def _merge_buffers(
        self, group: Group, base: Version, draft: Draft, items: Sequence[Item]
    ) -> None:
        count = self.manifest.counts[group]
        sent = [(u, w) for u, w in items if w > 0 and u.payload.has(group)]
        total = math.fsum(w for _, w in sent)
        start = base.flat(group)
        decoders = [u.payload.decoder(group) for u, _ in sent]
        for lo in range(0, count, TILE):
            hi = min(lo + TILE, count)
            tile = start[lo:hi].clone()
            if self.buffers == "weighted_mean" and sent:
                scratch = torch.empty(hi - lo, dtype=dtype_of(group))
                values = (decode(lo, hi, scratch) for decode in decoders)
                if group == "buffers_other":
                    for value in values:
                        torch.maximum(tile, value, out=tile)
                else:
                    mix = min(1.0, total)
                    tile.mul_(1 - mix)
                    for value, (_, weight) in zip(values, sent, strict=True):
                        tile.add_(value, alpha=mix * weight / total)
                    if not all_finite(tile):
                        raise _NotFiniteError
            draft.write(group, lo, tile)


class _Step:
    """One attempt at the trainable tensors: what every tile of it shares."""

    def __init__(
        self,
        merger: Merger,
        base: Version,
        draft: Draft,
        items: Sequence[Item],
        use_outer: bool,
    ) -> None:
        self.merger, self.draft, self.items = merger, draft, items
        self.outer = merger.outer if use_outer else PLAIN
        self.moves = use_outer and bool(items)
        self.anchor = base.flat("trainable")
        self.decoders = [u.payload.decoder("trainable") for u, _ in items]
        self.weights = [w for _, w in items]
        self.state = dict(base.outer)
        self.new_state: dict[str, Tensor] = {}
        self.steps = int(self.state[STEPS]) if STEPS in self.state else 0
        if self.moves:
            self.steps += 1
        if merger.vectors:
            self.new_state[STEPS] = torch.tensor([self.steps])
        self.rule: SetAggregator | None = None
        self.fell_back = False
        if merger.aggregator.algebra == "set":
            rule = merger.aggregator
            self.fell_back = 0 < len(items) < rule.min_results
            self.rule = None if self.fell_back else rule
        self.by_tiles = self.rule is None or self.rule.coordinatewise

    def tile(self, lo: int, hi: int, area: Area) -> float:
        """Elements [lo, hi) from decoding to writing; returns the squared norm of their delta."""
        anchor = self.anchor[lo:hi]
        if not self.items:
            self.draft.write("trainable", lo, anchor)
            self._keep_state(lo, hi, area)
            return 0.0
        delta = _scratch(area, "delta", hi - lo)
        place = self.draft.place("trainable", lo, hi)
        if place is not None:
            out = place
        else:
            out = delta if self.outer.in_place else _scratch(area, "out", hi - lo)
        self._combine(lo, hi, delta, area)
        square = _squared_norm(delta)
        if not math.isfinite(square):
            if not all_finite(delta):
                raise _NotFiniteError
            square = float(delta.double().square().sum())  # squares beyond float32
        state = self._keep_state(lo, hi, area, write=not self.moves)
        self.outer.kernel(anchor, delta, state, self.steps, out)
        if not all_finite(out) or not all(all_finite(v) for v in state.values()):
            raise _NotFiniteError
        if place is None:
            self.draft.write("trainable", lo, out)
        if self.moves:
            for name, values in state.items():
                self.draft.write_outer(name, lo, values)
        return square

    def _combine(self, lo: int, hi: int, delta: Tensor, area: Area) -> None:
        spare = _scratch(area, "decoded", hi - lo)
        if self.rule is None:
            weights = self._normalised() if self.fell_back else self.weights
            rule = cast("SumAggregator", MEAN if self.fell_back else self.merger.aggregator)
            for i, (decode, weight) in enumerate(zip(self.decoders, weights, strict=True)):
                rule.add(delta, decode(lo, hi, spare), weight, first=i == 0)
        else:
            deltas = [
                decode(lo, hi, _scratch(area, f"decoded{i}", hi - lo))
                for i, decode in enumerate(self.decoders)
            ]
            if not all(all_finite(d) for d in deltas):  # a median would hide it
                raise _NotFiniteError
            delta.copy_(self.rule.combine(self.anchor[lo:hi], deltas, self._normalised()))
        if self.merger.aggregator.algebra == "set":
            delta.mul_(min(1.0, math.fsum(self.weights)))

    def _normalised(self) -> list[float]:
        total = math.fsum(self.weights)
        return [w / total for w in self.weights] if total else [0.0] * len(self.weights)

    def _keep_state(self, lo: int, hi: int, area: Area, write: bool = True) -> dict[str, Tensor]:
        """The old state's tile in scratch, to be changed there; written on as it is if `write`."""
        tiles = {}
        for name, at_first in self.merger.outer.vectors.items():
            tiles[name] = _scratch(area, name, hi - lo)
            if name in self.state:
                tiles[name].copy_(self.state[name][lo:hi])
            else:
                tiles[name].fill_(at_first)
            if write:
                self.draft.write_outer(name, lo, tiles[name])
        return tiles


def _culprits(manifest: Manifest, items: Sequence[Item]) -> dict[str, str]:
    """Which updates hold NaN or Inf, and where; all of them where only their sum is too large."""
    found: dict[str, str] = {}
    for update, _ in items:
        try:
            finite(manifest, update.payload)
        except RemoteError as error:
            found[update.id] = error.message
    return found or {update.id: "the merged model would not be finite" for update, _ in items}


def _scratch(area: Area, name: str, size: int) -> Tensor:
    """A work area of this thread's, kept from tile to tile."""
    if name not in area or area[name].numel() < size:
        area[name] = torch.empty(size)
    return area[name][:size]


def _squared_norm(values: Tensor) -> float:
    """In float64 over float32 blocks, so that neither threads nor alignment change a bit of it."""
    whole = values.numel() // NORM_BLOCK * NORM_BLOCK
    norms = torch.linalg.vector_norm(values[:whole].view(-1, NORM_BLOCK), dim=1).double()
    rest = torch.linalg.vector_norm(values[whole:]).double()
    return float(norms.square().sum() + rest.square())
