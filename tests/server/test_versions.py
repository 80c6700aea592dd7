"""Versions: sealed bytes are served, stored, found after a crash, and set aside if damaged."""

import errno
import hashlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from atoll.aggregation.outer import STEPS
from atoll.protocols.blobs import CHUNK
from atoll.protocols.codecs import codec
from atoll.protocols.errors import ServerError, UsageError
from atoll.protocols.manifest import TRAVELLING, Manifest, TensorSpec
from atoll.protocols.payload import parse, read_extras
from atoll.server.draft import FACTS, MODEL, OUTER, Version
from atoll.server.versions import VersionStore, kept

FP32, BF16 = codec("fp32"), codec("bf16")
MANIFEST = Manifest(
    (
        TensorSpec("w", (3, 4), "float32", "trainable"),
        TensorSpec("bn.count", (), "int64", "buffers_other"),
        TensorSpec("bn.mean", (3,), "float16", "buffers_float"),
        TensorSpec("base", (9,), "float32", "frozen"),
        TensorSpec("b", (4,), "float32", "trainable"),
    )
)
SIZES = [0, 1 << 20]  # memory limits: a version in files, a version in memory


def named(value: float = 1.0) -> dict[str, Tensor]:
    return {
        "w": torch.arange(12.0).view(3, 4) * value,
        "b": torch.full((4,), value),
        "bn.mean": torch.tensor([0.5, 1.5, 2.5], dtype=torch.float16),
        "bn.count": torch.tensor(17),
    }


def store(folder: Path, limit: int = 0) -> VersionStore:
    return VersionStore(folder, MANIFEST, memory_limit=limit)


def stepped(versions: VersionStore, number: int, value: float = 2.0) -> Version:
    """A version with outer state, all of its elements `value`."""
    draft = versions.draft(number, number - 1, ["momentum"])
    draft.write("trainable", 0, torch.full((16,), value))
    draft.write("buffers_float", 0, torch.full((3,), value))
    draft.write("buffers_other", 0, torch.tensor([number]))
    draft.write_outer("momentum", 0, torch.full((16,), -value))
    draft.write_outer(STEPS, 0, torch.tensor([number]))
    return draft.seal([("o1.0", 0.5)], {"loss": 0.25})


@pytest.mark.parametrize("limit", SIZES)
def test_tensors_come_back_with_names_shapes_and_dtypes(tmp_path: Path, limit: int) -> None:
    version = store(tmp_path, limit).initial(named())
    assert version.number == 0
    for name, tensor in version.tensors().items():
        assert torch.equal(tensor, named()[name])
        assert tensor.dtype == named()[name].dtype


@pytest.mark.parametrize("limit", SIZES)
def test_a_saved_version_is_a_file_any_safetensors_reader_loads(tmp_path: Path, limit: int) -> None:
    versions = store(tmp_path, limit)
    versions.save(versions.initial(named()))
    found = load_file(tmp_path / "0" / MODEL)
    assert set(found) == set(named())
    assert all(torch.equal(found[name].to(t.dtype), t) for name, t in named().items())


@pytest.mark.parametrize("limit", SIZES)
def test_what_is_served_is_the_data_region_of_the_file(tmp_path: Path, limit: int) -> None:
    versions = store(tmp_path, limit)
    version = versions.initial(named())
    versions.save(version)
    blob = versions.blob(version, FP32)
    head = versions.shelf.layout.head
    assert (tmp_path / "0" / MODEL).read_bytes() == head + bytes(blob.view)
    assert len(head) % 64 == 0
    assert blob.info.id == "v0/fp32"
    assert blob.info.size == len(blob.view) == 4 * 16 + 4 * 3 + 8
    told = hashlib.sha256(blob.view).digest()
    assert version.sha256 == told
    assert blob.info.sha256 == (told if limit == 0 else b"")  # a small one is not waited for
    assert list(blob.crcs) == [zlib.crc32(blob.view)]
    assert [s.group for s in blob.info.sections] == ["trainable", "buffers_float", "buffers_other"]


def test_large_and_small_versions_have_the_same_bytes(tmp_path: Path) -> None:
    large, small = (store(tmp_path / str(limit), limit).initial(named()) for limit in SIZES)
    assert large.on_disk
    assert not small.on_disk
    assert bytes(large.view) == bytes(small.view)
    assert large.sha256 == small.sha256
    assert small.facts.sha256 == ""
    for version in (large, small):
        store(version.shelf.folder, 0).save(version)
    assert large.facts == small.facts


