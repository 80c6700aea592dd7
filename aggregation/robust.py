"""Robust: what the rules share that survive clients who send anything at all.

    rule                 survives                 costs          reads
    median               < 1/2                    some accuracy  tiles
    trimmed-mean:trim    trim                     little         tiles
    krum:f               f of 2f + 3              averaging      inner products
    multi-krum:f,m       f of 2f + 3              little         inner products
    rfa                  < 1/2                    nothing        inner products
    centered-clipping    < 1/2, given time        nothing        inner products
    norm-clipping        bounds each one's pull   nothing        norms

All assume that honest updates are alike: on very uneven data they also cut off honest minorities.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from atoll.aggregation.checks import at_least, at_most
from atoll.protocols.errors import UsageError


class Robust:
    """Base: a rule over the set, which must see single updates."""

    algebra: ClassVar[Literal["set"]] = "set"
    needs: ClassVar[frozenset[str]] = frozenset()
    private: ClassVar[bool] = False
    robust: ClassVar[bool] = True


def check_share(**values: float) -> None:
    """Every value is a share of the updates, below 1/2, or a whole number of them. FL-S102."""
    for name, value in values.items():
        at_least(0, **{name: value})
        if value < 1:
            at_most(0.49, **{name: value})
        elif not float(value).is_integer():
            raise UsageError(
                "FL-S102", f"{name}={value}", "choose a share up to 0.49, or a whole number"
            )


def share_of(value: float, n: int) -> int:
    """How many of `n` updates a share, or a whole number, means."""
    return int(value) if value >= 1 else int(value * n + 1e-9)  # 0.29 * 100 is 28.999...


def least(value: float, spare: int) -> int:
    """The fewest updates of which `share_of` is at least one (if it ever is), and from which on
    there are always twice that many and `spare`.
    """
    if value >= 1 or value == 0:
        return 2 * int(value) + spare
    n = max(math.ceil(spare / (1 - 2 * value)), math.ceil(1 / value - 1e-9))
    while share_of(value, n - 1) and n - 1 >= 2 * share_of(value, n - 1) + spare:
        n -= 1
    return n


def distances(gram: Tensor, centre: Tensor) -> Tensor:
    """(rows,) from each row to the point sum of centre[i] * row i; `gram` as `Stack.gram`."""
    to_centre = gram @ centre
    squares = gram.diagonal() - 2 * to_centre + centre @ to_centre
    return squares.clamp(min=0).sqrt()


def within(lengths: Tensor, limit: float) -> Tensor:
    """The factor that shortens each length to at most `limit`."""
    return torch.where(lengths <= limit, 1.0, limit / lengths)


def middle(values: Tensor) -> float:
    """The median of a few numbers; of an even number, the mean of the two in the middle."""
    ordered = values.sort().values
    n = len(ordered)
    return float(ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def shares(weights: Sequence[float], weighted: bool) -> Tensor:
    """(n,) float64, sum 1: the strategy's weights, or alike for all."""
    n = len(weights)
    return torch.tensor(weights if weighted else [1 / n] * n, dtype=torch.float64)
