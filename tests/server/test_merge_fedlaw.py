"""Merging under FedLAW: streamed or not the same bits, damped, buffers as examples give them."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from atoll.aggregation.asking import Asking
from atoll.aggregation.fedlaw import FedLaw
from atoll.aggregation.outer import Momentum
from atoll.aggregation.stack import Reported, Rows
from atoll.client.data import Split
from atoll.client.flat import FlatModel
from atoll.client.models import manifest_of
from atoll.protocols.codecs import codec
from atoll.protocols.manifest import Group
from atoll.protocols.payload import parse
from atoll.protocols.tensors import flatten, pack
from atoll.server.buffers import Buffers
from atoll.server.draft import Version
from atoll.server.items import Item, UpdateBytes
from atoll.server.merge import Merger, MergeStats
from atoll.server.versions import VersionStore
from tests.aggregation.test_asking import Bowls


def net(norm: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = [nn.Linear(6, 8), nn.BatchNorm1d(8)] if norm else [nn.Linear(6, 8)]
        return nn.Sequential(*body, nn.ReLU(), nn.Linear(8, 3))


def examples(n: int = 30) -> Split:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(n, 6, generator=random)
    return Split(x, x[:, :3].argmax(dim=1))


def rule(module: nn.Module, **given: object) -> FedLaw:
    made = FedLaw(lr=0.05, epochs=3, batch=16, **given)  # type: ignore[arg-type]
    flat = FlatModel(module, examples(), batch_statistics=made.buffers == "recompute")
    return made.with_proxy(flat)


class World:
    """A store with the net's first version, and updates that are noise of some length."""

    def __init__(self, folder: Path, norm: bool = False, memory_limit: int = 1 << 20) -> None:
        self.manifest = manifest_of(net(norm))
        self.store = VersionStore(folder, self.manifest, memory_limit=memory_limit)
        self.start = self.store.initial(net(norm).state_dict())
        self.count = self.manifest.counts["trainable"]

    def delta(self, seed: int, length: float = 0.3) -> Tensor:
        return length * torch.randn(self.count, generator=torch.Generator().manual_seed(seed))

    def update(self, name: str, values: Tensor, buffer: float = 0.0) -> UpdateBytes:
        groups: dict[Group, Tensor] = {"trainable": values}
        if self.manifest.counts["buffers_float"]:
            groups["buffers_float"] = torch.full((self.manifest.counts["buffers_float"],), buffer)
            groups["buffers_other"] = torch.tensor([7])
        sections, data = pack(self.manifest, groups, codec("fp32"))
        payload = parse(self.manifest, sections, data.toreadonly(), codec("fp32"), "update")
        return UpdateBytes(name, payload)

    def three(self, total: float = 1.0) -> list[Item]:
        weights = (0.5, 0.3, 0.2)
        return [
            (self.update(f"o{i}.0", self.delta(i), float(i + 1)), total * w)
            for i, w in enumerate(weights)
        ]

    def merged(self, merger: Merger, items: Sequence[Item]) -> tuple[Version, MergeStats]:
        draft = self.store.draft(1, 0, merger.vectors)
        stats = merger.merge(self.start, draft, items)
        return draft.seal(), stats

    def moved(self, version: Version) -> Tensor:
        return self.start.flat("trainable") - version.flat("trainable")


# ---- streaming -----------------------------------------------------------------------------------


def test_streamed_in_any_tiles_it_gives_the_bits_of_the_stack_in_memory(tmp_path: Path) -> None:
    seen = set()
    for at, (tile, threads, limit) in enumerate([(1, 1, 0), (7, 2, 1 << 20), (1 << 20, 2, 0)]):
        world = World(tmp_path / str(at), memory_limit=limit)
        merger = Merger(world.manifest, rule(net()), threads=threads, tile=tile)
        version, stats = world.merged(merger, world.three())
        merger.close()
        told = {k: v for k, v in stats.stats.items() if k != "delta_norm"}  # added tile by tile
        seen.add((version.sha256, tuple(sorted(told.items()))))
    assert len(seen) == 1
    x = world.start.flat("trainable")
    rows = Rows([*(world.delta(i) for i in range(3)), x])
    found = rule(net()).coefficients(rows, [0.5, 0.3, 0.2])
    assert isinstance(found, Reported)
    told = dict(next(iter(seen))[1])
    assert [told[f"lambda/o{i}.0"] for i in range(3)] == found.rows["lambda"]
    assert {k: told[k] for k in found.stats} == found.stats
    assert torch.equal(x - rows.mix(found), version.flat("trainable"))


def test_what_it_takes_is_told_with_every_version(tmp_path: Path) -> None:
    world = World(tmp_path)
    _, stats = world.merged(Merger(world.manifest, rule(net())), world.three())
    told = stats.stats
    assert sum(told[f"lambda/o{i}.0"] for i in range(3)) == pytest.approx(1)
    assert told["gamma"] > 0
    assert told["proxy_loss"] < told["proxy_loss_before"]
    assert not any(name.startswith("coefficient/") for name in told)


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [0.25, 3.0])
def test_damping_survives(tmp_path: Path, total: float) -> None:
    world = World(tmp_path)
    whole, _ = world.merged(Merger(world.manifest, rule(net())), world.three())
    damped, _ = world.merged(Merger(world.manifest, rule(net())), world.three(total))
    expected = min(1.0, total) * world.moved(whole)
    assert torch.allclose(world.moved(damped), expected, atol=1e-6)