@pytest.mark.parametrize("limit", SIZES)
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_blob_is_encoded_once_and_read_by_a_client(tmp_path: Path, name: str, limit: int) -> None:
    versions = store(tmp_path, limit)
    version = versions.initial(named())
    blob = versions.blob(version, codec(name))
    assert versions.blob(version, codec(name)) is blob
    unhashed = limit > 0 and name == "fp32"
    assert blob.info.sha256 == (b"" if unhashed else hashlib.sha256(blob.view).digest())
    payload = parse(MANIFEST, blob.info.sections, blob.view, codec(name), "model")
    assert torch.equal(payload.read("trainable"), version.flat("trainable"))
    assert blob.view.readonly


def test_chunks_are_summed_one_by_one_whatever_the_order_of_writing(tmp_path: Path) -> None:
    count = (3 * CHUNK + 400) // 4
    manifest = Manifest((TensorSpec("w", (count,), "float32", "trainable"),))
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    draft = VersionStore(tmp_path, manifest).draft(1)
    draft.write("trainable", 0, torch.zeros(500_000))
    draft.rewind()  # what was hashed of it is forgotten
    for lo, hi in ((500_000, count), (0, 250_000), (250_000, 500_000)):
        draft.write("trainable", lo, values[lo:hi])
    version = draft.seal()
    data = values.numpy().tobytes()
    assert version.sha256 == hashlib.sha256(data).digest()
    assert list(version.crcs) == [
        zlib.crc32(data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)
    ]


def test_a_draft_with_a_hole_is_not_sealed(tmp_path: Path) -> None:
    draft = store(tmp_path).draft(1)
    draft.write("trainable", 8, torch.zeros(8))
    with pytest.raises(AssertionError, match="were written"):
        draft.seal()


def test_an_abandoned_draft_leaves_nothing(tmp_path: Path) -> None:
    store(tmp_path).draft(1, 0, ["momentum"]).abandon()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", SIZES)
def test_a_new_process_finds_the_version_with_its_outer_state(tmp_path: Path, limit: int) -> None:
    versions = store(tmp_path, limit)
    made = stepped(versions, 3)
    versions.save(made)
    found = store(tmp_path, limit).open(3)
    assert found.facts == made.facts
    assert found.facts.inputs == (("o1.0", 0.5),)
    assert found.facts.metrics == {"loss": 0.25}
    assert (bytes(found.view), list(found.crcs)) == (bytes(made.view), list(made.crcs))
    assert found.outer["momentum"].tolist() == [-2.0] * 16
    assert found.outer[STEPS].tolist() == [3]


@pytest.mark.parametrize("limit", SIZES)
def test_saving_again_over_the_same_number_replaces_it(tmp_path: Path, limit: int) -> None:
    """A version made before a crash is made again from kept updates; ours must win."""
    for value in (2.0, 5.0):
        versions = store(tmp_path, limit)
        versions.save(stepped(versions, 1, value))
    assert store(tmp_path).open(1).flat("trainable").tolist() == [5.0] * 16


def test_a_small_version_reaches_the_disk_only_when_saved(tmp_path: Path) -> None:
    versions = store(tmp_path, 1 << 20)
    version = versions.initial(named())
    assert (versions.numbers(), versions.saved()) == ([0], [])
    assert list(tmp_path.iterdir()) == []
    assert versions.open(0) is version
    versions.save(version)
    assert versions.saved() == store(tmp_path).numbers() == [0]


def test_saving_syncs_files_and_folders_once(tmp_path: Path, synced: list[str]) -> None:
    versions = store(tmp_path)
    version = stepped(versions, 1)
    versions.save(version, durable=False)
    assert synced == []
    versions.save(version)
    versions.save(version)
    files = [tmp_path / "1" / name for name in (MODEL, OUTER, FACTS)]
    assert synced == [str(path) for path in (*files, tmp_path / "1", tmp_path)]
    del synced[:]
    small = store(tmp_path, 1 << 20)  # in memory until it is saved
    small.save(stepped(small, 2))
    files = [tmp_path / "2.tmp" / name for name in (MODEL, OUTER, f"{FACTS}.part")]
    assert synced == [str(path) for path in (*files, tmp_path / "2", tmp_path)]


