"""int8: one byte a value, scaled by the largest magnitude of its block.

Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization,
https://arxiv.org/abs/2110.02861 (its blocks, with uniform levels).
"""

import torch
from torch import Tensor

from atoll.protocols.codec_blocks import BlockCodec, scales_of


class Int8(BlockCodec):
    """code = round_half_even(127 x / absmax); off by at most absmax / 254. 3.94 times smaller."""

    kind, bits, default = "int8", 8, 256

    def __init__(
        self,
        block: int = 256,  # values that share a scale, a multiple of 8
    ) -> None:
        super().__init__(block)

    def write(
        self, rows: Tensor, scales: Tensor, codes: Tensor, spare: Tensor, filled: int
    ) -> None:
        found, factors = scales_of(rows, spare, 127)
        scales.copy_(found)
        codes.view(torch.int8).copy_(torch.mul(rows, factors[:, None], out=spare).round_())

    def levels(self, codes: Tensor, out: Tensor) -> None:
        out.copy_(codes.view(torch.int8))
