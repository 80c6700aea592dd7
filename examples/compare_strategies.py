"""Three strategies on the same four clients: virtual seconds until digits are at 95 %.

The training is real, the clock is not: one client takes a second a step, the others 0.5, 0.25 and
0.125. Each holds unlike data (Dirichlet 0.5).

    python compare_strategies.py
"""

from atoll.aggregation import FedAvg, FedBuff, FedCompass, Strategy
from atoll.client import LocalConfig
from atoll.server import Rules, Training, simulate
from atoll.server.simulation import Simulation

CLIENTS = {"c1": 1.0, "c2": 0.5, "c3": 0.25, "c4": 0.125}  # seconds a step


def strategies() -> list[Strategy]:
    return [
        FedAvg(steps=50, min_clients=4),
        FedBuff(size=3, steps=50, weighting="examples"),
        FedCompass(min_steps=10, max_steps=50, min_clients=4),
    ]


def run(strategy: Strategy, target: float, seed: int = 0) -> Simulation:
    learning = Training.of(
        list(CLIENTS),
        model="mlp",
        data="digits",
        partition="dirichlet:0.5",
        seed=seed,
        local=LocalConfig(lr=0.1, batch=32, device="cpu"),
    )
    rules = Rules(target=target)
    return simulate(strategy, CLIENTS, 3000.0, seed, learning=learning, rules=rules)


def compare(target: float = 0.95) -> dict[str, Simulation]:
    return {type(s).__name__: run(s, target) for s in strategies()}


def table(made: dict[str, Simulation], target: float) -> str:
    lines = [f"{'':12} {f'seconds to {target:.0%}':>16} {'versions':>9} {'steps':>8} {'idle':>6}"]
    for name, s in made.items():
        reached = s.seconds_to(target)
        told = "not reached" if reached is None else f"{reached:.0f}"
        lines.append(f"{name:12} {told:>16} {s.versions:9} {s.steps_used:8} {s.idle:6.0%}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(compare(), 0.95))
