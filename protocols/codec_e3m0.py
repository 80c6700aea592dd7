"""E3M0: a sign and a power of two, half a byte a value, for changes whose sizes differ widely.

Streaming DiLoCo (Douillard et al. 2025), https://arxiv.org/abs/2501.18512, sends outer gradients so
and sums them in float32. It does not say how they are scaled; here by the largest of a block.
"""

import torch
from torch import Tensor

from atoll.protocols.codec_blocks import BlockCodec, from_planes, scales_of, to_planes


class E3M0(BlockCodec):
    """The nearest of 0, 1/64, 1/32, ..., 1, times absmax; midpoints go up. 7.98 times smaller."""

    kind, bits, default = "e3m0", 4, 4096

    def __init__(
        self,
        block: int = 4096,  # values that share a scale, a multiple of 8
    ) -> None:
        super().__init__(block)

    def write(
        self, rows: Tensor, scales: Tensor, codes: Tensor, spare: Tensor, filled: int
    ) -> None:
        found, factors = scales_of(rows, spare, 1)
        scales.copy_(found)
        sizes = torch.mul(rows, factors[:, None], out=spare).abs_()
        none = sizes < 1 / 128
        # Half of the significand's range added to a float32's bits carries into its exponent where
        # it is 1.5 times a power of two or more: the exponent is that of the nearest power.
        bits = sizes.view(torch.int32).add_(1 << 22).bitwise_right_shift_(23).sub_(120)
        bits.clamp_(1, 7).masked_fill_(none, 0)
        bits.add_((rows < 0).logical_and_(bits > 0), alpha=8)
        codes.copy_(to_planes(bits.to(torch.uint8), 4))

    def levels(self, codes: Tensor, out: Tensor) -> None:
        """By the bits of a float32: 1 to 7 are the exponents 121 to 127."""
        bits = out.view(torch.int32)
        from_planes(codes, 4, bits)
        sign, size = (bits & 8) << 28, bits & 7
        torch.where(size > 0, (size + 120) << 23, size, out=bits).bitwise_or_(sign)
