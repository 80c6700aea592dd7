"""Rate: rounds a second of a small model: 0.1 MB, 4 client processes, training that does nothing.

Every round is downloaded, uploaded, verified, journaled with its payloads (SQLite, synced), merged
and published. Rivals on this kind of machine: Flower's former gRPC path 67-73, NVFlare 0.4,
Flower's default 0.1, APPFL 0.08 rounds a second.
"""

from federation import measure
from harness import Result, main, say

FLOATS = 25_000
CLIENTS = 4
LIMIT = 250.0  # rounds a second


def run(quick: bool) -> Result:
    rates = []
    for _ in range(2 if quick else 5):
        gaps = measure(FLOATS, CLIENTS, 600 if quick else 2000).rounds[50:]
        rates.append(len(gaps) / sum(gaps))
        say(f"{rates[-1]:.0f} rounds/s")
    rates.sort()
    return Result(
        "rate", rates[len(rates) // 2], "rounds/s", LIMIT, rival=73.0, better="higher",
        more={"slowest": round(rates[0], 1), "fastest": round(rates[-1], 1)},
    )  # fmt: skip


if __name__ == "__main__":
    main(run)
