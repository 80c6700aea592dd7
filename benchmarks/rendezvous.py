"""How soon a group forms when its last peer is ready, and whether swarms in storms ever fork.

Four peers, each a process, over real hivemind on loopback: the time is from the last one's being
ready to the moment when all have begun to reduce, the median over the rounds. Beside it, swarms in
virtual time with random faults by seed (`p2p/storms.py`): no forks, no stalls, no wrong means.
"""

import statistics
import tempfile
from pathlib import Path

from harness import Result, main, say
from swarm import Swarm

from atoll.p2p.storms import main as storms

NAMES = "abcd"
LIMIT = 1.0  # seconds
SEEDS, QUICK_SEEDS = 10_000, 40
ROUNDS, QUICK_ROUNDS = 50, 10


def run(quick: bool) -> Result:
    formed = _formed(QUICK_ROUNDS if quick else ROUNDS)
    seeds = QUICK_SEEDS if quick else SEEDS
    found = storms(seeds, say=say)
    bad = found["forks"] + found["wrong means"] + found["stalls"]
    return Result(
        "rendezvous", statistics.median(formed), "s", LIMIT, ok=not bad,
        more={
            "worst": round(max(formed), 3), "rounds": len(formed), "seeds": seeds,
            "forks": found["forks"], "wrong_means": found["wrong means"],
            "stalls": found["stalls"],
        },
    )  # fmt: skip


def _formed(rounds: int) -> list[float]:
    with (
        tempfile.TemporaryDirectory(prefix="atoll-meet-") as folder,
        Swarm(Path(folder) / "swarm", elements=10_000, first=len(NAMES)) as swarm,
    ):
        swarm.up(*NAMES)
        start = swarm.round
        swarm.until(lambda: swarm.round > start + rounds, 300, "so many rounds")
        found = []
        for round_ in range(start + 1, start + rounds):
            ready = [e for one in swarm.peers.values() for e in one.told("ready", round=round_)]
            begun = [e for one in swarm.peers.values() for e in one.told("reduce", round=round_)]
            if len(ready) == len(begun) == len(NAMES):  # one attempt, with all of them
                found.append(max(e["at"] for e in begun) - max(e["at"] for e in ready))
    return found


if __name__ == "__main__":
    main(run)
