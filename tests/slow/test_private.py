"""Noise in real processes: epsilon goes on after a kill, the budget ends the run, clients' own."""

import json
import math
from typing import TYPE_CHECKING

import dp_accounting
import pytest
import torch
from safetensors.torch import load_file

from atoll.client.outbox import Outbox
from tests.slow.test_kill import BIG

if TYPE_CHECKING:
    from tests.slow.conftest import Federation

pytestmark = pytest.mark.slow

ROUNDS = "fedavg:steps=3,min_clients=2"


def epsilon(versions: int, z: float) -> float:
    return float(dp_accounting.get_epsilon_gaussian(z / math.sqrt(versions), 1e-5))


@pytest.mark.long
def test_a_killed_run_goes_on_with_its_noise_and_its_price(federation: "Federation") -> None:
    """The price counts the versions before and after the kill, and ends the run in time."""
    options = ("--strategy", ROUNDS, "--dp", "clip=0.5,noise=4", "--max-epsilon", "4")
    server = federation.server(*options)
    slow = ("--sleep-per-step", "0.1")
    clients = [federation.client(name, "--shard", f"{i}/2", *slow) for i, name in enumerate("ab")]
    federation.until(lambda: federation.merged() >= 3, 90.0)
    server.kill()
    assert (federation.state / "privacy.key").stat().st_mode & 0o777 == 0o600
    told = federation.server(*options).data()
    versions = told["versions"]
    assert epsilon(versions, 4) <= 4 < epsilon(versions + 1, 4)
    assert told["reason"] == f"privacy budget spent: epsilon {epsilon(versions, 4):.4g}"
    rows = [
        json.loads(line) for line in (federation.state / "history.jsonl").read_text().splitlines()
    ]
    paid = [row["stats"]["epsilon"] for row in rows if row["kind"] == "merged"]
    assert paid == pytest.approx([epsilon(v, 4) for v in range(1, versions + 1)])
    assert [client.wait() for client in clients] == [0, 0]
    shown = federation.command(
        "show", "fl-server", "run", "show", str(federation.state), "--json"
    ).data()
    assert shown["status"]["epsilon"] == pytest.approx(epsilon(versions, 4))


def test_clients_noise_is_counted_by_them_and_a_spent_one_leaves(federation: "Federation") -> None:
    options = ("--strategy", ROUNDS, "--versions", "6", "--local-dp", "clip=0.5,noise=8")
    server = federation.server(*options)
    a = federation.client("a", "--shard", "0/2")
    b = federation.client("b", "--shard", "1/2", "--local-dp", "clip=0.5,noise=2,epsilon=1")
    code, status, why = b.failure()
    assert (code, status) == ("FL-C107", 77)
    assert "privacy budget spent: 4 updates cost epsilon" in why
    assert server.data()["versions"] == 6
    assert a.wait() == 0
    rows = [
        json.loads(line) for line in (federation.state / "history.jsonl").read_text().splitlines()
    ]
    sent = [row for row in rows if row["kind"] == "update"]
    for name, z in (("a", 8.0), ("b", 8.0)):  # the run's noise is the greater
        told = [row["metrics"] for row in sent if row["client"] == name]
        assert [list(metrics) for metrics in told] == [["epsilon"]] * len(told)
        assert [m["epsilon"] for m in told] == pytest.approx(
            [epsilon(n + 1, z) for n in range(len(told))]
        )


def test_a_secret_that_is_gone_ends_the_start_with_its_remedy(federation: "Federation") -> None:
    server = federation.server("--dp", "noise=1")
    federation.until(lambda: (federation.state / "privacy.key").exists())
    federation.until(lambda: (federation.state / "versions" / "0").exists())
    server.kill()
    (federation.state / "privacy.key").unlink()
    again = federation.server("--dp", "noise=1", wait=False)
    code, status, _ = again.failure()
    assert (code, status) == ("FL-S206", 78)


def test_noise_that_was_drawn_is_not_drawn_again_after_a_kill(federation: "Federation") -> None:
    """A client killed in mid-upload sends the bytes that it had, and pays for them once: noise
    drawn anew over the same work would tell, by their mean, twice as much of it."""
    (federation.folder / "big.py").write_text(BIG)
    model = ["--model", "big:Big"]
    server = federation.server(
        "--strategy", "fedavg:steps=5,min_clients=1", "--versions", "1", *model, "--data", "digits",
        "--local-dp", "clip=0.5,noise=4",
    )  # fmt: skip
    gate = federation.gate(9 << 20)
    first = federation.client("a", *model, address=gate.address)
    federation.until(lambda: gate.shut, 90.0, "half of an upload")
    first.kill()
    outbox = Outbox(federation.folder / "client-a")
    ((_, update),) = outbox.waiting()
    kept = outbox.get(update)
    assert kept is not None
    drawn = torch.frombuffer(bytearray(kept[1][: 4 * 5_000_000]), dtype=torch.float32)
    assert outbox.memory.sent == 1
    outbox.close()
    gate.open.set()
    second = federation.client("a", *model, address=gate.address)
    assert server.data(120.0)["versions"] == 1
    second.data()
    made = load_file(federation.state / "versions" / "1" / "model.safetensors")
    assert torch.equal(made["ballast"], 0 - drawn)  # it begins as zeros, and is what noise moves
    assert float(drawn.std()) == pytest.approx(0.5 * 4, rel=0.01)
    (sent,) = federation.history("update")
    assert sent["metrics"] == {"epsilon": pytest.approx(epsilon(1, 4))}
    assert Outbox(federation.folder / "client-a").memory.sent == 1


def test_a_client_killed_again_and_again_pays_for_every_update_that_left(
    federation: "Federation",
) -> None:
    """Killed at any moment: what it tells of its price never falls behind what the server had."""
    server = federation.server(
        "--strategy", "fedavg:steps=4,min_clients=1", "--versions", "16",
        "--local-dp", "clip=0.5,noise=8",
    )  # fmt: skip
    kills = 5
    for life in range(kills):
        client = federation.client("a")
        federation.until(lambda n=3 * life: federation.merged() > n, 90.0)  # type: ignore[misc]
        client.kill()
    federation.client("a")
    assert server.data(120.0)["versions"] == 16
    paid = {round(epsilon(n, 8), 9): n for n in range(1, 20 + kills)}
    rows = federation.history("update")
    assert len({row["update"] for row in rows}) == len(rows) >= 16
    counted = [paid[round(row["metrics"]["epsilon"], 9)] for row in rows]
    assert counted == sorted(set(counted)), "two updates for one price"
    assert (
        counted[-1] <= len(rows) + kills
    )  # killed between paying and sending: one too many each time


@pytest.mark.parametrize("noise", ["--dp", pytest.param("--local-dp", marks=pytest.mark.long)])
def test_a_demo_with_noise_tells_its_price(federation: "Federation", noise: str) -> None:
    out = federation.folder / "demo"
    told = federation.command(
        "demo", "fl-server", "demo", "--strategy", ROUNDS, "--clients", "2", "--speeds", "4,4",
        noise, "clip=1,noise=0.5", "--max-epsilon", "5000", "--target-accuracy", "0.12",
        "--timeout", "200", "--out", str(out), "--json",
    ).data()  # fmt: skip
    assert told["reached"]
    assert told["epsilon"] > 0
    assert told["bytes_up"] == sum(c["bytes_up"] for c in told["clients"]) > 0
    assert told["bytes_down"] == sum(c["bytes_down"] for c in told["clients"]) > 0
