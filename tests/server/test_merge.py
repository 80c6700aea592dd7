"""Merge: the formula, the same bits whatever the tiles and threads, and no NaN in any model."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor

from atoll.aggregation.outer import STEPS, Adam, Momentum, Nesterov, Outer, Sgd, Yogi
from atoll.protocols.codecs import codec
from atoll.protocols.errors import ServerError, UsageError
from atoll.protocols.manifest import Group, Manifest, TensorSpec
from atoll.protocols.payload import parse
from atoll.protocols.tensors import pack
from atoll.server.buffers import Buffers
from atoll.server.draft import Version
from atoll.server.items import Item, UpdateBytes
from atoll.server.merge import Merger, MergeStats
from atoll.server.versions import VersionStore

COUNT = 1003
MANIFEST = Manifest(
    (
        TensorSpec("w", (17, 59), "float32", "trainable"),
        TensorSpec("bn.mean", (3,), "float32", "buffers_float"),
        TensorSpec("bn.count", (1,), "int64", "buffers_other"),
    )
)
START = torch.linspace(-1, 1, COUNT)


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    return VersionStore(tmp_path, MANIFEST)


def base(store: VersionStore) -> Version:
    return store.initial(
        {
            "w": START.view(17, 59),
            "bn.mean": torch.tensor([1.0, 2.0, 3.0]),
            "bn.count": torch.tensor([5]),
        }
    )


def random(seed: int) -> Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(seed))


def update(
    name: str,
    delta: Tensor,
    mean: Sequence[float] | None = None,
    count: int | None = None,
    how: str = "fp32",
) -> UpdateBytes:
    groups: dict[Group, Tensor] = {"trainable": delta}
    if mean is not None:
        groups["buffers_float"] = torch.tensor(mean)
    if count is not None:
        groups["buffers_other"] = torch.tensor([count])
    sections, data = pack(MANIFEST, groups, codec(how))
    return UpdateBytes(name, parse(MANIFEST, sections, data.toreadonly(), codec(how), "update"))


def three(how: str = "fp32") -> list[Item]:
    return [(update(f"o{i}.0", random(i), how=how), w) for i, w in enumerate((0.2, 0.5, 0.1))]


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


def test_the_model_becomes_base_minus_the_weighted_sum(store: VersionStore) -> None:
    version, stats = merged(store, Merger(MANIFEST), base(store), three())
    total = 0.2 * random(0).double() + 0.5 * random(1).double() + 0.1 * random(2).double()
    assert torch.allclose(version.flat("trainable").double(), START - total, atol=1e-6)
    assert stats.used == ("o0.0", "o1.0", "o2.0")
    assert stats.dropped == ()
    assert stats.stats["delta_norm"] == pytest.approx(float(total.norm()), rel=1e-6)


@pytest.mark.parametrize("how", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("outer", [Sgd(0.3), Nesterov(), Yogi()], ids=["sgd", "nesterov", "yogi"])
def test_tiles_threads_and_memory_change_no_bit(tmp_path: Path, outer: Outer, how: str) -> None:
    """Two rounds, so that the state that was written is also read."""
    seen = set()
    shapes = [(1 << 20, 1, 0), (1 << 20, 2, 1 << 20), (64, 1, 0), (64, 3, 0), (333, 2, 1 << 20)]
    for i, (tile, threads, limit) in enumerate(shapes):
        store = VersionStore(tmp_path / str(i), MANIFEST, memory_limit=limit)
        merger = Merger(MANIFEST, outer=outer, threads=threads, tile=tile)
        version = base(store)
        for _ in range(2):
            version, _ = merged(store, merger, version, three(how))
        merger.close()
        state = b"".join(bytes(v.numpy()) for _, v in sorted(version.outer.items()))
        seen.add((version.sha256, state))
    assert len(seen) == 1


@pytest.mark.parametrize("outer", [Momentum(), Nesterov(), Adam(flower=True)])
def test_the_merge_steps_as_the_outer_optimizer_alone(store: VersionStore, outer: Outer) -> None:
    merger = Merger(MANIFEST, outer=outer, tile=128)
    version, x, state = base(store), START, dict[str, Tensor]()
    for seed in range(3):
        version, _ = merged(store, merger, version, [(update("o1.0", random(seed)), 1.0)])
        x, state = outer.step(x, random(seed), state)
        assert torch.equal(version.flat("trainable"), x)
        assert set(version.outer) == set(state)
        assert all(torch.equal(version.outer[name], state[name]) for name in state)


def test_past_the_outer_optimizer_the_sum_is_taken_as_it_is(store: VersionStore) -> None:
    merger = Merger(MANIFEST, outer=Nesterov())
    first, _ = merged(store, merger, base(store), three())
    second, _ = merged(store, merger, first, [(update("o9.0", random(9)), 0.5)], use_outer=False)
    assert torch.equal(second.flat("trainable"), first.flat("trainable") - 0.5 * random(9))
    assert torch.equal(second.outer["momentum"], first.outer["momentum"])
    assert second.outer[STEPS].tolist() == [1]


def test_the_order_of_the_items_is_the_order_of_the_sum(store: VersionStore) -> None:
    large, one = torch.full((COUNT,), 1e8), torch.ones(COUNT)
    deltas = {"a": large, "b": one, "c": -large}
    zero = store.initial({**base(store).tensors(), "w": torch.zeros(17, 59)})
    for order, expected in (("abc", 0.0), ("acb", -1.0)):
        items = [(update(name, deltas[name]), 1.0) for name in order]
        version, _ = merged(store, Merger(MANIFEST), zero, items)
        assert version.flat("trainable").tolist() == [expected] * COUNT


# ---- what cannot be used -------------------------------------------------------------------


def spoilt(value: float, at: int = 700) -> Tensor:
    delta = random(5)
    delta[at] = value
    return delta


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_an_update_with_nan_is_dropped_and_the_others_merge_without_it(
    store: VersionStore, bad: float, weight: float
) -> None:
    merger, start = Merger(MANIFEST, outer=Nesterov(), tile=64), base(store)
    clean, _ = merged(store, merger, start, three())
    items = [*three()[:1], (update("bad.0", spoilt(bad)), weight), *three()[1:]]
    version, stats = merged(store, merger, start, items)
    assert version.sha256 == clean.sha256
    assert torch.equal(version.outer["momentum"], clean.outer["momentum"])
    assert stats.used == ("o0.0", "o1.0", "o2.0")
    assert stats.dropped == (("bad.0", f"tensor 'w'[11, 51] is {bad}"),)


def test_infinities_that_cancel_are_both_found(store: VersionStore) -> None:
    items = [
        (update("a.0", spoilt(math.inf)), 1.0),
        (update("b.0", spoilt(-math.inf, 3)), 1.0),
        (update("c.0", random(1)), 1.0),
    ]
    _, stats = merged(store, Merger(MANIFEST, tile=64), base(store), items)
    assert stats.used == ("c.0",)
    assert [name for name, _ in stats.dropped] == ["a.0", "b.0"]


def test_a_merge_that_starts_again_is_hashed_again(tmp_path: Path) -> None:
    """Above 1 MiB hashing runs behind the writers: some of the spoilt model is hashed by then."""
    count = 600_000
    manifest = Manifest((TensorSpec("w", (count,), "float32", "trainable"),))
    store = VersionStore(tmp_path, manifest)
    start, fp32 = store.initial({"w": torch.zeros(count)}), codec("fp32")
    items = []
    for name, last in (("good.0", 1.0), ("bad.0", math.nan)):
        delta = torch.ones(count)
        delta[-1] = last
        payload = parse(manifest, *pack(manifest, {"trainable": delta}, fp32), fp32, "update")
        items.append((UpdateBytes(name, payload), 0.5))
    version, stats = merged(store, Merger(manifest, tile=100_000), start, items)
    assert stats.used == ("good.0",)
    assert version.sha256 == hashlib.sha256(version.view).digest()
    assert torch.equal(version.flat("trainable"), torch.full((count,), -0.5))


@pytest.mark.parametrize("outer", [Sgd(), Momentum(), Adam()])
def test_with_nothing_usable_model_and_state_stay_the_same(
    store: VersionStore, outer: Outer
) -> None:
    merger = Merger(MANIFEST, outer=outer, tile=64)
    start, _ = merged(store, merger, base(store), three())
    version, stats = merged(store, merger, start, [(update("bad.0", spoilt(math.nan)), 1.0)])
    assert version.number == 2
    assert version.sha256 == start.sha256
    assert {n: v.tolist() for n, v in version.outer.items()} == {
        n: v.tolist() for n, v in start.outer.items()
    }
    assert stats.used == ()
    assert "delta_norm" not in stats.stats


def test_no_items_at_all_make_an_equal_version(store: VersionStore) -> None:
    start = base(store)
    version, stats = merged(store, Merger(MANIFEST, outer=Momentum()), start, [])
    assert version.sha256 == start.sha256
    assert version.outer["momentum"].tolist() == [0.0] * COUNT
    assert stats == MergeStats((), (), {})


@pytest.mark.parametrize(("outer", "value"), [(Sgd(), 3e38), (Sgd(1e20), 1e19), (Adam(), 1e30)])
def test_finite_updates_whose_step_is_not_are_all_dropped(
    store: VersionStore, outer: Outer, value: float
) -> None:
    """3e38 + 3e38 overflows in the sum, 1e20 * 1e19 in the step, (1e30)^2 in Adam's state."""
    start = base(store)
    items = [(update(f"o{i}.0", torch.full((COUNT,), value)), 1.0) for i in (1, 2)]
    version, stats = merged(store, Merger(MANIFEST, outer=outer, tile=64), start, items)
    assert version.sha256 == start.sha256
    assert stats.dropped == tuple(
        (f"o{i}.0", "the merged model would not be finite") for i in (1, 2)
    )


