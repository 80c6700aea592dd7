"""SCAFFOLD's table on a real server: killed anywhere it keeps every row, and tells none."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from atoll.protocols import wire_pb2
from atoll.server.rules import Rules
from tests.slow.conftest import Federation, Process, code_of
from tests.slow.test_kill import BIG
from tests.slow.test_momentum import variate

pytestmark = pytest.mark.slow

ROUNDS = "fedavg:steps=5,min_clients=2,weighting=equal"
VERSIONS = 6


def rows(state: Path) -> dict[str, Tensor]:
    """Each client's row in the newest version."""
    names = [name for name in facts(state)["numbers"] if name.startswith("row/")]
    found = {}
    for client in (name.removeprefix("row/") for name in names):
        commits = int(facts(state)["numbers"][f"commits/{client}"])
        data = bytearray((state / "rows" / f"{client}.{commits}").read_bytes())
        found[client] = torch.frombuffer(data, dtype=torch.float32)
    return found


def newest(state: Path) -> Path:
    found = [p for p in (state / "versions").iterdir() if p.name.isdecimal()]
    return max(found, key=lambda path: int(path.name))


def facts(state: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((newest(state) / "version.json").read_text())
    return found


def control(state: Path) -> Tensor:
    found: Tensor = load_file(newest(state) / "outer.safetensors")["control"]
    return found


def begin(folder: Path, keeper: str) -> tuple[Federation, Process]:
    """A run of two clients on a model of 8 MB."""
    folder.mkdir()
    (folder / "big.py").write_text(BIG.replace("5_000_000", "2_000_000"))
    made = Federation(folder)
    server = made.server(
        "--strategy", ROUNDS, "--local", f"scaffold:table={keeper}", "--lr", "0.1", "--model",
        "big:Big", "--data", "digits", "--versions", str(VERSIONS), "--save-every", "2",
    )  # fmt: skip
    for place, name in enumerate("ab"):
        made.client(name, "--model", "big:Big", "--shard", f"{place}/2")
    return made, server


def ended(made: Federation, server: Process) -> tuple[dict[str, Tensor], Tensor]:
    """The last model, and c."""
    assert server.data()["versions"] == VERSIONS, server.said()
    for name in "ab":
        client = next(process for process in made.processes if process.name == name)
        assert client.wait(60) == 0, client.said()
    made.ledger().check()
    return load_file(newest(made.state) / "model.safetensors"), control(made.state)


def rewriting(state: Path) -> bool:
    """Whether a row is written right now."""
    return any((state / "rows").glob("*.part"))


@pytest.mark.long
def test_a_server_killed_between_merges_and_amid_them_ends_with_the_same_bits(
    tmp_path: Path,
) -> None:
    """As a run that nobody killed, whose clients keep their variates."""
    with contextlib.ExitStack() as stack:

        def start(keeper: str) -> tuple[Federation, Process]:
            made, server = begin(tmp_path / keeper, keeper)
            stack.callback(made.close)
            return made, server

        killed, server = start("server")
        for version, amid in ((2, True), (3, False), (5, True)):
            end = time.monotonic() + 240
            while not (amid and rewriting(killed.state)) and killed.merged() < version:
                assert time.monotonic() < end, server.said()
                time.sleep(0.001)
            server.kill()
            server = killed.server()
        model, c = ended(killed, server)
        found = rows(killed.state)
        assert sorted(found) == ["a", "b"]
        assert torch.allclose(c, (found["a"] + found["b"]) / 2, atol=1e-6)
        assert float(c.abs().max()) > 1e-4
        assert not rewriting(killed.state)

        other, other_c = ended(*start("client"))
        assert not (tmp_path / "client" / "state" / "rows").exists()
        assert all(torch.equal(model[name], other[name]) for name in model)
        assert torch.equal(c, other_c)
        for name, row in found.items():
            assert torch.equal(row, variate(tmp_path / "client" / f"client-{name}"))


def test_a_client_on_a_new_disk_has_lost_nothing(federation: Federation) -> None:
    server = federation.server(
        "--strategy", ROUNDS, "--local", "scaffold-m:beta=0.5,table=server", "--lease", "3"
    )
    first = federation.client("a", "--shard", "0/2")
    federation.client("b", "--shard", "1/2")
    federation.until(lambda: federation.merged() >= 3, 60, "version 3")
    first.kill()
    (federation.folder / "client-a").rename(federation.folder / "gone")
    before = worked(federation, "a")
    federation.client("a", "--shard", "0/2")
    federation.until(lambda: worked(federation, "a") >= before + 3, 90, "work after it")
    server.interrupt()
    assert server.wait(60) == 0, server.said()
    assert not federation.history("state-lost")
    numbers = facts(federation.state)["numbers"]
    assert numbers["epoch"] == 0
    assert numbers["commits/a"] >= before + 2
    found = rows(federation.state)
    mean = (found["a"] + found["b"]) / 2
    assert torch.allclose(control(federation.state), mean, atol=1e-6)


def worked(federation: Federation, client: str) -> int:
    """Updates of this client that are part of a version."""
    mine = {row["update"] for row in federation.history("update") if row["client"] == client}
    done = federation.merged()
    rows = [row for row in federation.history("aggregate") if row["version"] <= done]
    return sum(update in mine for row in rows for update, _ in row["items"])


def test_who_asks_for_anothers_row_is_refused(federation: Federation) -> None:
    local = federation.local(
        Rules(versions=40), strategy="fedbuff:size=1,steps=3", algorithm="scaffold:table=server"
    )
    assert local.error is None, local.error
    guest = federation.digits("good", slowdown=0.01)
    federation.until(lambda: federation.merged() >= 2, 60)
    thief = federation.raw()
    thief.hello("thief")
    for _ in range(5):
        [newest_row] = sorted((federation.state / "rows").glob("good.*[0-9]"))[-1:]
        number = newest_row.name.removeprefix("good.")
        asked = wire_pb2.BlobRequest(blob=f"own/good/{number}")
        with pytest.raises(grpc.RpcError) as refused:
            list(thief.stub.Download(asked, metadata=thief.metadata, timeout=60))
        assert code_of(refused.value) == "FL-W107"
    thief.close()
    assert local.ended().versions == 40
    guest.ended()
    assert guest.report is not None
    assert guest.report.used > 2
