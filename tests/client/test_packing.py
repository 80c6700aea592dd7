"""Packing: an update read from two models tile by tile has the bytes of one laid out first."""

import pytest
import torch

from atoll.client.packing import Made, pack
from atoll.protocols import tensors
from atoll.protocols.codecs import codec
from atoll.protocols.manifest import Manifest, TensorSpec
from atoll.protocols.payload import Payload

MANIFEST = Manifest(
    tuple(
        TensorSpec(f"t{i}", shape, "float32", "trainable")
        for i, shape in enumerate([(300, 400), (), (0, 3), (7,), (70_001,), (3, 5)])
    )
)


@pytest.mark.parametrize("spec", ["int8", "int4", "int8:block=24", "sign", "bf16", "topk:0.1"])
def test_an_update_is_packed_as_if_its_delta_lay_somewhere(spec: str) -> None:
    generator = torch.Generator().manual_seed(3)
    start, local = (
        {t.name: torch.randn(t.shape, generator=generator) for t in MANIFEST.tensors} for _ in "ab"
    )
    fp32, up = codec("fp32"), codec(spec)
    flat = tensors.flatten(MANIFEST, start, "trainable")
    base = Payload(*tensors.pack(MANIFEST, {"trainable": flat}, fp32), fp32)
    packed = pack(MANIFEST, Made(base, local), (), up, None, {}, lambda n: memoryview(bytearray(n)))
    delta = flat - tensors.flatten(MANIFEST, local, "trainable")
    assert bytes(packed.view) == bytes(up.encode(delta))
    assert torch.equal(flat, tensors.flatten(MANIFEST, start, "trainable"))


def test_a_difference_is_read_from_anywhere_to_anywhere() -> None:
    generator = torch.Generator().manual_seed(4)
    local = {t.name: torch.randn(t.shape, generator=generator) for t in MANIFEST.tensors}
    base = torch.randn(MANIFEST.counts["trainable"], generator=generator)
    whole = base - tensors.flatten(MANIFEST, local, "trainable")
    read = tensors.Difference(MANIFEST, base, local)
    spare, count = torch.empty(1000), len(base)
    for lo in (0, 1, 119_990, 120_000, 120_001, 120_007, 120_008, 190_000, count - 16, count - 1):
        for size in (1, 2, 9, 100):
            hi = min(lo + size, count)
            assert torch.equal(read(lo, hi, spare), whole[lo:hi])


@pytest.mark.parametrize(
    ("value", "extras", "known"),
    [(1.0, (), True), (float("nan"), (), False), (float("inf"), (), False), (1.0, ("c",), False)],
)
def test_an_update_is_known_to_be_finite_where_it_is_one_delta_that_is(
    value: float, extras: tuple[str, ...], known: bool
) -> None:
    manifest = Manifest((TensorSpec("w", (5,), "float32", "trainable"),))
    fp32 = codec("fp32")
    base = Payload(*tensors.pack(manifest, {"trainable": torch.zeros(5)}, fp32), fp32)
    local = {"w": torch.tensor([0.0, 0.0, value, 0.0, 0.0])}
    made = Made(base, local, {f"extra:{name}": torch.zeros(5) for name in extras})
    beside = tensors.extra_sections(dict.fromkeys(extras, 5))
    packed = pack(manifest, made, beside, fp32, None, {}, lambda n: memoryview(bytearray(n)))
    assert packed.finite is known
