"""Twelve bits: places within 4096, two in three bytes, as SparseLoCo sends them.

Sarfi et al. 2025, https://arxiv.org/abs/2508.15706.
"""

import torch
from torch import Tensor


def size(places: int) -> int:
    """Bytes of a row of `places`."""
    return -(-places * 3 // 2)


def pack(places: Tensor) -> Tensor:
    """int64 places (rows, k) below 4096 as bytes (rows, size(k)), the lower bits first."""
    rows, count = places.shape
    if count % 2:
        places = torch.cat([places, places.new_zeros(rows, 1)], dim=1)
    low, high = places[:, 0::2], places[:, 1::2]
    made = torch.stack([low & 255, (low >> 8) | ((high & 15) << 4), high >> 4], dim=2)
    return made.to(torch.uint8).view(rows, -1)[:, : size(count)]


def unpack(packed: Tensor, count: int) -> Tensor:
    """int64 places (rows, count) of bytes (rows, size(count)); a half byte left over is ignored."""
    rows = len(packed)
    if count % 2:
        packed = torch.cat([packed, packed.new_zeros(rows, 1)], dim=1)
    first, middle, last = packed.view(rows, -1, 3).to(torch.int64).unbind(2)
    both = torch.stack([first | ((middle & 15) << 8), (middle >> 4) | (last << 4)], dim=2)
    return both.view(rows, -1)[:, :count]
