"""Sign: one bit a value, and the mean magnitude of its block. With `+ef`, or it drifts.

Seide et al. 2014, https://www.isca-archive.org/interspeech_2014/seide14_interspeech.html;
Karimireddy et al. 2019 (EF-SignSGD), https://arxiv.org/abs/1901.09847.
"""

from typing import ClassVar

import torch
from torch import Tensor

from atoll.protocols.codec_blocks import BlockCodec, from_planes, to_planes
from atoll.protocols.halving import row_sums


class Sign(BlockCodec):
    """Plus or minus mean |x|; 0 counts as plus. 31.75 times smaller."""

    kind, bits, default = "sign", 1, 4096
    gives: ClassVar[frozenset[str]] = frozenset({"lossy", "sign"})

    def __init__(
        self,
        block: int = 4096,  # values that share a magnitude, a multiple of 8
    ) -> None:
        super().__init__(block)

    def write(
        self, rows: Tensor, scales: Tensor, codes: Tensor, spare: Tensor, filled: int
    ) -> None:
        scales.copy_(row_sums(torch.abs(rows, out=spare).div_(filled)))
        codes.copy_(to_planes((rows >= 0).to(torch.uint8), 1))

    def levels(self, codes: Tensor, out: Tensor) -> None:
        from_planes(codes, 1, out)
        out.mul_(2).sub_(1)
