"""Vectors: what stands for models and work in virtual time: short lists of floats."""

import hashlib
import math
import random
import struct
from collections.abc import Sequence

Vector = list[float]


def unit(seed: str, size: int) -> Vector:
    """Of length 1. Sums of such vectors differ with their order."""
    rng = random.Random(seed)
    raw = [rng.uniform(-1, 1) * 10.0 ** rng.randrange(8) for _ in range(size)]
    return [x / math.hypot(*raw) for x in raw]


def mean(weighted: Sequence[tuple[Vector, float]]) -> Vector:
    """The weighted mean, summed in the order given."""
    total = sum(weight for _, weight in weighted)
    sums = [0.0] * len(weighted[0][0])
    for vector, weight in weighted:
        sums = [s + weight * x for s, x in zip(sums, vector, strict=True)]
    return [s / total for s in sums]


def length(vector: Vector) -> float:
    """L2; 0, which says nothing, of one that is not finite."""
    found = math.hypot(*vector)
    return found if math.isfinite(found) else 0.0


def sha256(vector: Vector) -> str:
    return hashlib.sha256(struct.pack(f"<{len(vector)}d", *vector)).hexdigest()
