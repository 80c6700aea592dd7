"""The momentum family, both halves and the real merge, against the numbers of hand calculations.

Quadratics f_i(x) = a_i/2 (x - b_i)^2 without noise, eta = 0.1, K = 5, gamma = eta K, x = 0 first.
Everything travels as float32, so numbers hold to 1e-6.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from atoll.aggregation import FedAvg, FedBuff, Strategy
from atoll.aggregation.outer import Outer, Sgd, outer
from atoll.aggregation.strategy import Actions
from atoll.client.algorithm import local_algorithm
from atoll.client.data import Split
from atoll.client.local import LocalConfig, TorchTrainer
from atoll.protocols import Aggregate, ClientInfo, Finish, Merged, Train, Update
from atoll.protocols.errors import ServerError
from atoll.protocols.events import UpdateReceived
from atoll.server.run import Merge
from atoll.server.simulator import simulate
from atoll.server.training import Training

TWO = {"a": ([1.0], [-1.0]), "b": ([4.0], [1.0])}
ETA, STEPS = 0.1, 5
CLOSE = 2e-6


class Quadratic(nn.Module):
    def __init__(self, a: Sequence[float], b: Sequence[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(len(a)))
        self.a, self.b = torch.tensor(a), torch.tensor(b)

    def training_loss(self, batch: object) -> Tensor:
        return (self.a * (self.w - self.b) ** 2).sum() / 2


@dataclass
class Chosen(Strategy):
    """Rounds with the clients that `who` names, each time merged with equal weights."""

    gives = frozenset({"rounds"})

    who: Callable[[int], Sequence[str]]
    rounds: int
    steps: int = STEPS
    clients: int = 2  # to wait for
    backwards: bool = False
    here: set[str] = field(default_factory=set, init=False)
    missing: int = field(default=0, init=False)
    got: list[str] = field(default_factory=list, init=False)

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        self.here.add(client)
        yield from self.begin(0) if len(self.here) == self.clients else ()

    def begin(self, number: int) -> Actions:
        self.got.clear()
        for client in self.who(number):
            yield Train(client, self.steps)
        self.missing = len(self.who(number))

    def on_update(self, update: Update, now: float) -> Actions:
        self.got.append(update.id)
        self.missing -= 1
        if not self.missing:
            ids = sorted(self.got, reverse=self.backwards)
            yield Aggregate(tuple((u, 1 / len(ids)) for u in ids))

    def on_merged(self, merged: Merged, now: float) -> Actions:
        if merged.version == self.rounds:
            yield Finish("done")
        else:
            yield from self.begin(merged.version)


class Watched(Training):
    """Keeps what every version was."""

    def __init__(self, toys: Mapping[str, tuple[Sequence[float], Sequence[float]]], spec: str,
                 eta: float = ETA, step: Outer = Sgd()) -> None:  # fmt: skip  # noqa: B008
        data = Split(torch.zeros(4, 1), torch.zeros(4))

        def make(name: str) -> TorchTrainer:
            return TorchTrainer(
                Quadratic(*toys[name]), data, None, LocalConfig(lr=eta, device="cpu"),
                kind="regression", algorithm=local_algorithm(spec), client=name,
            )  # fmt: skip

        first = make(next(iter(toys)))
        algorithm = local_algorithm(spec)
        super().__init__(make, first.manifest, first.export(), algorithm=algorithm, outer=step)
        self.models = [self.model()["w"].clone()]
        self.toys = toys

    def merge(self, merge: Merge) -> Merged:
        made = super().merge(merge)
        self.models.append(self.model()["w"].clone())
        return made

    def vector(self, name: str) -> Tensor:
        return self._newest.outer[name].clone()

    def variates(self) -> list[Tensor]:
        """c_i of every client; of one that has none yet: zero."""
        zero = torch.zeros_like(self.models[0])
        if self._table is not None:
            rows = [self._table.row(self._newest.facts.numbers, name) for name in self.toys]
            return [zero if row is None else row for row in rows]
        held = {n: k.now("control") for n, k in self.keeps.of.items()}
        return [held.get(name, {}).get("c", zero) for name in self.toys]


def both(number: int) -> Sequence[str]:
    return ("a", "b")


def in_turn(number: int) -> Sequence[str]:
    return ("a", "b")[number % 2]


def ran(spec: str, rounds: int = 4, who: Callable[[int], Sequence[str]] = both) -> list[float]:
    learning = Watched(TWO, spec)
    simulate(Chosen(who, rounds), {"a": 1.0, "b": 1.0}, learning=learning)
    return [float(x) for x in learning.models[1:]]


def fixed_point(eta: float) -> float:
    """sum w_i b_i / sum w_i with w_i = 1 - (1 - eta a_i)^K."""
    w = [1 - (1 - eta * a[0]) ** STEPS for a, _ in TWO.values()]
    return sum(wi * b[0] for wi, (_, b) in zip(w, TWO.values(), strict=True)) / sum(w)


@pytest.mark.parametrize(
    ("spec", "first"),
    [
        ("plain", (0.256365, 0.3420229556, 0.3706434200, 0.3802062327)),
        ("fedavg-m:beta=0.5", (0.2230504688, 0.4338397487, 0.5450932524, 0.5671170833)),
        ("fedavg-m:beta=0.2", (0.1224196368, 0.3068737657, 0.4960144843, 0.6472270554)),
        ("fedavg-m-vr:beta=0.5", (0.1281825, 0.2120343642, 0.2685407744, 0.3065869064)),
        ("scaffold", (0.256365, 0.4611812869, 0.5607430537, 0.5958166012)),
        ("scaffold-m:beta=0.5", (0.2230504688, 0.4860799674, 0.6504527998, 0.6957784432)),
        ("scaffold-m:beta=0.2", (0.1224196368, 0.3187268733, 0.5257336449, 0.6937923392)),
        ("scaffold-m-vr:beta=0.5", (0.1281825, 0.2977458220, 0.4217798183, 0.5001162766)),
    ],
)  # fmt: skip
def test_the_first_rounds_with_both_clients_have_the_hand_numbers(
    spec: str, first: tuple[float, ...]
) -> None:
    assert ran(spec) == pytest.approx(first, abs=CLOSE)


@pytest.mark.parametrize(
    ("spec", "at_20"),
    [
        ("scaffold", 0.6000000097),
        ("scaffold-m:beta=0.5", 0.6000786977),
        ("scaffold-m:beta=0.2", 0.6243714649),
        ("scaffold-m-vr:beta=0.5", 0.5999983420),
    ],
)
def test_control_variates_reach_the_optimum(spec: str, at_20: float) -> None:
    assert ran(spec, 20)[-1] == pytest.approx(at_20, abs=CLOSE)


@pytest.mark.parametrize(
    ("spec", "eta", "rounds"),
    [
        ("plain", ETA, 16),
        ("fedavg-m:beta=0.5", 0.5 * ETA, 30),
        pytest.param("fedavg-m:beta=0.2", 0.2 * ETA, 120, marks=pytest.mark.slow),
        pytest.param("fedavg-m:beta=0.1", 0.1 * ETA, 250, marks=pytest.mark.slow),
        pytest.param("fedavg-m-vr:beta=0.5", ETA, 60, marks=pytest.mark.slow),
    ],
)
def test_momentum_shrinks_the_drift_as_a_smaller_step_would(
    spec: str, eta: float, rounds: int
) -> None:
    assert ran(spec, rounds)[-1] == pytest.approx(fixed_point(eta), abs=5e-6)


@pytest.mark.parametrize(
    ("spec", "first"),
    [
        ("scaffold", (-0.40951, 0.7959798768, 0.8057159770, 0.4522098287)),
        ("scaffold-m:beta=0.5", (-0.2262190625, 0.4461009375, 0.9320319965, 0.7003236317)),
        ("scaffold-m:beta=0.2", (-0.0960792032, 0.1711401285, 0.4985417370, 0.6700289647)),
        ("scaffold-m-vr:beta=0.5", (-0.204755, 0.3455657820, 0.6375253288, 0.4487306914)),
    ],
)
def test_clients_in_turn_have_the_hand_numbers_and_reach_the_optimum(
    spec: str, first: tuple[float, ...]
) -> None:
    found = ran(spec, 40, in_turn)
    assert found[:4] == pytest.approx(first, abs=CLOSE)
    assert found[-1] == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize(
    ("spec", "cycle"),
    [
        ("plain", (0.1415636031, 0.9332479858)),
        ("fedavg-m:beta=0.5", (0.4634398204, 0.7334225620)),
        ("fedavg-m:beta=0.2", (0.5583743597, 0.6478945360)),
    ],
)
def test_without_variates_clients_in_turn_end_in_a_cycle(
    spec: str, cycle: tuple[float, float]
) -> None:
    assert ran(spec, 100, in_turn)[-2:] == pytest.approx(cycle, abs=CLOSE)


def test_feddyn_reaches_the_optimum_and_keeps_the_mean_of_its_clients() -> None:
    learning = Watched(TWO, "feddyn:alpha=0.5")
    simulate(Chosen(both, 40), {"a": 1.0, "b": 1.0}, learning=learning)
    assert float(learning.models[-1]) == pytest.approx(0.6, abs=1e-3)
    mine = [keep.now("lambda")["c"] for keep in learning.keeps.of.values()]
    assert float(learning.vector("drift")) == pytest.approx(float(sum(mine)) / 2, abs=CLOSE)


def test_feddyns_first_round_is_its_formula() -> None:
    """lambda = 0: y := y - eta (a (y - b) + alpha (y - x)); x := x - mean(delta) - h / alpha."""
    alpha, ends = 0.5, []
    for a, b in ((1.0, -1.0), (4.0, 1.0)):
        y = 0.0
        for _ in range(STEPS):
            y -= ETA * (a * (y - b) + alpha * y)
        ends.append(y)
    delta = -sum(ends) / 2
    h = alpha / 2 * -sum(ends)
    assert ran("feddyn:alpha=0.5", 1) == pytest.approx([-delta - h / alpha], abs=CLOSE)


# ---- identities ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "same"),
    [
        ("fedavg-m:beta=1", "plain"),
        ("fedavg-m-vr:beta=1", "plain"),
        ("scaffold-m:beta=1", "scaffold"),
        ("scaffold-m-vr:beta=1", "scaffold"),
    ],
)
def test_without_momentum_each_is_its_plain_form_bit_for_bit(spec: str, same: str) -> None:
    assert ran(spec, 6) == ran(same, 6)
    assert ran(spec, 6, in_turn) == ran(same, 6, in_turn)


@pytest.mark.parametrize("spec", ["scaffold:", "scaffold-m:beta=0.5,", "scaffold-m-vr:beta=0.5,"])
def test_whoever_keeps_the_variates_they_and_the_models_have_the_same_bits(spec: str) -> None:
    for who in (both, in_turn):
        made = [Watched(TWO, f"{spec}table={keeper}") for keeper in ("client", "server")]
        for learning in made:
            simulate(Chosen(who, 8), {"a": 1.0, "b": 1.0}, learning=learning)
        client, server = made
        assert len(server.models) == 9
        assert all(map(torch.equal, client.models, server.models))
        assert all(map(torch.equal, client.variates(), server.variates()))
        assert float(server.variates()[0]) != 0
        assert not server.keeps.of or all(not k.report() for k in server.keeps.of.values())


def test_one_step_a_round_is_momentum_sgd() -> None:
    """g+ = beta mean G + (1 - beta) g;  x -= eta g+."""
    learning = Watched(TWO, "fedavg-m:beta=0.3")
    simulate(Chosen(both, 8, steps=1), {"a": 1.0, "b": 1.0}, learning=learning)
    x = g = 0.0
    for found in learning.models[1:]:
        mean = (1 * (x + 1) + 4 * (x - 1)) / 2
        g = 0.3 * mean + 0.7 * g
        x -= ETA * g
        assert float(found) == pytest.approx(x, abs=CLOSE)
    assert float(learning.vector("direction")) == pytest.approx(g, abs=CLOSE)


def test_the_former_model_is_one_direction_away() -> None:
    """x_prev = x + gamma g after each round with a plain server step."""
    learning = Watched(TWO, "fedavg-m-vr:beta=0.5")
    simulate(Chosen(both, 5), {"a": 1.0, "b": 1.0}, learning=learning)
    gamma = ETA * STEPS
    assert learning._newest.facts.numbers["gamma"] == pytest.approx(gamma)
    derived = learning.models[-1] + gamma * learning.vector("direction")
    assert torch.allclose(derived, learning.models[-2], atol=CLOSE)
    assert torch.equal(learning.vector("former"), learning.models[-2])


def test_what_is_sent_stays_the_direction_under_any_outer_step() -> None:
    learning = Watched(TWO, "fedavg-m:beta=0.5", step=outer("adam:lr=0.05"))
    simulate(Chosen(both, 1), {"a": 1.0, "b": 1.0}, learning=learning)
    assert float(learning.vector("direction")) == pytest.approx(-0.2230504688 / 0.5, abs=CLOSE)
    assert abs(float(learning.models[-1]) - 0.2230504688) > 0.1


def test_nothing_moves_where_no_client_moves() -> None:
    there = {"a": ([1.0], [0.0]), "b": ([4.0], [0.0])}
    for spec in ("fedavg-m", "scaffold", "scaffold-m", "feddyn"):
        learning = Watched(there, spec)
        simulate(Chosen(both, 3), {"a": 1.0, "b": 1.0}, learning=learning)
        assert all(float(x) == 0 for x in learning.models), spec


def test_the_order_of_results_changes_nothing() -> None:
    found = []
    for backwards in (False, True):
        learning = Watched(TWO, "scaffold-m:beta=0.2")
        chosen = Chosen(both, 6, backwards=backwards)
        simulate(chosen, {"a": 1.0, "b": 2.0}, learning=learning)
        found.append([float(x) for x in learning.models])
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_unlike_numbers_of_steps_are_averaged_as_directions() -> None:
    """x moves by the mean path times the mean direction, not by the longer path's direction."""

    class Uneven(Chosen):
        def begin(self, number: int) -> Actions:
            self.missing = 2
            yield Train("a", 2)
            yield Train("b", 6)

    learning = Watched(TWO, "fedavg-m:beta=1")
    simulate(Uneven(both, 1), {"a": 1.0, "b": 1.0}, learning=learning)
    ends = [
        b[0] * (1 - (1 - ETA * a[0]) ** k) for (a, b), k in zip(TWO.values(), (2, 6), strict=True)
    ]
    u = [-end / (ETA * k) for end, k in zip(ends, (2, 6), strict=True)]
    assert float(learning.models[-1]) == pytest.approx(-ETA * 4 * sum(u) / 2, abs=CLOSE)