def damage(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "model bit": lambda folder: damage(folder / MODEL),
    "model header": lambda folder: damage(folder / MODEL, 20),
    "model length": lambda folder: damage(folder / MODEL, 7),
    "model cut": lambda folder: os.truncate(folder / MODEL, 100),
    "model empty": lambda folder: os.truncate(folder / MODEL, 0),
    "model gone": lambda folder: (folder / MODEL).unlink(),
    "outer bit": lambda folder: damage(folder / OUTER),
    "outer gone": lambda folder: (folder / OUTER).unlink(),
    "facts cut": lambda folder: os.truncate(folder / FACTS, 30),
    "facts gone": lambda folder: (folder / FACTS).unlink(),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_version_is_set_aside_and_the_one_before_it_used(
    tmp_path: Path, case: str
) -> None:
    versions = store(tmp_path)
    for number in (1, 2):
        versions.save(stepped(versions, number), durable=False)
    DAMAGES[case](tmp_path / "2")
    again = store(tmp_path)
    with pytest.raises(ServerError, match="version 2 is damaged") as caught:
        again.open(2)
    assert caught.value.code == "FL-S206"
    assert (tmp_path / "2.corrupt").is_dir()
    found = again.latest()
    assert found is not None
    assert found.number == 1
    assert store(tmp_path).numbers() == [1]


def test_latest_passes_over_damage_by_itself(tmp_path: Path) -> None:
    versions = store(tmp_path)
    for number in (1, 2, 3):
        stepped(versions, number)
    for number in (2, 3):
        damage(tmp_path / str(number) / MODEL)
    found = store(tmp_path).latest()
    assert found is not None
    assert found.number == 1
    damage(tmp_path / "1" / MODEL)
    assert store(tmp_path).latest() is None


def test_a_version_of_another_model_is_not_taken(tmp_path: Path) -> None:
    stepped(store(tmp_path), 1)
    other = Manifest(MANIFEST.tensors[:1])
    with pytest.raises(ServerError, match="another version or model"):
        VersionStore(tmp_path, other).open(1)


def test_a_version_that_is_not_kept_is_told_with_those_that_are(tmp_path: Path) -> None:
    versions = store(tmp_path)
    stepped(versions, 4)
    with pytest.raises(ServerError, match="version 5") as caught:
        versions.open(5)
    assert caught.value.code == "FL-S107"
    assert "[4]" in caught.value.hint


def test_what_a_dead_process_was_writing_is_removed(tmp_path: Path) -> None:
    store(tmp_path).draft(7)
    assert (tmp_path / "7.tmp").is_dir()
    assert store(tmp_path).numbers() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", SIZES)
def test_pruned_versions_go_but_whoever_holds_one_reads_on(tmp_path: Path, limit: int) -> None:
    versions = store(tmp_path, limit)
    made = [stepped(versions, number, float(number)) for number in range(1, 6)]
    for version in made[::2]:
        versions.save(version, durable=False)
    versions.prune(kept(versions.numbers(), last=2, every=3))
    assert versions.numbers() == [3, 4, 5]
    assert store(tmp_path, limit).numbers() == ([3, 4, 5] if limit == 0 else [3, 5])
    assert made[0].flat("trainable").tolist() == [1.0] * 16


def test_metrics_that_come_later_are_noted_on_disk_too(tmp_path: Path) -> None:
    versions = store(tmp_path)
    version = stepped(versions, 1)
    versions.note(version, {"accuracy": 0.5})
    assert store(tmp_path).open(1).facts.metrics == {"loss": 0.25, "accuracy": 0.5}
    assert version.facts.metrics == {"loss": 0.25, "accuracy": 0.5}


@pytest.mark.parametrize("limit", SIZES)
def test_an_exported_version_is_a_start_for_another_run(tmp_path: Path, limit: int) -> None:
    versions = store(tmp_path / "a", limit)
    made = stepped(versions, 1)
    versions.export(made, tmp_path / "model.safetensors")
    start = store(tmp_path / "b", limit).initial_from(tmp_path / "model.safetensors")
    assert bytes(start.view) == bytes(made.view)
    assert start.number == 0


def test_a_pretrained_file_may_hold_the_frozen_tensors_too(tmp_path: Path) -> None:
    save_file({**named(), "base": torch.zeros(9)}, tmp_path / "init.safetensors")
    start = store(tmp_path / "v").initial_from(tmp_path / "init.safetensors")
    assert torch.equal(start.tensors()["w"], named()["w"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"w": torch.ones(4, 3)}, r"'w' is \(4, 3\), the run expects \(3, 4\)"),
        ({"b": None}, "'b' is missing"),
        ({"head": torch.ones(2)}, r"'head' \(2,\) is not in the run's model"),
        ({"b": torch.tensor([0.0, 0.0, float("nan"), 0.0])}, r"'b'\[2\] is nan"),
    ],
)
def test_a_start_that_does_not_fit_is_told_by_its_tensor(
    tmp_path: Path, change: dict[str, Tensor | None], told: str
) -> None:
    given = {name: t for name, t in {**named(), **change}.items() if t is not None}
    save_file(given, tmp_path / "init.safetensors")
    with pytest.raises(UsageError, match=told) as caught:
        store(tmp_path / "v").initial_from(tmp_path / "init.safetensors")
    assert caught.value.code == "FL-S106"
    assert list((tmp_path / "v").iterdir()) == []


