"""Merge: 16 updates of 25 M float32 in mapped files are summed; limit 1.6 reads of them.

The floor is one read of the same mapped bytes with as many threads, taken in turn with the sum. The
value is what other frameworks' aggregation does, weighted sum into memory that is there, by the
pieces of our merge: decoder, tile, `Mean`. What a server does besides is reported beside it, each
as the whole from the mapped updates on: `stepped` with the outer step from a mapped base, the norm
and the checks for NaN; `file` the same into a new file; `sealed` with SHA-256 and CRC-32 behind the
merge and the rename. The rival is the textbook sum of whole numpy arrays, as Flower's `aggregate`
does it, in the same run.
"""

import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from harness import Result, interleaved, main, medians, say
from torch import Tensor

from atoll.aggregation.mean import Mean
from atoll.protocols.codecs import TILE, as_tensor, codec
from atoll.protocols.manifest import Manifest, TensorSpec
from atoll.protocols.payload import parse
from atoll.protocols.tensors import sections_of
from atoll.server.draft import Draft, Version
from atoll.server.items import Item, UpdateBytes
from atoll.server.merge import Merger
from atoll.server.regions import map_file
from atoll.server.versions import VersionStore

UPDATES, COUNT, THREADS, LIMIT = 16, 25_000_000, 2, 1.6


def run(quick: bool) -> Result:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="atoll-merge-", dir=os.environ.get("ATOLL_BENCH_DIR")))
    try:
        return measure(folder, rounds=5 if quick else 15)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(folder: Path, rounds: int) -> Result:
    manifest = Manifest((TensorSpec("w", (COUNT,), "float32", "trainable"),))
    store = VersionStore(folder / "versions", manifest)
    base = store.initial({"w": torch.zeros(COUNT)})
    items = [(update(folder / f"u{i}", manifest, i), 1 / UPDATES) for i in range(UPDATES)]
    views = [as_tensor(u.payload.view, torch.float32) for u, _ in items]
    merger = Merger(manifest, threads=THREADS)
    pool = ThreadPoolExecutor(THREADS)
    check(store, merger, base, items, views)
    here = VersionStore(folder / "here", manifest, memory_limit=4 * COUNT).draft(1, 0)
    total = torch.zeros(COUNT)
    cases: dict[str, Callable[[], object]] = {
        "read": lambda: read(views, pool),
        "sum": lambda: add_up(items, total, pool),
        "stepped": lambda: over(here, merger, base, items),
        "file": lambda: new(store, merger, base, items, seal=False),
        "sealed": lambda: new(store, merger, base, items, seal=True),
    }
    taken = interleaved(cases, rounds)
    rival = medians(interleaved({"naive": lambda: naive(views)}, 1))["naive"]
    ms = {name: round(1000 * s, 1) for name, s in medians(taken).items()}
    ratios = [m / r for m, r in zip(taken["sum"], taken["read"], strict=True)]
    say(f"sum / read, round by round: {', '.join(f'{r:.2f}' for r in sorted(ratios))}")
    more = {name: ms[name] for name in ("stepped", "file", "sealed")}
    return Result("merge", ms["sum"], "ms", LIMIT, ms["read"], 1000 * rival, more=more)


def update(path: Path, manifest: Manifest, seed: int) -> UpdateBytes:
    """An update as the store of uploads holds it: a mapped file of nothing but its payload."""
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write((8).to_bytes(8, "little"))  # so that `map_file` finds its data
        file.write(b" " * 8)
        for lo in range(0, COUNT, 1 << 20):
            rng.standard_normal(min(1 << 20, COUNT - lo), dtype=np.float32).tofile(file)
    fp32 = codec("fp32")
    view = map_file(path, sha=False)[1].view
    return UpdateBytes(path.name, parse(manifest, sections_of(manifest, fp32), view, fp32, "model"))


def add_up(items: list[Item], total: Tensor, pool: ThreadPoolExecutor) -> None:
    """The weighted sum of all updates, tile by tile, as `Merger` takes it."""
    mean, todo = Mean(), iter(range(0, COUNT, TILE))  # `next` of a range is atomic
    decoders = [(update.payload.decoder("trainable"), weight) for update, weight in items]

    def work(_: int) -> None:
        spare = torch.empty(0)  # fp32 is not decoded
        for lo in todo:
            hi = min(lo + TILE, COUNT)
            for i, (decode, weight) in enumerate(decoders):
                mean.add(total[lo:hi], decode(lo, hi, spare), weight, first=i == 0)

    list(pool.map(work, range(THREADS)))


def over(draft: Draft, merger: Merger, base: Version, items: list[Item]) -> None:
    draft.rewind()
    merger.merge(base, draft, items)


def new(
    store: VersionStore, merger: Merger, base: Version, items: list[Item], *, seal: bool
) -> Callable[[], object]:
    draft = store.draft(1, 0, behind=seal)
    merger.merge(base, draft, items)
    if not seal:
        return draft.abandon
    draft.seal()
    return lambda: store.prune({0})


def read(views: list[Tensor], pool: ThreadPoolExecutor) -> None:
    half = COUNT // THREADS

    def span(lo: int) -> None:
        for view in views:
            view[lo : lo + half].sum()

    list(pool.map(span, range(0, half * THREADS, half)))


def naive(views: list[Tensor]) -> object:
    arrays = [view.numpy() for view in views]
    return functools.reduce(np.add, [array * (1 / UPDATES) for array in arrays])


def check(
    store: VersionStore, merger: Merger, base: Version, items: list[Item], views: list[Tensor]
) -> None:
    """The merge is the sum it claims to be."""
    draft = store.draft(1, 0)
    merger.merge(base, draft, items)
    model = draft.seal().flat("trainable")
    expected = -torch.stack([view[:1000].double() for view in views]).mean(dim=0)
    assert torch.allclose(model[:1000].double(), expected, atol=1e-6)
    store.prune({0})


if __name__ == "__main__":
    main(run)
