"""Sync engine: the outer half of DiLoCo, the same for a server's clients and for peers.

Douillard et al. 2023, https://arxiv.org/abs/2311.08105. Everybody trains some local steps from a
shared anchor; the mean of what they did is a gradient for the outer optimizer, which moves the
anchor. Whoever applies the same means in the same order holds the same bits.

    engine = SyncEngine(Nesterov(), anchor)
    delta, factor = engine.contribution(trained)     # anchor - trained; factor 0: do not count it
    ...                                              # an averager takes it and gives the mean
    state = engine.commit(mean)                      # the outer step: new anchor, next round

A round that is given up changes nothing here: no mean, no commit.
"""

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from atoll.aggregation.outer import Outer
from atoll.protocols.codecs import all_finite, as_bytes

LONGEST = 100.0  # times the usual length of a delta: longer is no work but an accident
REMEMBERED = 0.1  # share of the newest delta in what is usual


@dataclass(frozen=True, eq=False)
class SyncState:
    """What all who take part hold alike. Its tensors are never written again once it is made."""

    anchor: Tensor  # flat, fp32, on the CPU
    outer: Mapping[str, Tensor] = field(default_factory=dict)  # of the outer optimizer, whole
    round: int = 0  # commits that made it

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256, in hex, over the anchor and the outer optimizer's tensors by their names."""
        sha = hashlib.sha256(as_bytes(self.anchor))
        for name in sorted(self.outer):
            sha.update(f"/{name}/".encode())
            sha.update(as_bytes(self.outer[name]))
        return sha.hexdigest()


class SyncEngine:
    """No IO and no clock. `state` is replaced at a commit and never changed, so whoever sends an
    old one to a newcomer may go on with it."""

    def __init__(self, outer: Outer, anchor: Tensor) -> None:
        """`anchor`: flat, fp32, on the CPU; it is not copied, and must not be written again."""
        self.outer = outer
        self.state = SyncState(anchor, outer.initial(anchor))
        self._usual: float | None = None  # length of a delta, a running mean

    def contribution(self, local: Tensor) -> tuple[Tensor, float]:
        """What was trained from the anchor, and 1.0; zeros and 0.0 where that must not count.

        It must not where it is not finite, or more than 100 times longer than what is usual here.
        """
        delta = self.state.anchor - local
        length = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
        usual = self._usual
        if not math.isfinite(length) or (usual is not None and length > LONGEST * usual):
            return torch.zeros_like(delta), 0.0
        if length > 0:
            self._usual = length if usual is None else usual + REMEMBERED * (length - usual)
        return delta, 1.0

    def commit(self, mean: Tensor) -> SyncState:
        """The outer step along the group's mean. ValueError, and nothing is changed, where the
        mean is of another length or not finite, or where the step leads to what is not."""
        old = self.state
        if mean.shape != old.anchor.shape:
            raise ValueError(f"a mean of {mean.numel()} elements for {old.anchor.numel()}")
        if not all_finite(mean):
            raise ValueError("the mean is not finite")
        anchor, outer = self.outer.step(old.anchor, mean, old.outer)
        if not all_finite(anchor):
            raise ValueError("the outer step leads to a model that is not finite")
        self.state = SyncState(anchor, outer, old.round + 1)
        return self.state

    def load(self, state: SyncState) -> None:
        """Go on from another's state. ValueError, and nothing is changed, where it does not fit."""
        mine = {"anchor": self.state.anchor, **self.state.outer}
        theirs = {"anchor": state.anchor, **state.outer}
        if theirs.keys() != mine.keys():
            raise ValueError(f"a state of {', '.join(theirs)} for one of {', '.join(mine)}")
        for name, tensor in theirs.items():
            if tensor.shape != mine[name].shape or tensor.dtype != mine[name].dtype:
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, "
                    f"not {mine[name].dtype} {tuple(mine[name].shape)}"
                )
            if tensor.is_floating_point() and not all_finite(tensor):
                raise ValueError(f"{name} is not finite")
        self.state = state
