"""Robust rules: the spec's worked numbers, identities, and what 30 % of attackers do to each."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from atoll.aggregation.aggregator import Aggregator, aggregator, by_stack, by_tiles, remembers
from atoll.aggregation.centered_clipping import CenteredClipping
from atoll.aggregation.krum import Krum, MultiKrum, scores
from atoll.aggregation.median import Median
from atoll.aggregation.norm_clipping import NormClipping
from atoll.aggregation.rfa import GeometricMedian
from atoll.aggregation.robust import Robust, least, middle, share_of
from atoll.aggregation.stack import CHUNK, Rows
from atoll.aggregation.trimmed_mean import TrimmedMean
from atoll.protocols.errors import UsageError

V = torch.tensor(
    [[1, 2], [1.2, 1.8], [0.8, 2.2], [1.1, 2.1], [0.9, 1.9], [10, -10], [12, -8]],
    dtype=torch.float32,
)
INF = math.inf

ALL = [
    "median", "trimmed-mean:trim=0.3", "krum:f=0.3", "multi-krum:f=0.3", "rfa", "geometric-median",
    "centered-clipping", "centered-clipping:radius=0.5", "norm-clipping", "norm-clipping:limit=0.5",
]  # fmt: skip
ON_PLACE = [s for s in ALL if not s.startswith("norm")]  # does not matter where the origin is


def result(
    rule: Aggregator,
    deltas: Tensor | Sequence[Tensor],
    weights: Sequence[float] | None = None,
    memory: Tensor | None = None,
) -> Tensor:
    """What `rule` makes of whole vectors in memory; equal weights where none are given."""
    rows = list(deltas)
    shares = list(weights or [1 / len(rows)] * len(rows))
    assert rule.algebra == "set"
    if by_stack(rule):
        if remembers(rule):
            rows.append(torch.zeros_like(rows[0]) if memory is None else memory)
        stack = Rows(rows)
        return stack.mix(rule.coefficients(stack, shares))
    assert by_tiles(rule)
    return rule.combine(torch.zeros_like(rows[0]), rows, shares)


def near(found: Tensor, expected: Sequence[float], within: float = 2e-6) -> bool:
    return torch.allclose(found, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=within)


def honest(n: int, seed: int, length: int = 20) -> Tensor:
    """Updates that are alike: one direction, and noise."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(length, generator=draw) + 0.3 * torch.randn(n, length, generator=draw)


# ---- the spec's numbers (robust-aggregation, 8) --------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Median(), (1.1, 1.9)),
        (TrimmedMean(2), (1.1, 1.9)),
        (TrimmedMean(0.3), (1.1, 1.9)),
        (TrimmedMean(1), (2.84, -0.04)),
        (TrimmedMean(0), (3.857143, -1.142857)),
        (Krum(2), (1, 2)),
        (MultiKrum(2, m=3), (1, 2)),
        (MultiKrum(2), (1, 2)),
        (MultiKrum(2, m=7), (3.857143, -1.142857)),
        (GeometricMedian(), (1.054058, 1.940201)),
        (GeometricMedian(iterations=0), (3.857143, -1.142857)),
        (GeometricMedian(iterations=1), (2.372527, 0.492353)),
        (GeometricMedian(iterations=2), (1.601345, 1.339968)),
        (GeometricMedian(iterations=3), (1.265049, 1.710766)),
        (CenteredClipping(1, iterations=1), (0.539272, 0.456290)),
        (CenteredClipping(1, iterations=2), (0.955843, 0.945717)),
        (CenteredClipping(1), (1.190817, 1.430294)),
        (CenteredClipping(INF, iterations=1), (3.857143, -1.142857)),
        (NormClipping(3), (1.373924, 0.887797)),
        (NormClipping(), (1.227041, 1.002838)),
        (NormClipping(INF), (3.857143, -1.142857)),
    ],
    ids=str,
)
def test_the_worked_numbers(rule: Aggregator, expected: tuple[float, float]) -> None:
    within = 1e-5 if rule == GeometricMedian() else 2e-6  # it stops when it nearly stands
    assert near(result(rule, V), expected, within)


