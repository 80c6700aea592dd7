"""Part mean: what a peer does with the parts of a vector that it reduces (`allreduce.Combine`).

The weighted mean in the order given, by the sum that a server's merge takes (`mean.py`), so that
both give the same bits; and before it what hivemind's reducers lack: an input that is not finite is
refused by name, and no peer's part may be longer than `most` times the median of all, as Templar
limits contributions (there by the whole vector).
"""

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from atoll.aggregation.mean import Mean
from atoll.protocols.codecs import all_finite, square

MEAN = Mean()
TILE = 1 << 16  # elements: the sums stay in the cache


def part_mean(
    parts: Sequence[Tensor],
    weights: Sequence[float],
    most: float = math.inf,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, tuple[int, ...]]:
    """The mean, fp32 of the parts' length, and the places of inputs that are not finite.

    `parts`: flat, fp32, all of one length; `weights`: above 0. Where any input is not finite the
    mean is all zeros and must not be used. It lies in `out` if given; nothing else is written to.
    The same inputs in the same order give the same bits. Not lengthened, only shortened: a zero
    part stays one.
    """
    assert parts, "nothing to reduce"
    assert len(parts) == len(weights), f"{len(parts)} parts, {len(weights)} weights"
    assert all(w > 0 for w in weights), f"weights {weights}"
    factors = [1.0] * len(parts) if math.isinf(most) else _limit(parts, most)
    share, bad = math.fsum(weights), set()
    total = torch.empty_like(parts[0]) if out is None else out
    for lo in range(0, len(total), TILE):  # an input is read once: looked at and added up
        sums = total[lo : lo + TILE]
        for i, (part, weight, factor) in enumerate(zip(parts, weights, factors, strict=True)):
            tile = part[lo : lo + TILE]
            if not all_finite(tile):
                bad.add(i)
            MEAN.add(sums, tile, weight * factor / share, first=i == 0)
    if bad:
        total.zero_()
    return total, tuple(sorted(bad))


def _limit(parts: Sequence[Tensor], most: float) -> list[float]:
    """What each part is multiplied by, so that none is longer than `most` medians."""
    norms = [norm(part) for part in parts]
    limit = most * statistics.median(norms)
    return [min(1.0, limit / length) if length > 0 else 1.0 for length in norms]


def norm(part: Tensor) -> float:
    """L2; not finite where a value is not."""
    total = sum(square(part[lo : lo + TILE]) for lo in range(0, len(part), TILE))
    return math.sqrt(total) if math.isfinite(total) else math.inf
