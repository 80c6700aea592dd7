"""The sync engine: DiLoCo's worked numbers, and what it refuses."""

import asyncio
import itertools
import math

import pytest
import torch
from torch import Tensor

from atoll.aggregation.averager import Loopback, NotAveragedError, in_parts
from atoll.aggregation.outer import Adam, Nesterov, Outer, Sgd
from atoll.aggregation.sync_engine import SyncEngine, SyncState


def close(value: float) -> object:
    return pytest.approx(value, abs=2e-7)


def test_two_workers_on_two_parabolas() -> None:
    """f1 = (x - 1)^2 / 2, f2 = (x + 2)^2; inner SGD 0.1, two steps, outer Nesterov 0.7, 0.9.

    From v <- 0.9 v + g; x <- x - 0.7 (g + 0.9 v), by hand, from 0.
    """
    engine = SyncEngine(Nesterov(lr=0.7, momentum=0.9), torch.zeros(1))
    wanted = [
        ((0.19, -0.72), 0.265, -0.35245),
        ((-0.0954845, -0.945568), 0.40657625, -0.72624641),
        ((-0.39825959, -1.1847977), 0.43120086, -1.04360052),
    ]
    for locals_, v, anchor in wanted:
        trained = []
        for slope, at in ((1.0, 1.0), (2.0, -2.0)):
            x = engine.state.anchor.clone()
            for _ in range(2):
                x -= 0.1 * slope * (x - at)
            trained.append(x)
        assert [x.item() for x in trained] == [close(value) for value in locals_]
        deltas = [engine.contribution(x)[0] for x in trained]
        mean, _ = in_parts(deltas, [1.0, 1.0])
        state = engine.commit(mean)
        assert state.outer["momentum"].item() == close(v)
        assert state.anchor.item() == close(anchor)
    assert engine.state.round == 3


def test_one_unit_of_gradient_moves_the_anchor_ten_times_in_the_end() -> None:
    engine = SyncEngine(Nesterov(lr=1.0, momentum=0.9), torch.zeros(1))
    moved, last = [], 0.0
    for step in range(300):
        now = engine.commit(torch.tensor([1.0 if step == 0 else 0.0])).anchor.item()
        moved.append(last - now)
        last = now
    assert moved[:4] == [close(x) for x in (1.9, 0.81, 0.729, 0.6561)]
    assert last == pytest.approx(-10.0, abs=1e-4)


def test_with_one_inner_step_and_no_momentum_it_is_data_parallel_sgd() -> None:
    """Two workers' quadratics; inner SGD of lr 1 for one step, outer SGD of lr 0.05."""
    generator = torch.Generator().manual_seed(5)
    curves = [torch.rand(8, generator=generator, dtype=torch.float64) for _ in range(2)]
    goals = [torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(2)]
    parallel = torch.zeros(8, dtype=torch.float64)
    engine = SyncEngine(Sgd(lr=0.05), torch.zeros(8, dtype=torch.float64))
    for _ in range(20):
        gradients = [c * (parallel - g) for c, g in zip(curves, goals, strict=True)]
        parallel = parallel - 0.05 * (gradients[0] + gradients[1]) / 2
        at = engine.state.anchor
        works = [at - c * (at - g) for c, g in zip(curves, goals, strict=True)]
        mean, _ = in_parts([engine.contribution(work)[0] for work in works], [1.0, 1.0])
        engine.commit(mean)
    assert torch.allclose(engine.state.anchor, parallel, rtol=0, atol=1e-15)


def test_equal_means_give_equal_digests_and_a_joiner_replays_to_the_same() -> None:
    generator = torch.Generator().manual_seed(1)
    one, two = (SyncEngine(Nesterov(), torch.zeros(1000)) for _ in range(2))
    means = [torch.randn(1000, generator=generator) for _ in range(100)]
    joiner = SyncEngine(Nesterov(), torch.zeros(1000))
    for i, mean in enumerate(means):
        if i == 98:
            joiner.load(one.state)
        assert one.commit(mean).digest == two.commit(mean).digest
    for mean in means[98:]:
        joiner.commit(mean)
    assert joiner.state.digest == one.state.digest
    assert joiner.state.round == 100


