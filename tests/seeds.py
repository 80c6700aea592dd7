"""Seeds: a few of a proof's in the fast tests, the others in the slow ones."""

import pytest


def seeds(fast: int, of: int) -> list[object]:
    """0 to `of` - 1 for `parametrize`; from `fast` on they are slow."""
    return [pytest.param(n, marks=pytest.mark.slow if n >= fast else ()) for n in range(of)]
