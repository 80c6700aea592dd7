"""FedLAW: the numbers of its specification (section 8), each way to be set, and its guards."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from atoll.aggregation.aggregator import aggregator, anchored, by_stack, is_learner
from atoll.aggregation.fedlaw import FedLaw
from atoll.aggregation.fedlaw_learn import How, Mixture, learn
from atoll.aggregation.fedlaw_steps import Adam, Momentum
from atoll.aggregation.fedlaw_weights import FORMS, Form
from atoll.aggregation.stack import Reported, Rows
from atoll.protocols.errors import UsageError

X = torch.tensor([0.5, -1.0, 2.0])  # the model that is merged into
MODELS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [-1.0, 0.0, 1.0]])
SIZES = (0.1, 0.3, 0.6)


@dataclass
class Bowl:
    """A proxy whose loss is 0.5 * |w - lowest|^2, whatever the examples."""

    lowest: Tensor
    examples: int = 4
    limit: int | None = None
    steps: int = 0
    vector: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.vector = torch.empty_like(self.lowest)

    def begin(self, buffers: Mapping[str, Tensor]) -> None: ...

    def loss(self) -> float:
        return float(0.5 * (self.vector - self.lowest).square().sum())

    def gradient(self, at: Tensor) -> tuple[float, Tensor]:
        self.steps += 1
        return self.loss(), self.vector - self.lowest

    def gain(self, before: float, after: float) -> float:
        return before - after

    def told(self) -> Mapping[str, float]:
        return {}

    def settle(self) -> Tensor:
        raise AssertionError("it has no buffers")

    def interrupt(self) -> None: ...


def stack(models: Tensor, x: Tensor) -> Rows:
    """As the engine shows them: the deltas, and last the model."""
    return Rows([*(x - model for model in models), x])


def result(
    rule: FedLaw, weights: Sequence[float], models: Tensor = MODELS, x: Tensor = X
) -> tuple[Tensor, Reported]:
    """The new model, and what the rule told."""
    rows = stack(models, x)
    found = rule.coefficients(rows, weights)
    assert isinstance(found, Reported)
    return x - rows.mix(found), found


def learning(lowest: Sequence[float], **given: object) -> FedLaw:
    return FedLaw(**given).with_proxy(Bowl(torch.tensor(lowest).float()))  # type: ignore[arg-type]


# ---- 1, 2, 6, 8: without learning it is FedAvg --------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("weights", "expected"), [(SIZES, (0.7, 1.7, 2.7)), ((1 / 3,) * 3, (4 / 3, 7 / 3, 10 / 3))]
)
def test_no_epochs_are_the_weighted_mean(
    form: str, weights: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    model, told = result(learning([0, 0, 0], epochs=0, form=form), weights)
    assert model.tolist() == pytest.approx(expected, abs=1e-6)
    assert told.stats["gamma"] == 1
    assert told.rows["lambda"] == pytest.approx(weights)


@pytest.mark.parametrize(("gamma", "expected"), [(1.0, (0.7, 1.7, 2.7)), (0.9, (0.63, 1.53, 2.43))])
def test_a_fixed_gamma_needs_no_proxy_data(gamma: float, expected: tuple[float, ...]) -> None:
    model, _ = result(FedLaw(mode="fixed", gamma=gamma), SIZES)
    assert model.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("form", FORMS.values())
def test_it_starts_from_the_sizes(form: Form) -> None:
    shares, gamma = form.values(form.start(SIZES))
    assert shares.tolist() == pytest.approx(SIZES, abs=1e-15)
    assert gamma == 1


def test_a_client_that_stands_twice_counts_as_one_of_both_sizes() -> None:
    twice = torch.stack([MODELS[0], MODELS[0], MODELS[2]])
    model, _ = result(learning([0, 0, 0], epochs=0), (0.1, 0.3, 0.6), twice)
    expected, _ = result(learning([0, 0, 0], epochs=0), (0.4, 0.6), MODELS[[0, 2]])
    assert model.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_gamma_scales_the_model_and_not_the_update() -> None:
    model, _ = result(FedLaw(mode="fixed", gamma=0.9), SIZES, torch.stack([X, X, X]))
    assert model.tolist() == pytest.approx((0.9 * X).tolist(), abs=1e-6)


# ---- 3, 4, 5: what it learns --------------------------------------------------------------------

TWO = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
LOWEST = (1.2, 0.4)


def test_the_closed_form_gradient_of_the_specs_example() -> None:
    form = FORMS["exp"]
    theta = form.start([0.5, 0.5])
    q = torch.tensor([1.0, 1.0]) - torch.tensor(LOWEST)  # at w = (1, 1)
    assert 0.5 * float(q.square().sum()) == pytest.approx(0.2)
    found = form.gradient(theta, TWO.double() @ q.double())
    assert found.tolist() == pytest.approx([-0.4, 0.4, 0.4], abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("form", FORMS.values())
def test_the_closed_form_is_what_autograd_finds(form: Form, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    models = torch.randn(4, 7, generator=random, dtype=torch.float64)
    lowest = torch.randn(7, generator=random, dtype=torch.float64)
    theta = torch.rand(5, generator=random, dtype=torch.float64) + 0.2
    z, s = theta[:-1].clone().requires_grad_(), theta[-1].clone().requires_grad_()
    exponential = form is FORMS["exp"]
    shares = z.softmax(0) if exponential else z.square() / z.square().sum()
    w = (s.exp() if exponential else s.square()) * (shares @ models)
    torch.autograd.backward(0.5 * (w - lowest).square().sum())
    assert z.grad is not None
    assert s.grad is not None
    q = (w - lowest).detach()
    found = form.gradient(theta, models @ q)
    assert torch.allclose(found, torch.cat([z.grad, s.grad.view(1)]), atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_it_finds_the_only_best_mixture(form: str) -> None:
    """lambda (0.75, 0.25), gamma 0.8, loss 0: 2000 Adam steps at a rate that stays 0.05."""
    proxy = Bowl(torch.tensor(LOWEST))
    mixture = Mixture(stack(TWO, torch.tensor([3.0, -5.0])), proxy, [0.5, 0.5], How(form=form))
    everything = mixture.mask(shares=True, scale=True)
    for _ in range(2000):
        assert mixture.step(torch.arange(4), 0.05, everything)
        shares, gamma = mixture.values()
        assert sum(shares) == pytest.approx(1)
        assert min(*shares, gamma) > 0
    assert shares == pytest.approx([0.75, 0.25], abs=0.005)
    assert gamma == pytest.approx(0.8, abs=0.02)
    mixture.build()
    assert proxy.loss() < 1e-3


def test_a_constant_added_to_z_changes_nothing() -> None:
    form = FORMS["exp"]
    theta = form.start(SIZES)
    moved = theta + torch.tensor([7.0, 7.0, 7.0, 0.0])
    g = torch.tensor([1.0, -2.0, 3.0]).double()
    assert torch.allclose(form.values(moved)[0], form.values(theta)[0], atol=1e-15)
    assert torch.allclose(form.gradient(moved, g), form.gradient(theta, g), atol=1e-14)


@pytest.mark.parametrize(
    ("mode", "shares", "gamma"),
    [("both", True, True), ("lambda", True, False), ("gamma", False, True)],
)
def test_a_mode_learns_what_it_says_and_nothing_else(mode: str, shares: bool, gamma: bool) -> None:
    _, told = result(learning(LOWEST, mode=mode, lr=0.05), (0.5, 0.5), TWO, torch.ones(2))
    assert (told.rows["lambda"] != [0.5, 0.5]) == shares
    assert (told.stats["gamma"] != 1) == gamma
    assert told.stats["proxy_loss"] < told.stats["proxy_loss_before"]


@pytest.mark.parametrize("form", FORMS)
def test_gamma_never_passes_its_limit(form: str) -> None:
    wide = learning([9.0, 9.0], lr=0.2, form=form)
    _, free = result(wide, (0.5, 0.5), TWO, torch.ones(2))
    assert free.stats["gamma"] > 1.5
    held = learning([9.0, 9.0], lr=0.2, form=form, gamma_max=1.0)
    _, told = result(held, (0.5, 0.5), TWO, torch.ones(2))
    assert told.stats["gamma"] == pytest.approx(1.0)


def test_two_stages_learn_lambda_then_gamma() -> None:
    rule = learning(LOWEST, two_stage=True, epochs=200, lr=0.05)
    _, told = result(rule, (0.5, 0.5), TWO, torch.ones(2))
    assert told.rows["lambda"][0] > 0.6
    assert 0.7 < told.stats["gamma"] < 0.95
    short = learning(LOWEST, two_stage=True, epochs=4, lr=0.05)  # too few epochs to average
    _, told = result(short, (0.5, 0.5), TWO, torch.ones(2))
    assert told.stats["proxy_loss"] < told.stats["proxy_loss_before"]


def test_sgd_with_momentum_learns_too() -> None:
    rule = learning(LOWEST, optimizer="sgd", lr=0.05, epochs=100)
    _, told = result(rule, (0.5, 0.5), TWO, torch.ones(2))
    assert told.stats["proxy_loss"] < 0.05


GRADIENTS = [torch.tensor([1.0, -0.5 * i, i - 3.0]).double() for i in range(5)]


def test_adam_steps_as_its_paper_says() -> None:
    """m and v with their bias taken out; torch's own takes seconds to import."""
    own, theta = Adam(), torch.ones(3).double()
    m, v, expected = [0.0] * 3, [0.0] * 3, [1.0] * 3
    for t, gradient in enumerate(GRADIENTS, start=1):
        own.step(theta, gradient, 0.1)
        for i, g in enumerate(gradient.tolist()):
            m[i] = 0.5 * m[i] + 0.5 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            step = m[i] / (1 - 0.5**t) / (math.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)
            expected[i] -= 0.1 * step
    assert theta.tolist() == pytest.approx(expected, abs=1e-12)