def test_named_tensors_that_do_not_fit_are_refused_too(tmp_path: Path) -> None:
    for change in ({"w": torch.ones(4, 3)}, {"b": torch.ones(3)}):
        with pytest.raises(UsageError, match="the run expects"):
            store(tmp_path).initial({**named(), **change})
    with pytest.raises(UsageError, match=r"'w' .* is missing"):
        store(tmp_path).initial({})


def test_a_start_that_is_no_safetensors_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"not a model")
    os.mkfifo(tmp_path / "pipe")  # a start waited for it, and no signal ended that
    for path in (tmp_path / "x", tmp_path / "none", tmp_path / "pipe", tmp_path):
        with pytest.raises(UsageError) as caught:
            store(tmp_path / "v").initial_from(path)
        assert caught.value.code == "FL-S106"


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "rename", "mkdir"])
def test_a_full_disk_is_told_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    versions = store(tmp_path)

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(ServerError, match="No space left") as caught:
        stepped(versions, 1)
    assert caught.value.code == "FL-S203"
    assert "free space" in caught.value.hint


def test_a_disk_that_writes_short_is_written_to_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:7], at))
    versions = store(tmp_path)
    stepped(versions, 1)
    monkeypatch.undo()
    assert store(tmp_path).open(1).flat("trainable").tolist() == [2.0] * 16


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_vectors_beside_a_model_travel_as_one_blob_encoded_once(tmp_path: Path, limit: int) -> None:
    versions = store(tmp_path, limit)
    first = versions.initial(named())
    count = MANIFEST.counts["trainable"]
    zeros = versions.extras(first, ("b", "a"))
    assert bytes(zeros.view) == bytes(2 * 4 * count)
    draft = versions.draft(1, 0, ("a", "b"))
    for group in TRAVELLING:
        draft.write(group, 0, first.flat(group))
    draft.write_outer(STEPS, 0, torch.tensor([1]))
    draft.write_outer("a", 0, torch.arange(float(count)))
    draft.write_outer("b", 0, -torch.arange(float(count)))
    draft.numbers = {"gamma": 0.5, "life/x": 3.0}
    version = draft.seal()
    blob = versions.extras(version, ("b", "a"))
    assert versions.extras(version, ("b", "a")) is blob
    found = read_extras(blob.info.sections, blob.view, {"a": count, "b": count})
    assert found["a"].tolist() == [float(i) for i in range(count)]
    assert found["b"].tolist() == [-float(i) for i in range(count)]
    assert hashlib.sha256(blob.view).digest() == blob.info.sha256
    versions.save(version)
    assert store(tmp_path).open(1).facts.numbers == {"gamma": 0.5, "life/x": 3.0}


def test_an_exported_version_replaces_nothing_but_a_file(tmp_path: Path) -> None:
    versions = store(tmp_path / "v")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="no regular file") as refused:
        versions.export(versions.initial(named()), tmp_path / "pipe")
    assert refused.value.code == "FL-S108"
    assert (tmp_path / "pipe").is_fifo()
