"""Buffers: what becomes of the clients' buffers (batch statistics, counters) in a merge.

"weighted_mean": float ones are averaged with the weights normalised to 1 and mixed into the
server's by min(1, sum of the weights), of integer ones the largest is taken; under a robust rule
the median stands for the mean, and for the largest. "keep_server" and "personal": the server's stay
as they are (and the clients' stay with them).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from atoll.protocols.codecs import TILE, all_finite
from atoll.protocols.errors import UsageError
from atoll.protocols.manifest import TRAVELLING, Group
from atoll.protocols.tensors import dtype_of
from atoll.server.draft import Version
from atoll.server.items import Item
from atoll.server.passes import NotFiniteError

Buffers = Literal["weighted_mean", "keep_server", "personal"]


def checked(how: str) -> None:
    """UsageError FL-S102 where there is no such way."""
    if how not in get_args(Buffers):
        raise UsageError("FL-S102", f"buffers={how!r}", f"one of {', '.join(get_args(Buffers))}")


def buffers_to_be(how: Buffers, base: Version, items: Sequence[Item]) -> dict[str, Tensor]:
    """All buffers that come of these items, by group. NotFiniteError."""
    made: dict[str, Tensor] = {}
    for group in TRAVELLING[1:]:
        made[group] = base.flat(group).clone()
        for lo, tile in buffer_tiles(how, group, base, items, robust=False):
            made[group][lo : lo + len(tile)] = tile
    return made


def buffer_tiles(
    how: Buffers, group: Group, base: Version, items: Sequence[Item], robust: bool
) -> Iterator[tuple[int, Tensor]]:
    """The new buffers of a group, tile by tile with where each begins. NotFiniteError."""
    start = base.flat(group)
    if not len(start):
        return
    sent = [(u.payload.decoder(group), w) for u, w in items if w > 0 and u.payload.has(group)]
    total = math.fsum(w for _, w in sent)
    for lo in range(0, len(start), TILE):
        hi = min(lo + TILE, len(start))
        tile = start[lo:hi].clone()
        if how == "weighted_mean" and sent:
            spare = torch.empty(hi - lo, dtype=dtype_of(group))
            if robust:
                values = [decode(lo, hi, torch.empty_like(spare)) for decode, _ in sent]
                if group == "buffers_float" and not all(map(all_finite, values)):
                    raise NotFiniteError  # a median would hide it
                _mix_median(tile, values, total)
            else:
                _mix_mean(tile, ((decode(lo, hi, spare), w) for decode, w in sent), total)
            if group == "buffers_float" and not all_finite(tile):
                raise NotFiniteError
        yield lo, tile


def _mix_mean(tile: Tensor, sent: Iterable[tuple[Tensor, float]], total: float) -> None:
    """Mix buffers of (values, weight) into the server's by min(1, `total` weight), in place."""
    if tile.dtype == torch.int64:
        for value, _ in sent:
            torch.maximum(tile, value, out=tile)
        return
    mix = min(1.0, total)
    tile.mul_(1 - mix)
    for value, weight in sent:
        tile.add_(value, alpha=mix * weight / total)


def _mix_median(tile: Tensor, sent: Sequence[Tensor], total: float) -> None:
    """As `_mix_mean`, where some who sent may not be honest."""
    ordered = torch.stack(list(sent)).sort(dim=0).values
    low, high = ordered[(len(sent) - 1) // 2], ordered[len(sent) // 2]
    if tile.dtype == torch.int64:
        torch.maximum(tile, low, out=tile)
        return
    tile.lerp_((low + high) / 2, min(1.0, total))
