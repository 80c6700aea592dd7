"""Memory: what is written comes back, what is torn is found out, one directory is one process's."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atoll.aggregation.allreduce import Part
from atoll.aggregation.rendezvous_events import Bound
from atoll.aggregation.rendezvous_messages import Commit, Goodbye, Stand
from atoll.aggregation.sync_engine import SyncState
from atoll.p2p.identity import Identity, make
from atoll.p2p.memory import Memory
from atoll.p2p.reducing import Mean
from atoll.protocols.codecs import FP32, as_bytes
from atoll.protocols.errors import PeerError
from tests.p2p.test_post import VALUE

STAND = Stand(3, "c" * 32, 4.5)
BOUND = Bound(
    STAND, ("a", "b"), Commit("e" * 32, VALUE), (2, "b"), ((2, "b"), VALUE),
    {"z": Goodbye(Stand(1, "f", 1.0), None, "5ea1")},
)  # fmt: skip
RUN, ME = "r" * 64, "Qm1"


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    made = Memory(tmp_path / "peer")
    made.open()
    return made


def model() -> SyncState:
    outer = {"velocity": torch.randn(50), "steps": torch.tensor([3])}
    return SyncState(torch.randn(50), outer, 3)


def mean() -> Mean:
    import hashlib

    values = torch.randn(50)
    parts = (Part("a", 0, 20), Part("b", 20, 50))
    payloads = tuple(as_bytes(values[p.start : p.stop].clone()) for p in parts)
    digests = tuple(hashlib.sha256(p).hexdigest() for p in payloads)
    return Mean("d" * 64, parts, digests, payloads, values)


def test_what_binds_comes_back(memory: Memory) -> None:
    assert memory.recall(RUN) is None
    memory.bind(RUN, ME, BOUND)
    kept = memory.recall(RUN)
    assert kept is not None
    assert (kept.run, kept.peer, kept.bound) == (RUN, ME, BOUND)
    assert (memory.folder.stat().st_mode & 0o777) == 0o700
    memory.close()


def test_keys_of_seals_outlive_a_power_cut(memory: Memory, synced: list[str]) -> None:
    """They lay in a file that was written anew at each beat and never synced: torn, what those had
    sealed who were gone by then was nobody's word."""
    assert memory.keys() == {}
    memory.keep_keys({"Qm2": "ab" * 32})
    file = memory.folder / "seals.json"
    assert synced == [f"{file}.tmp", str(memory.folder)]
    assert memory.keys() == {"Qm2": "ab" * 32}
    for torn in (b"", b"{", b"[1]", b'{"Qm2":3}', b"\xff"):
        file.write_bytes(torn)
        assert memory.keys() == {}
    memory.close()


def test_a_peers_own_key_outlives_a_power_cut(tmp_path: Path, synced: list[str]) -> None:
    """Whoever had admitted it knew another one, if any, when it came back."""
    file = tmp_path / "identity.key"
    make(file)
    assert synced == [f"{file}.tmp", str(tmp_path)]
    assert file.stat().st_mode & 0o777 == 0o400
    assert Identity(file).id == Identity(file).id


def test_a_model_comes_back_bit_for_bit(memory: Memory) -> None:
    kept = model()
    memory.keep_model("c", kept)
    found = memory.model("c")
    assert found is not None
    assert (found.digest, found.round) == (kept.digest, 3)
    assert memory.model("other") is None
    memory.close()


def test_a_mean_comes_back_as_it_travelled(memory: Memory) -> None:
    kept = mean()
    memory.keep_mean(kept)
    found = memory.mean(kept.digest, FP32)
    assert found is not None
    assert (found.digest, found.parts, found.digests) == (kept.digest, kept.parts, kept.digests)
    assert torch.equal(found.values, kept.values)
    assert [bytes(p) for p in found.payloads] == [bytes(p) for p in kept.payloads]
    assert memory.mean("other", FP32) is None
    given = memory.packed_mean(kept.digest)
    assert given is not None
    assert (given.digest, given.parts, given.digests) == (kept.digest, kept.parts, kept.digests)
    assert [bytes(p) for p in given.payloads] == [bytes(p) for p in kept.payloads]
    for name in ("e" * 64, "other", "../" + "d" * 64):  # none of ours, and a stranger's wish
        assert memory.packed_mean(name) is None
    memory.close()


