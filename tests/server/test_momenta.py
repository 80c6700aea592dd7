"""Two momenta: where they swing up, and what is done and said about it."""

import pytest

from atoll.aggregation.outer import Momentum, Nesterov
from atoll.server.check import check
from atoll.server.momenta import BESIDE, largest_lr, remark, suited
from atoll.server.spec import RunSpec
from atoll.server.training import Training


def grown(lr: float, momentum: float, beta: float, nesterov: bool) -> float:
    """How far from the optimum of x^2 the recursion is after a long time, from 1 on."""
    x, v, d, furthest = 1.0, 0.0, 0.0, 0.0
    for step in range(6000):
        d = (1 - beta) * d + beta * x
        v = momentum * v + d
        x -= lr * (d + momentum * v) if nesterov else lr * v
        if step > 5000:
            furthest = max(furthest, abs(x))
        if abs(x) > 1e9:
            return abs(x)
    return furthest


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("beta", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.9])
def test_the_largest_step_is_the_edge_of_the_recursion(
    momentum: float, beta: float, nesterov: bool
) -> None:
    most = largest_lr(momentum, beta, nesterov=nesterov)
    assert grown(0.8 * most, momentum, beta, nesterov) < 1e-2
    assert grown(1.3 * most, momentum, beta, nesterov) > 1.0


def test_known_edges() -> None:
    assert largest_lr(0.9, 0.1, nesterov=True) == pytest.approx(0.030, abs=1e-3)
    assert largest_lr(0.3, 0.1, nesterov=True) == pytest.approx(10.02, abs=0.01)
    assert largest_lr(0.9, 0.1, nesterov=False) == pytest.approx(0.023, abs=1e-3)
    assert largest_lr(0.0, 0.1, nesterov=False) == pytest.approx(38, abs=0.1)
    assert largest_lr(0.9, 1.0, nesterov=True) == pytest.approx(1.357, abs=1e-3)  # DiLoCo's own


@pytest.mark.parametrize(
    ("outer", "algorithm", "found"),
    [
        ("nesterov", "scaffold-m", "nesterov:momentum=0.3"),
        ("momentum:lr=0.5", "fedavg-m:beta=0.2", "momentum:lr=0.5,momentum=0.3"),
        ("nesterov:momentum=0.8", "scaffold-m", "nesterov:momentum=0.8"),
        ("nesterov", "scaffold", "nesterov"),
        ("nesterov", "plain", "nesterov"),
        ("sgd", "scaffold-m", "sgd"),
        ("their.module:Nesterov", "scaffold-m", "their.module:Nesterov"),
    ],
)
def test_momentum_is_small_where_the_local_steps_have_it(
    outer: str, algorithm: str, found: str
) -> None:
    assert suited(outer, algorithm) == found


def test_what_was_chosen_is_stable_by_far() -> None:
    assert largest_lr(BESIDE, 0.1, nesterov=False) > 1.5 * Momentum().lr
    assert largest_lr(BESIDE, 0.1, nesterov=True) > 10 * Nesterov().lr


def test_a_simulation_steps_with_it() -> None:
    made = Training.of(["a"], algorithm="scaffold-m", step="nesterov")
    assert made._merger.outer == Nesterov(momentum=0.3)


def test_it_is_said_at_the_start() -> None:
    spec = RunSpec("r", strategy="fedavg", outer="nesterov", algorithm="scaffold-m")
    (said,) = check(spec)
    assert said.startswith("outer nesterov takes momentum=0.3 here: local algorithm scaffold-m has")
    assert remark("nesterov:momentum=0.9", "scaffold-m") == (
        "outer nesterov with lr=0.7, momentum=0.9 beside local algorithm scaffold-m with beta=0.1: "
        "two momenta may swing up from lr=0.03 on; give less of either"
    )
    assert remark("nesterov:lr=0.02,momentum=0.9", "scaffold-m") == ""
    assert remark("nesterov", "scaffold") == remark("adam", "scaffold-m") == ""
    assert remark("nesterov:momentum=much", "scaffold-m") == ""
