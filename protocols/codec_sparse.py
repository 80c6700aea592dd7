"""Sparse: what codecs share that send a few values of a section and leave out the rest.

They read a tile as (places, values), places ascending and distinct, so that a merge adds a
hundredth of a model where a hundredth was sent.
"""

from typing import Protocol

import torch
from torch import Tensor

from atoll.protocols.errors import RemoteError, UsageError

DTYPES = {16: torch.bfloat16, 32: torch.float32}


class Picks(Protocol):
    """Which elements of [lo, hi), lo < hi, were sent: (int64 places from lo on, float32 values)."""

    def __call__(self, lo: int, hi: int) -> tuple[Tensor, Tensor]: ...


class SparseDecoder:
    """A section that is zero but where `picks` says otherwise."""

    def __init__(self, picks: Picks) -> None:
        self._picks = picks

    def __call__(self, lo: int, hi: int, out: Tensor) -> Tensor:
        out = out[: hi - lo].zero_()
        if hi > lo:
            places, values = self._picks(lo, hi)
            out[places] = values
        return out

    def accumulate(self, lo: int, hi: int, total: Tensor, weight: float, spare: Tensor) -> None:
        """total += weight * values of [lo, hi)."""
        if hi > lo:
            places, values = self._picks(lo, hi)
            total.index_add_(0, places, values, alpha=weight)


def fraction_of(kind: str, fraction: float) -> float:
    """`fraction` if it is one. Raises UsageError FL-S102."""
    if isinstance(fraction, (bool, str)) or not 0 < fraction <= 1:
        raise UsageError(
            "FL-S102", f"{kind} fraction={fraction}", "give the part to keep, e.g. 0.01"
        )
    return float(fraction)


def bits_of(kind: str, bits: int, among: tuple[int, ...]) -> int:
    """`bits` if they are among these. Raises UsageError FL-S102."""
    if type(bits) is not int or bits not in among:
        raise UsageError(
            "FL-S102", f"{kind} bits={bits}", f"give {', '.join(map(str, among))} bits a value"
        )
    return bits


def corrupt(what: str) -> RemoteError:
    """The bytes of a section cannot have come from its encoder."""
    return RemoteError("FL-W105", what, "send what the codec made, unchanged")
