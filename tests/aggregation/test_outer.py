"""Outer optimizers: the numbers of specs/momentum.md 8.8, torch's bits, and nothing but tiles."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from atoll.aggregation import outer as module
from atoll.aggregation.outer import (
    STEPS,
    Adagrad,
    Adam,
    Momentum,
    Nesterov,
    Outer,
    Sgd,
    Yogi,
    outer,
)
from atoll.protocols.errors import UsageError

ALL = [Sgd(0.5), Momentum(), Nesterov(), Adam(), Yogi(), Adagrad(), Adam(flower=True)]
SPEC: dict[str, Any] = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}


def three_steps(optimizer: Outer) -> list[list[float]]:
    """x = (1, 1) and a constant Delta = (0.1, -0.2), which is -delta; float64."""
    x, state = torch.ones(2, dtype=torch.float64), dict[str, Tensor]()
    delta = torch.tensor([-0.1, 0.2], dtype=torch.float64)
    made = []
    for _ in range(3):
        x, state = optimizer.step(x, delta, state)
        made.append(x.tolist())
    return made


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (Momentum(lr=1.0, momentum=0.9), [(1.1, 0.8), (1.29, 0.42), (1.561, -0.122)]),
        (
            Adam(**SPEC),
            [
                (1.0905028312, 0.9048739483),
                (1.2159863387, 0.7748742452),
                (1.3643810539, 0.6221208596),
            ],
        ),
        (
            Yogi(**SPEC),
            [
                (1.0904987562, 0.9048750780),
                (1.2156845016, 0.7751908469),
                (1.3633736441, 0.6231804117),
            ],
        ),
        (
            Adagrad(**SPEC),
            [
                (1.0099005000, 0.9900498750),
                (1.0232408647, 0.9766622622),
                (1.0387969844, 0.9610611714),
            ],
        ),
        (
            Adam(**SPEC, v0=0.0),
            [
                (1.0909090909, 0.9047619048),
                (1.2166807998, 0.7746849319),
                (1.3653044293, 0.6218709388),
            ],
        ),
        (Yogi(**SPEC, flower=True), [None, None, (1.3643084295, 0.6229274303)]),
        (Adagrad(**SPEC, flower=True), [None, None, (1.0387980635, 0.9610608994)]),
    ],
    ids=["momentum", "adam", "yogi", "adagrad", "adam v0=0", "yogi v0=0", "adagrad v0=0"],
)
def test_three_steps_give_the_numbers_of_the_spec(
    optimizer: Outer, expected: list[tuple[float, float] | None]
) -> None:
    for made, wanted in zip(three_steps(optimizer), expected, strict=True):
        assert wanted is None or made == pytest.approx(wanted, abs=1.1e-10)


def test_flower_multiplies_adams_rate_by_its_bias_correction() -> None:
    """lr sqrt(1-b2^(t+1)) / (1-b1^(t+1)) in round t, counted from 1, with m = v = 0 at first."""
    made = three_steps(Adam(**SPEC, flower=True))
    for i, delta in enumerate((-0.1, 0.2)):
        x, m, v = 1.0, 0.0, 0.0
        for t in (1, 2, 3):
            m, v = 0.9 * m + 0.1 * delta, 0.99 * v + 0.01 * delta**2
            lr = 0.1 * math.sqrt(1 - 0.99 ** (t + 1)) / (1 - 0.9 ** (t + 1))
            x -= lr * m / (math.sqrt(v) + 1e-3)
            assert made[t - 1][i] == pytest.approx(x, abs=1e-12)


def test_yogi_lets_v_fall_by_the_square_not_by_the_difference() -> None:
    """After a large delta a small one: v - (1-b2) g^2, where Adam's would shrink by (1-b2) v."""
    yogi = Yogi(**SPEC)
    _, state = yogi.step(torch.zeros(1), torch.ones(1), {"m": torch.zeros(1), "v": torch.ones(1)})
    assert state["v"].item() == 1.0  # sign(v - g^2) = 0
    _, state = yogi.step(torch.zeros(1), torch.full((1,), 0.5), state)
    assert state["v"].item() == pytest.approx(1 - 0.01 * 0.25)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_has_the_bits_of_torchs_sgd(nesterov: bool) -> None:
    """Diloco's outer optimizer is torch.optim.SGD(lr=0.7, momentum=0.9, nesterov=True)."""
    rng = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(1003, generator=rng))
    theirs = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=nesterov, foreach=False)
    ours: Outer = Nesterov() if nesterov else Momentum(lr=0.7)
    x, state = parameter.detach().clone(), dict[str, Tensor]()
    for _ in range(5):
        delta = torch.randn(1003, generator=rng)
        parameter.grad = delta.clone()
        theirs.step()
        x, state = ours.step(x, delta, state)
        assert torch.equal(x, parameter.detach())