def test_sgd_keeps_nine_tenths_of_its_velocity() -> None:
    own, theta = Momentum(), torch.ones(3).double()
    velocity, expected = [0.0] * 3, [1.0] * 3
    for gradient in GRADIENTS:
        own.step(theta, gradient, 0.1)
        for i, g in enumerate(gradient.tolist()):
            velocity[i] = 0.9 * velocity[i] + g
            expected[i] -= 0.1 * velocity[i]
    assert theta.tolist() == pytest.approx(expected, abs=1e-12)


def test_many_updates_share_their_lambdas() -> None:
    models = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    weights = [(i + 1) / 55 for i in range(10)]
    _, told = result(learning([1.0, 1.0, 1.0], max_models=3, lr=0.1), weights, models)
    found = told.rows["lambda"]
    assert sum(found) == pytest.approx(1)
    ratios = [share / weight for share, weight in zip(found, weights, strict=True)]
    assert len({round(r, 9) for r in ratios}) == 3
    assert ratios[0] == pytest.approx(ratios[3])  # 10 in 3 groups: 4, 3, 3


# ---- 7: those who send anything -----------------------------------------------------------------


def test_an_update_out_of_all_proportion_takes_no_part() -> None:
    models = torch.cat([MODELS, torch.full((1, 3), 1e6)])
    model, told = result(learning([1.0, 1.0, 1.0]), (0.25,) * 4, models)
    assert told.rows["lambda"][3] < 1e-3
    assert told.stats["screened"] == 1
    assert float(model.abs().max()) < 10


