"""A merge of packed updates: sums as they read, and corrupt bytes cost their sender its place."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from atoll.protocols.codecs import Codec
from atoll.protocols.manifest import Manifest, TensorSpec
from atoll.protocols.payload import Payload, parse
from atoll.protocols.tensors import codec_for, pack
from atoll.server.items import UpdateBytes
from atoll.server.merge import Merger
from atoll.server.versions import VersionStore

COUNT = 9001
MANIFEST = Manifest(
    (
        TensorSpec("w", (90, 100), "float32", "trainable"),
        TensorSpec("temperature", (), "float32", "trainable"),
        TensorSpec("bn.var", (3,), "float32", "buffers_float"),
    )
)
ZEROS = {"w": torch.zeros(90, 100), "temperature": torch.zeros(()), "bn.var": torch.ones(3)}
SPECS = ("int8", "sign", "topk:0.1", "randomk:0.1", "powersgd:2", "int8+zstd", "bf16")


def delta(seed: int) -> Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(seed))


def update(seed: int, how: Codec) -> UpdateBytes:
    groups = {"trainable": delta(seed), "buffers_float": torch.full((3,), 2.0 + seed)}
    sections, view = pack(MANIFEST, groups, how)
    return UpdateBytes(f"u{seed}", parse(MANIFEST, sections, view, how, "update"))


def merged(folder: Path, items: list[tuple[UpdateBytes, float]], tile: int = 1 << 20) -> Tensor:
    store = VersionStore(folder, MANIFEST)
    base = store.initial(ZEROS)
    merger, draft = Merger(MANIFEST, tile=tile), store.draft(1, 0)
    stats = merger.merge(base, draft, items)
    assert stats.used == tuple(u.id for u, _ in items)
    version = draft.seal()
    assert version.flat("buffers_float").tolist() == [2.5, 2.5, 2.5]
    return version.flat("trainable").clone()


@pytest.mark.parametrize("spec", SPECS)
def test_packed_updates_are_summed_as_they_read(spec: str, tmp_path: Path) -> None:
    """Buffers beside them go as they are: a variance of 0 would be a lie."""
    items = [(update(seed, codec_for(MANIFEST, spec)), 0.5) for seed in (0, 1)]
    expected = -sum(0.5 * u.payload.read("trainable").double() for u, _ in items)
    found = merged(tmp_path / "a", items)
    assert torch.allclose(found.double(), torch.as_tensor(expected), atol=1e-5)
    assert torch.equal(merged(tmp_path / "b", items, tile=1000), found)


def test_clients_may_pack_differently(tmp_path: Path) -> None:
    items = [
        (update(0, codec_for(MANIFEST, "int8")), 0.5),
        (update(1, codec_for(MANIFEST, "topk:0.1")), 0.5),
    ]
    expected = -sum(0.5 * u.payload.read("trainable") for u, _ in items)
    assert torch.allclose(merged(tmp_path, items), torch.as_tensor(expected), atol=1e-5)


def spoilt(how: str, seed: int = 1) -> UpdateBytes:
    good = update(seed, codec_for(MANIFEST, how))
    view = bytearray(good.payload.view)
    match how:
        case "topk:0.1":  # places that repeat
            end = good.payload.sections[0].length
            view[end - 900 : end] = bytes(900)
        case "int8+zstd":
            view[100] ^= 255
        case _:  # a scale that is NaN
            view[:4] = b"\xff" * 4
    payload = Payload(good.payload.sections, memoryview(view), codec_for(MANIFEST, how))
    return UpdateBytes(good.id, payload)


@pytest.mark.parametrize(
    ("how", "why"), [("topk:0.1", "ascending"), ("int8+zstd", "zstd"), ("int8", "nan")]
)
def test_corrupt_bytes_are_dropped_with_their_reason_and_the_rest_is_merged(
    how: str, why: str, tmp_path: Path
) -> None:
    store = VersionStore(tmp_path, MANIFEST)
    base = store.initial(ZEROS)
    good, draft = update(0, codec_for(MANIFEST, how)), store.draft(1, 0)
    stats = Merger(MANIFEST).merge(base, draft, [(good, 0.5), (spoilt(how), 0.5)])
    assert stats.used == ("u0",)
    ((dropped, reason),) = stats.dropped
    assert dropped == "u1"
    assert why in reason
    expected = -0.5 * good.payload.read("trainable")
    assert torch.allclose(draft.seal().flat("trainable"), expected, atol=1e-6)
