"""Ternary: two bits a value, minus, zero or plus one magnitude for a block.

Li and Liu 2016, Ternary Weight Networks, https://arxiv.org/abs/1605.04711: values up to 0.7 of the
mean magnitude are 0, the others the mean of theirs. ProWD's clients of two bits send so.
"""

import torch
from torch import Tensor

from atoll.protocols.codec_blocks import BlockCodec, from_planes, to_planes
from atoll.protocols.halving import row_sums


class Ternary(BlockCodec):
    """Values of a block are -a, 0 or a. 15.5 times smaller."""

    kind, bits, default = "ternary", 2, 512

    def __init__(
        self,
        block: int = 512,  # values that share a magnitude, a multiple of 8
    ) -> None:
        super().__init__(block)

    def write(
        self, rows: Tensor, scales: Tensor, codes: Tensor, spare: Tensor, filled: int
    ) -> None:
        sizes = torch.abs(rows, out=spare)
        means = row_sums(sizes / filled)
        large = sizes > 0.7 * means[:, None]
        some = row_sums(large.float()).clamp_(min=1)
        scales.copy_(torch.where(means.isfinite(), row_sums(sizes * large / some[:, None]), means))
        codes.copy_(
            to_planes(1 + large.to(torch.uint8) - 2 * (large & (rows < 0)).to(torch.uint8), 2)
        )

    def levels(self, codes: Tensor, out: Tensor) -> None:
        from_planes(codes, 2, out)
        out.sub_(1)
