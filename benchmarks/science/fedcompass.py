"""FedCompass: arrival groups against waiting for all (FedAvg) and for nobody (FedBuff, FedAsync).

MNIST pooled to 14x14, MLP 196-32-10, five clients of 5 or 6 classes each, Adam 0.003, batch 32. The
classes are the paper's partition, drawn again until each has two owners. A step takes a second on
average: the same for all (homo), normal with a deviation of 0.3, or exponential; 5 % noise an
order; transfers take no time. FedAvg, FedBuff and FedAsync 50 steps, FedCompass 10 to 50 with slack
1.2. The asynchronous three weigh by 0.9 / sqrt(1 + staleness) and by the client's share, FedBuff
(K = 3) and FedAsync each client as a fifth. 3,000 virtual seconds, evaluated about every 10 (FedAvg
at every version), seeds 0 to 2. A target that was missed counts as 3,000 s.
"""

import mnist
from recipe import Claim, Finding, Recipe, curves, main, mean, say

from atoll.aggregation.fedavg import FedAvg
from atoll.aggregation.fedbuff import FedBuff
from atoll.aggregation.fedcompass import FedCompass
from atoll.aggregation.strategy import Strategy
from atoll.client.local import LocalConfig
from atoll.server.simulation import Simulation
from atoll.server.simulator import simulate
from atoll.server.training import Training
from atoll.server.world import Draw, crowd, exponential, homogeneous, normal

SPEEDS: dict[str, Draw] = {
    "homo": homogeneous(1.0),
    "normal": normal(1.0),
    "exp": exponential(1.0),
}
END = 3000.0  # virtual seconds
TARGETS = (0.85, 0.9)
CLIENTS = 5
LOOKS = {"FedCompass": 2, "FedAvg": 1, "FedBuff": 1, "FedAsync": 3}  # versions: about 10 s


def strategies() -> dict[str, Strategy]:
    share = 0.9 / CLIENTS  # alpha * p
    return {
        "FedCompass": FedCompass(min_steps=10, max_steps=50, min_clients=CLIENTS),
        "FedAvg": FedAvg(steps=50, min_clients=CLIENTS),
        "FedBuff": FedBuff(size=3, steps=50, lr=3 * share),
        "FedAsync": FedBuff(size=1, steps=50, lr=share),
    }


def once(name: str, speeds: str, seed: int) -> Simulation:
    data = mnist.pooled()
    models = crowd(CLIENTS, SPEEDS[speeds], seed)
    learning = Training.of(
        [model.name for model in models],
        model=mnist.POOLED,
        data=data,
        partition=mnist.class_partition(data, CLIENTS, 5, 6, seed, owners=2),
        seed=seed,
        local=LocalConfig(lr=0.003, batch=32, optimizer="adam", device="cpu"),
    )
    made = simulate(
        strategies()[name], models, END, seed, learning=learning, history=False,
        evaluate_every=LOOKS[name],
    )  # fmt: skip
    say(f"{speeds:7} {name:10} seed {seed}: {made.versions} versions, {times(made)}")
    return made


def times(made: Simulation) -> list[float]:
    """Virtual seconds to each target, END where it was missed."""
    return [made.seconds_to(target) or END for target in TARGETS]


def run(quick: bool) -> Finding:
    seeds = range(1 if quick else 3)
    made = {
        (speeds, name): [once(name, speeds, seed) for seed in seeds]
        for speeds in (["exp"] if quick else SPEEDS)
        for name in strategies()
    }
    rows: list[list[str | float | None]] = []
    for (speeds, name), runs in made.items():
        reached = [_shown([times(r)[at] for r in runs]) for at in range(len(TARGETS))]
        best = mean([max(value for _, value in r.accuracy) for r in runs])
        versions, stale = mean([r.versions for r in runs]), mean([r.mean_staleness for r in runs])
        rows.append([
            speeds, name, *reached, f"{100 * best:.1f}", f"{versions:.0f}", f"{stale:.1f}",
            f"{100 * mean([r.idle for r in runs]):.0f} %",
        ])  # fmt: skip
    panels = {
        speeds: {name: [r.accuracy for r in made[speeds, name]] for name in strategies()}
        for speeds in dict.fromkeys(speeds for speeds, _ in made)
    }
    columns = ["speeds", "strategy", "s to 85 %, seeds 0, 1, 2", "s to 90 %", "best accuracy",
               "versions", "staleness", "idle"]  # fmt: skip
    picture = curves(panels, "virtual seconds", "accuracy", 0.3, 1.0)
    return Finding(columns, rows, [] if quick else claims(made), picture, SAID)


def claims(made: dict[tuple[str, str], list[Simulation]]) -> list[Claim]:
    def late(speeds: str, name: str, target: float) -> float:
        return mean([times(r)[TARGETS.index(target)] for r in made[speeds, name]])

    def before(speeds: str, first: str, then: str, target: float, asserted: bool = True) -> Claim:
        a, b = late(speeds, first, target), late(speeds, then, target)
        return Claim(
            f"{speeds}: {first} is at {target:.0%} before {then}",
            f"{a:.0f} s, {b:.0f} s", a < b, asserted, "spec 7",
        )  # fmt: skip

    def ratio(speeds: str, other: str, target: float, low: float, high: float, by: str) -> Claim:
        found = late(speeds, other, target) / late(speeds, "FedCompass", target)
        return Claim(
            f"{speeds}: {other} takes {low:g} to {high:g} times as long to {target:.0%}",
            f"{found:.2f} times", low <= found <= high, False, by,
        )  # fmt: skip

    return [
        before("exp", "FedCompass", "FedAvg", 0.85),
        before("exp", "FedCompass", "FedAvg", 0.9),
        before("exp", "FedCompass", "FedBuff", 0.85),
        before("exp", "FedBuff", "FedAsync", 0.85),
        before("normal", "FedCompass", "FedAvg", 0.9),
        before("normal", "FedCompass", "FedBuff", 0.9),
        before("homo", "FedCompass", "FedAsync", 0.85),
        ratio("exp", "FedAvg", 0.85, 1.0, 2.1, "spec 7"),
        ratio("exp", "FedAvg", 0.9, 4.0, 5.0, "paper, table 1 (m = 5; 200 steps)"),
        ratio("exp", "FedBuff", 0.9, 1.5, 2.1, "paper, table 1"),
        ratio("normal", "FedAvg", 0.9, 1.2, 1.6, "spec 7"),
        ratio("homo", "FedAvg", 0.85, 0.9, 1.25, "spec 7"),
        ratio("homo", "FedAsync", 0.85, 2.0, 3.0, "spec 7"),
    ]


SAID = """
With the paper's partition as it is, where one owner is enough, seeds 0 and 1 have three classes
that a single client holds. Nobody reached 90 % within 3,000 s there, and only FedCompass 85 %
(seed 1, homo and normal: 1,936 and 2,634 s); the means over the three seeds, misses as 3,000 s,
had the same order: exp, 85 %: FedCompass 2,047, FedAvg 2,252, FedBuff 2,456, FedAsync 3,000 s.
""".strip().replace("\n", " ")


def _shown(seconds: list[float]) -> str:
    return ", ".join("-" if value >= END else f"{value:.0f}" for value in seconds)


RECIPE = Recipe(
    "fedcompass",
    "FedCompass against FedAvg, FedBuff and FedAsync",
    minutes=12,
    paper="https://arxiv.org/abs/2309.14675",
    run=run,
    needs=mnist.FOLDER,
)

if __name__ == "__main__":
    main(RECIPE)
