"""The layers: what each folder may import, and what the machines may not.

    server/, p2p/  >  client/  >  aggregation/  >  protocols/

`server` and `p2p` know each other in no file but cli and demo ones, and the connecting half of
`client` is for its command line only. Machines decide; they touch no clock, socket or tensor.
"""

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "protocols": {"protocols"},
    "aggregation": {"protocols", "aggregation"},
    "client": {"protocols", "aggregation", "client"},
    "server": {"protocols", "aggregation", "client", "server"},
    "p2p": {"protocols", "aggregation", "client", "p2p"},
}
COMPOSE = {
    "cli.py",
    "cli_peers.py",
    "demo.py",
}  # may bring server, p2p and the connecting client together
CONNECTING = {
    "cli",
    "client",
    "outbox",
    "session",
    "settling",
    "transfer",
    "work",
}  # half of client/

MACHINES = [
    "aggregation/allreduce.py",
    "aggregation/circle.py",
    "aggregation/compass_groups.py",
    "aggregation/diloco.py",
    "aggregation/dp_fedavg.py",
    "aggregation/dylu.py",
    "aggregation/fedavg.py",
    "aggregation/fedbuff.py",
    "aggregation/fedcompass.py",
    "aggregation/believing.py",
    "aggregation/meter.py",
    "aggregation/plan_check.py",
    "aggregation/seals.py",
    "aggregation/proposing.py",
    "aggregation/quorum.py",
    "aggregation/rendezvous.py",
    "aggregation/rendezvous_events.py",
    "aggregation/rendezvous_messages.py",
    "aggregation/shares.py",
    "aggregation/staleness.py",
    "aggregation/strategy.py",
    "aggregation/validated.py",
    "client/session.py",
    "client/session_events.py",
    "protocols/blobs.py",
    "protocols/events.py",
    "protocols/manifest.py",
    "protocols/membership.py",
    "server/run.py",
]
BESIDE_MACHINES = {  # pure, used by machines
    "aggregation/checks.py",
    "protocols/errors.py",
    "protocols/state.py",
}
NOT_IN_MACHINES = {
    "asyncio", "grpc", "hivemind", "logging", "os", "socket", "threading", "time", "torch",
}  # fmt: skip


@functools.cache
def imports(file: Path) -> list[str]:
    """Every module a file imports, inside functions too; `from a import b` gives a and a.b."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; write atoll.<folder>"
            found += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("*.py"))


def ours(file: Path) -> Iterator[tuple[str, str]]:
    """(folder, module) of each import of atoll."""
    for name in imports(file):
        parts = [*name.split("."), "", ""]
        if parts[0] == "atoll" and parts[1]:
            yield parts[1], parts[2]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_from_its_own_layer_and_below(folder: str) -> None:
    assert sources(folder), "no such folder"
    for file in sources(folder):
        allowed = MAY_IMPORT[folder] | ({"server", "p2p"} if file.name in COMPOSE else set())
        wrong = sorted({used for used, _ in ours(file)} - allowed)
        assert not wrong, f"{folder}/{file.name} imports atoll.{wrong[0]}"


@pytest.mark.parametrize("folder", ["server", "p2p"])
def test_the_connecting_half_of_the_client_is_for_command_lines_only(folder: str) -> None:
    for file in sources(folder):
        used = {module for part, module in ours(file) if part == "client"}
        wrong = sorted(used & CONNECTING)
        assert not wrong or file.name in COMPOSE, f"{folder}/{file.name}: atoll.client.{wrong[0]}"


@pytest.mark.parametrize("machine", MACHINES)
def test_a_machine_imports_the_standard_library_and_other_machines_only(machine: str) -> None:
    for name in imports(ROOT / machine):
        top, *rest = name.split(".")
        assert top not in NOT_IN_MACHINES, f"{machine} imports {name}"
        if top != "atoll":
            assert top in sys.stdlib_module_names, f"{machine} imports {name}"
        elif len(rest) == 2:
            known = {*MACHINES, *BESIDE_MACHINES}
            assert f"{rest[0]}/{rest[1]}.py" in known, f"{machine} imports {name}"


@pytest.mark.parametrize("folder", ["protocols", "aggregation"])
def test_brain_and_vocabulary_never_import_hivemind(folder: str) -> None:
    for file in sources(folder):
        assert not any(name.split(".")[0] == "hivemind" for name in imports(file)), file


def test_a_forbidden_import_is_seen_wherever_it_hides(tmp_path: Path) -> None:
    file = tmp_path / "hidden.py"
    file.write_text("def f() -> None:\n    from atoll.server import run\n    import torch.nn\n")
    assert set(ours(file)) == {("server", ""), ("server", "run")}
    assert "torch.nn" in set(imports(file))
