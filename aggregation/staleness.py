"""Staleness: how much an update still counts, `u` versions after the one it was made from.

A strategy names one in text, so that its parameters stay plain data: `"constant"`,
`"polynomial:0.5"` (the exponent a) or `"hinge:10:4"` (a and b). Source: FedAsync,
https://arxiv.org/abs/1903.03934, section 5.
"""

import functools
import math
from collections.abc import Callable

from atoll.protocols.errors import UsageError

Discount = Callable[[int], float]  # versions elapsed, at least 0 -> factor in (0, 1]


def constant() -> Discount:
    """1, however stale."""
    return lambda u: 1.0


def polynomial(a: float = 0.5) -> Discount:
    """(u + 1)^-a. A negative exponent, which would amplify stale work, is UsageError FL-S102."""
    if not 0.0 <= a < math.inf:
        raise UsageError(
            "FL-S102", f"staleness exponent a={a} would amplify stale updates", "choose a >= 0"
        )
    return lambda u: (u + 1.0) ** -a


def hinge(a: float = 10.0, b: float = 4.0) -> Discount:
    """1 up to u = b, then 1 / (a (u - b) + 1)."""
    if not (0.0 <= a < math.inf and 0.0 <= b < math.inf):
        raise UsageError("FL-S102", f"staleness hinge:{a}:{b}", "choose a >= 0 and b >= 0")
    return lambda u: 1.0 if u <= b else 1.0 / (a * (u - b) + 1.0)


@functools.cache
def discount(spec: str) -> Discount:
    """The function that `spec` names, e.g. `"hinge:10:4"`. Raises UsageError FL-S102 for others."""
    name, *texts = spec.split(":")
    try:
        return _FUNCTIONS[name](*map(float, texts))
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(
            "FL-S102",
            f"unknown staleness {spec!r}",
            "write constant, polynomial:EXPONENT or hinge:A:B",
        ) from error


_FUNCTIONS: dict[str, Callable[..., Discount]] = {
    "constant": constant,
    "polynomial": polynomial,
    "hinge": hinge,
}