def test_random_quadratics_reach_the_optimum_and_keep_every_identity() -> None:
    """Six clients of four dimensions, two a round: c is the mean of the c_i after every round."""
    rng = random.Random(5)
    toys = {
        f"c{i}": ([rng.uniform(0.5, 3) for _ in range(4)], [rng.gauss(0, 1) for _ in range(4)])
        for i in range(6)
    }

    def who(number: int) -> Sequence[str]:
        return sorted(random.Random(number).sample(sorted(toys), 2))

    rounds = 60
    learning = Watched(toys, "scaffold-m:beta=0.3", eta=0.05)
    seen = []

    def listen(now: float, event: object, actions: object) -> None:
        if isinstance(event, UpdateReceived) and len(learning.models) > 1:
            seen.append((learning.vector("control"), learning.variates()))

    chosen = Chosen(who, rounds, clients=len(toys))
    simulate(chosen, dict.fromkeys(toys, 1.0), learning=learning, listen=listen)
    a, b = (torch.tensor([toy[i] for toy in toys.values()]) for i in (0, 1))
    optimum = (a * b).sum(0) / a.sum(0)
    assert torch.allclose(learning.models[-1], optimum, atol=0.02)
    for control, variates in seen:
        assert torch.allclose(control, torch.stack(variates).mean(0), atol=1e-6)
    assert len(seen) == 2 * (rounds - 1)