@pytest.mark.parametrize(
    ("iterations", "expected"),
    [(1, (1.191420, 1.789618)), (2, (1.246079, 1.729548)), (3, (1.261687, 1.712396))],
)
def test_clipping_goes_out_from_the_last_result(
    iterations: int, expected: tuple[float, float]
) -> None:
    rule = CenteredClipping(1, iterations)
    assert near(result(rule, V, memory=torch.tensor([1.0, 2.0])), expected)


def test_krums_scores() -> None:
    found = scores(Rows(list(V)).gram(), 2)
    assert found.tolist() == pytest.approx([0.12, 0.28, 0.28, 0.20, 0.20, 449.1, 441.5], rel=1e-5)
    assert MultiKrum(2, m=3).coefficients(Rows(list(V)), []) == [1 / 3, 0, 0, 1 / 3, 1 / 3, 0, 0]


def test_a_twin_is_a_neighbour_and_not_oneself() -> None:
    """Twins that took each other for themselves would both have score 0."""
    stack = Rows([torch.tensor([x]) for x in (0.0, 0.0, 1.0, 5.0, 9.0)])
    assert scores(stack.gram(), 1).tolist() == [1, 1, 2, 32, 80]
    assert Krum(1).coefficients(stack, []) == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("rule", [Median(), TrimmedMean(1)], ids=str)
def test_an_even_number_has_two_in_the_middle(rule: Aggregator) -> None:
    scalars = [torch.tensor([x]) for x in (100.0, 1.0, 3.0, 2.0)]
    assert result(rule, scalars).tolist() == [2.5]


def test_the_median_length_of_an_even_number_is_between_the_two_in_the_middle() -> None:
    assert middle(torch.tensor([100.0, 1.0, 3.0, 2.0])) == 2.5
    clipped = result(NormClipping(), [torch.tensor([x]) for x in (100.0, 1.0, 3.0, 2.0)])
    assert clipped.tolist() == [(2.5 + 1 + 2.5 + 2) / 4]


# ---- identities --------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("n", [5, 8, 10])
def test_of_equal_updates_every_rule_makes_that_update(spec: str, n: int) -> None:
    one = honest(1, n)[0]
    one *= 0.4 / one.norm()  # within the limits given
    assert torch.allclose(result(aggregator(spec), [one] * n), one, atol=1e-6)


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_updates_does_not_matter(spec: str, seed: int) -> None:
    deltas = honest(9, seed)
    deltas[3] *= -30
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    rule = aggregator(spec)
    assert torch.allclose(result(rule, deltas[order]), result(rule, deltas), atol=1e-6)


@pytest.mark.parametrize("spec", ON_PLACE)
def test_updates_that_all_move_by_something_move_the_result_by_it(spec: str) -> None:
    deltas, by = honest(9, 1), 3 * honest(1, 2)[0]
    rule, still = aggregator(spec), torch.zeros(20)
    moved = result(rule, deltas + by, memory=by)
    assert torch.allclose(moved, result(rule, deltas, memory=still) + by, atol=1e-4)


