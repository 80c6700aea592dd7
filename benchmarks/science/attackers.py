"""Attackers: 30 % hostile clients against the mean and the rules made to survive them.

MNIST, MLP 784-32-10, ten clients (Dirichlet 1.0), three of them hostile, drawn by the seed; FedAvg,
12 rounds of 10 steps, SGD 0.1, batch 32; seeds 0 and 1. A sign flip sends five times the opposite
of what was learnt, x1000 a thousand times what was learnt, a label flip trains on y -> 9 - y. Rules
that are told how many to expect are told 3 of 10. Accuracy is the mean of the last three rounds.
The spec's own table is for two of eleven clients, another seed and 15 rounds.
"""

import mnist
from recipe import Claim, Finding, Recipe, bars, late, main, mean, say, spread

from atoll.aggregation.fedavg import FedAvg
from atoll.client.local import LocalConfig
from atoll.server.simulator import simulate
from atoll.server.training import Training
from atoll.server.world import at_paces, attacked

CLIENTS, ROUNDS = 10, 12
ATTACKS = {
    "none": "",
    "sign flip": "sign-flip:5",
    "x1000": "scale:1000",
    "label flip": "label-flip",
}
RULES = {
    "mean": "mean",
    "median": "median",
    "trimmed mean": "trimmed-mean:trim=3",
    "Multi-Krum": "multi-krum:f=3",
    "RFA": "rfa",
    "centered clipping": "centered-clipping",
}


def once(rule: str, attack: str, seed: int) -> float:
    """Accuracy in percent."""
    models = at_paces({f"c{i}": 0.1 for i in range(CLIENTS)})
    if attack:
        models = attacked(models, attack, 0.3, seed)
    learning = Training.of(
        [model.name for model in models],
        model="mlp:hidden=32",
        data=mnist.whole(),
        partition="dirichlet:1.0",
        seed=seed,
        local=LocalConfig(lr=0.1, batch=32, device="cpu"),
        aggregation=rule,
        attacks={model.name: model.attack for model in models if model.attack},
    )
    strategy = FedAvg(steps=10, rounds=ROUNDS, min_clients=CLIENTS)
    made = simulate(strategy, models, seed=seed, learning=learning, history=False)
    return 100 * late(made.accuracy, 3)


def run(quick: bool) -> Finding:
    seeds = range(1 if quick else 2)
    found: dict[tuple[str, str], list[float]] = {}
    for rule, spec in RULES.items():
        for attack, kind in ATTACKS.items():
            found[rule, attack] = [once(spec, kind, seed) for seed in seeds]
            say(f"{rule:18} {attack:10} {spread(found[rule, attack])}")
    rows = [[rule, *(spread(found[rule, attack]) for attack in ATTACKS)] for rule in RULES]
    heights = {a: {rule: mean(found[rule, a]) for rule in RULES} for a in ATTACKS}
    return Finding(["rule", *ATTACKS], rows, claims(heights), bars(heights, "accuracy, %"))


def claims(accuracy: dict[str, dict[str, float]]) -> list[Claim]:
    robust = [rule for rule in RULES if rule != "mean"]

    def worst(attack: str) -> tuple[str, float]:
        return min(((rule, accuracy[attack][rule]) for rule in robust), key=lambda pair: pair[1])

    made, by = [], "spec 7"
    for attack in ("sign flip", "x1000"):
        rule, value = worst(attack)
        mean = accuracy[attack]["mean"]
        made += [
            Claim(f"{attack}: the mean is under 60 %", f"{mean:.1f} %", mean < 60, source=by),
            Claim(
                f"{attack}: every robust rule is over 80 %", f"the worst, {rule}: {value:.1f} %",
                value > 80, True, by,
            ),
        ]  # fmt: skip
    rule, value = worst("label flip")
    behind = accuracy["label flip"]["mean"]
    made.append(
        Claim("label flip: every robust rule is ahead of the mean",
              f"{rule} {value:.1f} %, mean {behind:.1f} %", value > behind, False, by)
    )  # fmt: skip
    rule, value = worst("none")
    plain = accuracy["none"]["mean"]
    made.append(
        Claim("without attack every rule is within a point of the mean",
              f"{rule} {value:.1f} %, mean {plain:.1f} %", value > plain - 1, False, by)
    )  # fmt: skip
    return made


RECIPE = Recipe(
    "attackers",
    "30 % attackers against six rules",
    minutes=8,
    paper="https://arxiv.org/abs/1912.13445",
    run=run,
    needs=mnist.FOLDER,
)

if __name__ == "__main__":
    main(RECIPE)
