"""Round: one FedAvg round of a 100 MB model with 4 client processes that do not train.

Download, verify, upload, verify, spill, merge, seal, save; against the floor of the same bytes
over blocking sockets with SHA-256 at both ends and one read per merge, run before and after.
Rivals on this kind of machine: Flower's former gRPC path 7.6-10.0 s, NVFlare 9.1-11.9, Flower's
default 25-28, APPFL 27-64; their servers held 2.3-3.1 GB.

`--codec int8` runs it packed both ways, in turn with fp32.
"""

import statistics
import sys

from federation import measure
from floor import floor
from harness import Result, main, say

FLOATS = 25_000_000
CLIENTS = 4
LIMIT = 2.0  # times the floor
MEMORY = 4 * FLOATS + 300 * 10**6  # bytes: one model and 300 MB


def run(quick: bool) -> Result:
    floors, rounds, peaks = [], [], []
    for _ in range(1 if quick else 3):
        floors.append(floor(4 * FLOATS, CLIENTS, 3))
        found = measure(FLOATS, CLIENTS, 7 if quick else 12)
        floors.append(floor(4 * FLOATS, CLIENTS, 3))
        rounds += found.rounds[1:]
        peaks.append(found.peak_bytes)
        say(f"rounds {[round(r, 2) for r in found.rounds]}, floors {[round(f, 2) for f in floors]}")
    peak = max(peaks)
    return Result(
        "round", statistics.median(rounds), "s", LIMIT, floor=statistics.median(floors), rival=7.6,
        ok=peak <= MEMORY,
        more={"server_peak_mb": round(peak / 1e6), "server_limit_mb": MEMORY // 10**6},
    )  # fmt: skip


def packed(codec: str, quick: bool) -> Result:
    """The same round packed both ways, and plain, in turn: a ratio below 1 is a gain."""
    plain, small = [], []
    for _ in range(1 if quick else 3):
        plain += measure(FLOATS, CLIENTS, 5 if quick else 8).rounds[1:]
        found = measure(FLOATS, CLIENTS, 5 if quick else 8, codec_up=codec, codec_down=codec)
        small += found.rounds[1:]
        say(f"fp32 {[round(r, 2) for r in plain]}, {codec} {[round(r, 2) for r in small]}")
    more = {"server_peak_mb": round(found.peak_bytes / 1e6), "floor_is": "the round in fp32"}
    return Result(
        f"round-{codec}", statistics.median(small), "s", 1.0, floor=statistics.median(plain),
        more=more,
    )  # fmt: skip


def large() -> Result:
    """A 2.5 GB model with two clients, with the same settings: that it goes through at all."""
    found = measure(625_000_000, 2, 3)
    more = {"server_peak_mb": round(found.peak_bytes / 1e6)}
    return Result("round-2.5GB", max(found.rounds), "s", 120.0, more=more)


if __name__ == "__main__":
    if "--large" in sys.argv:
        sys.argv.remove("--large")
        main(lambda quick: large())
    if "--codec" in sys.argv:
        at = sys.argv.index("--codec")
        named = sys.argv[at + 1]
        del sys.argv[at : at + 2]
        main(lambda quick: packed(named, quick))
    main(run)