def test_a_digest_is_of_the_momentum_too() -> None:
    anchor = torch.zeros(3)
    states = [SyncState(anchor, {"momentum": torch.full((3,), m)}) for m in (0.0, 1.0)]
    assert states[0].digest != states[1].digest
    assert SyncState(anchor, {"m": anchor, "v": anchor + 1}).digest == (
        SyncState(anchor.clone(), {"v": anchor + 1, "m": anchor}).digest
    )


@pytest.mark.parametrize("outer", [Nesterov(), Adam()])
def test_an_older_state_stays_what_it_was(outer: Outer) -> None:
    engine = SyncEngine(outer, torch.ones(5))
    old = engine.state
    kept = {name: t.clone() for name, t in {"anchor": old.anchor, **old.outer}.items()}
    for _ in range(3):
        engine.commit(torch.full((5,), 0.5))
    assert all(torch.equal({"anchor": old.anchor, **old.outer}[n], t) for n, t in kept.items())
    assert not torch.equal(engine.state.anchor, old.anchor)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_work_that_is_not_finite_counts_nothing_and_the_rest_is_averaged(value: float) -> None:
    """The result is the mean of the others, and who was not in it goes on from the same anchor."""
    engine = SyncEngine(Sgd(lr=1.0), torch.zeros(2))
    bad, factor = engine.contribution(torch.tensor([1.0, value]))
    assert (bad.tolist(), factor) == ([0.0, 0.0], 0.0)
    rest = [engine.contribution(-torch.tensor([x, 2.0]))[0] for x in (1.0, 3.0)]
    seats = Loopback(["a", "b", "c"])

    async def round_of_three() -> list[Tensor]:
        given = [("a", bad, factor), ("b", rest[0], 1.0), ("c", rest[1], 1.0)]
        found = await asyncio.gather(*(seats.seat(m).average(0, d, w) for m, d, w in given))
        assert [average.group for average in found] == [(("b", 1.0), ("c", 1.0))] * 3
        return [average.mean for average in found]

    means = asyncio.run(round_of_three())
    assert [mean.tolist() for mean in means] == [[2.0, 2.0]] * 3
    assert engine.commit(means[0]).anchor.tolist() == [-2.0, -2.0]


def test_work_a_hundred_times_longer_than_usual_is_an_accident() -> None:
    engine = SyncEngine(Sgd(), torch.zeros(4))
    assert engine.contribution(torch.zeros(4))[1] == 1.0  # no work at all is not what is usual
    for _ in range(5):
        assert engine.contribution(torch.ones(4))[1] == 1.0
    assert engine.contribution(torch.full((4,), 99.0))[1] == 1.0
    usual = 2 + 0.1 * (198 - 2)  # norms of what came
    assert engine.contribution(torch.full((4,), 50.0 * usual * 1.01))[1] == 0.0
    assert engine.contribution(torch.full((4,), 50.0 * usual * 0.99))[1] == 1.0


