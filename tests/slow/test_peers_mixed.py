"""One run of two peers and of two gRPC clients, whose server is a peer on their behalf."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atoll.aggregation.sync_engine import SyncState
from atoll.server.spec import RunSpec
from benchmarks.swarm import Swarm
from tests.slow.conftest import Federation, Process

pytestmark = pytest.mark.slow
pytest.importorskip("hivemind")

TEXT: dict[str, Any] = {
    "model": "charlm:width=64,depth=1", "data": "topics:context=32", "seed": 1, "local_steps": 20,
    "batch": 8, "lr": 3e-3, "codec": "int8", "speed": 40.0,
}  # fmt: skip
VERSIONS = 5


def swarm_of(folder: Path, rounds: int = 0, first: int = 1) -> Swarm:
    """A run on text, in which peers wait long for each other: the machine may be slow."""
    from atoll.p2p.work import facts

    found = facts(TEXT["model"], TEXT["data"], TEXT["seed"])
    real = {**TEXT, "elements": found.elements, "schema": found.schema, "init": found.init}
    return Swarm(folder, rounds=rounds, real=real, ready=30.0, first=first)


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Swarm]:
    with swarm_of(tmp_path / "swarm") as made:
        made.up("a", "b")
        yield made


def bridge(federation: Federation, swarm: Swarm, *options: str) -> Process:
    """A server that is one of the peers, and two clients of its own."""
    from atoll.p2p import invite

    text = invite.write(replace(swarm._invite, addresses=swarm.addresses()))
    server = federation.server(
        "--peer", text, "--strategy", "diloco:steps=20,min_clients=2,dylu=false",
        "--name", "bridge", *options,
    )  # fmt: skip
    for i in range(2):
        federation.client(f"c{i}", "--shard", f"{i}/2")
    return server


def test_two_peers_and_two_grpc_clients_train_one_model(
    peers: Swarm, federation: Federation
) -> None:
    """Means are of all three, and the server's version is the peers' model, bit by bit."""
    server = bridge(federation, peers, "--versions", str(VERSIONS))
    told = server.data(300.0)
    events = [event for by in peers.commits().values() for _, event in by]
    weights = [dict(zip(e["group"], e["weights"], strict=True)) for e in events]
    assert any(set(w) == {"a", "b", "bridge"} and all(w.values()) for w in weights), weights
    assert peers.forks() == 0
    assert told["versions"] == VERSIONS
    assert model_digest(federation.state, VERSIONS) in {event["digest"] for event in events}
    merged = federation.history("merged")
    assert [row for row in merged if row["stats"].get("delta_norm", 0) > 0], merged
    before = peers.round
    peers.until(lambda: peers.round > before + 1, what="the peers going on without the server")


@pytest.mark.long
def test_a_server_goes_on_when_all_other_peers_have_left_and_stops_with_ctrl_c(
    tmp_path: Path, federation: Federation
) -> None:
    with swarm_of(tmp_path / "swarm") as swarm:
        swarm.up("a", "b")
        server = bridge(federation, swarm)
        federation.until(lambda: federation.merged() >= 2, 300, "two versions")
        swarm.peers["a"].popen.terminate()  # with a goodbye
        swarm.peers["b"].popen.terminate()
        federation.until(lambda: not swarm.peers["a"].alive and not swarm.peers["b"].alive, 120)
        made = federation.merged()
        federation.until(lambda: federation.merged() > made, 300, "a version of the server alone")
        server.interrupt()
        assert server.wait(60.0) == 0, server.said()


@pytest.mark.long
def test_a_server_ends_when_its_peers_have_made_their_last_round(
    tmp_path: Path, federation: Federation
) -> None:
    """The first mean is of all three, so no version is made before the server is among them."""
    with swarm_of(tmp_path / "swarm", rounds=3, first=3) as swarm:
        swarm.up("a", "b")
        server = bridge(federation, swarm)
        assert server.wait(300.0) == 75, server.said()
        assert server.told()["error"]["code"] == "FL-P409"
        swarm.until(lambda: all(one.told("end") for one in swarm.peers.values()))
        [end, _] = [one.told("end")[0] for one in swarm.peers.values()]
    assert [row["version"] for row in federation.history("merged")] == [1, 2, 3]
    assert model_digest(federation.state, 3) == end["digest"]


def model_digest(state: Path, number: int) -> str:
    """As peers reckon it, of a version on the server's disk."""
    from atoll.client.data import load_data
    from atoll.client.models import build, manifest_of
    from atoll.server.versions import VersionStore

    spec = RunSpec.read(state / "run.json")
    manifest = manifest_of(build(spec.model, load_data(spec.data).info, spec.seed))
    version = VersionStore(state / "versions", manifest).open(number)
    return SyncState(version.flat("trainable"), dict(version.outer), number).digest
