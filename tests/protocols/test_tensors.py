"""Tensors: flat and back, and the refusal of everything that is not the run's manifest."""

import math
import struct
import tracemalloc

import pytest
import torch
from torch import Tensor

from atoll.protocols import payload as reading
from atoll.protocols import tensors
from atoll.protocols.blobs import Section
from atoll.protocols.codecs import codec
from atoll.protocols.errors import ClientError, RemoteError
from atoll.protocols.manifest import TRAVELLING, Group, Manifest, TensorSpec
from atoll.protocols.payload import Payload, check, finite, parse

FP32 = codec("fp32")
MANIFEST = Manifest(
    (
        TensorSpec("conv.weight", (2, 3), "float32", "trainable"),
        TensorSpec("bn.mean", (3,), "float32", "buffers_float"),
        TensorSpec("fc.bias", (5,), "bfloat16", "trainable"),
        TensorSpec("base", (100,), "float32", "frozen"),
        TensorSpec("bn.count", (), "int64", "buffers_other"),
    )
)
MODEL = tensors.sections_of(MANIFEST, FP32)
SIZE = 4 * 11 + 4 * 3 + 8


def named() -> dict[str, Tensor]:
    return {
        "conv.weight": torch.arange(6.0).view(2, 3),
        "bn.mean": torch.tensor([7.0, 8.0, 9.0]),
        "fc.bias": torch.arange(5, dtype=torch.bfloat16) + 10,
        "bn.count": torch.tensor(2**40),
    }


def groups() -> dict[Group, Tensor]:
    return {g: tensors.flatten(MANIFEST, named(), g) for g in TRAVELLING}


def test_a_group_is_flat_in_manifest_order() -> None:
    flat = tensors.flatten(MANIFEST, named(), "trainable")
    assert flat.dtype == torch.float32
    assert flat.tolist() == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14]
    assert tensors.flatten(MANIFEST, named(), "buffers_other").tolist() == [2**40]


def test_flat_groups_come_back_with_names_shapes_and_dtypes() -> None:
    for group, flat in groups().items():
        for name, tensor in tensors.unflatten(MANIFEST, group, flat).items():
            assert torch.equal(tensor, named()[name])
            assert tensor.dtype == named()[name].dtype


def test_unflattened_tensors_of_flats_own_dtype_are_views() -> None:
    flat = torch.zeros(11)
    tensors.unflatten(MANIFEST, "trainable", flat)["conv.weight"].fill_(1)
    assert flat.sum() == 6


def test_parameters_that_require_grad_can_be_flattened() -> None:
    given = {**named(), "conv.weight": torch.nn.Parameter(torch.ones(2, 3))}
    assert not tensors.flatten(MANIFEST, given, "trainable").requires_grad


def test_the_delta_is_base_minus_local(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.full((11,), 20.0)
    expected = base - tensors.flatten(MANIFEST, named(), "trainable")
    for tile in (1, 4, 1000):
        monkeypatch.setattr(tensors, "TILE", tile)
        assert torch.equal(tensors.delta(MANIFEST, base, named()), expected)
    assert tensors.delta(MANIFEST, base, named(), out=base) is base
    assert torch.equal(base, expected)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"fc.bias": None}, "'fc.bias' .* is missing"),
        ({"fc.bias": torch.ones(4)}, r"\(4,\)"),
        ({"fc.bias": torch.ones(5, dtype=torch.complex64)}, "half of it would be lost"),
    ],
)
def test_a_model_that_does_not_fit_is_told_by_its_tensor(
    change: dict[str, Tensor | None], told: str
) -> None:
    given = {name: t for name, t in {**named(), **change}.items() if t is not None}
    with pytest.raises(ClientError, match=told) as caught:
        tensors.flatten(MANIFEST, given, "trainable")
    assert caught.value.code == "FL-C103"


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_what_is_packed_is_read_again(name: str) -> None:
    """The values here are exact in every codec."""
    sections, data = tensors.pack(MANIFEST, groups(), codec(name))
    payload = parse(MANIFEST, sections, data, codec(name), "model")
    for group, flat in groups().items():
        assert torch.equal(payload.read(group), flat)


def test_packing_into_given_bytes_writes_just_them() -> None:
    out = memoryview(bytearray(SIZE))
    sections, data = tensors.pack(MANIFEST, groups(), FP32, out)
    assert data is out
    assert bytes(out) == bytes(tensors.pack(MANIFEST, groups(), FP32)[1])
    assert [s.length for s in sections] == [44, 12, 8]


def test_one_fp32_section_alone_is_not_copied() -> None:
    flat = torch.zeros(11)
    _, data = tensors.pack(MANIFEST, {"trainable": flat}, FP32)
    flat[0] = 1.0
    assert bytes(data[:4]) == b"\0\0\x80?"


def test_an_update_may_leave_buffers_out_and_a_model_may_not() -> None:
    only = MODEL[:1]
    check(MANIFEST, only, 44, FP32, "update")
    with pytest.raises(RemoteError, match="'buffers_float' of 3 values is missing"):
        check(MANIFEST, only, 44, FP32, "model")


def test_a_model_without_buffers_has_one_section() -> None:
    manifest = Manifest(MANIFEST.tensors[:1])
    assert [s.group for s in tensors.sections_of(manifest, FP32)] == ["trainable"]
    check(manifest, tensors.sections_of(manifest, FP32), 24, FP32, "model")


def test_extra_sections_are_only_those_allowed() -> None:
    extra = Section("extra:control", "fp32", 11, 44)
    check(MANIFEST, [MODEL[0], extra], 88, FP32, "update", {"control": 11})
    with pytest.raises(RemoteError, match="'extra:control' is not one of"):
        check(MANIFEST, [MODEL[0], extra], 88, FP32, "update")


