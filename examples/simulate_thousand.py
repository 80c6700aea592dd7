"""A thousand clients of unlike speed, five virtual minutes: who waits, and for whom?

Nothing is trained: what is compared is time. Steps are the local steps that entered the model;
idle is the share of the clients' time in which they had nothing to do.

    python simulate_thousand.py
"""

from collections.abc import Sequence

from atoll.aggregation import FedAvg, FedBuff, FedCompass, Strategy
from atoll.server import simulate
from atoll.server.simulation import Simulation
from atoll.server.world import crowd, lognormal


def strategies(clients: int) -> list[Strategy]:
    return [
        FedAvg(steps=50, min_clients=clients),
        FedAvg(steps=50, min_clients=clients, deadline=20.0),
        FedBuff(size=max(1, clients // 10), steps=50),
        FedCompass(min_steps=20, max_steps=100, min_clients=clients),
    ]


def compare(clients: int = 1000, seconds: float = 300.0, seed: int = 0) -> list[Simulation]:
    """All strategies on the same clients: lognormal speeds, 0.2 s a step on average."""
    models = crowd(clients, lognormal(0.2, 0.6), seed)
    return [simulate(s, models, seconds, seed, history=False) for s in strategies(clients)]


def table(made: Sequence[Simulation], names: Sequence[str]) -> str:
    lines = [f"{'':22} {'versions':>9} {'updates':>9} {'steps':>10} {'staleness':>10} {'idle':>6}"]
    for name, s in zip(names, made, strict=True):
        lines.append(
            f"{name:22} {s.versions:9,} {s.updates_used:9,} {s.steps_used:10,} "
            f"{s.mean_staleness:10.2f} {s.idle:6.0%}"
        )
    return "\n".join(lines)


NAMES = ("FedAvg", "FedAvg, deadline 20 s", "FedBuff", "FedCompass")

if __name__ == "__main__":
    print(table(compare(), NAMES))