def test_without_the_screen_it_is_at_least_seen() -> None:
    models = torch.cat([MODELS, torch.full((1, 3), 1e6)])
    _, told = result(learning([1.0, 1.0, 1.0], screen=0), (0.25,) * 4, models)
    assert told.rows["lambda"][3] < 0.25
    assert "screened" not in told.stats


@dataclass
class Broken(Bowl):
    """Its gradient is not a number, or leads uphill."""

    factor: float = math.nan

    def gradient(self, at: Tensor) -> tuple[float, Tensor]:
        loss, q = super().gradient(at)
        return loss, self.factor * q


@pytest.mark.parametrize("factor", [math.nan, -1.0])
@pytest.mark.parametrize("given", [{}, {"two_stage": True, "epochs": 20}])
def test_what_is_no_better_than_the_mean_gives_way_to_it(
    factor: float, given: dict[str, object]
) -> None:
    proxy = Broken(torch.tensor(LOWEST), factor=factor)
    rule = FedLaw(lr=0.05, **given).with_proxy(proxy)  # type: ignore[arg-type]
    model, told = result(rule, (0.5, 0.5), TWO, torch.zeros(2))
    assert told.stats["guard"] == 1
    assert told.stats["gamma"] == 1
    assert told.rows["lambda"] == [0.5, 0.5]
    assert model.tolist() == [1.0, 1.0]
    assert ("proxy_loss" in told.stats) == (factor == -1)


def test_a_gradient_that_breaks_in_the_second_stage_is_seen() -> None:
    @dataclass
    class Later(Bowl):
        def gradient(self, at: Tensor) -> tuple[float, Tensor]:
            loss, q = super().gradient(at)
            return (math.nan if self.steps > 5 else loss), q

    rule = FedLaw(two_stage=True, epochs=8).with_proxy(Later(torch.tensor(LOWEST)))
    _, told = result(rule, (0.5, 0.5), TWO, torch.zeros(2))
    assert told.stats["guard"] == 1


def test_a_tolerance_lets_something_worse_through() -> None:
    proxy = Broken(torch.tensor(LOWEST), factor=-1.0)
    rule = FedLaw(lr=0.05, tolerance=100.0).with_proxy(proxy)
    _, told = result(rule, (0.5, 0.5), TWO, torch.zeros(2))
    assert "guard" not in told.stats
    assert told.stats["proxy_loss"] > told.stats["proxy_loss_before"]


# ---- without proxy data -------------------------------------------------------------------------


def test_fedavg_and_a_fixed_gamma_are_ways_without_proxy_data() -> None:
    model, _ = result(FedLaw(no_proxy="fedavg"), SIZES)
    assert model.tolist() == pytest.approx((0.7, 1.7, 2.7), abs=1e-6)
    model, told = result(FedLaw(no_proxy="fixed_gamma", gamma=0.9), SIZES)
    assert model.tolist() == pytest.approx((0.63, 1.53, 2.43), abs=1e-6)
    assert told.stats == {"gamma": 0.9}