def test_a_norm_too_large_for_float32_squares_is_still_right(store: VersionStore) -> None:
    items = [(update("o1.0", torch.full((COUNT,), 1e25)), 1.0)]
    _, stats = merged(store, Merger(MANIFEST), base(store), items)
    assert stats.used == ("o1.0",)
    assert stats.stats["delta_norm"] == pytest.approx(1e25 * math.sqrt(COUNT), rel=1e-5)


def test_a_norm_too_small_for_float32_squares_is_still_right(store: VersionStore) -> None:
    items = [(update("o1.0", torch.full((COUNT,), 1e-25)), 1.0)]
    _, stats = merged(store, Merger(MANIFEST), base(store), items)
    assert stats.stats["delta_norm"] * 1e25 == pytest.approx(math.sqrt(COUNT), rel=1e-5)


def test_a_disk_that_fails_in_a_helper_thread_is_told(
    store: VersionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = store.draft(1)
    merger = Merger(MANIFEST, tile=64, threads=3)
    start = base(store)

    def full(*_: object) -> None:
        raise ServerError("FL-S203", "no space", "free some")

    monkeypatch.setattr(draft, "write", full)
    with pytest.raises(ServerError, match="no space"):
        merger.merge(start, draft, three())
    draft.abandon()
    merger.close()


# ---- buffers -------------------------------------------------------------------------------


def buffers(store: VersionStore, policy: Buffers, *items: tuple[float, float, int]) -> Version:
    """Merge updates of (weight, value of all means, count)."""
    sent = [
        (update(f"o{i}.0", torch.zeros(COUNT), [value] * 3, count), weight)
        for i, (weight, value, count) in enumerate(items)
    ]
    return merged(store, Merger(MANIFEST, buffers=policy), base(store), sent)[0]


def test_buffers_are_the_weighted_mean_when_weights_sum_to_one(store: VersionStore) -> None:
    version = buffers(store, "weighted_mean", (0.25, 10.0, 7), (0.75, 20.0, 9))
    assert version.flat("buffers_float").tolist() == pytest.approx([17.5] * 3)
    assert version.flat("buffers_other").tolist() == [9]


@pytest.mark.parametrize("scale", [1.0, 0.2, 3.0])
def test_buffers_mix_into_the_servers_by_the_sum_of_the_weights(
    store: VersionStore, scale: float
) -> None:
    """min(1, sum w): a damped update moves buffers as little as it moves the model."""
    version = buffers(store, "weighted_mean", (0.25 * scale, 10.0, 1), (0.25 * scale, 20.0, 2))
    mix = min(1.0, 0.5 * scale)
    expected = [(1 - mix) * old + mix * 15.0 for old in (1.0, 2.0, 3.0)]
    assert version.flat("buffers_float").tolist() == pytest.approx(expected)
    assert version.flat("buffers_other").tolist() == [5]  # the server's own is the largest


def test_buffers_of_an_update_without_weight_do_not_count(store: VersionStore) -> None:
    version = buffers(store, "weighted_mean", (0.0, 10.0, 99))
    assert version.flat("buffers_float").tolist() == [1.0, 2.0, 3.0]
    assert version.flat("buffers_other").tolist() == [5]


@pytest.mark.parametrize("policy", ["keep_server", "personal"])
def test_other_policies_leave_the_servers_buffers(store: VersionStore, policy: Buffers) -> None:
    version = buffers(store, policy, (1.0, 10.0, 99))
    assert version.flat("buffers_float").tolist() == [1.0, 2.0, 3.0]
    assert version.flat("buffers_other").tolist() == [5]


def test_updates_without_buffers_do_not_dilute_those_with(store: VersionStore) -> None:
    items = [
        (update("a.0", torch.zeros(COUNT)), 0.5),
        (update("b.0", torch.zeros(COUNT), [10.0] * 3, 6), 0.5),
    ]
    version, _ = merged(store, Merger(MANIFEST), base(store), items)
    assert version.flat("buffers_float").tolist() == pytest.approx([5.5, 6.0, 6.5])


def test_nan_in_a_buffer_costs_the_whole_update(store: VersionStore) -> None:
    items = [
        (update("bad.0", random(1), [1.0, math.nan, 1.0], 6), 0.5),
        (update("good.0", random(2), [10.0] * 3, 6), 1.0),
    ]
    version, stats = merged(store, Merger(MANIFEST), base(store), items)
    assert stats.dropped == (("bad.0", "tensor 'bn.mean'[1] is nan"),)
    assert torch.equal(version.flat("trainable"), START - random(2))
    assert version.flat("buffers_float").tolist() == [10.0] * 3


def test_a_policy_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="median"):
        Merger(MANIFEST, buffers="median")  # type: ignore[arg-type]


