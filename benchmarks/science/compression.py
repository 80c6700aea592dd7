"""Compressed updates: accuracy against the bytes that clients send.

The four clients of `benchmarks/time_to_target.py`: MNIST, Dirichlet 0.5, MLP 784-64-10 (50,890
parameters), SGD 0.1, batch 32, a step in 1, 0.5, 0.25 and 0.125 s; FedCompass with 10 to 50 steps,
ended by its 300th version; transfers take no time, so that all see the same schedule. Every tenth
version is evaluated; accuracy is the mean of the last five. Seeds 0 and 1.
"""

import mnist
from recipe import Claim, Finding, Recipe, curves, late, main, mean, say, spread

from atoll.aggregation.fedcompass import FedCompass
from atoll.client.local import LocalConfig
from atoll.server.rules import Rules
from atoll.server.simulator import simulate
from atoll.server.training import Training

CLIENTS = {"c1": 1.0, "c2": 0.5, "c3": 0.25, "c4": 0.125}  # seconds a step
VERSIONS = 300
CODECS = {
    "fp32": "fp32",
    "int8": "int8",
    "top-k 1 % + EF": "topk:0.01+ef",
    "top-k 1 %, no EF": "topk:0.01",
}
Points = list[tuple[float, float]]


def once(codec: str, seed: int, versions: int) -> tuple[Points, int]:
    """Accuracy in percent over MB sent, and the bytes of an update."""
    learning = Training.of(
        list(CLIENTS),
        model="mlp:hidden=64",
        data=mnist.whole(),
        partition="dirichlet:0.5",
        seed=seed,
        local=LocalConfig(lr=0.1, batch=32, device="cpu"),
        up=codec,
    )
    sent, _ = learning.sizes()
    strategy = FedCompass(min_steps=10, max_steps=50, min_clients=len(CLIENTS))
    made = simulate(
        strategy, CLIENTS, seed=seed, learning=learning, history=False, evaluate_every=10,
        rules=Rules(versions=versions),
    )  # fmt: skip
    total = made.updates_used * sent / 1e6
    count = len(made.accuracy)
    points = [(total * (i + 1) / count, 100 * a) for i, (_, a) in enumerate(made.accuracy)]
    return points, sent


def run(quick: bool) -> Finding:
    seeds, versions = range(1 if quick else 2), 60 if quick else VERSIONS
    made = {}
    for name, spec in CODECS.items():
        made[name] = [once(spec, seed, versions) for seed in seeds]
        say(f"{name:18} {spread([late(points) for points, _ in made[name]], 2)}")
    accuracy = {name: mean([late(points) for points, _ in runs]) for name, runs in made.items()}
    sizes = {name: runs[0][1] for name, runs in made.items()}
    rows: list[list[str | float | None]] = [
        [
            name, spread([late(points) for points, _ in runs], 2), f"{sizes[name]:,}",
            f"{sizes['fp32'] / sizes[name]:.1f}", f"{mean([p[-1][0] for p, _ in runs]):.1f}",
        ]
        for name, runs in made.items()
    ]  # fmt: skip
    columns = ["codec up", "accuracy, %", "bytes an update", "times smaller", "MB sent"]
    lines = {name: [points for points, _ in runs] for name, runs in made.items()}
    picture = curves({"accuracy over MB sent": lines}, "MB sent up", "accuracy, %", 70, 100)
    return Finding(columns, rows, claims(accuracy, sizes), picture)


def claims(accuracy: dict[str, float], sizes: dict[str, int]) -> list[Claim]:
    def below(name: str) -> float:
        return accuracy["fp32"] - accuracy[name]

    def smaller(name: str) -> float:
        return sizes["fp32"] / sizes[name]

    sparse, bare = "top-k 1 % + EF", "top-k 1 %, no EF"
    return [
        Claim("int8 is within 0.2 points of fp32", f"{below('int8'):.2f} points below",
              below("int8") <= 0.2),
        Claim("int8 sends about a quarter", f"{smaller('int8'):.1f} times fewer bytes",
              smaller("int8") > 3.8),
        Claim("top-k 1 % with error feedback is within 0.5 points of fp32 after 300 versions",
              f"{below(sparse):.2f} points below", below(sparse) <= 0.5),
        Claim("top-k 1 % sends at least 50 times fewer bytes",
              f"{smaller(sparse):.1f} times fewer", smaller(sparse) >= 50),
        Claim("the same without error feedback is visibly worse",
              f"{below(bare):.2f} points below fp32", below(bare) > below(sparse) + 0.2),
    ]  # fmt: skip


RECIPE = Recipe(
    "compression",
    "Compressed updates, with and without error feedback",
    minutes=8,
    paper="https://arxiv.org/abs/1901.09847",
    run=run,
    needs=mnist.FOLDER,
)

if __name__ == "__main__":
    main(RECIPE)
