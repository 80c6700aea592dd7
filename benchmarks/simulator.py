"""Simulator: what virtual time costs, beyond the training itself. One core.

1,000 clients for 2,000 virtual seconds of FedCompass with 20 to 100 steps and a null trainer; step
times are lognormal (sigma 0.6) with mean 72 ms, which makes about one update per client each 3.7 s,
some 541,000 in all. Then an hour of 100 clients at the CPU recipe of the specs (10 to 50 steps, one
second a step on average) and at the paper's fastest setting (20 to 100 steps, 0.15 s a step).
Seconds are of processor time, of which a single thread has one a second at most.
"""

import time

import harness

from atoll.aggregation.fedcompass import FedCompass
from atoll.server.simulation import Simulation
from atoll.server.simulator import simulate
from atoll.server.world import crowd, lognormal

LIMIT = 40.0  # seconds
HOUR_LIMIT = 1.0  # seconds of bookkeeping


def run(quick: bool) -> harness.Result:
    hours = [timed(100, 3600.0, 1.0, (10, 50)) for _ in range(1 if quick else 3)]
    hour = min(seconds for seconds, _ in hours)
    fast_hour, fast = timed(100, 3600.0, 0.15, (20, 100))
    began = time.perf_counter()
    seconds, made = timed(1000, 2000.0, 0.072, (20, 100))
    wall = time.perf_counter() - began
    repeated = {result.hash for _, result in hours}
    updates = finished(made)
    return harness.Result(
        "simulator",
        seconds,
        "s",
        LIMIT,
        ok=hour <= HOUR_LIMIT and len(repeated) == 1,
        more={
            "wall_seconds": round(wall, 1),
            "updates": updates,
            "seconds_per_update_and_client": round(1000 * 2000.0 / updates, 2),
            "microseconds_per_update": round(seconds / updates * 1e6, 1),
            "hour_of_100_clients": round(hour, 3),
            "hour_of_100_clients_limit": HOUR_LIMIT,
            "hour_of_100_clients_updates": finished(hours[0][1]),
            "fast_hour_of_100_clients": round(fast_hour, 3),
            "fast_hour_of_100_clients_updates": finished(fast),
        },
    )


def timed(
    clients: int, until: float, mu: float, steps: tuple[int, int]
) -> tuple[float, Simulation]:
    """Processor seconds of a simulation, and what came of it."""
    strategy = FedCompass(min_steps=steps[0], max_steps=steps[1], min_clients=clients)
    models = crowd(clients, lognormal(mu, 0.6), seed=0)
    began = time.process_time()
    made = simulate(strategy, models, until, history=False)
    return time.process_time() - began, made


def finished(made: Simulation) -> int:
    return sum(client.updates for client in made.clients.values())


if __name__ == "__main__":
    harness.main(run)
