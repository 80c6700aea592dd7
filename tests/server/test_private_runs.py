"""Runs with noise: real training in virtual time, what is told of epsilon, and what is refused."""

import json
import math
from pathlib import Path

import dp_accounting
import pytest

from atoll.aggregation.strategy import Strategy
from atoll.protocols import console
from atoll.protocols.errors import ServerError, UsageError
from atoll.server.check import check, strategy_of
from atoll.server.cli import cli
from atoll.server.history import History
from atoll.server.live import event_line, render, view
from atoll.server.offline import end_of
from atoll.server.rules import Rules
from atoll.server.screen import status_screen
from atoll.server.secret import FILE, key_of, privacy_of, sampling_of
from atoll.server.spec import OPTIONS, RunSpec
from atoll.server.status import Status


def simulate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    code = console.run(cli, ["simulate", *arguments, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert code == 0, told
    return dict(told["data"])


DIGITS = ("--local-momentum", "0.9", "--clients", "8", "--speeds", "homogeneous")


def test_central_dp_on_digits_learns_and_tells_its_price(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Eight clients, 12 rounds, each pays 12 / z^2: with z = 1 nobody is safe, and it says so."""
    run = (
        "--strategy",
        "fedavg:steps=20,rounds=12,min_clients=8",
        *DIGITS,
        "--evaluate-every",
        "12",
    )
    found = simulate(capsys, *run, "--dp", "clip=1,noise=1", "--out", str(tmp_path))
    exact = dp_accounting.get_epsilon_gaussian(1 / math.sqrt(12), 1e-5)
    assert found["epsilon"] == pytest.approx(exact)
    accuracy = found["accuracy"]
    assert isinstance(accuracy, float)
    assert 0.68 < accuracy < 0.9  # 0.71; without clip and noise 0.96
    history = History.read(tmp_path / "history.jsonl")
    told = [row["stats"]["epsilon"] for row in history.rows if row["kind"] == "merged"]
    assert len(told) == 12
    assert told == sorted(told)
    assert told[-1] == history.epsilon == pytest.approx(exact)
    again = simulate(capsys, *run, "--dp", "clip=1,noise=1")
    assert again["hash"] == found["hash"]


def test_max_epsilon_ends_the_run_before_it_is_passed(capsys: pytest.CaptureFixture[str]) -> None:
    found = simulate(
        capsys, "--strategy", "fedcompass:min_clients=8", *DIGITS, "--evaluate-every", "100",
        "--dp", "noise=2", "--max-epsilon", "5",
    )  # fmt: skip
    epsilon = found["epsilon"]
    assert isinstance(epsilon, float)
    assert epsilon <= 5 < dp_accounting.get_epsilon_gaussian(1 / math.sqrt(6 / 4), 1e-5)
    assert found["reason"] == f"privacy budget spent: epsilon {epsilon:.4g}"


def test_who_is_drawn_in_secret_pays_less(capsys: pytest.CaptureFixture[str]) -> None:
    found = simulate(
        capsys, "--strategy", "dp-fedavg:population=8,fraction=0.25,rounds=4,steps=5", *DIGITS,
        "--evaluate-every", "100", "--dp", "clip=0.5,noise=1,delta=1e-3",
    )  # fmt: skip
    event = dp_accounting.PoissonSampledDpEvent(0.25, dp_accounting.GaussianDpEvent(1.0))
    exact = dp_accounting.pld.PLDAccountant()
    exact.compose(event, 4)
    assert found["epsilon"] == pytest.approx(exact.get_epsilon(1e-3), rel=0.01)
    assert found["versions"] == 4


def test_local_noise_ends_with_the_budget_too(capsys: pytest.CaptureFixture[str]) -> None:
    found = simulate(
        capsys, "--strategy", "fedavg:steps=5,min_clients=8", *DIGITS, "--evaluate-every", "100",
        "--local-dp", "clip=0.5,noise=2", "--max-epsilon", "4",
    )  # fmt: skip
    assert found["versions"] == 3
    assert found["epsilon"] == pytest.approx(
        dp_accounting.get_epsilon_gaussian(2 / math.sqrt(3), 1e-5)
    )


# ---- what is told ------------------------------------------------------------------------------


def rows(*epsilons: float | None) -> History:
    return History.of(
        {
            "t": float(i),
            "kind": "merged",
            "version": i,
            "stats": {} if e is None else {"epsilon": e},
        }
        for i, e in enumerate(epsilons)
    )


def test_epsilon_is_in_history_status_and_the_live_table() -> None:
    history = rows(1.0, 2.5)
    assert history.epsilon == 2.5
    assert rows(None).epsilon is None
    status = end_of(Status("01J", "run", "fedavg", "running"), history)
    assert status.epsilon == 2.5
    assert "epsilon 2.5" in status_screen(status).plain
    assert "epsilon" not in status_screen(Status("01J", "run", "fedavg", "running")).plain
    from rich.console import Console

    with Console(width=100).capture() as shown:
        Console(width=100).print(render(view(history)))
    assert "epsilon 2.5" in str(render(view(history)).renderables[0])
    del shown
    assert event_line(history.rows[1]) == "    1.00s  v1 merged, epsilon 2.5"


def test_infinity_is_told_as_such() -> None:
    history = History.of([{"t": 0.0, "kind": "merged", "version": 1, "stats": {"epsilon": None}}])
    assert history.epsilon == math.inf  # as JSON has no infinity


def test_the_rule_hears_of_a_spent_budget() -> None:
    rules = Rules()
    rules.merged({"epsilon": 3.0, "budget_spent": 0.0})
    assert rules.reason(1, 1, 1, 0.0) is None
    rules.merged({"epsilon": 4.0, "budget_spent": 1.0})
    assert rules.reason(1, 1, 1, 0.0) == "privacy budget spent: epsilon 4"


# ---- the run's secret --------------------------------------------------------------------------


def test_the_secret_is_made_once_and_only_its_owner_may_read_it(
    tmp_path: Path, synced: list[str]
) -> None:
    key = key_of(tmp_path, begun=False)
    assert len(key) == 32
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    assert synced == [f"{tmp_path / FILE}.tmp", str(tmp_path)]
    assert key_of(tmp_path, begun=True) == key_of(tmp_path, begun=False) == key
    (tmp_path / FILE).write_bytes(b"short")
    with pytest.raises(ServerError, match=r"FL-S206.*5 bytes"):
        key_of(tmp_path, begun=True)
    (tmp_path / FILE).unlink()
    with pytest.raises(ServerError, match=r"FL-S206.*restore it"):
        key_of(tmp_path, begun=True)


def test_clients_hear_of_local_noise_and_of_no_secret() -> None:
    spec = RunSpec("01J", dp="clip=1", local_dp="noise=2", strategy="dp-fedavg")
    told = json.loads(spec.for_clients())
    assert told["local_dp"] == "noise=2"
    assert not {"dp", "strategy"} & set(told)
    strategy = strategy_of(spec)
    before = vars(strategy)["secret"]
    assert privacy_of(spec, strategy, bytes(32)).sampling == sampling_of(strategy)
    assert vars(strategy)["secret"] != before
    assert sampling_of(Strategy()) is None


# ---- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"dp": "clip=1", "aggregator": "krum", "strategy": "fedavg:cohort=9"},
            r"FL-S104: --dp clip=1 needs a merge that is a weighted sum, which aggregator krum "
            r"does not give \(take aggregator mean",
        ),
        ({"dp": "clip=-1"}, "FL-S102: --dp .*clip=-1"),
        ({"dp": "delta=7"}, "FL-S102: --dp .*delta=7"),
        ({"local_dp": "noise=-1"}, "FL-S102: --local-dp .*noise=-1"),
    ],
)
def test_what_cannot_be_is_refused_with_both_sides_and_the_remedy(
    given: dict[str, str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        check(RunSpec("01J", **given))  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["krum", "median", "rfa", "trimmed-mean"])
def test_robust_rules_go_with_noise_of_the_clients(rule: str) -> None:
    check(RunSpec("01J", local_dp="noise=1", aggregator=rule, strategy="fedavg:cohort=9"))


@pytest.mark.parametrize("strategy", ["fedavg", "fedbuff", "fedasync", "fedcompass", "dp-fedavg"])
@pytest.mark.parametrize("outer", ["sgd", "nesterov", "adam"])
def test_central_noise_goes_with_every_strategy_and_step(strategy: str, outer: str) -> None:
    check(RunSpec("01J", dp="noise=1,adaptive=true", strategy=strategy, outer=outer))


def test_a_limit_without_noise_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code = console.run(cli, ["simulate", "--max-epsilon", "3", "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert (code, error["code"]) == (2, "FL-S108")
    assert OPTIONS["max_epsilon"] == ("dp", "local_dp")
