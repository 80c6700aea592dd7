"""Check: wrong names, and mixes that cannot be, are refused without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from atoll.aggregation import FedAvg, FedBuff, FedCompass, Krum, Median
from atoll.client.local import LocalConfig
from atoll.protocols.errors import AtollError, UsageError
from atoll.server import Server, Training, catalogue, simulate
from atoll.server.check import FILES, check, made_of, mixed
from atoll.server.spec import RunSpec
from tests.conftest import Logged


def spec(**given: str) -> RunSpec:
    return RunSpec("01J8ZQ4T0V7M3N5P6R8S9T0V1W", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("slot", ["aggregator", "outer", "algorithm", "model", "data"])
def test_every_built_in_name_passes(slot: str) -> None:
    for name in catalogue.builtin("local algorithm" if slot == "algorithm" else slot):
        if name not in FILES:
            proxy = "digits" if name == "fedlaw" else ""
            check(spec(strategy="fedavg:cohort=20", proxy=proxy, **{slot: name}))


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"strategy": "fedcompas"}, "FL-S101"),
        ({"trainer": "no_such_module:Mine"}, "FL-S103"),
        ({"trainer": "mine"}, "FL-S101"),
        ({"data": "", "model": "mlp:hidden=9"}, "FL-S104"),
        ({"strategy": "fedavg:stepz=3"}, "FL-S102"),
        ({"strategy": "json:dumps:obj=1"}, "FL-S102"),
        ({"strategy": "no_such_module:X"}, "FL-S103"),
        ({"aggregator": "meen"}, "FL-S101"),
        ({"outer": "nestorov:lr=1"}, "FL-S101"),
        ({"algorithm": "fedproxy"}, "FL-S101"),
        ({"model": "no_such_module:Net"}, "FL-S103"),
        ({"model": "json.no_such:Net"}, "FL-S103"),
        ({"codec_up": "fp31"}, "FL-S101"),
        ({"codec_down": "fp31"}, "FL-S101"),
        ({"data": "digit"}, "FL-D103"),
        ({"data": "mnist:no/such/folder"}, "FL-D101"),
        ({"data": "no_such_module:data"}, "FL-S103"),
    ],
)
def test_a_wrong_slot_is_refused(given: dict[str, str], code: str) -> None:
    with pytest.raises(AtollError) as caught:
        check(spec(**given))
    assert caught.value.code == code


def test_the_remedy_names_strategies_that_give_by_default_what_lacks() -> None:
    with pytest.raises(UsageError) as caught:
        check(spec(strategy="fedcompass", algorithm="feddyn"))
    assert caught.value.hint == "take strategy dp-fedavg or fedavg"


def test_one_of_each_goes_together() -> None:
    """FedLAW adds up whole updates by learned weights: control variates go with it."""
    mix = {
        "strategy": "fedcompass", "aggregator": "fedlaw", "proxy": "digits:take=200",
        "outer": "nesterov", "algorithm": "scaffold-m", "codec_up": "topk:0.01+ef",
    }  # fmt: skip
    check(spec(**mix))
    with pytest.raises(UsageError, match="whole updates"):
        check(spec(**{**mix, "aggregator": "rfa", "proxy": ""}))


def test_a_table_on_the_server_goes_with_what_its_kin_goes_with() -> None:
    kept = {"strategy": "fedcompass", "algorithm": "scaffold-m:table=server"}
    check(spec(**kept))
    for given, what in (
        ({"dp": "clip=1,noise=1"}, r"--dp clip=1,noise=1 cannot work with a server that keeps"),
        ({"local_dp": "clip=1,noise=1"}, r"--local-dp .* cannot work with a server that keeps"),
        ({"aggregator": "rfa"}, r"scaffold-m:table=server needs a merge that adds up whole updat"),
    ):
        with pytest.raises(UsageError, match=what) as caught:
            check(spec(**kept, **given))
        assert caught.value.code == "FL-S104"
        assert caught.value.hint


def test_a_module_of_the_users_own_is_found_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net_of_mine.py").write_text("raise SystemExit('it was run')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    check(spec(model="net_of_mine:Net", data="net_of_mine:data", trainer="net_of_mine:Mine"))
    check(spec(model="net_of_mine:Net", data=""))


def test_where_nothing_is_trained_names_must_be_right_and_need_not_go_together() -> None:
    check(spec(data="", outer="nesterov", algorithm="fedavg-m"), trains=False)
    check(spec(aggregator="fedlaw"), trains=False)  # and no proxy data
    for slot in ("strategy", "model", "aggregator", "outer", "algorithm", "codec_up"):
        with pytest.raises(UsageError, match="nonsense"):
            check(spec(**{slot: "nonsense"}), trains=False)


def test_a_wrong_name_costs_no_import_of_torch() -> None:
    """One process: a person who mistypes waits for its start, not for torch."""
    program = (
        "import sys\n"
        "from atoll.protocols import console\n"
        "from atoll.server.cli import cli\n"
        "for slot in ('strategy', 'outer', 'aggregator', 'model', 'codec', 'local'):\n"
        "    option = f'--{slot}'\n"
        "    assert console.run(cli, ['start', '--state', 'never', option, 'nonsense']) == 78\n"
        "    assert console.run(cli, ['simulate', option, 'nonsense']) == 78\n"
        "    assert console.run(cli, ['demo', '--out', 'never', option, 'nonsense']) == 78\n"
        "print('torch' in sys.modules)\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert told.stdout == "False\n", told.stderr
    assert told.stderr.count("error FL-S101") == 18
    assert "start on this machine" not in told.stderr  # a demo says that it starts when it does
    assert not Path("never").exists()


def test_a_rule_that_never_has_enough_updates_is_refused_by_its_parameters() -> None:
    asked = spec(strategy="fedavg:cohort=4", aggregator="krum:f=2")
    with pytest.raises(UsageError) as caught:
        mixed(asked, None, made_of(asked))
    assert caught.value.code == "FL-S104"
    assert caught.value.message == (
        "aggregator krum:f=2 needs 7 updates for a version, "
        "strategy fedavg:cohort=4 never brings more than 4"
    )


def test_of_few_clients_no_round_is_large() -> None:
    with pytest.raises(UsageError, match="never brings more than 2"):
        check(spec(strategy="fedavg", aggregator="median"), clients=2)
    check(spec(strategy="fedavg:min_results=3", aggregator="median"), clients=3)


@pytest.mark.parametrize(
    "strategy",
    ["fedavg:min_clients=5", "fedcompass:min_clients=5", "dp-fedavg:min_clients=5",
     "fedavg:min_results=5"],
)  # fmt: skip
def test_a_strategy_does_not_wait_for_clients_that_never_come(strategy: str) -> None:
    """A demo of four clients stood still for five minutes; a simulation ended with no version."""
    with pytest.raises(UsageError, match="waits for 5 clients, and there are 4") as caught:
        mixed(spec(strategy=strategy), 4, made_of(spec(strategy=strategy)))
    assert caught.value.code == "FL-S104"
    mixed(spec(strategy=strategy), 5, made_of(spec(strategy=strategy)))
    mixed(spec(strategy=strategy), None, made_of(spec(strategy=strategy)))


def test_a_buffer_of_one_is_never_enough_for_a_median() -> None:
    with pytest.raises(UsageError, match="strategy fedasync never brings more than 1"):
        check(spec(strategy="fedasync", aggregator="median"))


def test_a_strategy_that_may_bring_fewer_is_a_warning() -> None:
    (warning,) = check(spec(strategy="fedcompass", aggregator="median"))
    assert warning == (
        "aggregator median needs 3 updates for a version; strategy fedcompass may bring fewer, "
        "and those are merged by their mean"
    )
    assert check(spec(strategy="fedavg:min_results=3", aggregator="median")) == []


def test_python_is_refused_what_the_command_line_is(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    with pytest.raises(UsageError, match=r"Median needs 3 updates .* never brings more than 1"):
        Server(strategy=FedBuff(size=1), aggregator=Median(), data="digits", folder=folder)
    assert not folder.exists()
    Server(strategy=FedBuff(size=3), aggregator=Median(), data="digits", folder=folder)


def test_a_median_of_sparse_updates_is_refused_on_the_way_up_alone() -> None:
    with pytest.raises(UsageError) as caught:
        check(spec(strategy="fedbuff", aggregator="median", codec_up="topk:0.01+ef"))
    assert caught.value.message == (
        "aggregator median cannot work with sparse updates, of which most values are 0, "
        "which codec topk:0.01+ef makes"
    )
    assert caught.value.hint.startswith("take another codec bf16, ")
    assert "topk" not in caught.value.hint
    check(spec(strategy="fedbuff", aggregator="median", codec_down="topk:0.01"))


def test_objects_are_judged_like_names() -> None:
    named = spec(strategy="own:Rounds", aggregator="own:Rule", data="")
    made = {"strategy": FedAvg(cohort=6), "aggregator": Krum(f=2), "model": object()}
    with pytest.raises(UsageError, match=r"own:Rule needs 7 updates .* own:Rounds never .* 6"):
        check(named, made=made)
    check(named, made={**made, "strategy": FedBuff(size=7)})
    assert (
        check(named, made={**made, "strategy": FedAvg(min_results=3), "aggregator": Median()}) == []
    )


def test_a_simulation_from_python_is_judged_with_the_same_sentence(
    logged: Logged,
) -> None:
    few, paces = FedBuff(size=2, steps=2), {"a": 0.1, "b": 0.1}
    with pytest.raises(UsageError) as caught:
        simulate(few, paces, 1.0, learning=Training.of(["a", "b"], aggregation="krum:f=1"))
    assert caught.value.code == "FL-S104"
    assert caught.value.message == (
        "aggregator krum:f=1 needs 5 updates for a version, "
        "strategy fedbuff never brings more than 2"
    )
    local = LocalConfig(optimizer="adam")
    scaffold = Training.of(["a", "b"], algorithm="scaffold", local=local)
    with pytest.raises(UsageError, match="plain SGD steps") as caught:
        simulate(few, paces, 1.0, learning=scaffold)
    assert "take --local-optimizer sgd" in caught.value.hint  # diloco has another unless it is told
    simulate(FedCompass(), paces, 1.0, learning=Training.of(["a", "b"], aggregation="median"))
    assert "strategy fedcompass may bring fewer" in logged.text
