"""Contribution: what a peer brings to the mean of one epoch, packed part by part.

    contribution = Contribution(delta, parse("topk:0.01+ef"), residual)
    payloads = contribution.packed(plan.parts)  # for each attempt anew: its parts may be others
    residual = contribution.left_out(plan.parts, payloads)  # once the mean was applied, not before

An attempt that fails changes nothing, and where the peer's work is not in the mean its residual
stays what it was: what had been sent is not taken for received.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from atoll.aggregation.allreduce import Part
from atoll.aggregation.part_mean import norm
from atoll.protocols import codecs, feedback
from atoll.protocols.codecspec import Chain
from atoll.protocols.errors import UsageError

LONGEST = 1e15  # length that is said of any work: letters take no larger number


class Contribution:
    """`delta`: flat, fp32, on the CPU, never written to. `residual`: what `left_out` gave last."""

    def __init__(self, delta: Tensor, chain: Chain, residual: Tensor | None = None) -> None:
        self.codec = packer(chain)
        self._feedback = chain.feedback is not None
        self._whole = delta
        rule = chain.feedback
        if rule is None or residual is None or feedback.too_long(rule, residual, delta):
            return
        self._whole = torch.add(delta, residual, alpha=rule.decay)

    @property
    def length(self) -> float:
        """L2, of what it gives, before its codec."""
        return min(norm(self._whole), LONGEST)

    def packed(self, parts: Sequence[Part]) -> tuple[memoryview, ...]:
        """Bytes of each part; of fp32 the delta's own, without a copy."""
        return tuple(self.codec.encode(self._whole[p.start : p.stop]) for p in parts)

    def left_out(self, parts: Sequence[Part], payloads: Sequence[memoryview]) -> Tensor | None:
        """The residual after these payloads were used; None without error feedback."""
        if not self._feedback:
            return None
        kept = self._whole.clone()
        for part, payload in zip(parts, payloads, strict=True):
            here = kept[part.start : part.stop]
            feedback.subtract(self.codec.decoder(payload, here.numel()), here)
        return kept


def packer(chain: Chain) -> codecs.Codec:
    """The codec of `chain` for parts of a vector. UsageError FL-P401 where it cannot pack those."""
    found = codecs.codec(chain)
    if "low_rank" in getattr(found, "gives", ()):
        raise UsageError(
            "FL-P401",
            f"codec {chain.text!r} packs whole matrices, and peers reduce parts of one long vector",
            "take int8, int4, e3m0, topk, randomk or sign, each with +ef if you like",
        )
    return found


def gain(codec: codecs.Codec) -> float:
    """By how much values get longer on its way, as a rule: some let few stand for all."""
    inner = getattr(codec, "inner", codec)
    return float(getattr(inner, "gain", 1.0))


def unpack(codec: codecs.Codec, payload: memoryview, out: Tensor) -> float:
    """Read `payload` into `out`; its L2 norm, which is not finite where a value is not. RemoteError
    FL-W105 for garbage."""
    decode = codec.decoder(payload, out.numel())
    squares = []
    for lo in range(0, out.numel(), codecs.TILE):
        tile = out[lo : min(lo + codecs.TILE, out.numel())]
        found = decode(lo, lo + tile.numel(), tile)
        if found.data_ptr() != tile.data_ptr():
            tile.copy_(found)
        squares.append(codecs.square(tile))  # while it lies in the cache
    total = sum(squares)
    return math.sqrt(total) if math.isfinite(total) else math.inf
