"""Promises: what a swarm must hold at every commit, and how often it did not.

One successor to each model, the exact mean of those who are in it, the same bits with all who have
it, and no attempt with the work of two lives of one peer.
"""

from dataclasses import dataclass, field

from atoll.aggregation.rendezvous_messages import Stand
from atoll.p2p.vectors import Vector


@dataclass
class Promises:
    forks: int = 0  # models with two successors, or peers with different bits of one
    wrong: int = 0  # means that were not exactly that of their group
    commits: dict[int, tuple[tuple[str, ...], tuple[float, ...]]] = field(default_factory=dict)
    flipped: bool = False  # a peer's memory spoilt its model
    _next: dict[str, str] = field(default_factory=dict)  # chain -> the chain that followed
    _bits: dict[str, str] = field(default_factory=dict)  # chain -> SHA-256 of the model
    _gave: dict[tuple[str, str], int] = field(default_factory=dict)  # (attempt, peer) -> its life

    def given(self, attempt: str, peer: str, life: int) -> None:
        """The work of two lives differs: one attempt must not have parts of both."""
        self.wrong += self._gave.setdefault((attempt, peer), life) != life

    def applied(
        self, base: str, stand: Stand, group: tuple[str, ...], weights: tuple[float, ...]
    ) -> None:
        """The mean of `group` has made a model of that of chain `base`."""
        self.forks += self._next.setdefault(base, stand.chain) != stand.chain
        self.commits[stand.epoch] = (group, weights)

    def mean(self, found: Vector, wanted: Vector) -> None:
        self.wrong += found != wanted

    def holds(self, chain: str, bits: str) -> None:
        """A peer has these bits of a model that it made.

        Where one was flipped others may have loaded its model: all alike in the end is enough.
        """
        self.forks += not self.flipped and self._bits.setdefault(chain, bits) != bits
