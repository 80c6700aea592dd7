"""SCAFFOLD-M between real processes: what is killed, lost or wrong never leaves c a wrong mean."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from atoll.client.client import Client
from atoll.client.keep import Keep
from atoll.client.options import Options, maker
from atoll.client.scaffold import KIND, Variate
from atoll.client.trainer import Trainer
from atoll.protocols.runinfo import RunInfo
from atoll.server.rules import Rules

if TYPE_CHECKING:
    from tests.slow.conftest import Federation, Process

pytestmark = pytest.mark.slow

SCAFFOLD = ["--local", "scaffold-m:beta=0.5", "--lr", "0.3"]
ROUNDS = "fedavg:steps=20,min_clients=2,weighting=equal"
GROUPS = "fedcompass:min_steps=5,max_steps=20,min_clients=2,slack=1.01"


@pytest.mark.parametrize(
    "local", [pytest.param("scaffold-m", marks=pytest.mark.long), "scaffold-m:table=server"]
)
def test_a_demo_with_scaffold_m_reaches_its_target(federation: "Federation", local: str) -> None:
    out = federation.folder / "demo"
    quick = ["--speeds", "10,10,20,40"]  # a step's pause is a tenth of what a person may watch
    demo = federation.command(
        "demo", "fl-server", "demo", "--local", local, *quick, "--out", str(out), "--json"
    )
    told = demo.data(180)
    assert told["reached"]
    assert told["accuracy"] >= 0.95
    up, down = (sum(c[way] for c in told["clients"]) for way in ("bytes_up", "bytes_down"))
    assert down > 1.4 * up > 0  # model, direction and control down; delta and dc up


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "versions"), [(ROUNDS, 14), (GROUPS, 40)])
def test_clients_killed_anywhere_leave_c_the_mean_of_what_they_keep(
    federation: "Federation", strategy: str, versions: int
) -> None:
    """Each is killed and started again, several times; so is the server. In groups a client's
    orders overlap, and a version may hold two of its results."""
    options = ["--strategy", strategy, *SCAFFOLD, "--versions", str(versions)]
    server = federation.server(*options)
    clients = {name: client(federation, name, place) for place, name in enumerate("ab")}

    def reached(version: int) -> bool:
        return federation.merged() >= version

    for version, name in ((2, "a"), (4, "b"), (6, "a")):
        federation.until(partial(reached, version), 60, f"version {version}")
        clients[name].kill()
        clients[name] = client(federation, name, "ab".index(name))
    federation.until(lambda: federation.merged() >= 8, 60, "version 8")
    server.kill()
    server = federation.server()
    assert server.wait(90) == 0, server.said()
    for one in clients.values():
        assert one.wait(60) == 0, one.said()
    assert not federation.history("state-lost")
    facts, control = newest(federation.state)
    assert facts["numbers"]["epoch"] == 0
    kept = [variate(federation.folder / f"client-{name}") for name in "ab"]
    assert torch.allclose(control, (kept[0] + kept[1]) / 2, atol=1e-6)
    assert float(control.abs().max()) > 1e-4


def test_a_client_on_a_new_disk_is_noticed_and_all_begin_anew(federation: "Federation") -> None:
    server = federation.server("--strategy", ROUNDS, *SCAFFOLD, "--lease", "3")
    first = client(federation, "a", 0)
    client(federation, "b", 1)
    federation.until(lambda: federation.merged() >= 3, 60, "version 3")
    first.kill()
    (federation.folder / "client-a").rename(federation.folder / "gone")
    client(federation, "a", 0)
    federation.until(lambda: federation.history("state-lost"), 90, "a report")
    [lost] = federation.history("state-lost")
    assert (lost["client"], lost["state"]) == ("a", KIND)
    federation.until(
        lambda: any("state_lost" in row["stats"] for row in federation.history("merged")), 60
    )
    reset = federation.merged()
    federation.until(lambda: federation.merged() >= reset + 3, 60, "versions after it")
    server.interrupt()
    server.wait(60)
    facts, _ = newest(federation.state)
    assert facts["numbers"]["epoch"] == 1
    assert facts["numbers"]["commits/a"] >= 1


def test_a_client_that_trains_otherwise_is_one_clear_error_and_the_run_goes_on(
    federation: "Federation",
) -> None:
    local = federation.local(
        Rules(versions=6), strategy="fedbuff:size=1,steps=3", algorithm="scaffold"
    )
    assert local.error is None, local.error
    wrong = federation.guest(Client(federation.address, plain, name="plain"))
    good = federation.command(
        "good", "fl-client", "start", federation.address, "--name", "good", "--json"
    )
    assert local.ended().versions == 6
    assert good.wait(60) == 0
    wrong.join(30)
    assert wrong.error is not None
    assert "extra:control" in str(wrong.error)


def plain(info: RunInfo) -> Trainer:
    """A trainer that knows nothing of the run's algorithm."""
    return maker(Options("plain"))(replace(info, algorithm="plain"))


def client(federation: "Federation", name: str, place: int) -> "Process":
    slow = ("--sleep-per-step", "0.01") if place else ()
    return federation.client(name, "--shard", f"{place}/2", *slow)


def newest(state: Path) -> tuple[dict[str, Any], Tensor]:
    """Facts of the newest version, and its c."""
    number = max(int(p.name) for p in (state / "versions").iterdir() if p.name.isdecimal())
    folder = state / "versions" / str(number)
    facts = json.loads((folder / "version.json").read_text())
    return facts, load_file(folder / "outer.safetensors")["control"]


def variate(folder: Path) -> Tensor:
    """c_i as it lies on a client's disk.

    An order that the end of the run overtook leaves what it would have made of c_i beside it: the
    rule says that it does not count before it was used.
    """
    keep = Keep(folder / "keep")
    keep.register(KIND, Variate())
    found: Tensor = keep.now(KIND)["c"]
    return found
