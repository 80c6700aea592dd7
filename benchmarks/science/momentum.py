"""Momentum over rounds and control variates: where they help, and where they do not.

MNIST, MLP 784-64-10 (50,890 parameters), clients cut by Dirichlet(0.1), batch 32, K = 20 plain SGD
steps an order, equal weights, accuracy and loss as the mean of the last three evaluations, every
fifth version being evaluated. A: ten clients, all in every round, 60 rounds, local steps 0.1 and
0.3, seeds 0 and 1. B: 20 clients, four a round, 100 rounds, local step 0.1, seeds 0 and 1. C:
server optimizers, 20 clients, four a round, 60 rounds, local step 0.03, seeds 0 and 1.
"""

from dataclasses import dataclass

import mnist
from recipe import Claim, Finding, Recipe, curves, main, mean, say

from atoll.aggregation.fedavg import FedAvg
from atoll.client.local import LocalConfig
from atoll.protocols.errors import ServerError
from atoll.server.simulator import simulate
from atoll.server.training import Training

STEPS, EVERY, LAST = 20, 5, 3
SEEDS = (0, 1)


@dataclass(frozen=True, slots=True)
class Setting:
    """One column of a table: everything but the method and the seed."""

    name: str
    clients: int
    cohort: int | None
    rounds: int
    eta: float


A1, A3 = (Setting(f"A, step {eta}", 10, None, 60, eta) for eta in (0.1, 0.3))
B = Setting("B, 4 of 20", 20, 4, 100, 0.1)
C = Setting("C, servers", 20, 4, 60, 0.03)

# label -> (local algorithm, outer optimizer)
LOCAL = {
    "FedAvg": ("plain", "sgd"),
    "FedAvg-M": ("fedavg-m:beta=0.2", "sgd"),
    "SCAFFOLD": ("scaffold", "sgd"),
    "SCAFFOLD-M": ("scaffold-m:beta=0.2", "sgd"),
    "FedDyn": ("feddyn:alpha=0.1", "sgd"),
}
SERVER = {
    "FedAvg": ("plain", "sgd"),
    "FedAvgM, mu 0.5": ("plain", "momentum:lr=1.0,momentum=0.5"),
    "FedAdam": ("plain", "adam:lr=0.01,tau=0.001"),
    "FedYogi": ("plain", "yogi:lr=0.01,tau=0.001"),
    "FedAdagrad": ("plain", "adagrad:lr=0.03"),
}
SMALL = {label: method for label, method in LOCAL.items() if label != "FedDyn"}
PLAN = {A1: SMALL, A3: LOCAL, B: LOCAL, C: SERVER}


@dataclass(frozen=True, slots=True)
class Ran:
    accuracy: list[tuple[float, float]]  # (version, %)
    losses: list[float]
    ended: str = ""  # why it ended before its time

    @property
    def late(self) -> float:
        return mean([value for _, value in self.accuracy[-LAST:]])

    @property
    def loss(self) -> float:
        return mean(self.losses[-LAST:])


def once(setting: Setting, method: tuple[str, str], seed: int, rounds: int | None = None) -> Ran:
    names = [f"c{i:02}" for i in range(setting.clients)]
    learning = Training.of(
        names,
        model="mlp",
        data=mnist.whole(),
        partition="dirichlet:0.1",
        seed=seed,
        local=LocalConfig(lr=setting.eta, batch=32, device="cpu"),
        algorithm=method[0],
        step=method[1],
    )
    strategy = FedAvg(
        steps=STEPS, cohort=setting.cohort, rounds=rounds or setting.rounds, weighting="equal",
        min_clients=setting.clients, seed=seed,
    )  # fmt: skip
    judged: list[tuple[int, float, float]] = []

    evaluate = learning.evaluate

    def heard(version: int) -> "dict[str, float]":
        found = dict(evaluate(version))
        judged.append((version, 100 * found["accuracy"], found["loss"]))
        return found

    learning.evaluate = heard  # type: ignore[method-assign]
    ended = ""
    try:
        simulate(
            strategy, dict.fromkeys(names, 1.0), seed=seed, learning=learning,
            evaluate_every=EVERY, history=False,
        )  # fmt: skip
    except ServerError as error:
        ended = str(error)
    return Ran([(float(v), a) for v, a, _ in judged], [loss for _, _, loss in judged], ended)


