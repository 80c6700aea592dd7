"""A joiner of a 100 MB run: seconds from the start of its process to its first local step.

Three peers average 25 million fp32 elements while it comes; it starts Python, finds them, says
hello, downloads model and outer state (200 MB) from all of them, checks the digest and trains from
it. It must then be in a round with a weight of its own, and the others must not have stood still.
"""

import tempfile
import time
from pathlib import Path

import psutil
from harness import Result, main, say
from swarm import Swarm

LIMIT = 20.0  # seconds
SECONDS = 240.0


def run(quick: bool) -> Result:
    elements = 2_000_000 if quick else 25_000_000
    with (
        tempfile.TemporaryDirectory(prefix="atoll-join-") as folder,
        Swarm(Path(folder) / "swarm", elements=elements, pause=3.0, first=3) as swarm,
    ):
        swarm.up("a", "b", "c")
        swarm.until(lambda: swarm.round >= 1, SECONDS, "the first round")
        came, at = swarm.round, time.monotonic()
        joiner = swarm.start("q")
        trains = lambda: [e for e in joiner.told("train") if e["round"] > 0]  # noqa: E731
        swarm.until(trains, SECONDS, "its first step")
        first = trains()[0]
        processor = psutil.Process(joiner.popen.pid).cpu_times()
        up = joiner.told("up")[0]["at"]
        meanwhile = swarm.round - came
        say(f"at round {came}; trained from {first['round']}")
        swarm.until(lambda: _weighs(swarm), SECONDS, "a round that its work is in")
        forks = swarm.forks()
        errors = max(e["error"] for by in swarm.commits().values() for _, e in by)
    return Result(
        "joiner", first["at"] - at, "s", LIMIT, ok=forks == 0 and errors < 1e-6,
        more={
            "megabytes": elements * 4 // 10**6, "after_imports": round(first["at"] - up, 2),
            "processor_seconds": round(processor.user + processor.system, 2),
            "rounds_meanwhile": meanwhile, "forks": forks,
        },
    )  # fmt: skip


def _weighs(swarm: Swarm) -> bool:
    for event in swarm.peers["q"].told("commit"):
        weights = dict(zip(event["group"], event["weights"], strict=True))
        if weights.get("q", 0) > 0:
            return True
    return False


if __name__ == "__main__":
    main(run)