# ---- rules over the set --------------------------------------------------------------------


class Median:
    """A toy: the coordinate-wise median."""

    algebra: ClassVar[Literal["set"]] = "set"
    needs: ClassVar[frozenset[str]] = frozenset()
    private: ClassVar[bool] = False
    min_results = 3
    coordinatewise = True

    def combine(self, x: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        assert math.fsum(weights) == pytest.approx(1.0)
        assert all(len(delta) == len(x) <= 64 for delta in deltas)
        return torch.stack(list(deltas)).median(dim=0).values


class Nearest(Median):
    """A toy that needs whole vectors: the delta nearest to the mean of the others' models."""

    coordinatewise = False

    def combine(self, x: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        assert len(x) == COUNT
        mean = torch.stack(list(deltas)).mean(dim=0)
        return min(deltas, key=lambda d: float((x - d - (x - mean)).norm()))


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("how", ["fp32", "bf16"])
def test_a_rule_over_the_set_keeps_the_strategys_damping(
    store: VersionStore, scale: float, how: str
) -> None:
    deltas = [random(i).bfloat16().float() for i in range(3)]
    items = [(update(f"o{i}.0", d, how=how), scale / 3) for i, d in enumerate(deltas)]
    version, stats = merged(store, Merger(MANIFEST, Median(), tile=64), base(store), items)
    expected = START - min(1.0, scale) * torch.stack(deltas).median(dim=0).values
    assert torch.allclose(version.flat("trainable"), expected, atol=1e-6)
    assert "fallback" not in stats.stats


def test_a_rule_may_ask_for_whole_vectors(store: VersionStore) -> None:
    deltas = [random(0), random(0) * 0.9, random(0) * 5]
    items = [(update(f"o{i}.0", d), 1 / 3) for i, d in enumerate(deltas)]
    version, _ = merged(store, Merger(MANIFEST, Nearest(), tile=64), base(store), items)
    assert torch.allclose(version.flat("trainable"), START - deltas[0], atol=1e-6)


def test_below_its_minimum_a_rule_gives_way_to_the_mean_and_says_so(store: VersionStore) -> None:
    items = [(update("a.0", random(0)), 0.1), (update("b.0", random(1)), 0.3)]
    version, stats = merged(store, Merger(MANIFEST, Median(), tile=64), base(store), items)
    expected = START - 0.1 * random(0) - 0.3 * random(1)
    assert torch.allclose(version.flat("trainable"), expected, atol=1e-6)
    assert stats.stats["fallback"] == 1.0


def test_a_median_does_not_hide_infinity(store: VersionStore) -> None:
    items = [*three(), (update("bad.0", spoilt(math.inf)), 0.2)]
    _, stats = merged(store, Merger(MANIFEST, Median(), tile=64), base(store), items)
    assert [name for name, _ in stats.dropped] == ["bad.0"]