def test_a_single_update_of_weight_w_moves_the_model_by_w_times_its_delta(tmp_path: Path) -> None:
    """FedCompass merges singles with small weights: learning on one would undo its damping."""
    world = World(tmp_path)
    item = (world.update("o0.0", world.delta(0)), 0.2)
    version, stats = world.merged(Merger(world.manifest, rule(net())), [item])
    assert torch.allclose(world.moved(version), 0.2 * world.delta(0), atol=1e-7)
    assert stats.stats["fallback"] == 1
    asked = Merger(world.manifest, rule(net(), min_updates=1))
    version, stats = world.merged(asked, [item])  # gamma alone is learned, and damped
    assert stats.stats["lambda/o0.0"] == 1
    gamma, x = stats.stats["gamma"], world.start.flat("trainable")
    expected = 0.2 * ((1 - gamma) * x + gamma * world.delta(0))
    assert gamma != 1
    assert torch.allclose(world.moved(version), expected, atol=1e-6)


def test_an_update_that_is_not_a_number_is_dropped_before_anything_is_learned(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    bad = world.delta(5)
    bad[3] = float("nan")
    merger = Merger(world.manifest, rule(net()))
    version, stats = world.merged(merger, [*world.three(), (world.update("bad", bad), 0.5)])
    expected, _ = world.merged(Merger(world.manifest, rule(net())), world.three())
    assert [name for name, _ in stats.dropped] == ["bad"]
    assert torch.allclose(version.flat("trainable"), expected.flat("trainable"), atol=1e-5)


def test_an_update_of_a_million_times_the_length_is_not_felt(tmp_path: Path) -> None:
    world = World(tmp_path)
    items = [*world.three(), (world.update("huge", world.delta(5, 1e6)), 0.5)]
    version, stats = world.merged(Merger(world.manifest, rule(net())), items)
    assert stats.stats["lambda/huge"] == 0
    assert stats.stats["screened"] == 1
    assert float(world.moved(version).norm()) < 10


def test_what_is_learned_goes_through_the_outer_optimizer(tmp_path: Path) -> None:
    world = World(tmp_path)
    plain, _ = world.merged(Merger(world.manifest, rule(net())), world.three())
    merger = Merger(world.manifest, rule(net()), Momentum(lr=0.5))
    half, _ = world.merged(merger, world.three())
    assert torch.allclose(world.moved(half), 0.5 * world.moved(plain), atol=1e-6)


# ---- buffers -------------------------------------------------------------------------------------


def statistics(version: Version, manifest_net: nn.Module) -> tuple[Tensor, Tensor]:
    """What BatchNorm should have: mean and variance of its inputs under the new model."""
    manifest_net.load_state_dict(version.tensors())
    first = manifest_net[0]  # type: ignore[index]
    inputs = first(examples().x)
    return inputs.mean(dim=0).detach(), inputs.var(dim=0).detach()


def test_batch_norms_statistics_are_taken_anew_from_the_proxy_data(tmp_path: Path) -> None:
    world = World(tmp_path, norm=True)
    version, _ = world.merged(Merger(world.manifest, rule(net(norm=True))), world.three())
    mean, variance = statistics(version, net(norm=True))
    found = version.tensors()
    assert torch.allclose(found["1.running_mean"], mean, atol=1e-5)
    assert torch.allclose(found["1.running_var"], variance, atol=1e-5)
    assert int(found["1.num_batches_tracked"]) == 7  # the largest of the clients', as always


@pytest.mark.parametrize(
    ("given", "buffers", "expected"),
    [
        ({"buffers": "average"}, "weighted_mean", 0.5 * 1 + 0.3 * 2 + 0.2 * 3),
        ({}, "keep_server", None),
        ({}, "personal", None),
    ],
)
def test_or_they_are_averaged_or_stay(
    tmp_path: Path, given: dict[str, object], buffers: Buffers, expected: float | None
) -> None:
    world = World(tmp_path, norm=True)
    merger = Merger(world.manifest, rule(net(norm=True), **given), buffers=buffers)
    version, stats = world.merged(merger, world.three())
    first = world.start.flat("buffers_float")
    wanted = first if expected is None else torch.full_like(first, expected)
    assert torch.allclose(version.flat("buffers_float"), wanted, atol=1e-6)
    assert stats.stats["proxy_loss"] < stats.stats["proxy_loss_before"]


def test_of_validators_they_are_the_mean_of_the_clients(tmp_path: Path) -> None:
    """Who is asked judges by the statistics of its batch, and says nothing of them."""
    world = World(tmp_path, norm=True)
    asks = FedLaw(no_proxy="validators", lr=0.02).with_proxy(Asking(world.count, Bowls()))
    version, stats = world.merged(Merger(world.manifest, asks), world.three())
    wanted = torch.full_like(world.start.flat("buffers_float"), 0.5 * 1 + 0.3 * 2 + 0.2 * 3)
    assert torch.allclose(version.flat("buffers_float"), wanted, atol=1e-6)
    assert stats.stats["validators"] == 2
    assert stats.stats["proxy_loss"] < stats.stats["proxy_loss_before"]


def test_learning_leaves_the_statistics_alone(tmp_path: Path) -> None:
    flat = FlatModel(net(norm=True), examples())
    world = World(tmp_path, norm=True)
    groups: tuple[Group, ...] = ("buffers_float", "buffers_other")
    flat.begin({group: world.start.flat(group) for group in groups})
    flat.vector.copy_(world.start.flat("trainable"))
    before = flatten(world.manifest, flat._named, "buffers_float")
    loss, gradient = flat.gradient(torch.arange(16))
    assert loss > 0
    assert float(gradient.norm()) > 0
    assert torch.equal(flatten(world.manifest, flat._named, "buffers_float"), before)
    assert not torch.equal(flat.settle(), before)
    assert flat.gradient(torch.arange(16))[0] == loss
