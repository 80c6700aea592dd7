"""Rate: rounds a second of a small model: 0.1 MB, 4 client processes, training that does nothing.

Every round is downloaded, uploaded, verified, journaled with its payloads (SQLite, synced), merged
and published. Rivals on this kind of machine: Flower's former gRPC path 67-73, NVFlare 0.4,
Flower's default 0.1, APPFL 0.08 rounds a second. The line also has the processor time of a round,
`cpu_ms_per_round`, which other work on the machine sways less than the rate.
"""

import statistics

from federation import measure
from harness import Result, main, say

FLOATS = 25_000
CLIENTS = 4
LIMIT = 250.0  # rounds a second


def run(quick: bool) -> Result:
    rates, server, client = [], [], []
    for _ in range(2 if quick else 5):
        found = measure(FLOATS, CLIENTS, 600 if quick else 2000)
        gaps = found.rounds[50:]
        rates.append(len(gaps) / sum(gaps))
        server.append(found.server_cpu * 1e3)
        client.append(found.client_cpu * 1e3)
        say(f"{rates[-1]:.0f} rounds/s, {server[-1]:.2f} ms + {CLIENTS} x {client[-1]:.2f} ms")
    rates.sort()
    spent = {"server": statistics.median(server), "each client": statistics.median(client)}
    return Result(
        "rate", rates[len(rates) // 2], "rounds/s", LIMIT, rival=73.0, better="higher",
        more={
            "slowest": round(rates[0], 1), "fastest": round(rates[-1], 1),
            "cpu_ms_per_round": {who: round(ms, 2) for who, ms in spent.items()},
        },
    )  # fmt: skip


if __name__ == "__main__":
    main(run)
