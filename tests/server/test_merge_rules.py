"""Merging under rules over the set: same bits however it is read, bounded memory, and a memory."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from atoll.aggregation.aggregator import (
    Aggregator,
    StackRule,
    aggregator,
    by_stack,
    by_tiles,
    remembers,
)
from atoll.aggregation.centered_clipping import CenteredClipping
from atoll.aggregation.krum import Krum
from atoll.aggregation.median import Median
from atoll.aggregation.norm_clipping import NormClipping
from atoll.aggregation.outer import Nesterov
from atoll.aggregation.rfa import GeometricMedian
from atoll.aggregation.robust import Robust
from atoll.aggregation.stack import CHUNK, Rows, Stack
from atoll.aggregation.trimmed_mean import TrimmedMean
from atoll.protocols.codecs import Decoder, codec
from atoll.protocols.errors import ServerError, UsageError
from atoll.protocols.manifest import Group, Manifest, TensorSpec
from atoll.protocols.payload import parse
from atoll.protocols.tensors import pack
from atoll.server.combine import DECODED, MEMORY, Source, plan
from atoll.server.draft import Version
from atoll.server.items import Item, UpdateBytes
from atoll.server.merge import Merger, MergeStats
from atoll.server.passes import Crew, InOrder, NotFiniteError, Reading
from atoll.server.versions import VersionStore

COUNT = 2 * CHUNK + 1003  # three blocks
MANIFEST = Manifest(
    (
        TensorSpec("w", (COUNT,), "float32", "trainable"),
        TensorSpec("bn.mean", (3,), "float32", "buffers_float"),
        TensorSpec("bn.count", (1,), "int64", "buffers_other"),
    )
)
RULES = [
    "median", "trimmed-mean:trim=0.3", "krum:f=1", "multi-krum:f=1,m=3", "rfa",
    "centered-clipping", "centered-clipping:radius=50", "norm-clipping", "norm-clipping:limit=50",
]  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    return VersionStore(tmp_path, MANIFEST)


def base(store: VersionStore) -> Version:
    return store.initial(
        {
            "w": torch.linspace(-1, 1, COUNT),
            "bn.mean": torch.tensor([1.0, 2.0, 3.0]),
            "bn.count": torch.tensor([5]),
        }
    )


def delta(seed: int) -> Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(seed))


def update(
    name: str, values: Tensor, buffer: float | None = None, count: int = 6, how: str = "fp32"
) -> UpdateBytes:
    groups: dict[Group, Tensor] = {"trainable": values}
    if buffer is not None:
        groups["buffers_float"] = torch.full((3,), float(buffer))
        groups["buffers_other"] = torch.tensor([count])
    sections, data = pack(MANIFEST, groups, codec(how))
    return UpdateBytes(name, parse(MANIFEST, sections, data.toreadonly(), codec(how), "update"))


def five(total: float = 1.0, how: str = "fp32", scale: float = 1.0) -> list[Item]:
    return [(update(f"o{i}.0", scale * delta(i), how=how), total / 5) for i in range(5)]


def merged(
    store: VersionStore,
    merger: Merger,
    start: Version,
    items: Sequence[Item],
    use_outer: bool = True,
) -> tuple[Version, MergeStats]:
    draft = store.draft(start.number + 1, start.number, merger.vectors)
    stats = merger.merge(start, draft, items, use_outer)
    return draft.seal(), stats


def moved(start: Version, version: Version) -> Tensor:
    return start.flat("trainable") - version.flat("trainable")


# ---- bits and blocks ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", RULES)
def test_tiles_threads_and_memory_change_no_bit(tmp_path: Path, spec: str, how: str) -> None:
    """Two rounds, so that what the rule and the outer optimizer remember is also read."""
    seen = set()
    for i, (tile, threads, limit) in enumerate([(1 << 20, 1, 0), (5000, 3, 0), (777, 2, 1 << 30)]):
        store = VersionStore(tmp_path / str(i), MANIFEST, memory_limit=limit)
        merger = Merger(MANIFEST, aggregator(spec), Nesterov(), threads=threads, tile=tile)
        version = base(store)
        for scale in (1.0, -0.5):
            version, _ = merged(store, merger, version, five(how=how, scale=scale))
        merger.close()
        state = b"".join(bytes(v.numpy()) for _, v in sorted(version.outer.items()))
        seen.add((version.sha256, state))
    assert len(seen) == 1


@pytest.mark.parametrize("spec", RULES)
def test_a_merge_does_what_the_rule_alone_does_to_whole_vectors(
    store: VersionStore, spec: str
) -> None:
    rule, start = aggregator(spec), base(store)
    version, stats = merged(store, Merger(MANIFEST, rule, tile=5000), start, five())
    rows = [delta(i) for i in range(5)]
    assert rule.algebra == "set"
    if by_tiles(rule):
        expected = rule.combine(rows[0], rows, [0.2] * 5)
    else:
        assert by_stack(rule)
        stack = Rows([*rows, torch.zeros(COUNT)] if remembers(rule) else rows)
        found = rule.coefficients(stack, [0.2] * 5)
        expected = stack.mix(found)
        told = [stats.stats[f"coefficient/o{i}.0"] for i in range(5)]
        assert told == pytest.approx(list(found[:5]), rel=1e-9)
    assert torch.allclose(moved(start, version), expected, atol=1e-5)
    assert "fallback" not in stats.stats


class Watched:
    """A decoder that notes the longest tile it was asked for."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.longest = 0
        self.reads = 0

    def __call__(self, lo: int, hi: int, out: Tensor) -> Tensor:
        self.longest = max(self.longest, hi - lo)
        self.reads += 1
        return out[: hi - lo].copy_(self.values[lo:hi])


