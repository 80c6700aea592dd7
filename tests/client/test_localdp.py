"""Local DP: what leaves a client is cut, noisy, and counted; the rest does not leave."""

import math
from pathlib import Path

import dp_accounting
import pytest
import torch

from atoll.client.algorithm import local_algorithm
from atoll.client.localdp import LocalDP, local_dp, stricter
from atoll.client.outbox import Outbox
from atoll.client.work import Workbench
from atoll.protocols.codecs import codec
from atoll.protocols.errors import ClientError, UsageError
from tests.client.test_work import MANIFEST, START, Adding, do, no_fetch, order, update

KEY = bytes(range(32))


def bench(folder: Path | None, private: LocalDP, up: str = "fp32") -> Workbench:
    outbox = Outbox(folder)
    return Workbench(Adding(0.25), MANIFEST, codec(up), codec("fp32"), outbox, private=private)


@pytest.mark.parametrize(("length", "kept"), [(5.0, 0.5), (0.5, 0.5), (0.1, 0.1), (0.0, 0.0)])
def test_the_length_is_cut_to_the_clip_exactly(length: float, kept: float) -> None:
    delta = torch.zeros(3_000_000)
    delta[5], delta[2_500_000] = 0.6 * length, 0.8 * length
    LocalDP(clip=0.5, noise=0.0).protect(delta, KEY)
    assert delta.double().norm().item() == pytest.approx(kept, rel=1e-6)
    assert delta.double().norm() <= 0.5 * (1 + 1e-6)


def test_the_noise_has_the_deviation_that_was_asked_for() -> None:
    n = 100_000
    delta = torch.zeros(n)
    LocalDP(clip=0.5, noise=3.0).protect(delta, KEY)
    assert delta.double().std().item() == pytest.approx(1.5, rel=5 / math.sqrt(2 * n))
    again = torch.zeros(n)
    LocalDP(clip=0.5, noise=3.0).protect(again, KEY)
    assert torch.equal(again, delta)


def test_what_is_no_number_stays_none() -> None:
    delta = torch.tensor([1.0, math.nan])
    LocalDP().protect(delta, KEY)
    assert delta.isnan().any()


def test_cost_is_dp_accountings_and_ends_at_the_budget() -> None:
    made = LocalDP(noise=2.0, epsilon=4.0)
    for n in (1, 3, 10):
        one = dp_accounting.get_epsilon_gaussian(2.0 / math.sqrt(n), 1e-5)
        assert made.cost(n) == pytest.approx(one, rel=1e-9)
    assert made.cost(0) == 0.0
    assert made.cost(3) < 4.0 < made.cost(4)
    made.afford(2)
    with pytest.raises(
        ClientError, match=r"FL-C107: privacy budget spent: 3 updates cost .*3\.709"
    ):
        made.afford(3)
    assert LocalDP(noise=0.0).cost(1) == math.inf


def test_both_sides_wishes_hold() -> None:
    own, runs = LocalDP(1.0, 2.0, 1e-5), LocalDP(0.5, 3.0, 1e-6, epsilon=8.0)
    both = stricter(own, runs)
    assert both == LocalDP(0.5, 4.0, 1e-6, 8.0)  # the noise of 2.0 * 1.0 over the clip of 0.5
    assert stricter(None, runs) is runs
    assert stricter(own, None) is own
    assert stricter(None, None) is None


@pytest.mark.parametrize(
    "spec",
    ["clip=0", "noise=-1", "noise=nan", "delta=1", "epsilon=0", "z=1", "8", "on:noise=8",
     "noise=1e-300", "clip=1e300,noise=1e300"],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="FL-S102"):
        local_dp(spec)


# ---- at the workbench --------------------------------------------------------------------------


@pytest.mark.parametrize("up", ["fp32", "bf16"])
def test_an_update_leaves_cut_with_the_servers_buffers_and_no_metrics(up: str) -> None:
    made = bench(None, LocalDP(clip=0.5, noise=0.0), up)
    result = do(made, order(steps=4))  # 8 values moved by 1: a length of 2.83
    sent = update(made, result)
    assert sent.read("trainable").norm().item() == pytest.approx(0.5, rel=1e-2)
    assert torch.equal(sent.read("buffers_float"), START["mean"])
    assert sent.read("buffers_other").tolist() == [7]
    assert result.metrics == {}
    assert made.evaluate(order().sent, no_fetch) == {"examples": 0.0}


def test_every_update_has_noise_of_its_own() -> None:
    made = bench(None, LocalDP(clip=1.0, noise=100.0))
    first, second = (update(made, do(made, order(number=i))).read("trainable") for i in (1, 2))
    assert not torch.equal(first, second)
    assert first.std() > 20


def test_what_was_spent_outlives_the_process_and_counts_snapshots(tmp_path: Path) -> None:
    private = LocalDP(noise=2.0, epsilon=4.0)
    made = bench(tmp_path, private)
    made.outbox.enter("run")
    first = do(made, order(number=1))
    assert first.metrics == {"epsilon": pytest.approx(private.cost(1))}
    answers = iter(["continue"])
    do(made, order(number=2), asked=lambda: next(answers, None))  # type: ignore[arg-type]
    assert made.outbox.memory.sent == 3
    made.outbox.close()
    again = bench(tmp_path, private)
    with pytest.raises(ClientError, match="FL-C107"):
        do(again, order(number=3))
    again.outbox.enter("another run")
    assert again.outbox.memory.sent == 0


def test_noise_of_ones_own_refuses_a_run_that_wants_more_than_updates() -> None:
    """The server does not know of it, so the client itself must see."""

    class Scaffold(Adding):
        algorithm = local_algorithm("scaffold")

    with pytest.raises(ClientError, match=r"FL-C107: local noise does not cover .*: dc"):
        Workbench(
            Scaffold(), MANIFEST, codec("fp32"), codec("fp32"), Outbox(None), private=LocalDP()
        )
