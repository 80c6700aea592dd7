"""Stop rules and the best version, the same for every strategy."""

import math

import pytest

from atoll.protocols import state
from atoll.protocols.errors import UsageError
from atoll.server.rules import LIMITS, Rules


def told(rules: Rules, *values: float, metric: str = "accuracy") -> Rules:
    for version, value in enumerate(values, 1):
        rules.evaluated(version, {metric: value}, float(version))
    return rules


@pytest.mark.parametrize("name", ["versions", "updates", "steps", "seconds", "patience"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_limit_that_would_end_the_run_at_once_is_refused(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"{name}={value}") as refused:
        Rules(**{name: value})  # type: ignore[arg-type]
    assert refused.value.code == "FL-S108"


def test_without_limits_a_run_never_ends() -> None:
    assert told(Rules(), 0.99, 0.1, 0.1).reason(10**9, 10**9, 10**9, 1e12) is None


@pytest.mark.parametrize(
    ("rules", "before", "at", "reason"),
    [
        (Rules(versions=3), (2, 9, 9, 9.0), (3, 0, 0, 0.0), "3 versions done"),
        (Rules(updates=3), (9, 2, 9, 9.0), (0, 3, 0, 0.0), "3 updates done"),
        (Rules(steps=3), (9, 9, 2, 9.0), (0, 0, 4, 0.0), "3 steps done"),
        (Rules(steps=2000001), (9, 9, 9, 9.0), (0, 0, 2000001, 0.0), "2000001 steps done"),
        (Rules(seconds=2.5), (9, 9, 9, 2.4), (0, 0, 0, 2.5), "2.5 seconds done"),
    ],
)
def test_a_count_ends_the_run_when_it_is_reached(
    rules: Rules, before: tuple[int, int, int, float], at: tuple[int, int, int, float], reason: str
) -> None:
    assert rules.reason(*before) is None
    assert rules.reason(*at) == reason


def test_the_last_version_is_known_while_it_is_being_made() -> None:
    assert [Rules(versions=3).last(version) for version in (2, 3)] == [None, "3 versions done"]
    assert Rules(updates=1).last(10**9) is None


def test_a_target_is_reached_once_and_for_good() -> None:
    rules = told(Rules(target=0.9), 0.5, 0.89)
    assert rules.reason(2, 2, 2, 2.0) is None
    told(rules, 0.5, 0.89, 0.9, 0.95, 0.7)
    assert rules.reached_at == 3.0
    reason = rules.reason(7, 7, 7, 7.0)
    assert reason == "target reached: accuracy 0.9500, wanted 0.9"


def test_the_best_is_the_first_of_the_highest() -> None:
    rules = told(Rules(), 0.5, 0.8, 0.7, 0.8)
    assert (rules.best, rules.best_version, rules.since_best) == (0.8, 2, 2)
    assert (rules.latest, rules.latest_version) == (0.8, 4)


@pytest.mark.parametrize("metric", ["loss", "valid_loss", "perplexity"])
def test_a_loss_is_better_when_lower(metric: str) -> None:
    rules = told(Rules(target=0.3, metric=metric), 0.9, 0.4, 0.5, metric=metric)
    assert (rules.best, rules.best_version) == (0.4, 2)
    assert rules.reached_at is None
    told(rules, 0.9, 0.4, 0.3, metric=metric)
    assert rules.reached_at == 3.0


def test_patience_counts_evaluations_without_a_better_one() -> None:
    rules = told(Rules(patience=2), 0.5, 0.6, 0.55)
    assert rules.reason(3, 3, 3, 3.0) is None
    rules.evaluated(4, {"accuracy": 0.6}, 4.0)
    assert rules.reason(4, 4, 4, 4.0) == "no better accuracy in 2 evaluations, best 0.6000"
    rules.evaluated(5, {"accuracy": 0.7}, 5.0)
    assert rules.reason(5, 5, 5, 5.0) is None


def test_evaluations_may_come_out_of_order() -> None:
    rules = Rules()
    rules.evaluated(5, {"accuracy": 0.5}, 1.0)
    rules.evaluated(3, {"accuracy": 0.9}, 2.0)
    assert (rules.latest, rules.latest_version) == (0.5, 5)
    assert (rules.best, rules.best_version) == (0.9, 3)


def test_metrics_without_the_one_that_counts_change_nothing() -> None:
    rules = Rules(target=0.1)
    rules.evaluated(1, {"loss": 0.5}, 1.0)
    assert rules == Rules(target=0.1)


def test_a_metric_that_is_no_number_is_never_the_best_nor_a_target() -> None:
    """A model that diverged on its first evaluation kept its place as the best for ever."""
    for metric, target in (("accuracy", 0.9), ("loss", 0.1)):
        rules = Rules(target=target, metric=metric, patience=2)
        rules.evaluated(1, {metric: math.nan}, 1.0)
        assert rules == Rules(
            target, metric, patience=2, since_best=1, latest_version=1, latest=rules.latest
        )
        rules.evaluated(2, {metric: 0.5}, 2.0)
        assert (rules.best, rules.best_version, rules.since_best) == (0.5, 2, 0)
        rules.evaluated(3, {metric: math.nan}, 3.0)
        assert (rules.best_version, rules.since_best, rules.reached_at) == (2, 1, None)


def test_a_model_whose_loss_is_no_number_is_right_by_chance_alone() -> None:
    """Of data all of one class a model of NaN was right on each, and met the target at once."""
    rules = Rules(target=0.9)
    rules.evaluated(0, {"accuracy": 1.0, "loss": math.nan}, 1.0)
    assert (rules.best, rules.reached_at) == (None, None)
    rules.evaluated(1, {"accuracy": 0.95, "loss": 0.2}, 2.0)
    assert (rules.best_version, rules.reached_at) == (1, 2.0)


def test_patience_without_any_number_ends_the_run_too() -> None:
    rules = told(Rules(patience=2), math.nan, math.nan)
    assert rules.reason(2, 2, 2, 2.0) == "no better accuracy in 2 evaluations, best none"


def test_other_limits_can_be_taken_and_the_state_is_kept() -> None:
    rules = told(Rules(target=0.5, versions=9), 0.6)
    assert reached(rules) == 1.0
    rules.take_limits(Rules(target=0.5, updates=4), 9.0)
    assert reached(rules) == 1.0
    assert [getattr(rules, name) for name in LIMITS] == [0.5, "accuracy", None, 4, None, None, None]
    rules.take_limits(Rules(target=0.9), 9.0)
    assert (reached(rules), rules.best, rules.best_version) == (None, 0.6, 1)
    rules.evaluated(2, {"accuracy": 0.91}, 2.0)
    assert reached(rules) == 2.0


def reached(rules: Rules) -> float | None:
    return rules.reached_at


def test_a_best_that_meets_a_lower_target_counts_at_once() -> None:
    rules = told(Rules(target=0.9), 0.6)
    rules.take_limits(Rules(target=0.5), 4.0)
    assert rules.reached_at == 4.0
    assert rules.reason(1, 1, 1, 5.0) == "target reached: accuracy 0.6000, wanted 0.5"


def test_rules_survive_being_written_down() -> None:
    rules = told(Rules(target=0.5, seconds=7.5), 0.6, 0.4)
    assert state.loads(Rules, state.dumps(rules)) == rules


def test_rules_without_a_limit_end_nothing() -> None:
    assert not Rules(metric="loss").ends()
    assert all(Rules(**{name: 1}).ends() for name in LIMITS if name != "metric")  # type: ignore[arg-type]