def test_average_takes_the_delta_off() -> None:
    x, state = outer("average").step(torch.tensor([3.0, 4.0]), torch.tensor([1.0, -1.0]))
    assert x.tolist() == [2.0, 5.0]
    assert state == {}


@pytest.mark.parametrize("optimizer", ALL, ids=lambda o: type(o).__name__)
def test_tiles_change_no_bit(optimizer: Outer, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(1)
    x, deltas = torch.randn(1003, generator=rng), torch.randn(3, 1003, generator=rng)
    results = []
    for tile in (1, 64, 333, 4096):
        monkeypatch.setattr(module, "TILE", tile)
        made, state = x, dict[str, Tensor]()
        for delta in deltas:
            made, state = optimizer.step(made, delta, state)
        results.append(torch.cat([made, *(v.float() for v in state.values())]))
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("optimizer", ALL, ids=lambda o: type(o).__name__)
def test_a_step_writes_to_nothing_it_was_given(optimizer: Outer) -> None:
    x, delta = torch.ones(7), torch.full((7,), 0.5)
    state = optimizer.initial(x)
    before = {name: v.clone() for name, v in state.items()}
    optimizer.step(x, delta, state)
    assert x.tolist() == [1.0] * 7
    assert delta.tolist() == [0.5] * 7
    assert all(torch.equal(state[name], before[name]) for name in before)


@pytest.mark.parametrize("optimizer", ALL, ids=lambda o: type(o).__name__)
def test_in_place_and_apart_are_the_same(optimizer: Outer) -> None:
    x, delta = torch.linspace(-1, 1, 9), torch.linspace(2, 0, 9)
    apart, _ = optimizer.step(x, delta)
    made, _ = optimizer.step(x, delta, out=x)
    assert made is x
    assert torch.equal(x, apart)


@pytest.mark.parametrize("optimizer", ALL, ids=lambda o: type(o).__name__)
def test_a_kernel_that_says_so_may_write_over_its_delta(optimizer: Outer) -> None:
    x, delta = torch.linspace(-1, 1, 9), torch.linspace(2, 0, 9)
    apart, _ = optimizer.step(x, delta)
    if optimizer.in_place:
        optimizer.kernel(x, delta, optimizer.initial(x), 1, delta)
        assert torch.equal(delta, apart)


def test_momentum_moves_on_without_a_delta() -> None:
    x, state = Momentum().step(torch.zeros(1), torch.ones(1))
    x, state = Momentum().step(x, torch.zeros(1), state)
    assert x.item() == pytest.approx(-1.9)
    assert state[STEPS].item() == 2


@pytest.mark.parametrize(
    ("spec", "made"),
    [
        ("sgd:lr=0.5", Sgd(lr=0.5)),
        ("momentum", Momentum(lr=1.0, momentum=0.9)),
        ("nesterov", Nesterov(lr=0.7, momentum=0.9)),
        ("adam:lr=0.1,flower=true", Adam(lr=0.1, flower=True)),
        ("yogi", Yogi(lr=0.01)),
        ("adagrad:beta1=0.9", Adagrad(lr=0.1, beta1=0.9)),
    ],
)
def test_outer_optimizers_are_found_by_name(spec: str, made: Outer) -> None:
    assert outer(spec) == made
    assert type(outer(spec)) is type(made)


@pytest.mark.parametrize(
    "spec",
    ["sgd:lr=0", "sgd:lr=nan", "nesterov:momentum=1", "adam:beta2=-0.1", "adam:tau=0", "sgd:mu=1"],
)
def test_parameters_that_cannot_be_are_refused(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        outer(spec)
    assert caught.value.code == "FL-S102"


def test_an_object_that_is_no_outer_optimizer_is_refused() -> None:
    with pytest.raises(UsageError, match="Fraction") as caught:
        outer("fractions:Fraction")
    assert caught.value.code == "FL-S102"
