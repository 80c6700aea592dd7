"""Try an aggregator, yours or ours, on cases made from seeds, as the engine would call it.

`check_aggregator(lambda: MyRule(...))` makes hundreds of merges - few and many updates, twins, one
that is a million times longer, weights that do not sum to 1 - and raises AssertionError with the
seed for what a rule must not do.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atoll.aggregation.aggregator import (
    Aggregator,
    SumAggregator,
    anchored,
    by_stack,
    by_tiles,
    remembers,
)
from atoll.aggregation.mean import Mean
from atoll.aggregation.stack import Rows
from atoll.protocols.errors import RAISED

Make = Callable[[], Aggregator]

MANY, LONG = 9, 1 << 18  # updates and elements of the merge whose memory is watched
NEAR = 1e-4  # a sum in another order, as a share of the longest update


@dataclass(frozen=True)
class Case:
    """One merge. `weights` are a strategy's: raw, their sum is what it is."""

    x: Tensor  # (elements,), the model that is merged into
    deltas: tuple[Tensor, ...]
    weights: tuple[float, ...]

    def permuted(self, order: Sequence[int]) -> "Case":
        picked = tuple(self.deltas[i] for i in order)
        return Case(self.x, picked, tuple(self.weights[i] for i in order))

    def tile(self, lo: int, hi: int) -> "Case":
        return Case(self.x[lo:hi], tuple(d[lo:hi] for d in self.deltas), self.weights)

    def alone(self, i: int) -> "Case":
        return Case(self.x, (self.deltas[i],), (self.weights[i],))


def check_aggregator(make: Make, cases: int = 200) -> None:
    """Run the rules that `make` makes through `cases` merges.

    Holds it to: a vector of the model's length, finite where the updates are; the same bits again,
    from another rule and from the same one; no writing to what it is given; the same result, but
    for rounding, in any order of the updates; of a rule that works tile by tile, the same bits for
    any tiles, and no tensor as large as all updates together; a single update of weight w moves the
    model by no more than w times it, and by exactly that under a mean; of a sum, a NaN that can
    still be seen in it.
    """
    for seed in range(cases):
        try:
            _check(make, case_of(seed), random.Random(f"check/{seed}"))
        except RAISED as error:
            why = error if isinstance(error, AssertionError) else f"it raises {error!r}"
            raise AssertionError(f"seed {seed}: {why}") from error
    _check_memory(make())


def case_of(seed: int) -> Case:
    rng = random.Random(f"case/{seed}")
    draw = torch.Generator().manual_seed(seed)
    length, n = rng.choice([1, 2, 7, 100, 1000]), rng.randint(1, 12)
    deltas = list(
        0.1 * torch.randn(n, length, generator=draw) + torch.randn(length, generator=draw)
    )
    match rng.choice(["alike", "twins", "zeros", "far", "same"]):
        case "twins":
            deltas = [deltas[rng.randrange(n)].clone() for _ in deltas]
        case "zeros":
            deltas = [d * (torch.rand(length, generator=draw) < 0.5) for d in deltas]
        case "far":
            deltas[rng.randrange(n)] *= 1e6
        case "same":
            deltas = [deltas[0].clone() for _ in deltas]
        case _:
            pass
    total = rng.choice([1.0, 1.0, 0.3, 2.0])
    shares = [rng.uniform(0.1, 1.0) for _ in deltas]
    weights = tuple(total * s / math.fsum(shares) for s in shares)
    return Case(torch.randn(length, generator=draw), tuple(deltas), weights)


def merged(rule: Aggregator, case: Case) -> Tensor:
    """What the engine makes of a merge: `server/merge.py`, for vectors in memory."""
    if rule.algebra == "sum":
        return _summed(rule, case.deltas, case.weights, case.x)
    total = math.fsum(case.weights)
    shares = [w / total for w in case.weights]
    if len(case.deltas) < max(1, rule.min_results):
        found = _summed(Mean(), case.deltas, shares, case.x)
    elif by_stack(rule):
        rows = [*case.deltas, *([torch.zeros_like(case.x)] if remembers(rule) else [])]
        rows += [case.x] if anchored(rule) and not remembers(rule) else []
        stack = Rows(rows)
        coefficients = [float(c) for c in rule.coefficients(stack, shares)]
        assert len(coefficients) == len(rows), f"{len(coefficients)} numbers for {len(rows)} rows"
        found = stack.mix(coefficients)
    else:
        assert by_tiles(rule), "a rule over the set has combine() or coefficients()"
        found = rule.combine(case.x, case.deltas, shares)
        assert isinstance(found, Tensor), f"combine() gave {type(found).__name__}"
    return found * min(1.0, total)