def test_coherence_gives_more_to_those_who_agree() -> None:
    """lambda_i in proportion to p_i * exp(cos(delta_i, mean delta) / 0.5)."""
    models, x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]]), torch.zeros(2)
    weights = torch.tensor([0.4, 0.4, 0.2])
    mean = -(weights @ models)
    cosines = torch.nn.functional.cosine_similarity(-models, mean.expand(3, 2))
    expected = weights * (cosines / 0.5).exp()
    _, told = result(FedLaw(no_proxy="coherence"), weights.tolist(), models, x)
    assert told.rows["lambda"] == pytest.approx((expected / expected.sum()).tolist(), rel=1e-6)
    assert told.stats == {"gamma": 1.0}


def test_a_client_that_did_not_move_agrees_with_nobody() -> None:
    models, x = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.zeros(2)
    _, told = result(FedLaw(no_proxy="coherence"), (0.5, 0.5), models, x)
    assert told.rows["lambda"] == pytest.approx([math.e**2 / (math.e**2 + 1), 1 / (math.e**2 + 1)])


@pytest.mark.parametrize(("policy", "said"), [("error", "proxy data"), ("validators", "validate")])
def test_it_does_not_guess_what_it_cannot_learn(policy: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        result(FedLaw(no_proxy=policy), SIZES)  # type: ignore[arg-type]
    assert caught.value.code == "FL-S104"


def test_validators_are_asked_five_times_and_no_more() -> None:
    proxy = Bowl(torch.tensor(LOWEST), limit=5)
    result(FedLaw(no_proxy="validators").with_proxy(proxy), (0.5, 0.5), TWO, torch.ones(2))
    assert proxy.steps == 5


# ---- what it says of itself ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "needs"),
    [
        ("fedlaw", {"proxy_data"}),
        ("fedlaw:mode=lambda", {"proxy_data"}),
        ("fedlaw:mode=fixed,gamma=0.99", set()),
        ("fedlaw:no_proxy=coherence", set()),
        ("fedlaw:no_proxy=validators", {"validators"}),
    ],
)
def test_it_says_what_it_needs(spec: str, needs: set[str]) -> None:
    rule = aggregator(spec)
    assert rule.needs == needs
    assert rule.algebra == "set"
    assert not rule.private
    assert by_stack(rule)
    assert anchored(rule)
    assert is_learner(rule)
    assert rule.learns == ("mode=fixed" not in spec)


@pytest.mark.parametrize(
    "spec",
    [
        "fedlaw:mode=lamda", "fedlaw:mode=fixed", "fedlaw:no_proxy=fixed_gamma", "fedlaw:gamma=0",
        "fedlaw:gamma=2", "fedlaw:mode=lambda,gamma=0.9",
        "fedlaw:gamma_max=-1", "fedlaw:gamma_max=inf", "fedlaw:epochs=-1", "fedlaw:lr=0",
        "fedlaw:batch=0", "fedlaw:optimizer=adamw", "fedlaw:form=tanh", "fedlaw:no_proxy=guess",
        "fedlaw:screen=-1",
        "fedlaw:temperature=0", "fedlaw:buffers=mine", "fedlaw:tolerance=-1", "fedlaw:seed=-1",
        "fedlaw:max_models=0", "fedlaw:min_updates=0", "fedlaw:two_stage=true,mode=lambda",
        "fedlaw:two_stage=true,no_proxy=validators", "fedlaw:panel=1", "fedlaw:deadline=0",
        "fedlaw:proxy=digits",
    ],
)  # fmt: skip
def test_a_parameter_out_of_range_is_refused(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        aggregator(spec)
    assert caught.value.code == "FL-S102"


def test_the_same_merge_gives_the_same_numbers() -> None:
    """A server that makes a version again after a crash must get the same bytes."""
    models = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    first = learn(stack(models, X), Bowl(torch.ones(3)), [0.25] * 4, How())
    again = learn(stack(models, X), Bowl(torch.ones(3)), [0.25] * 4, How())
    assert first == again


def test_batches_are_shuffled_whole_and_never_of_one() -> None:
    proxy = Bowl(torch.ones(3), examples=5)
    mixture = Mixture(stack(MODELS, X), proxy, SIZES, How())
    found = [at.tolist() for at in mixture.batches(How(batch=2), 0)]
    assert [len(at) for at in found] == [2, 2]
    whole = [at.tolist() for at in mixture.batches(How(batch=3), 1)]
    assert sorted(whole[0] + whole[1]) == [0, 1, 2, 3, 4]
    assert whole != [at.tolist() for at in mixture.batches(How(batch=3), 2)]
    assert [len(at) for at in mixture.batches(How(batch=9), 0)] == [5]
