"""Rate: rounds a second of a small model: 0.1 MB, 4 client processes, training that does nothing.

Every round is downloaded, uploaded, verified, journaled with its payloads (SQLite, synced), merged
and published. The floor is a bare gRPC sketch of the same bytes (`sketch.py`), run in turn with it:
250 rounds a second were asked for where such a sketch makes 580, so the limit is that part of it.
The sketch has gRPC as it comes; what it makes where gRPC reads as in our commands
(`protocols/poller.py`) is in the line as `sketch_polled`.
Rivals on this kind of machine: Flower's former gRPC path 67-73, NVFlare 0.4, Flower's default 0.1,
APPFL 0.08 rounds a second. The line also has the processor time of a round, `cpu_ms_per_round`,
which other work on the machine sways less than the rate.
"""

import statistics

from federation import measure
from harness import Result, main, say
from sketch import polled, sketch

FLOATS = 25_000
CLIENTS = 4
LIMIT = 250 / 580  # of the sketch


def run(quick: bool) -> Result:
    rates, floors, alike, server, client = [], [], [], [], []
    for _ in range(3 if quick else 5):
        floors.append(sketch(FLOATS, CLIENTS, 600 if quick else 2000))
        alike.append(polled(FLOATS, CLIENTS, 600 if quick else 2000))
        found = measure(FLOATS, CLIENTS, 600 if quick else 2000, look=1.0)
        gaps = found.rounds[50:]
        rates.append(len(gaps) / sum(gaps))
        server.append(found.server_cpu * 1e3)
        client.append(found.client_cpu * 1e3)
        cpu = f"{server[-1]:.2f} ms + {CLIENTS} x {client[-1]:.2f} ms"
        say(f"{rates[-1]:.0f} rounds/s, {cpu}; sketch {floors[-1]:.0f}, {alike[-1]:.0f} polled")
    spent = {"server": statistics.median(server), "each client": statistics.median(client)}
    return Result(
        "rate", statistics.median(rates), "rounds/s", round(LIMIT, 2),
        floor=statistics.median(floors), rival=73.0, better="higher",
        more={
            "slowest": round(min(rates), 1), "fastest": round(max(rates), 1),
            "sketch_polled": round(statistics.median(alike), 1),
            "cpu_ms_per_round": {who: round(ms, 2) for who, ms in spent.items()},
        },
    )  # fmt: skip


if __name__ == "__main__":
    main(run)
