"""An aggregator that learns gets the run's model and proxy data; what does not fit is refused."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from atoll.aggregation.aggregator import Aggregator, aggregator, is_asking, is_learner
from atoll.aggregation.fedavg import FedAvg
from atoll.client.data import Data, Split, load_data, size
from atoll.client.flat import FlatModel
from atoll.client.local import TorchTrainer
from atoll.client.models import build
from atoll.client.proxy import prints
from atoll.client.specs import make_trainer
from atoll.protocols.errors import DataError, UsageError
from atoll.server.check import check, wants_proxy
from atoll.server.learner import learning, learning_in
from atoll.server.simasker import SimAsker
from atoll.server.simulator import simulate
from atoll.server.spec import RunSpec
from atoll.server.trainers import VALIDATORS, Trainers
from atoll.server.training import Training
from tests.conftest import Logged

BLOBS = "synthetic:examples=400,classes=4,features=3"


def spec(**given: str) -> RunSpec:
    return RunSpec("01J8ZQ4T0V7M3N5P6R8S9T0V1W", **given)  # type: ignore[arg-type]


def proxy_of(rule: Aggregator) -> FlatModel:
    assert is_learner(rule)
    found = rule.proxy
    assert isinstance(found, FlatModel)
    return found


# ---- at start ------------------------------------------------------------------------------------


def test_without_proxy_data_it_is_refused_in_one_sentence() -> None:
    with pytest.raises(UsageError) as caught:
        check(spec(aggregator="fedlaw:mode=lambda"))
    assert caught.value.code == "FL-S104"
    assert "fedlaw:mode=lambda needs data of the server's own" in caught.value.message
    assert "--proxy" in caught.value.hint


@pytest.mark.parametrize(
    "rule",
    ["fedlaw:mode=fixed,gamma=0.99", "fedlaw:no_proxy=coherence", "fedlaw:no_proxy=fedavg"],
)
def test_a_policy_that_does_without_is_let_through(rule: str) -> None:
    check(spec(aggregator=rule))
    assert not wants_proxy(rule)


def test_validators_answer_without_noise_or_not_at_all() -> None:
    rule, noisy = "fedlaw:no_proxy=validators", {"local_dp": "clip=1,noise=1"}
    check(spec(aggregator=rule))
    check(spec(aggregator=rule, proxy="digits", **noisy))  # it judges in their place
    with pytest.raises(UsageError, match="in the middle of a merge") as caught:
        check(spec(aggregator=rule, **noisy))
    assert caught.value.code == "FL-S104"
    assert "leave --local-dp out" in caught.value.hint


@pytest.mark.parametrize("rule", ["mean", "median", "fedlaw:mode=fixed,gamma=0.99"])
def test_proxy_data_that_nobody_learns_by_are_refused(rule: str) -> None:
    with pytest.raises(UsageError, match="learns nothing") as caught:
        check(spec(aggregator=rule, proxy="digits"))
    assert caught.value.code == "FL-S104"
    with pytest.raises(UsageError, match="learns nothing"):
        learning(aggregator(rule), nn.Linear(1, 1), "digits", None, 0, rule)


def test_central_noise_needs_a_sum_and_local_noise_does_not() -> None:
    """Weights that depend on the data have no bound on what one client changes."""
    with pytest.raises(UsageError) as caught:
        check(spec(aggregator="fedlaw", proxy="digits", dp="clip=1,noise=1"))
    assert caught.value.code == "FL-S104"
    assert "fedlaw" in caught.value.message


def test_who_wants_proxy_data_is_known() -> None:
    assert wants_proxy("fedlaw")
    assert not wants_proxy("mean")
    assert not wants_proxy("fedlaw:Mine")


# ---- what it is given ----------------------------------------------------------------------------


def test_it_learns_by_a_copy_of_the_runs_model() -> None:
    run = load_data(BLOBS)
    module = build("mlp:hidden=4", run.info, 0)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    rule = learning(aggregator("fedlaw"), module, f"{BLOBS},take=40", run, 0)
    proxy_of(rule).vector.zero_()
    assert proxy_of(rule).examples == 40
    assert all(torch.equal(value, before[n]) for n, value in module.state_dict().items())
    assert learning(aggregator("mean"), module, None, run, 0).needs == frozenset()


def test_a_users_own_examples_will_do() -> None:
    run = load_data(BLOBS)
    module = build("linear", run.info, 0)
    x, y = torch.randn(60, 3), torch.arange(60) % 4
    for own in (
        Split(x, y),
        TensorDataset(x, y),
        (TensorDataset(x, y), TensorDataset(x, y)),
        Data(run.info, Split(x, y)),
    ):
        for among in (run, None):
            rule = learning(aggregator("fedlaw"), module, own, among, 0)
            assert proxy_of(rule).examples == 60


def test_a_users_own_examples_are_checked_as_well() -> None:
    run = load_data(BLOBS)
    module = build("linear", run.info, 0)
    with pytest.raises(DataError) as caught:
        learning(aggregator("fedlaw"), module, run.test, run, 0)
    assert caught.value.code == "FL-D106"
    few = Split(torch.randn(60, 3), torch.arange(60) % 3)
    with pytest.raises(DataError) as caught:
        learning(aggregator("fedlaw"), module, few, run, 0)
    assert caught.value.code == "FL-D107"


# ---- in a simulation -----------------------------------------------------------------------------


def test_each_client_holds_out_a_tenth_of_its_own() -> None:
    whole = Trainers(["a", "b"], "linear", BLOBS)
    cut = Trainers.loads(Trainers(["a", "b"], "linear", BLOBS, proxy=VALIDATORS).dumps())
    for name in ("a", "b"):
        mine = set(prints(whole.loaded.shard(whole.parts[name])))
        trained = set(prints(cut.loaded.shard(cut.parts[name])))
        held = set(prints(cut.held(name)))
        assert (len(mine), len(trained), len(held)) == (160, 144, 16)
        assert trained | held == mine


@pytest.mark.parametrize("rule", ["fedlaw", "fedlaw:no_proxy=validators", "fedlaw:no_proxy=fedavg"])
def test_a_simulation_learns_the_same_every_time(rule: str) -> None:
    def run() -> tuple[str, list[dict[str, float]]]:
        names = ["a", "b"]
        learned = Training.of(
            names, model="linear", data=BLOBS, aggregation=rule,
            proxy=f"{BLOBS},take=40" if rule == "fedlaw" else "",
        )  # fmt: skip
        strategy = FedAvg(steps=5, rounds=3, min_clients=2)
        found = simulate(strategy, dict.fromkeys(names, 0.1), learning=learned)
        merged = [dict(row["stats"]) for row in found.history if row["kind"] == "merged"]
        return found.hash, merged

    first, again = run(), run()
    assert first == again
    assert all("gamma" in stats for stats in first[1])
    assert len(first[1]) == 3


def test_trainers_of_a_users_own_judge_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(client: str, shard: tuple[int, int], seed: int) -> TorchTrainer:
        share = {"c": 0.0, "d": 0.05}.get(client, 0.2)  # c does not, and d has too few examples
        return make_trainer("linear", BLOBS, "iid", shard, seed, client=client, validate=share)

    module = ModuleType("judging")
    vars(module)["make"] = make
    monkeypatch.setitem(sys.modules, "judging", module)
    names = ["a", "b", "c", "d"]
    learned = Training.own(
        "judging:make", names, model="linear", data=BLOBS, seed=0,
        aggregation="fedlaw:no_proxy=validators",
    )  # fmt: skip
    strategy = FedAvg(steps=5, rounds=2, min_clients=4)
    found = simulate(strategy, dict.fromkeys(names, 0.1), learning=learned)
    merged = [row["stats"] for row in found.history if row["kind"] == "merged"]
    assert [stats["validators"] for stats in merged] == [2, 2]


def test_hostile_clients_turn_what_they_say_of_a_model_too(logged: Logged) -> None:
    names = ["a", "b", "c"]
    trainers = Trainers(names, "linear", BLOBS, proxy=VALIDATORS, attacks={"c": "sign-flip:2"})
    rule = aggregator("fedlaw:no_proxy=validators")
    assert is_asking(rule)
    asker, count = SimAsker.of(rule, trainers), 16
    for name in names:
        asker.came(name)
    asker.left("b")
    asker.begin()
    none = {"buffers_float": torch.empty(0), "buffers_other": torch.empty(0).long()}
    found = asker.ask(torch.zeros(count), none, True)
    assert found is not None
    assert [answer.count.client for answer in found] == ["a", "c"]
    a, c = (answer.gradient for answer in found)
    assert a is not None
    assert c is not None
    assert float(torch.nn.functional.cosine_similarity(a, c, dim=0)) < 0
    asker.left("a")
    asker.begin()
    assert asker.ask(torch.zeros(count), none, True) is None
    nan = torch.full((count,), float("nan"))
    asker.came("a")
    asker.begin()
    assert asker.ask(nan, none, False) is None  # they say nothing that is no number
    assert logged.text == (  # of two merges; of the first alone
        "nothing is learned in a merge: 0 validators answered, 2 are needed; "
        "1 of the clients can be asked\n"
    )


def test_another_process_holds_out_the_same_examples() -> None:
    proxy = f"{BLOBS},take=40"
    left = learning_in(
        aggregator("fedlaw"), lambda: build("linear", load_data(BLOBS).info, 0),
        load_data(BLOBS), BLOBS, proxy, 0, "fedlaw",
    )[1]  # fmt: skip
    here = Trainers(["a", "b"], "linear", BLOBS, proxy=proxy, given=left)
    there = Trainers.loads(here.dumps())
    assert list(prints(there.loaded.train)) == list(prints(left.train))
    assert size(there.loaded.train) < size(load_data(BLOBS).train)