@pytest.mark.parametrize(
    ("mean", "says"),
    [
        (torch.tensor([0.0, math.nan]), "not finite"),
        (torch.zeros(3), "3 elements for 2"),
        (torch.tensor([3e38, 0.0]), "leads to a model"),
    ],
)
def test_a_mean_that_cannot_be_changes_nothing(mean: Tensor, says: str) -> None:
    engine = SyncEngine(Nesterov(lr=100.0), torch.zeros(2))
    before = engine.commit(torch.ones(2))
    digest = before.digest
    with pytest.raises(ValueError, match=says):
        engine.commit(mean)
    assert engine.state is before
    assert SyncState(before.anchor, before.outer, before.round).digest == digest


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (SyncState(torch.zeros(2)), "anchor for one of anchor, momentum"),
        (SyncState(torch.zeros(3), {"momentum": torch.zeros(2), "steps": torch.zeros(1)}), "(3,)"),
        (
            SyncState(
                torch.zeros(2),
                {"momentum": torch.zeros(2), "steps": torch.zeros(1, dtype=torch.int32)},
            ),
            "int32",
        ),
        (
            SyncState(
                torch.zeros(2),
                {
                    "momentum": torch.tensor([0.0, math.inf]),
                    "steps": torch.zeros(1, dtype=torch.int64),
                },
            ),
            "momentum is not finite",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state: SyncState, says: str) -> None:
    engine = SyncEngine(Nesterov(), torch.zeros(2))
    before = engine.state
    with pytest.raises(ValueError, match=says.replace("(", r"\(").replace(")", r"\)")):
        engine.load(state)
    assert engine.state is before


def test_weights_count_relative_to_each_other_and_weight_0_not_at_all() -> None:
    generator = torch.Generator().manual_seed(2)
    deltas = {m: torch.randn(100, generator=generator) for m in "abc"}

    async def mean(weights: dict[str, float]) -> Tensor:
        group = Loopback(list(weights))
        asked = (group.seat(m).average(0, deltas[m], w) for m, w in weights.items())
        return (await asyncio.gather(*asked))[0].mean

    async def all_of_them() -> list[Tensor]:
        return [
            await mean({"a": 3.0, "b": 1.0}),
            await mean({"a": 384.0, "b": 128.0}),
            await mean({"a": 3.0, "b": 1.0, "c": 0.0}),
        ]

    one, scaled, watched = asyncio.run(all_of_them())
    assert torch.equal(one, scaled)
    assert torch.equal(one, watched)
    assert torch.allclose(one, (3 * deltas["a"] + deltas["b"]) / 4)


def test_a_second_submission_replaces_the_first_and_a_late_one_learns_the_mean() -> None:
    async def play() -> None:
        group = Loopback(["a", "b", "c"])
        first = asyncio.ensure_future(group.seat("a").average(0, torch.tensor([100.0]), 1.0))
        await asyncio.sleep(0)
        again = asyncio.ensure_future(group.seat("a").average(0, torch.tensor([4.0]), 1.0))
        other = asyncio.ensure_future(group.seat("b").average(0, torch.tensor([2.0]), 1.0))
        await asyncio.sleep(0)
        group.close(0)
        found = await asyncio.gather(first, again, other)
        late = await group.seat("c").average(0, torch.tensor([7.0]), 1.0)
        assert [average.mean.item() for average in (*found, late)] == [3.0] * 4
        assert late.weight == 2.0

    asyncio.run(play())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"a": (0.0, 0.0), "b": (0.0, 0.0)}, "nobody has work"),
        ({"a": (1.0, 1.0), "b": (math.nan, 1.0)}, "b: not finite"),
    ],
)
def test_a_round_without_a_mean_says_why(given: dict[str, tuple[float, float]], says: str) -> None:
    async def play() -> None:
        group = Loopback(list(given))
        asked = [group.seat(m).average(7, torch.tensor([d]), w) for m, (d, w) in given.items()]
        for failed in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(failed, NotAveragedError)
            assert f"round 7: {says}" in str(failed)

    asyncio.run(play())


def test_the_mean_has_the_same_bits_wherever_the_vector_is_cut() -> None:
    """Elementwise kernels differ between the body of a vector and its rest, if they differ."""
    generator = torch.Generator().manual_seed(3)
    deltas = [torch.randn(5000, generator=generator) * 10.0**i for i in range(-2, 3)]
    weights = [3.0, 1.0, 0.3, 7.0, 11.0]
    whole, _ = in_parts(deltas, weights)
    for cut in itertools.chain(range(1, 70), (1234, 4999)):
        parts, _ = in_parts(deltas, weights, (cut, 5000 - cut))
        assert torch.equal(parts, whole), cut
