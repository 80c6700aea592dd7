"""Shares: which part of the vector each peer of a group reduces, by its bandwidth.

DeDLOC (Diskin et al. 2021, https://arxiv.org/abs/2106.10207) solves a linear program; hivemind's
form of it, min over shares f of the slowest peer's (1 + (n - 2) f) / b, has a closed solution. The
leader computes it once and ships whole elements, so nobody's floats can differ from another's.
Bandwidths are claims: ours has a bound, so that no claim buys more than two equal shares, and each
member checks that the leader kept it.
"""

import itertools
import math
import statistics
from collections.abc import Sequence

PIECES = 4  # of a peer's share, at most
PIECE = 1 << 20  # elements of one, at least
ALIKE = 2.0  # times faster or slower than the median, and still as good as it
SPREAD = 1000.0  # times faster or slower than the median, at most


def assumed(claims: Sequence[float]) -> list[float]:
    """Bandwidths to reckon with, in medians of those that are known; 0 stays 0.

    inf: nothing was measured, so it is taken for the median, as is what is within `ALIKE` of it:
    so much a busy machine makes of equal lines. None is more than `SPREAD` from it: whatever is
    claimed, there are shares.
    """
    known = [c for c in claims if 0 < c < math.inf]
    middle = statistics.median_low(known) if known else 1.0

    def one(claim: float) -> float:
        ratio = claim / middle
        if math.isinf(claim) or 1 / ALIKE <= ratio <= ALIKE:
            return 1.0
        return min(max(ratio, 1 / SPREAD), SPREAD)

    return [one(c) if c > 0 else 0.0 for c in claims]


def at_most(bandwidths: Sequence[float]) -> float:
    """The largest fraction that one peer may reduce: two equal shares of those who can."""
    able = sum(b > 0 for b in bandwidths)
    return 2 / able if able > 2 else 1.0


def longest(total: int, bandwidths: Sequence[float]) -> int:
    """Elements of `total` that one peer may reduce, with the few that `split` rounds."""
    return math.ceil(at_most(bandwidths) * total) + len(bandwidths)


def shares(bandwidths: Sequence[float]) -> list[float]:
    """The fraction that each peer reduces; they sum to 1, and 0 bandwidth reduces nothing.

    `bandwidths`: any unit, 0 for one that cannot accept connections. ValueError where all are 0.
    None is above `at_most`; who would be has that, and the others the rest as if it were all. Where
    the slowest sender alone sets the time, solutions are many: ours is proportional.
    """
    able = [b for b in bandwidths if b > 0]
    if not able:
        raise ValueError("nobody in the group can reduce: all bandwidths are 0")
    n, bound = len(bandwidths), at_most(bandwidths)
    full: set[int] = set()  # places of those at the bound
    while True:
        rest = [b for i, b in enumerate(bandwidths) if b > 0 and i not in full]
        left = (n - 2) * (1 - bound * len(full))
        time = max(1 / min(able), (left + len(rest)) / sum(rest))
        loads = [max(0.0, time * b - 1) if b > 0 else 0.0 for b in bandwidths]
        raw = [min(load, (n - 2) * bound) if n > 2 else load for load in loads]
        more = {i for i, load in enumerate(loads) if n > 2 and load > (n - 2) * bound} - full
        if not more or bound == 1:
            break
        full |= more
    if sum(raw) <= 1e-12 * n:
        raw = [max(0.0, b) for b in bandwidths]
    total = sum(raw)
    return [f / total for f in raw]


def split(total: int, fractions: Sequence[float], least: int = 1) -> list[int]:
    """`total` elements by Hagenbach-Bischoff: each next one to the largest fraction / (held + 1).

    Parts below `least` elements are given to the others; the largest fraction is always kept. Ties
    go to the first. The seats that are certain are dealt at once, so it is quick for any `total`.
    """
    top = max(range(len(fractions)), key=lambda i: (fractions[i], -i))
    kept = [f if f * total >= least or i == top else 0.0 for i, f in enumerate(fractions)]
    whole = sum(kept)
    parts = [max(0, int(f / whole * total)) for f in kept]  # nobody gets fewer than its floor
    for _ in range(total - sum(parts)):
        first = max(range(len(kept)), key=lambda i: (kept[i] / (parts[i] + 1), -i))
        parts[first] += 1
    return parts


def cut(count: int, least: int = PIECE) -> list[int]:
    """A peer's `count` elements in pieces of about the same size: while one travels another is
    reduced, and a third is on its way to all."""
    number = min(PIECES, max(1, count // least))
    ends = [count * i // number for i in range(number + 1)]
    return [stop - start for start, stop in itertools.pairwise(ends)]