@pytest.mark.parametrize("spec", [s for s in ALL if "=0.5" not in s])
@pytest.mark.parametrize("factor", [1e-3, 1e6, 1e30])
def test_updates_of_another_scale_give_a_result_of_that_scale(spec: str, factor: float) -> None:
    deltas, rule = honest(9, 3), aggregator(spec)
    expected = result(rule, deltas) * factor
    assert torch.allclose(result(rule, deltas * factor), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("spec", ["rfa", "centered-clipping:radius=inf", "norm-clipping:limit=inf"])
def test_weights_count_where_a_rule_is_told_to_use_them(spec: str) -> None:
    deltas, weights = honest(5, 4), [0.6, 0.1, 0.1, 0.1, 0.1]
    colon = "," if ":" in spec else ":"
    with_them = aggregator(f"{spec}{colon}weighted=true")
    without = aggregator(f"{spec}{colon}weighted=false")
    assert torch.allclose(result(without, deltas, weights), result(without, deltas))
    if spec == "rfa":  # more than half of the weight at one point: it is the median
        assert torch.allclose(result(with_them, deltas, weights), deltas[0], atol=1e-4)
    else:
        mean = torch.tensor(weights) @ deltas
        assert torch.allclose(result(with_them, deltas, weights), mean, atol=1e-6)


@pytest.mark.parametrize("spec", [*ALL, "multi-krum:f=1,m=3", "krum:f=1", "trimmed-mean:trim=2"])
def test_arguments_are_not_written_to(spec: str) -> None:
    deltas = honest(7, 6)
    before = deltas.clone()
    result(aggregator(spec), deltas)
    assert torch.equal(deltas, before)


def test_the_sums_of_a_stack_are_those_of_whole_vectors() -> None:
    rows = honest(4, 7, 2 * CHUNK + 77)
    stack, whole = Rows(list(rows)), rows.double() @ rows.double().T
    assert torch.allclose(stack.gram(), whole, rtol=1e-12)
    assert torch.allclose(stack.squares(), whole.diagonal(), rtol=1e-12)
    assert len(stack) == 4


# ---- attacks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["median", "trimmed-mean:trim=0.3", "krum:f=0.3",
                                  "multi-krum:f=0.3", "rfa"])  # fmt: skip
@pytest.mark.parametrize("value", [1e30, -1e30, 3e38])
@pytest.mark.parametrize("attackers", [1, 3])
def test_the_result_stays_among_the_honest_whatever_the_others_send(
    spec: str, value: float, attackers: int
) -> None:
    deltas = honest(10, 8)
    deltas[:attackers] = value
    good = deltas[attackers:]
    slack = 1e-3 if spec == "rfa" else 1e-6
    found = result(aggregator(spec), deltas)
    assert bool((found >= good.amin(dim=0) - slack).all())
    assert bool((found <= good.amax(dim=0) + slack).all())


ATTACKS = {"sign flip": -5.0, "times 1000": 1000.0, "flip times 1000": -1000.0}


def left(rule: Aggregator | None, factor: float, attackers: int, rounds: int = 60) -> float:
    """How far from the optimum ten clients end, each with its own least squares; None: the mean.

    At the start it is 1. An attacker sends `factor` times what it found.
    """
    draw = torch.Generator().manual_seed(0)
    optimum = torch.ones(8) / math.sqrt(8)
    a = torch.randn(10, 40, 8, generator=draw)
    b = (a @ optimum) + 0.01 * torch.randn(10, 40, generator=draw)
    x, memory = torch.zeros(8), torch.zeros(8)
    for _ in range(rounds):
        deltas = torch.einsum("nij,ni->nj", a, torch.einsum("nij,j->ni", a, x) - b) * 0.2 / 40
        deltas[:attackers] *= factor
        memory = deltas.mean(dim=0) if rule is None else result(rule, deltas, memory=memory)
        x = x - memory
    return float((x - optimum).norm())


@pytest.mark.parametrize("attack", ATTACKS)
def test_thirty_percent_of_attackers_wreck_the_mean(attack: str) -> None:
    assert left(None, 1.0, 0) < 0.02
    assert not left(None, ATTACKS[attack], 3) < 1e3


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("spec", [s for s in ALL if "=0.5" not in s])
def test_thirty_percent_of_attackers_do_not_wreck_a_robust_rule(spec: str, attack: str) -> None:
    assert left(aggregator(spec), ATTACKS[attack], 3) < 0.1


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("spec", ["centered-clipping:radius=0.03", "norm-clipping:limit=0.03"])
def test_a_fixed_radius_bounds_how_far_attackers_pull(spec: str, attack: str) -> None:
    """Where honest clients pull back by 0.7 * 0.2 of the way, 0.3 * 0.03 holds out at 0.064."""
    assert left(aggregator(spec), ATTACKS[attack], 3, rounds=150) < 0.1


