"""Models that come down in chains in virtual time: what clients train from, and what it costs."""

import pytest
import torch

from atoll.aggregation.fedavg import FedAvg
from atoll.aggregation.fedbuff import FedBuff
from atoll.client.data import load_data
from atoll.client.local import LocalConfig
from atoll.protocols.errors import RemoteError
from atoll.server.run import Order
from atoll.server.simulation import Simulation
from atoll.server.simulator import simulate
from atoll.server.training import Training
from atoll.server.world import Absence, ClientModel

DATA = load_data("synthetic:features=20,classes=3,examples=200")
PACES = {"a": 0.1, "b": 0.3}
LOCAL = LocalConfig(lr=0.1, batch=8)


def training(down: str) -> Training:
    return Training.of(
        list(PACES), model="linear", data=DATA, partition="iid", local=LOCAL, down=down
    )


def run(down: str, *clients: ClientModel, rounds: int = 10) -> tuple[Simulation, Training]:
    made = training(down)
    paces = clients or [ClientModel(n, p) for n, p in PACES.items()]
    return simulate(FedAvg(steps=5, rounds=rounds, min_clients=2), paces, learning=made), made


def test_differences_are_counted_as_they_travel() -> None:
    plain, _ = run("fp32")
    half, _ = run("fp16")
    whole = 63 * 4  # 20 features and a bias, 3 classes
    assert plain.bytes_down == 10 * 2 * whole
    assert half.bytes_down == 2 * whole + 9 * 2 * whole // 2  # the first model is all of it
    assert plain.bytes_up == half.bytes_up == 10 * 2 * whole
    started = [row["bytes"] for row in half.history if row["kind"] == "started"]
    assert sum(started) == half.bytes_down
    assert [c.bytes_down for c in half.clients.values()] == [half.bytes_down // 2] * 2


def test_what_is_learned_is_nearly_the_same_and_always_the_same() -> None:
    (first, a), (second, b), (_, exact) = run("fp16"), run("fp16"), run("fp32")
    assert first.hash == second.hash
    for name, value in a.model().items():
        assert torch.equal(value, b.model()[name])
        assert not torch.equal(value, exact.model()[name])
        torch.testing.assert_close(value, exact.model()[name], rtol=0, atol=1e-3)


def test_a_process_that_died_needs_all_of_a_model_again() -> None:
    away = Absence(2.0, 4.0, "dead")
    lost, _ = run("fp16", ClientModel("a", 0.1), ClientModel("b", 0.3, absences=(away,)))
    offline = Absence(2.0, 4.0, "offline")
    kept, _ = run("fp16", ClientModel("a", 0.1), ClientModel("b", 0.3, absences=(offline,)))
    per_client = {n: (lost.clients[n].bytes_down, kept.clients[n].bytes_down) for n in PACES}
    assert per_client["a"][0] == per_client["a"][1]
    assert per_client["b"][0] > per_client["b"][1]


def test_one_that_skips_versions_gets_all_differences_or_the_model() -> None:
    made = training("fp16")
    simulate(FedBuff(size=1, steps=5), {"a": 0.1, "b": 0.7}, 12.0, learning=made)
    order = Order("o900", "b", made._newest.number, 5)
    assert made.download(order) in (63 * 2, 63 * 4)
    made.given(order)
    assert made.sent(order) in (63 * 2, 63 * 4)
    chain = made._links._links._chains["fp16"]
    assert bytes(made._links.model(order).view) == bytes(chain.view(order.version))


@pytest.mark.parametrize("down", ["fp32", "fp16"])
def test_a_model_takes_its_time_on_the_way_down(down: str) -> None:
    slow = [ClientModel(n, 0.001, down=63.0) for n in PACES]  # bytes a second
    found, _ = run(down, *slow)
    assert found.seconds == pytest.approx(10 * 4 if down == "fp32" else 4 + 9 * 2, rel=0.01)


WHOLE = 63 * 4  # bytes of a model in fp32


def mixed(**codecs: str) -> tuple[Simulation, Training]:
    made = Training.of(
        list(PACES), model="linear", data=DATA, partition="iid", local=LOCAL,
        up="topk:0.1+ef/int8", down="fp16", codecs=codecs,
    )  # fmt: skip
    paces = [ClientModel(n, p, up=100.0) for n, p in PACES.items()]
    return simulate(FedAvg(steps=5, rounds=10, min_clients=2), paces, learning=made), made


def test_a_phone_and_a_server_in_one_run() -> None:
    """Each packs and hears as it asked, one version is made of both, and slow links show it."""
    run, made = mixed(b="up=fp32,down=fp32")
    phone, server = run.clients["a"], run.clients["b"]
    assert server.bytes_up == server.bytes_down == 10 * WHOLE
    assert phone.bytes_up < server.bytes_up / 5
    assert phone.bytes_down == WHOLE + 9 * WHOLE // 2
    assert made.keeps.residual("a") is not None  # error feedback is the phone's alone
    assert made.keeps.residual("b") is None
    assert run.versions == 10
    assert run.updates_used == 20
    assert run.seconds == pytest.approx(10 * (5 * PACES["b"] + WHOLE / 100))
    again, _ = mixed(b="up=fp32,down=fp32")
    assert again.hash == run.hash
    both, _ = mixed(b="up=int8")
    assert both.clients["b"].bytes_down == phone.bytes_down  # down as the run
    assert both.hash != run.hash


def test_a_codec_that_the_run_does_not_allow_is_refused() -> None:
    with pytest.raises(RemoteError, match=r"FL-W108.*up=sign.*allows topk:0.1\+ef or int8 or fp32"):
        mixed(b="up=sign")