def _summed(
    rule: SumAggregator, deltas: Sequence[Tensor], weights: Sequence[float], like: Tensor
) -> Tensor:
    total = torch.full_like(like, 7.0)  # it holds nothing yet, whatever it holds
    for i, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
        rule.add(total, delta, weight, first=i == 0)
    return total


# ---- what is held to -----------------------------------------------------------------------


def _check(make: Make, case: Case, rng: random.Random) -> None:
    rule = make()
    given = [t.clone() for t in (case.x, *case.deltas)]
    found = merged(rule, case)
    wrote = [not torch.equal(a, b) for a, b in zip(given, (case.x, *case.deltas), strict=True)]
    assert not any(wrote), "it writes to what it is given"
    assert found.shape == case.x.shape, f"it gives {tuple(found.shape)} for {tuple(case.x.shape)}"
    assert found.dtype == torch.float32, f"it gives {found.dtype}"
    assert torch.isfinite(found).all(), "of finite updates it makes what is not finite"
    assert torch.equal(merged(make(), case), found), "the same merge gives other bits"
    assert torch.equal(merged(rule, case), found), (
        "it remembers a former merge: made again after a crash, a version would have other bits"
    )
    longest = max(float(d.norm()) for d in case.deltas)
    order = rng.sample(range(len(case.deltas)), len(case.deltas))
    apart = float((merged(make(), case.permuted(order)) - found).norm())
    assert apart <= NEAR * longest, "the order of the updates changes the result"
    if rule.algebra == "sum" or (by_tiles(rule) and rule.coordinatewise):
        cut = rng.randint(0, len(case.x))
        parts = [case.tile(lo, hi) for lo, hi in ((0, cut), (cut, len(case.x))) if lo < hi]
        whole = torch.cat([merged(make(), part) for part in parts])
        assert torch.equal(whole, found), "the tiles change the result"
    _check_single(make, case.alone(rng.randrange(len(case.deltas))))
    if rule.algebra == "sum":
        _check_not_a_number(make, case, rng)


def _check_single(make: Make, case: Case) -> None:
    rule, (delta,), (weight,) = make(), case.deltas, case.weights
    found = merged(rule, case)
    most = min(1.0, weight) if rule.algebra == "set" else weight
    limit = most * float(delta.norm())
    assert float(found.norm()) <= limit * (1 + NEAR), (
        f"a single update of weight {weight:.3g} moves the model by more than {weight:.3g} times it"
    )


def _check_not_a_number(make: Make, case: Case, rng: random.Random) -> None:
    bad, at = rng.randrange(len(case.deltas)), rng.randrange(len(case.x))
    deltas = [d.clone() for d in case.deltas]
    deltas[bad][at] = rng.choice([math.nan, math.inf])
    found = merged(make(), Case(case.x, tuple(deltas), case.weights))
    assert not torch.isfinite(found).all(), "a NaN in an update is hidden by the sum"


def _check_memory(rule: Aggregator) -> None:
    if rule.algebra == "set" and not (by_tiles(rule) and rule.coordinatewise):
        return  # it sees norms and products, or has said that it needs all
    draw = torch.Generator().manual_seed(0)
    deltas = tuple(torch.randn(LONG, generator=draw) for _ in range(MANY))
    case = Case(torch.zeros(LONG), deltas, (1 / MANY,) * MANY)
    with _largest_made() as largest:
        merged(rule, case)
    assert largest[0] < 2 * LONG, (
        f"it makes a tensor of {largest[0]} elements out of {MANY} tiles of {LONG}: "
        "fold them in one by one, or by blocks"
    )


@contextmanager
def _largest_made() -> Iterator[list[int]]:
    """The number of elements of the largest tensor made meanwhile."""
    found = [0]

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made = func(*args, **(kwargs or {}))
            for one in made if isinstance(made, (tuple, list)) else [made]:
                if isinstance(one, Tensor):
                    found[0] = max(found[0], one.numel())
            return made

    with Watch():  # type: ignore[no-untyped-call]
        yield found