def run(quick: bool) -> Finding:
    made: dict[tuple[str, str], list[Ran]] = {}
    for setting, methods in PLAN.items():
        for label, method in methods.items():
            for seed in SEEDS[: 1 if quick else None]:
                one = once(setting, method, seed, 15 if quick else None)
                say(f"{setting.name:12} {label:16} seed {seed}: {one.late:.2f} / {one.loss:.3f}")
                made.setdefault((setting.name, label), []).append(one)
    rows: list[list[str | float | None]] = [
        [
            setting, label, ", ".join(f"{r.late:.2f}" for r in runs),
            f"{mean([r.late for r in runs]):.2f}", f"{mean([r.loss for r in runs]):.3f}",
        ]
        for (setting, label), runs in made.items()
    ]  # fmt: skip
    panels = {
        setting.name: {label: [r.accuracy for r in made[setting.name, label]] for label in methods}
        for setting, methods in PLAN.items()
    }
    columns = ["setting", "method", "accuracy, seeds 0, 1", "mean", "loss"]
    return Finding(
        columns, rows, [] if quick else claims(made), curves(panels, "version", "accuracy, %", 40),
    )  # fmt: skip


def claims(made: dict[tuple[str, str], list[Ran]]) -> list[Claim]:
    def accuracy(setting: Setting, label: str) -> float:
        return mean([r.late for r in made[setting.name, label]])

    def loss(setting: Setting, label: str) -> float:
        return mean([r.loss for r in made[setting.name, label]])

    def above(
        setting: Setting, first: str, other: str, points: float, asserted: bool = True
    ) -> Claim:
        a, b = accuracy(setting, first), accuracy(setting, other)
        return Claim(
            f"{setting.name}: {first} is {points:g} points above {other}",
            f"{a:.2f}, {b:.2f}: {a - b:+.2f}", a - b >= points, asserted, "spec 7",
        )  # fmt: skip

    lower = loss(B, "SCAFFOLD-M") < loss(B, "FedAvg")
    return [
        above(A3, "FedAvg-M", "FedAvg", 2),
        above(A3, "SCAFFOLD-M", "FedAvg", 3),
        above(A3, "FedAvg-M", "SCAFFOLD", 0, False),
        above(A3, "SCAFFOLD-M", "SCAFFOLD", 0, False),
        above(A1, "SCAFFOLD", "FedAvg", 0),
        above(A1, "FedAvg", "FedAvg-M", 0, False),
        above(B, "SCAFFOLD-M", "FedAvg", 1),
        Claim(
            f"{B.name}: SCAFFOLD-M ends with a lower loss than FedAvg",
            f"{loss(B, 'SCAFFOLD-M'):.3f}, {loss(B, 'FedAvg'):.3f}", lower, True, "spec 7",
        ),
        above(B, "FedAvg", "FedAvg-M", 0, False),
        above(C, "FedAdam", "FedAvg", 3, False),
        above(C, "FedYogi", "FedAvg", 3, False),
        above(C, "FedAvgM, mu 0.5", "FedAvg", 0, False),
        above(C, "FedAdagrad", "FedAvg", 1),
    ]  # fmt: skip


RECIPE = Recipe(
    "momentum",
    "Momentum and control variates in the local step, momentum on the server",
    minutes=12,
    paper="https://arxiv.org/abs/2306.16504",
    run=run,
    needs=mnist.FOLDER,
)

if __name__ == "__main__":
    main(RECIPE)