@pytest.mark.parametrize("spec", ALL)
def test_without_attackers_a_robust_rule_finds_what_the_mean_finds(spec: str) -> None:
    assert left(aggregator(spec), 1.0, 0) < 0.05


# ---- parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "fewest"),
    [
        (Median(), 3),
        (TrimmedMean(0), 1), (TrimmedMean(0.2), 5), (TrimmedMean(0.1), 10), (TrimmedMean(2), 5),
        (Krum(0), 3), (Krum(1), 5), (Krum(2), 7), (Krum(0.2), 5), (Krum(0.3), 5), (MultiKrum(1), 5),
        (GeometricMedian(), 3),
        (CenteredClipping(), 3), (CenteredClipping(1.0), 1), (NormClipping(), 3),
        (NormClipping(1.0), 1),
    ],
    ids=str,
)  # fmt: skip
def test_how_many_updates_a_rule_needs(rule: Aggregator, fewest: int) -> None:
    assert rule.algebra == "set"
    assert rule.min_results == fewest


@pytest.mark.parametrize("value", [0.01, 0.1, 0.2, 0.29, 0.3, 0.33, 0.4, 0.45, 0.49])
@pytest.mark.parametrize("spare", [1, 3])
def test_from_the_fewest_on_a_share_always_leaves_enough(value: float, spare: int) -> None:
    fewest = least(value, spare)
    assert share_of(value, fewest) >= 1
    assert all(n >= 2 * share_of(value, n) + spare for n in range(fewest, fewest + 500))
    before = share_of(value, fewest - 1)
    assert before < 1 or fewest - 1 < 2 * before + spare


def test_a_share_is_not_lost_to_rounding() -> None:
    assert share_of(0.29, 100) == 29  # 0.29 * 100 is 28.999999999999996
    assert share_of(0.3, 9) == 2
    assert share_of(3, 9) == 3


@pytest.mark.parametrize(
    "spec",
    [
        "trimmed-mean:trim=0.5", "trimmed-mean:trim=-0.1", "trimmed-mean:trim=1.5",
        "trimmed-mean:trim=nan", "trimmed-mean:trim=inf", "krum:f=-1", "krum:f=0.5", "krum:f=2.5",
        "multi-krum:m=0", "rfa:iterations=-1", "rfa:floor=0", "centered-clipping:radius=0",
        "centered-clipping:iterations=0", "centered-clipping:radius=nan", "norm-clipping:limit=-1",
        "median:trim=1",
    ],
)  # fmt: skip
def test_parameters_out_of_range_are_refused(spec: str) -> None:
    with pytest.raises(UsageError) as told:
        aggregator(spec)
    assert told.value.code == "FL-S102"
    assert told.value.hint


@pytest.mark.parametrize("spec", ALL)
def test_a_robust_rule_says_what_it_is(spec: str) -> None:
    rule = aggregator(spec)
    assert isinstance(rule, Robust)
    assert (rule.algebra, rule.needs, rule.private, rule.robust) == (
        "set",
        frozenset(),
        False,
        True,
    )
    assert remembers(rule) == spec.startswith("centered")


def test_a_class_without_the_methods_of_its_algebra_is_refused() -> None:
    with pytest.raises(UsageError, match="none of its methods") as told:
        aggregator("atoll.aggregation.robust:Robust")
    assert told.value.code == "FL-S102"


def test_the_median_of_sparse_updates_is_almost_nothing() -> None:
    """Which is why it refuses them: of ten who send 1 % of their values each, nobody is heard."""
    draw = torch.Generator().manual_seed(0)
    deltas = torch.randn(10, 10_000, generator=draw)
    deltas *= torch.rand(10, 10_000, generator=draw) < 0.01
    assert (deltas.mean(dim=0) != 0).float().mean() > 0.09
    assert (result(Median(), deltas) != 0).float().mean() < 0.001
    assert (result(TrimmedMean(0.2), deltas) != 0).float().mean() < 0.001
