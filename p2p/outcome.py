"""Outcome: what became of a swarm in virtual time, and who of it is not where it should be."""

from collections.abc import Mapping
from dataclasses import dataclass

from atoll.aggregation.quorum import quorum
from atoll.p2p.simulated import Simulated
from atoll.p2p.vectors import sha256


@dataclass(frozen=True)
class Outcome:
    """What became of a swarm."""

    seconds: float  # virtual
    epochs: int  # of the slowest living peer
    forks: int  # models with two successors, or peers with different bits of one
    wrong: int  # means that were not exactly that of their group
    stalled: tuple[str, ...]  # living peers that did not come so far, though a quorum lives
    headless: bool  # too many of one group died at once, or all who can reduce: the rest waits.
    # Or whoever has the model gives other bits for it.
    aborts: int
    commits: dict[int, tuple[tuple[str, ...], tuple[float, ...]]]  # epoch -> group, weights

    @property
    def summary(self) -> str:
        return (
            f"{self.epochs} epochs in {self.seconds:.0f} s, {self.forks} forks, "
            f"{self.wrong} wrong means, stalled: {', '.join(self.stalled) or 'nobody'}"
        )

    @property
    def good(self) -> bool:
        return not (self.forks or self.wrong or self.stalled)


def behind(peers: Mapping[str, Simulated], epochs: int, now: float) -> list[str]:
    """The living, and those still to come, that have not made so many epochs."""
    return [name for name, p in peers.items() if p.machine.stand.epoch < epochs and p.expected(now)]


def short(peers: Mapping[str, Simulated], epochs: int, now: float) -> list[str]:
    """Who is not there yet: those behind, and who has other bits than the others at its model."""
    bits: dict[str, set[str]] = {}
    for p in peers.values():
        if p.alive:
            bits.setdefault(p.machine.stand.chain, set()).add(sha256(p.anchor))
    torn = {chain for chain, found in bits.items() if len(found) > 1}
    late = [n for n, p in peers.items() if p.expected(now) and p.machine.stand.chain in torn]
    return sorted({*late, *behind(peers, epochs, now)})


def headless(peers: Mapping[str, Simulated]) -> bool:
    """Whether those who live can decide nothing, so that nobody is to blame for standing still."""
    living = [p.machine for p in peers.values() if p.alive]
    if not living:
        return True
    newest = max(living, key=lambda m: m.stand.rank)
    names = [machine.me for machine in living]
    reducers = len(names) == 1 or any(peers[n].model.bandwidth for n in names)
    best = [m.me for m in living if m.stand == newest.stand]
    if all(peers[n].model.poisons for n in best):
        return True
    return not (reducers and quorum(names, newest.members, newest.gone()))
