"""Storms: swarms with random faults by seed, to search for a fork, a stall, a wrong mean.

`python -m atoll.p2p.storms 10000` tries that many, and prints what it found.
"""

import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from atoll.p2p.outcome import Outcome
from atoll.p2p.virtual import Swarm
from atoll.p2p.world import PeerModel, Weather

EPOCHS = 3  # that all must make, after the faults


def storm(seed: int) -> Swarm:
    """2 to 6 founders: paces up to 4-fold apart, bad weather, late joiners, deaths, a goodbye.

    Some of the dead come back as themselves; memories spoil, donors give other bits, and in an
    eighth of the storms one lies all the time. Fewer than half of the founders die. All faults may
    meet; the network heals at 12 s.
    """
    rng = random.Random(f"storm {seed}")
    names = [f"p{i}" for i in range(rng.randint(2, 6))]
    dying = rng.sample(names, rng.randint(0, (len(names) - 1) // 2))
    leaving = rng.choice([*names, *[""] * 6])
    spoiling = rng.choice([*names, *[""] * 6])
    peers = []
    for name in names:
        how = rng.randrange(3) if name in dying else -1
        peers.append(
            PeerModel(
                name,
                pace=rng.uniform(0.5, 2.0),
                weight=float(rng.randint(1, 4)),
                bandwidth=rng.choice([0.0, 100.0, 100.0, 400.0]) if name != names[0] else 100.0,
                dies=rng.uniform(0, 9) if how == 0 else float("inf"),
                dies_after=rng.randint(3, 150) if how == 1 else 0,
                dies_applying=rng.randint(1, 3) if how == 2 else 0,
                leaves=rng.uniform(1, 9) if name == leaving else float("inf"),
                spoils=rng.randint(0, 2) if name == spoiling else -1,
            )
        )
    peers += [
        PeerModel(f"q{i}", joins=rng.uniform(0.5, 8), pace=rng.uniform(0.5, 2.0))
        for i in range(rng.choice([0, 0, 1, 2]))
    ]
    slow = rng.choice([0.05, 0.2, 0.2, 1.0])
    parted = []
    for _ in range(rng.choice([0, 0, 1, 2])):
        side = frozenset(p.name for p in peers if rng.random() < 0.5)
        start = rng.uniform(0, 8)
        parted.append((start, min(12.0, start + rng.uniform(0.5, 8)), side))
    for i, peer in enumerate(peers):
        peers[i] = replace(
            peer,
            returns=rng.choice([float("inf"), rng.uniform(0.1, 6)]),
            flips=rng.choice([-1] * 12 + [1, 2]),
            poisons=rng.random() < 0.1,
        )
    weather = Weather(
        delay=(0.005, slow),
        loss=rng.choice([0.0, 0.05, 0.2]),
        twice=rng.choice([0.0, 0.1]),
        calm=rng.choice([12.0, float("inf")]),
        parted=tuple(parted),
    )
    lying = rng.randrange(8 * len(peers))
    if lying < len(peers):
        peers[lying] = replace(peers[lying], lies=True)
    return Swarm(peers, weather, seed)


def try_storm(seed: int) -> Outcome:
    return storm(seed).run(EPOCHS, until=300.0)


def main(count: int, first: int = 0, *, say: Callable[[str], object] = print) -> Counter[str]:
    found: Counter[str] = Counter()
    for seed in range(first, first + count):
        outcome = try_storm(seed)
        found["swarms"] += 1
        found["forks"] += outcome.forks
        found["wrong means"] += outcome.wrong
        found["stalls"] += bool(outcome.stalled)
        found["without a quorum or a reducer"] += outcome.headless
        found["aborts"] += outcome.aborts
        if not outcome.good:
            say(f"seed {seed}: {outcome.summary}")
    say(", ".join(f"{number} {what}" for what, number in found.items()))
    return found


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
