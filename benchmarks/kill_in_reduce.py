"""A peer killed in the middle of an all-reduce: how soon the survivors have the mean of theirs.

Four peers, each a process, over real hivemind on loopback. One of them, another each time, gets a
SIGKILL while the group reduces; the time is from that to the last survivor's outer step. It counts
when every survivor has applied the exact mean of the survivors, all with one digest. The killed one
is then started again, comes back as itself, and must be in a round before the next try. A kill that
came too late, when the mean was there already, is no try.
"""

import random
import statistics
import tempfile
import time
from pathlib import Path

from harness import Result, main, say
from swarm import Swarm

NAMES = "abcd"
ELEMENTS = 4_000_000
LIMIT = 5.0  # seconds
TRIES, QUICK = 100, 2
SECONDS = 120.0  # that anything may take


def run(quick: bool) -> Result:
    rng, tries = random.Random(5), QUICK if quick else TRIES
    taken: list[float] = []
    late, wrong = 0, 0
    with (
        tempfile.TemporaryDirectory(prefix="atoll-kill-") as folder,
        Swarm(Path(folder) / "swarm", elements=ELEMENTS, pause=0.5, first=len(NAMES)) as swarm,
    ):
        swarm.up(*NAMES)
        while len(taken) + wrong < tries:
            victim = NAMES[(len(taken) + wrong + late) % len(NAMES)]
            whole(swarm)
            found = one(swarm, victim, rng.uniform(0, 0.15))
            if found is None:
                late += 1
            elif found < 0:
                wrong += 1
            else:
                taken.append(found)
                say(f"try {len(taken)}: {victim} killed, {found:.2f} s")
            swarm.start(victim)
        forks = swarm.forks()
    return Result(
        "kill_in_reduce", max(taken, default=float("inf")), "s", LIMIT,
        ok=not (wrong or forks) and len(taken) == tries,
        more={
            "tries": tries, "median": round(statistics.median(taken), 3) if taken else None,
            "wrong_means": wrong, "forks": forks, "too_late": late, "elements": ELEMENTS,
        },
    )  # fmt: skip


def whole(swarm: Swarm) -> None:
    """Wait for a round of all four."""
    since = swarm.round

    def all_in() -> bool:
        by = swarm.commits().get(swarm.round, [])
        return swarm.round > since and bool(by) and len(by[0][1]["group"]) == len(NAMES)

    swarm.until(all_in, SECONDS, "a round of all")


def one(swarm: Swarm, victim: str, wait: float) -> float | None:
    """Seconds until the last survivor had the mean; below 0: it was wrong; None: no try."""
    peer, since = swarm.peers[victim], swarm.round

    def reduces() -> list[int]:
        told = peer.told("reduce", group=len(NAMES))
        return [event["round"] for event in told if event["round"] >= since]

    swarm.until(reduces, SECONDS, "a reduce")
    round_ = reduces()[-1]  # not `since` where one of the four was missing there
    time.sleep(wait)
    at = peer.kill()
    survivors = [name for name in NAMES if name != victim]

    def applied() -> list[dict[str, object]]:
        found = [swarm.peers[name].told("commit", round=round_ + 1) for name in survivors]
        return [events[0] for events in found if events]

    swarm.until(lambda: len(applied()) == len(survivors), SECONDS, "the survivors' round")
    events = applied()
    if any(victim in e["group"] for e in events):  # type: ignore[operator]
        return None
    alike = len({str(e["digest"]) for e in events}) == 1
    exact = all(float(str(e["error"])) < 1e-6 for e in events)
    mine = all(sorted(e["group"]) == survivors for e in events)  # type: ignore[call-overload]
    if not (alike and exact and mine):
        say(f"{victim} killed: {events}")
        return -1.0
    return max(float(str(e["at"])) for e in events) - at


if __name__ == "__main__":
    main(run)