def test_distances_are_read_once_and_in_blocks() -> None:
    """However many iterations: the rule below makes a thousand of them."""
    watched = [Watched(delta(i)) for i in range(5)]
    rows: list[Decoder] = list(watched)
    reading = Reading(Crew(2), rows, COUNT)
    GeometricMedian(floor=1e-30).coefficients(reading, [0.2] * 5)
    assert torch.equal(reading.gram().diagonal(), reading.squares())
    assert {w.longest for w in watched} == {CHUNK}
    assert {w.reads for w in watched} == {3}


def test_what_krum_leaves_is_not_read_again() -> None:
    watched = [Watched(delta(i) if i else delta(0) * 9) for i in range(5)]
    made = plan(Krum(1), [Source(str(i), w, 0.2) for i, w in enumerate(watched)], Crew(1), COUNT)
    out = torch.empty(COUNT)
    made.tile(0, COUNT, out, out, {})
    assert sorted(w.reads for w in watched) == [3, 3, 3, 3, 4]


@pytest.mark.parametrize(("n", "largest"), [(3, DECODED // 3), (100, DECODED // 100)])
def test_the_more_updates_a_median_has_the_smaller_are_its_tiles(n: int, largest: int) -> None:
    sources = [Source(str(i), Watched(torch.zeros(1)), 1 / n) for i in range(n)]
    assert plan(Median(), sources, Crew(1), 1).largest == largest


def test_terms_are_added_in_the_order_of_their_places() -> None:
    total = InOrder(torch.zeros(1, dtype=torch.float64))
    terms = {2: 1.0, 0: 1e17, 1: -1e17}  # in another order the 1 would be lost
    for place, term in terms.items():
        total.add(place, torch.tensor([term], dtype=torch.float64))
    assert total.value.tolist() == [1.0]


# ---- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", RULES)
@pytest.mark.parametrize("total", [0.25, 3.0])
def test_a_rule_keeps_the_strategys_damping(store: VersionStore, spec: str, total: float) -> None:
    start, merger = base(store), Merger(MANIFEST, aggregator(spec))
    whole, _ = merged(store, merger, start, five())
    version, _ = merged(store, merger, start, five(total))
    expected = min(1.0, total) * moved(start, whole)
    assert torch.allclose(moved(start, version), expected, atol=1e-6)


@pytest.mark.parametrize("spec", RULES)
def test_an_update_without_weight_has_no_vote(store: VersionStore, spec: str) -> None:
    start, merger = base(store), Merger(MANIFEST, aggregator(spec))
    expected, _ = merged(store, merger, start, five())
    silent = [(update("z0.0", delta(8) * 100, 9.0), 0.0), (update("z1.0", delta(8) * 100), 0.0)]
    version, stats = merged(store, merger, start, [*silent, *five()])
    assert version.sha256 == expected.sha256
    assert "coefficient/z0.0" not in stats.stats


@pytest.mark.parametrize(
    "rule",
    [Median(), TrimmedMean(0.3), Krum(1), GeometricMedian(), CenteredClipping(), NormClipping()],
    ids=str,
)
def test_with_too_few_updates_it_is_the_weighted_mean_and_says_so(
    store: VersionStore, rule: Aggregator
) -> None:
    items = [(update("a.0", delta(0)), 0.3), (update("b.0", delta(1)), 0.1)]
    start, merger = base(store), Merger(MANIFEST, rule)
    version, stats = merged(store, merger, start, [*items, (update("c.0", delta(2)), 0.0)])
    expected = 0.3 * delta(0) + 0.1 * delta(1)
    assert torch.allclose(moved(start, version), expected, atol=1e-6)
    assert stats.stats["fallback"] == 1.0


def test_updates_that_have_no_weight_at_all_move_nothing(store: VersionStore) -> None:
    start, merger = base(store), Merger(MANIFEST, Krum(1))
    merged(store, merger, start, five())  # leaves its result in the work area
    items = [(update(f"o{i}.0", delta(i), 9.0), 0.0) for i in range(5)]
    version, stats = merged(store, merger, start, items)
    assert version.sha256 == start.sha256
    assert stats.stats == {"delta_norm": 0.0, "fallback": 1.0}


# ---- what cannot be used -----------------------------------------------------------------------


@pytest.mark.parametrize("spec", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_with_nan_is_dropped_also_where_the_rule_would_not_take_it(
    store: VersionStore, spec: str, bad: float
) -> None:
    start, merger = base(store), Merger(MANIFEST, aggregator(spec), tile=5000, threads=2)
    expected, _ = merged(store, merger, start, five())
    spoilt = delta(7) * 1000
    spoilt[COUNT - 1] = bad
    version, stats = merged(store, merger, start, [(update("bad.0", spoilt), 0.2), *five()])
    assert version.sha256 == expected.sha256
    assert [name for name, _ in stats.dropped] == ["bad.0"]
    merger.close()


@pytest.mark.parametrize("spec", RULES)
def test_the_largest_finite_numbers_do_no_more_than_a_rule_allows(
    store: VersionStore, spec: str
) -> None:
    start, merger = base(store), Merger(MANIFEST, aggregator(spec))
    good = five(5 / 6)
    version, stats = merged(
        store, merger, start, [*good, (update("bad.0", torch.full((COUNT,), 3e38)), 1 / 6)]
    )
    assert len(stats.used) == 6
    most = max(float(delta(i).norm()) for i in range(5))
    assert float(moved(start, version).norm()) < 1.01 * most


def test_norms_that_are_not_finite_are_found_without_a_gram_matrix() -> None:
    reading = Reading(Crew(1), [Watched(torch.tensor([1.0, math.inf]))], 2)
    with pytest.raises(NotFiniteError):
        reading.squares()


class Nothing(Robust):
    """A rule that takes nothing."""

    min_results = 1

    def coefficients(self, stack: Stack, weights: Sequence[float]) -> list[float]:
        return [0.0] * len(stack)


def test_a_rule_that_takes_nothing_moves_nothing(store: VersionStore) -> None:
    merger, start = Merger(MANIFEST, Median()), base(store)
    merged(store, merger, start, five())  # leaves its result in the work area
    merger.aggregator = Nothing()
    version, stats = merged(store, merger, start, five())
    assert version.sha256 == start.sha256
    assert stats.stats["delta_norm"] == 0.0


class Short(Robust):
    """A rule that forgets a row."""

    min_results = 1

    def coefficients(self, stack: Stack, weights: Sequence[float]) -> list[float]:
        return [1.0] * (len(stack) - 1)


def test_a_rule_that_forgets_a_row_is_told(store: VersionStore) -> None:
    rule: StackRule = Short()
    draft = store.draft(1)
    with pytest.raises(UsageError, match=r"Short.coefficients gave 4 for 5 rows") as told:
        Merger(MANIFEST, rule).merge(base(store), draft, five())
    assert told.value.code == "FL-S102"
    draft.abandon()


# ---- a rule's memory ---------------------------------------------------------------------------


class Own:
    """A user's rule with a mistake in it."""

    algebra: Literal["set"] = "set"
    needs: frozenset[str] = frozenset()
    min_results = 1
    coordinatewise = True

    def __init__(self, mistake: Callable[[Tensor, Sequence[Tensor]], Tensor]) -> None:
        self.mistake = mistake

    def combine(self, x: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return self.mistake(x, deltas)


class OwnSum:
    algebra: Literal["sum"] = "sum"
    needs: frozenset[str] = frozenset()

    def add(self, total: Tensor, delta: Tensor, weight: float, *, first: bool) -> None:
        raise KeyError("my mistake")


class OwnStack:
    algebra: Literal["set"] = "set"
    needs: frozenset[str] = frozenset()
    min_results = 1

    def coefficients(self, stack: Stack, weights: Sequence[float]) -> Sequence[float]:
        return [1.0 / (len(stack) - 5)]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Own(lambda x, deltas: deltas[len(deltas)]), "Own failed: IndexError: list index out"),
        (Own(lambda x, deltas: x[:1]), r"Own failed: ValueError: combine gave \(1,\) for \("),
        (Own(lambda x, deltas: None), "Own failed: AttributeError"),  # type: ignore[arg-type, return-value]
        (OwnSum(), "OwnSum failed: KeyError: 'my mistake'"),
        (OwnStack(), "OwnStack failed: ZeroDivisionError"),
    ],
)
def test_a_mistake_in_a_rule_of_ones_own_ends_the_run_and_never_moves_the_model(
    store: VersionStore, rule: Aggregator, said: str
) -> None:
    """An IndexError was taken for the end of the blocks: the version was what the disk held. One
    value for a whole tile was written to all of it. The others were told as bugs of ours."""
    with pytest.raises(ServerError, match=said) as caught:
        merged(store, Merger(MANIFEST, rule), base(store), five())
    assert caught.value.code == "FL-S204"


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_the_last_result_lies_in_the_version_before_damping(tmp_path: Path, limit: int) -> None:
    store = VersionStore(tmp_path, MANIFEST, memory_limit=limit)
    merger = Merger(MANIFEST, CenteredClipping(40.0), tile=5000)
    version, memory = base(store), torch.zeros(COUNT)
    for total in (0.25, 1.0, 0.5):
        version, _ = merged(store, merger, version, five(total))
        stack = Rows([*(delta(i) for i in range(5)), memory])
        memory = stack.mix(CenteredClipping(40.0).coefficients(stack, [0.2] * 5))
        assert torch.allclose(version.outer[MEMORY], memory, atol=1e-5)


def test_merges_that_are_no_round_leave_the_memory(store: VersionStore) -> None:
    """Past the outer optimizer, without updates, or with too few: it stays what it was."""
    merger = Merger(MANIFEST, CenteredClipping())
    assert merger.vectors == (MEMORY,)
    empty, _ = merged(store, merger, base(store), [])
    assert not empty.outer[MEMORY].any()
    first, _ = merged(store, merger, base(store), five())
    assert first.outer[MEMORY].any()
    for items, use_outer in ((five(scale=2.0), False), ([], True), (five()[:2], True)):
        version, _ = merged(store, merger, first, items, use_outer)
        assert torch.equal(version.outer[MEMORY], first.outer[MEMORY])


# ---- buffers -----------------------------------------------------------------------------------


def buffers(store: VersionStore, rule: Aggregator, values: Sequence[float], w: float) -> Version:
    items = [
        (update(f"o{i}.0", delta(i), value, int(value)), w / len(values))
        for i, value in enumerate(values)
    ]
    return merged(store, Merger(MANIFEST, rule), base(store), items)[0]


@pytest.mark.parametrize("rule", [Median(), NormClipping(1.0)], ids=str)
def test_a_robust_rule_takes_the_median_of_buffers(store: VersionStore, rule: Aggregator) -> None:
    version = buffers(store, rule, [10, 1000000, 20, 30], 1.0)
    assert version.flat("buffers_float").tolist() == [25.0] * 3
    assert version.flat("buffers_other").tolist() == [20]  # an integer that was sent
    damped = buffers(store, rule, [10, 1000000, 20], 0.5)
    assert damped.flat("buffers_float").tolist() == [10.5, 11.0, 11.5]


def test_a_counter_does_not_go_back(store: VersionStore) -> None:
    assert buffers(store, Median(), [1, 2, 3], 1.0).flat("buffers_other").tolist() == [5]


def test_with_too_few_updates_buffers_are_the_mean_as_well(store: VersionStore) -> None:
    items = [(update("a.0", delta(0), 10.0), 0.75), (update("b.0", delta(1), 20.0), 0.25)]
    version, _ = merged(store, Merger(MANIFEST, Median()), base(store), items)
    assert version.flat("buffers_float").tolist() == pytest.approx([12.5] * 3)


def test_a_median_does_not_hide_nan_in_a_buffer(store: VersionStore) -> None:
    items = [(update(f"o{i}.0", delta(i), 10.0), 0.2) for i in range(4)]
    spoilt = (update("bad.0", delta(4), math.nan), 0.2)
    _, stats = merged(store, Merger(MANIFEST, Median()), base(store), [*items, spoilt])
    assert stats.dropped == (("bad.0", "tensor 'bn.mean'[0] is nan"),)