TRAINABLE = Section("trainable", "fp32", 11, 44)
REFUSED: dict[str, tuple[list[Section], int, str]] = {
    "unknown group": ([Section("weights", "fp32", 11, 44)], 44, "'weights' is not one of"),
    "frozen": ([Section("frozen", "fp32", 100, 400)], 400, "'frozen' is not one of"),
    "too many values": (
        [Section("trainable", "fp32", 12, 48)],
        48,
        "has 12 values, expected 11 .'conv.weight' to 'fc.bias'.",
    ),
    "negative": ([Section("trainable", "fp32", -11, -44)], -44, "has -11 values"),
    "huge": ([Section("trainable", "fp32", 1 << 62, 1 << 64)], 44, "expected 11"),
    "wrong length": ([Section("trainable", "fp32", 11, 40)], 40, "has 40 bytes, expected 44"),
    "other codec": ([Section("trainable", "bf16", 11, 22)], 22, "'bf16', expected 'fp32'"),
    "code as codec": ([Section("trainable", "os:system", 11, 44)], 44, "expected 'fp32'"),
    "floats as integers": (
        [TRAINABLE, Section("buffers_other", "fp32", 1, 4)],
        48,
        "expected 'int64'",
    ),
    "twice": ([TRAINABLE, TRAINABLE], 88, "stands twice"),
    "out of order": ([MODEL[1], TRAINABLE], 56, "sections stand as"),
    "truncated": ([TRAINABLE], 43, "sections are 44 bytes, the payload is 43"),
    "longer": ([TRAINABLE], 45, "sections are 44 bytes, the payload is 45"),
    "nothing": ([], 0, "'trainable' of 11 values is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sections_that_do_not_fit_are_refused_by_name(case: str) -> None:
    sections, size, told = REFUSED[case]
    with pytest.raises(RemoteError, match=told) as caught:
        check(MANIFEST, sections, size, FP32, "update")
    assert caught.value.code == "FL-W104"


def test_a_section_of_an_empty_group_is_refused() -> None:
    manifest = Manifest(MANIFEST.tensors[:1])
    sections = [Section("trainable", "fp32", 6, 24), Section("buffers_float", "fp32", 0, 0)]
    with pytest.raises(RemoteError, match="has 0 values, expected 0"):
        check(manifest, sections, 24, FP32, "update")


def test_checking_a_large_model_allocates_nothing() -> None:
    manifest = Manifest((TensorSpec("w", (1 << 30,), "float32", "trainable"),))
    tracemalloc.start()
    sections = tensors.sections_of(manifest, FP32)
    check(manifest, sections, 4 << 30, FP32, "model")
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("group", "index", "told"),
    [
        ("trainable", 5, r"'conv.weight'\[1, 2\]"),
        ("trainable", 6, r"'fc.bias'\[0\]"),
        ("buffers_float", 2, r"'bn.mean'\[2\]"),
    ],
)
def test_nan_and_infinity_are_refused_by_tensor_and_index(
    name: str, bad: float, group: Group, index: int, told: str
) -> None:
    spoilt = groups()
    spoilt[group][index] = bad
    sections, data = tensors.pack(MANIFEST, spoilt, codec(name))
    payload = parse(MANIFEST, sections, data, codec(name), "model")
    with pytest.raises(RemoteError, match=told) as caught:
        finite(MANIFEST, payload)
    assert caught.value.code == "FL-W106"
    assert str(bad) in caught.value.message


def test_finite_values_pass_even_where_their_sum_overflows() -> None:
    large = {**groups(), "trainable": torch.full((11,), 3e38)}
    assert torch.isinf(large["trainable"].sum())
    sections, data = tensors.pack(MANIFEST, large, FP32)
    payload = parse(MANIFEST, sections, data, FP32, "model")
    assert refusal(payload) is None
    large["trainable"][3] = math.inf
    _, data = tensors.pack(MANIFEST, large, FP32)
    assert refusal(parse(MANIFEST, sections, data, FP32, "model")) == "FL-W106"


def refusal(payload: Payload) -> str | None:
    """The code with which a payload is refused."""
    try:
        finite(MANIFEST, payload)
    except RemoteError as error:
        return error.code
    return None


def test_nan_is_found_in_a_later_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "TILE", 4)
    spoilt = groups()
    spoilt["trainable"][9] = math.nan
    sections, data = tensors.pack(MANIFEST, spoilt, FP32)
    with pytest.raises(RemoteError, match=r"'fc.bias'\[3\] is nan"):
        finite(MANIFEST, parse(MANIFEST, sections, data, FP32, "model"))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("spec", ["int8", "int4", "sign", "ternary"])
def test_what_is_not_finite_is_found_in_the_scales_of_blocks(spec: str, scale: float) -> None:
    """3e38 is finite, and what 127 or 7 times as much of it means is not."""
    packs = codec(spec)
    manifest = Manifest((TensorSpec("w", (600,), "float32", "trainable"),))
    sections, view = tensors.pack(manifest, {"trainable": torch.ones(600)}, packs)
    finite(manifest, parse(manifest, sections, view, packs, "update"))
    view[:4] = struct.pack("<f", scale)  # of the first block
    payload = parse(manifest, sections, view, packs, "update")
    if bool(torch.isfinite(payload.read("trainable")).all()):
        assert scale == 3e38, "levels of 1 times a finite scale are finite"
        finite(manifest, payload)
        return
    with pytest.raises(RemoteError) as wrong:
        finite(manifest, payload)
    assert wrong.value.code == "FL-W106"
