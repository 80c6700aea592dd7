"""int4: half a byte a value, scaled by the largest magnitude of its block.

Dettmers et al. 2022, https://arxiv.org/abs/2110.02861 (blocks), with 15 uniform levels; the
quantiser of ProWD (Yoon et al. 2022, https://proceedings.mlr.press/v162/yoon22a.html) for 4 bits.
"""

import torch
from torch import Tensor

from atoll.protocols.codec_blocks import BlockCodec, from_planes, scales_of, to_planes


class Int4(BlockCodec):
    """code = round_half_even(7 x / absmax); off by at most absmax / 14. 7.1 times smaller."""

    kind, bits, default = "int4", 4, 64

    def __init__(
        self,
        block: int = 64,  # values that share a scale, a multiple of 8
    ) -> None:
        super().__init__(block)

    def write(
        self, rows: Tensor, scales: Tensor, codes: Tensor, spare: Tensor, filled: int
    ) -> None:
        found, factors = scales_of(rows, spare, 7)
        scales.copy_(found)
        levels = torch.mul(rows, factors[:, None], out=spare).round_().add_(8)
        codes.copy_(to_planes(levels.to(torch.uint8), 4))

    def levels(self, codes: Tensor, out: Tensor) -> None:
        from_planes(codes, 4, out)
        out.sub_(8)