def spoil(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.__setitem__(-1, data[-1] ^ 1),
        lambda data: data.__delitem__(slice(-8, None)),
        lambda data: data.clear(),
        lambda data: data.__setitem__(slice(0, 8), b"\xff" * 8),
        lambda data: data.__setitem__(10, 0),
    ],
    ids=["a bit", "the end", "all", "the size of the head", "the head"],
)
def test_what_is_torn_is_found_out(memory: Memory, change: Callable[[bytearray], object]) -> None:
    memory.keep_model("c", model())
    memory.keep_mean(mean())
    spoil(memory.folder / "model-c.safetensors", change)
    spoil(memory.folder / f"mean-{'d' * 64}.bin", change)
    assert memory.model("c") is None
    assert memory.mean("d" * 64, FP32) is None
    memory.close()


def test_a_state_that_is_none_is_named(memory: Memory) -> None:
    for data in (b"", b"{", b'{"run":1}', b"[]", b"\x90\xff"):
        (memory.folder / "state.json").write_bytes(data)
        with pytest.raises(PeerError, match="cannot be read") as refused:
            memory.recall(RUN)
        assert refused.value.code == "FL-P405"
    memory.close()


def test_a_directory_of_another_run_is_refused(memory: Memory) -> None:
    memory.bind("other", ME, BOUND)
    with pytest.raises(PeerError) as refused:
        memory.recall(RUN)
    assert refused.value.code == "FL-P407"
    memory.close()


def test_a_directory_has_one_process(memory: Memory) -> None:
    second = Memory(memory.folder)
    with pytest.raises(PeerError) as refused:
        second.open()
    assert refused.value.code == "FL-P406"
    memory.close()
    second.open()
    second.close()


def test_what_a_killed_process_had_begun_to_write_is_removed(memory: Memory) -> None:
    memory.close()
    (memory.folder / "mean-x.bin.tmp").write_bytes(b"torn")
    memory.open()
    assert not list(memory.folder.glob("*.tmp"))
    memory.close()


def test_a_disk_that_refuses_is_told(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: memory.bind(RUN, ME, BOUND),
        lambda: memory.keep_model("c", model()),
        lambda: memory.keep_mean(mean()),
    ):
        with pytest.raises(PeerError, match="No space left") as refused:
            write()  # type: ignore[no-untyped-call]
        assert refused.value.code == "FL-P405"
    assert memory.recall(RUN) is None
    memory.close()


def test_what_nothing_names_is_removed(memory: Memory) -> None:
    for chain in (STAND.chain, "old", "wanted"):
        memory.keep_model(chain, model())
    for digest in (VALUE.digest, "older", "held"):
        memory.keep_mean(replace(mean(), digest=digest))
    old = memory.old(BOUND, {"wanted", "held"})
    assert sorted(path.name for path in old) == ["mean-older.bin", "model-old.safetensors"]
    memory.remove(old)
    assert memory.old(BOUND, set()) != old
    assert memory.model(STAND.chain) is not None
    memory.close()


def test_after_a_goodbye_nothing_is_left_to_come_back_with(memory: Memory) -> None:
    memory.bind(RUN, ME, BOUND)
    memory.keep_model("c", model())
    memory.keep_mean(mean())
    (memory.folder / "identity.key").write_bytes(b"key")
    (memory.folder / "inner.safetensors").write_bytes(b"AdamW's")
    memory.retire()
    assert sorted(p.name for p in memory.folder.iterdir()) == ["inner.safetensors", "lock"]
    memory.close()


def test_one_whose_promises_somebody_removed_is_known(memory: Memory) -> None:
    """It came back under its name, and could have voted twice: the message for a torn state.json
    has users remove it."""
    identity, status = memory.folder / "identity.key", memory.folder / "status.json"
    assert not memory.forgot()
    identity.write_bytes(b"key")  # of a founder that has not begun
    (memory.folder / "habits.json").write_bytes(b"{}")
    assert not memory.forgot()
    memory.bind(RUN, ME, BOUND)
    status.write_bytes(b"{}")
    assert not memory.forgot()
    (memory.folder / "state.json").unlink()
    assert memory.forgot()
    memory.retire()
    assert not memory.forgot()
    assert status.exists()
    memory.close()