def test_overlapping_orders_leave_c_the_mean_of_the_servers_rows() -> None:
    """Late work, from a row that has changed since: its delta counts, its change does not."""
    learning = Watched(TWO, "scaffold:table=server")
    stats: list[Mapping[str, float]] = []

    def listen(now: float, event: object, actions: object) -> None:
        if isinstance(event, Merged):
            stats.append(event.stats)
            mean = torch.stack(learning.variates()).mean(0)
            if int(learning._newest.facts.numbers["clients"]) == 2:
                assert torch.allclose(learning.vector("control"), mean, atol=1e-6)

    simulate(
        FedBuff(size=2, steps=STEPS), {"a": 0.1, "b": 0.7}, 30.0, learning=learning, listen=listen
    )
    assert len(stats) > 20
    assert any("variates_skipped" in told for told in stats)
    assert learning._table is not None
    rows = sum(len(numbers) for numbers in learning._table._stored.values())
    assert rows <= 4  # of each client the newest, and what its order starts from


def test_the_vr_form_that_diverges_ends_the_run() -> None:
    steep = {"a": ([30.0], [-1.0]), "b": ([34.0], [1.0])}
    learning = Watched(steep, "fedavg-m-vr:beta=0.5", eta=0.08)
    with pytest.raises(ServerError, match=r"FL-S210.*diverges"):
        simulate(Chosen(both, 40, steps=2), {"a": 1.0, "b": 1.0}, learning=learning)
    assert 5 < len(learning.models) < 20
    assert all(math.isfinite(float(x)) for x in learning.models)


def test_a_lost_commit_would_break_the_mean() -> None:
    """The invariant can fail: a client that forgets its c_i in silence leaves c wrong."""
    learning = Watched(TWO, "scaffold")
    simulate(Chosen(both, 3), {"a": 1.0, "b": 1.0}, learning=learning)
    keep = learning.keeps.of["a"]
    keep._held.kinds.clear()
    mean = torch.stack(learning.variates()).mean(0)
    assert not torch.allclose(learning.vector("control"), mean, atol=1e-3)


def test_fedavg_of_the_package_gives_the_same_rounds() -> None:
    learning = Watched(TWO, "scaffold-m:beta=0.5")
    simulate(FedAvg(steps=STEPS, rounds=4, min_clients=2), {"a": 1.0, "b": 1.0}, learning=learning)
    found = [float(x) for x in learning.models[1:]]
    assert found == pytest.approx(
        (0.2230504688, 0.4860799674, 0.6504527998, 0.6957784432), abs=CLOSE
    )
