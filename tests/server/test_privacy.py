"""Central DP: nobody moves the model further than clip times weight, and noise covers it."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atoll.aggregation.krum import Krum
from atoll.aggregation.noise import derived, ids, normal
from atoll.client.algorithm import local_algorithm
from atoll.protocols.codecs import codec
from atoll.protocols.errors import UsageError
from atoll.protocols.manifest import Group, Manifest, TensorSpec
from atoll.protocols.payload import parse
from atoll.protocols.tensors import pack
from atoll.server.accountant import Sampling
from atoll.server.books import Books
from atoll.server.dp import CentralDP, central_dp
from atoll.server.draft import Version
from atoll.server.items import Item, UpdateBytes
from atoll.server.merge import Merger, MergeStats
from atoll.server.privacy import Privacy
from atoll.server.versions import VersionStore

COUNT = 40_000
PLAIN = Manifest((TensorSpec("w", (COUNT,), "float32", "trainable"),))
NORMED = Manifest((*PLAIN.tensors, TensorSpec("mean", (2,), "float32", "buffers_float")))
KEY = bytes(range(32))
START = torch.zeros(COUNT)


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    return VersionStore(tmp_path, PLAIN)


def item(name: str, client: str, delta: Tensor, weight: float = 1.0) -> Item:
    groups: dict[Group, Tensor] = {"trainable": delta}
    sections, data = pack(PLAIN, groups, codec("fp32"))
    payload = parse(PLAIN, sections, data.toreadonly(), codec("fp32"), "update")
    return UpdateBytes(name, payload, client), weight


def along(element: int, length: float) -> Tensor:
    delta = torch.zeros(COUNT)
    delta[element] = length
    return delta


def merged(
    store: VersionStore,
    params: str,
    items: list[Item],
    start: Version | None = None,
    *,
    threads: int = 1,
    tile: int = 1 << 20,
    sampling: Sampling | None = None,
) -> tuple[Version, MergeStats]:
    privacy = Privacy(central_dp(params), KEY, sampling)
    merger = Merger(PLAIN, threads=threads, tile=tile, privacy=privacy)
    base = start or store.initial({"w": START})
    draft = store.draft(base.number + 1, base.number, merger.vectors)
    stats = merger.merge(base, draft, items)
    merger.close()
    return draft.seal(), stats


def books(version: Version) -> Books:
    assert version.facts.books is not None
    return version.facts.books


# ---- clip --------------------------------------------------------------------------------------


def test_an_update_that_is_too_long_is_cut_to_the_clip_and_no_other(store: VersionStore) -> None:
    """(3, 4) with clip 1 is (.6, .8); a short one stays as it is, one of zeros too."""
    long = torch.zeros(COUNT)
    long[0], long[1] = 3, 4
    items = [item("o0.0", "a", long), item("o1.0", "b", along(2, 0.5)), item("o2.0", "c", START)]
    made, _ = merged(store, "clip=1,noise=0", [(u, 1 / 3) for u, _ in items])
    found = -made.flat("trainable")[:3] * 3
    torch.testing.assert_close(found, torch.tensor([0.6, 0.8, 0.5]))


@pytest.mark.parametrize("length", [1e-20, 1.0, 1.0000001, 7.3, 1e18])
def test_one_update_never_moves_the_model_by_more_than_the_clip(
    store: VersionStore, length: float
) -> None:
    delta = normal(KEY, 0, COUNT)
    delta *= length / delta.double().norm().item()
    made, _ = merged(store, "clip=0.3,noise=0", [item("o0.0", "a", delta)])
    assert made.flat("trainable").double().norm() <= 0.3 * (1 + 1e-6)
    if length > 0.3:
        assert made.flat("trainable").double().norm() >= 0.3 * (1 - 1e-6)


def test_without_clip_and_noise_it_is_the_mean_of_all_alike(store: VersionStore) -> None:
    deltas = [normal(derived(KEY, i), 0, COUNT) for i in range(3)]
    items = [
        item(f"o{i}.0", f"c{i}", d, w)
        for i, (d, w) in enumerate(zip(deltas, (0.5, 0.3, 0.2), strict=True))
    ]
    made, _ = merged(store, "clip=1e9,noise=0", items)
    torch.testing.assert_close(-made.flat("trainable"), sum(deltas) / 3)


def test_two_updates_of_one_client_count_as_one(store: VersionStore) -> None:
    items = [
        item("o0.0", "a", along(0, 9.0), 1 / 3), item("o1.0", "a", along(1, 9.0), 1 / 3),
        item("o2.0", "b", along(2, 9.0), 1 / 3),
    ]  # fmt: skip
    made, _ = merged(store, "clip=1,noise=0", items)
    torch.testing.assert_close(-made.flat("trainable")[:3], torch.tensor([0.25, 0.25, 0.5]))


# ---- noise -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "std"),
    [
        ((0.25, 0.25, 0.25, 0.25), 2.0 * 0.5 / 4),  # FedAvg's mean of four: z * clip / 4
        ((0.2,), 2.0 * 0.5 * 0.2),  # one that is damped to 0.2: its noise is too
        ((0.1, 0.3), 2.0 * 0.5 * 0.2),  # the same sum, shared alike
    ],
)
def test_noise_is_as_what_one_client_can_move(
    store: VersionStore, weights: tuple[float, ...], std: float
) -> None:
    items = [item(f"o{i}.0", f"c{i}", START, w) for i, w in enumerate(weights)]
    made, stats = merged(store, "clip=0.5,noise=2", items)
    assert stats.stats["dp_noise"] == pytest.approx(std)
    found = made.flat("trainable").double()
    assert found.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * COUNT))
    assert abs(found.mean().item()) < 5 * std / math.sqrt(COUNT)


def test_weights_of_the_strategy_are_kept_where_asked_for_and_the_greatest_is_covered(
    store: VersionStore,
) -> None:
    items = [item("o0.0", "a", START, 0.6), item("o1.0", "b", START, 0.2)]
    made, stats = merged(store, "clip=1,noise=1,weights=strategy", items)
    assert stats.stats["dp_noise"] == pytest.approx(0.6)
    assert books(made).spent == pytest.approx({"a": 1.0, "b": 1 / 9})  # it moved a third as far
    made, stats = merged(store, "clip=1,noise=1,weights=strategy,cap=0.3", items)
    assert stats.stats["dp_noise"] == pytest.approx(0.3)
    assert books(made).spent == pytest.approx({"a": 1.0, "b": 4 / 9})


def test_the_noise_comes_again_with_the_key_whatever_tiles_and_threads(store: VersionStore) -> None:
    items = [item("o0.0", "a", along(0, 1.0)), item("o1.0", "b", along(1, 1.0))]
    first, _ = merged(store, "clip=1,noise=1", items)
    for threads, tile in ((1, 1000), (3, 7001), (2, 1 << 20)):
        again, _ = merged(store, "clip=1,noise=1", items, threads=threads, tile=tile)
        assert again.facts.sha256 == first.facts.sha256
    key = derived(derived(KEY, 1, ids([("o0.0", 1.0), ("o1.0", 1.0)])), "delta")
    torch.testing.assert_close(first.flat("trainable")[2:], -normal(key, 0, COUNT)[2:])


def test_another_version_and_another_sum_get_other_noise(store: VersionStore) -> None:
    a, b = item("o0.0", "a", START), item("o1.0", "b", START)
    first, _ = merged(store, "noise=1", [a])
    other, _ = merged(store, "noise=1", [b])
    second, _ = merged(store, "noise=1", [a], start=first)
    steps = [
        first.flat("trainable"),
        other.flat("trainable"),
        second.flat("trainable") - first.flat("trainable"),
    ]
    for i, x in enumerate(steps):
        for y in steps[:i]:
            assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 5 / math.sqrt(COUNT)


def test_what_is_no_number_is_left_out_and_pays_nothing(store: VersionStore) -> None:
    bad = along(3, math.nan)
    made, stats = merged(store, "noise=1", [item("o0.0", "a", bad), item("o1.0", "b", START)])
    assert stats.used == ("o1.0",)
    assert set(books(made).spent) == {"b"}
    alone, _ = merged(store, "noise=1", [item("o1.0", "b", START)])
    assert alone.facts.sha256 == made.facts.sha256  # as if it is made again without


# ---- books -------------------------------------------------------------------------------------


def test_each_pays_for_the_versions_that_hold_its_work(store: VersionStore) -> None:
    made, _ = merged(store, "noise=2", [item("o0.0", "a", START), item("o1.0", "b", START)])
    made, stats = merged(store, "noise=2", [item("o2.0", "a", START)], start=made)
    assert books(made).spent == pytest.approx({"a": 2 / 4, "b": 1 / 4})
    import dp_accounting

    z = 1 / math.sqrt(2 / 4)
    assert stats.stats["epsilon"] == pytest.approx(dp_accounting.get_epsilon_gaussian(z, 1e-5))


def test_the_books_lie_on_disk_with_the_version(store: VersionStore, tmp_path: Path) -> None:
    made, _ = merged(store, "noise=2,adaptive=true", [item("o0.0", "a", START)])
    store.save(made)
    assert VersionStore(tmp_path, PLAIN).open(1).facts.books == made.facts.books
    bare, stats = merged(store, "noise=0", [item("o0.0", "a", START)], start=made)
    store.save(bare)
    assert stats.stats["epsilon"] == math.inf
    assert VersionStore(tmp_path, PLAIN).open(2).facts.books == bare.facts.books


def test_who_has_nothing_left_is_left_out(store: VersionStore) -> None:
    """z = 1 costs 4.3772 once and 6.7 twice."""
    params = "noise=1,epsilon=6"
    made, stats = merged(store, params, [item("o0.0", "a", START)])
    assert stats.stats["epsilon"] == pytest.approx(4.3772, abs=1e-4)
    assert stats.stats["budget_spent"] == 1
    both = [item("o1.0", "a", along(0, 1.0)), item("o2.0", "b", START)]
    made, stats = merged(store, params, both, start=made)
    assert stats.dropped == (("o1.0", "its client's privacy budget is spent"),)
    assert books(made).spent == {"a": 1.0, "b": 1.0}
    before = made.flat("trainable").clone()
    made, stats = merged(store, params, [item("o3.0", "a", along(0, 1.0))], start=made)
    assert (stats.used, stats.stats) == ((), {})
    assert torch.equal(made.flat("trainable"), before)  # not even noise
    assert books(made).spent == {"a": 1.0, "b": 1.0}


def test_a_budget_that_no_version_fits_into_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match=r"FL-S104: one version with noise=1 costs epsilon 4.377"):
        Privacy(central_dp("noise=1,epsilon=4"), KEY)
    with pytest.raises(UsageError, match="costs epsilon inf"):
        Privacy(central_dp("noise=0,epsilon=4"), KEY)


# ---- sampling ----------------------------------------------------------------------------------

DRAWN = Sampling(0.5, 8)


def test_a_drawn_client_counts_by_how_many_are_expected_not_by_how_many_came(
    store: VersionStore,
) -> None:
    items = [item("o0.0", "a", along(0, 1.0), 0.9), item("o1.0", "b", along(1, 1.0), 0.1)]
    made, _ = merged(store, "clip=1,noise=0", items, sampling=DRAWN)
    torch.testing.assert_close(-made.flat("trainable")[:2], torch.tensor([0.25, 0.25]))
    assert books(made) == Books(1.0, {}, 1)


def test_a_round_in_which_nobody_was_drawn_looks_like_any_other(store: VersionStore) -> None:
    made, stats = merged(store, "clip=1,noise=1", [], sampling=DRAWN)
    assert stats.stats["dp_noise"] == 0.25
    assert made.flat("trainable").double().std().item() == pytest.approx(0.25, rel=0.02)
    assert books(made).rounds == 1
    assert merged(store, "noise=1", [])[0].facts.sha256 == store.open(0).facts.sha256


def test_a_spent_budget_ends_the_noise_too(store: VersionStore) -> None:
    params = "noise=1,epsilon=4.2"
    made, stats = merged(store, params, [], sampling=DRAWN)
    assert stats.stats["budget_spent"] == 1
    after, stats = merged(store, params, [item("o0.0", "a", START)], made, sampling=DRAWN)
    assert after.facts.sha256 == made.facts.sha256
    assert [reason for _, reason in stats.dropped] == ["its client's privacy budget is spent"]
    assert books(after).rounds == 1


# ---- the adaptive clip -------------------------------------------------------------------------


def test_count_and_sum_together_cost_what_the_sum_alone_does() -> None:
    """z = 1 with noise 1.5 over the count leaves 1.060660 for the sum."""
    privacy = Privacy(CentralDP(noise=1.0, adaptive=True, count_noise=1.5), KEY)
    assert privacy._split(10)[0] == pytest.approx(1.060660, abs=1e-6)


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.8])
def test_the_adaptive_clip_finds_the_quantile(tmp_path: Path, quantile: float) -> None:
    """Forty clients, update i of length i / 40, from a clip 10 times too small."""
    manifest = Manifest((TensorSpec("w", (1,), "float32", "trainable"),))
    store = VersionStore(tmp_path, manifest)
    privacy = Privacy(
        CentralDP(
            clip=0.05, noise=1.0, adaptive=True, quantile=quantile, count_noise=2.0, rate=0.4
        ),
        KEY,
    )
    merger = Merger(manifest, threads=1, privacy=privacy)
    items: list[Item] = []
    for i in range(1, 41):
        sections, data = pack(manifest, {"trainable": torch.tensor([i / 40])}, codec("fp32"))
        payload = parse(manifest, sections, data.toreadonly(), codec("fp32"), "update")
        items.append((UpdateBytes(f"o{i}.0", payload, f"c{i}"), 0.025))
    version, clips = store.initial({"w": torch.zeros(1)}), []
    for number in range(1, 101):
        draft = store.draft(number, number - 1, merger.vectors)
        merger.merge(version, draft, items)
        version = draft.seal()
        clips.append(books(version).clip)
    assert sum(clips[-50:]) / 50 == pytest.approx(quantile, abs=0.04)
    assert books(version).spent["c1"] == pytest.approx(100.0)  # as without


def test_without_noise_the_clip_moves_by_its_formula(store: VersionStore) -> None:
    items = [item("o0.0", "a", along(0, 2.0)), item("o1.0", "b", along(1, 0.5))]
    made, stats = merged(store, "clip=1,noise=0,adaptive=true,quantile=0.9,rate=0.2", items)
    assert stats.stats["dp_below"] == 0.5
    assert books(made).clip == pytest.approx(math.exp(-0.2 * (0.5 - 0.9)))


# ---- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    ["clip=0", "clip=inf", "noise=-1", "noise=inf", "delta=0", "delta=2", "epsilon=0", "rate=0",
     "quantile=1.5", "weights=mine", "cap=0", "adaptive=true,noise=1,count_noise=0.5", "sigma=1",
     "8", "", "on", "on:noise=8", "noise=1e-300", "clip=1e300", "noise=1e300", "rate=inf",
     "adaptive=no", "adaptive=true,count_noise=1e300"],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused(params: str) -> None:
    """noise=1e-300 was a division by zero, and clip=1e300,noise=1e300 an overflow: FL-S100."""
    with pytest.raises(UsageError, match=r"FL-S102: .*--dp"):
        Privacy(central_dp(params), KEY)


def test_a_rule_without_a_bound_is_refused_with_both_sides_and_the_remedy() -> None:
    privacy = Privacy(CentralDP(), KEY)
    with pytest.raises(UsageError, match=r"FL-S104: --dp .* Krum .*\(use --aggregator mean, or"):
        Merger(PLAIN, Krum(), privacy=privacy)


def test_buffers_that_nothing_covers_are_refused_unless_the_servers_stay() -> None:
    privacy = Privacy(CentralDP(), KEY)
    with pytest.raises(UsageError, match=r"FL-S104: --dp .*BatchNorm.*--buffers keep_server"):
        Merger(NORMED, privacy=privacy)
    Merger(NORMED, buffers="keep_server", privacy=privacy)


def test_what_is_sent_beside_an_update_is_refused_and_what_is_made_of_the_sum_is_not() -> None:
    privacy = Privacy(CentralDP(), KEY)
    half = local_algorithm("scaffold").server_half()
    with pytest.raises(UsageError, match=r"FL-S104: --dp does not cover what clients send beside"):
        Merger(PLAIN, privacy=privacy, half=half)
    Merger(PLAIN, privacy=privacy, half=local_algorithm("fedavg-m").server_half())
