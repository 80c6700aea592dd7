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
        midpoints = rows.new_tensor([1 / 128, *(3 / 2**n for n in range(7, 1, -1))])
        sizes = torch.mul(rows, factors[:, None], out=spare).abs_()
        found_codes = torch.bucketize(sizes, midpoints, right=True, out_int32=True)
        found_codes += 8 * ((rows < 0) & (found_codes > 0))
        codes.copy_(to_planes(found_codes.to(torch.uint8), 4))

    def levels(self, codes: Tensor, out: Tensor) -> None:
        """By the bits of a float32: 1 to 7 are the exponents 121 to 127."""
        bits = out.view(torch.int32)
        from_planes(codes, 4, bits)
        sign, size = (bits & 8) << 28, bits & 7
        torch.where(size > 0, (size + 120) << 23, size, out=bits).bitwise_or_(sign)
