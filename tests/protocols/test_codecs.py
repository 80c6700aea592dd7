"""Codecs: every value comes back as near as its format allows, from any tile, or says NaN."""

import math

import pytest
import torch

from atoll.protocols import codecs
from atoll.protocols.codecs import Codec, Int64, as_bytes, as_tensor, codec
from atoll.protocols.errors import UsageError

NAMES = ("fp32", "fp16", "bf16")
SIGNIFICANT = {"fp32": 24, "fp16": 11, "bf16": 8}  # bits


def values(count: int = 1000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(3))


def read(one: Codec, payload: memoryview, count: int) -> torch.Tensor:
    return one.decoder(payload, count)(0, count, torch.empty(count)).clone()


@pytest.mark.parametrize("name", NAMES)
def test_values_come_back_within_half_a_unit_of_the_last_bit(name: str) -> None:
    one, sent = codec(name), values()
    payload = one.encode(sent)
    assert len(payload) == one.size(1000)
    error = (read(one, payload, 1000) - sent).abs()
    assert (error <= sent.abs() * 2.0 ** -SIGNIFICANT[name]).all()
    assert (error.max() == 0) == (name == "fp32")


@pytest.mark.parametrize("name", NAMES)
def test_a_tile_is_the_same_as_that_part_of_the_whole(name: str) -> None:
    one = codec(name)
    payload = memoryview(bytes(one.encode(values())))
    whole, scratch = read(one, payload, 1000), torch.empty(64)
    for lo, hi in ((0, 1), (17, 81), (936, 1000)):
        assert torch.equal(one.decoder(payload, 1000)(lo, hi, scratch), whole[lo:hi])


@pytest.mark.parametrize("name", NAMES)
def test_encoding_into_given_bytes_gives_the_same_bytes(name: str) -> None:
    one, out = codec(name), memoryview(bytearray(codec(name).size(1000)))
    assert bytes(one.encode(values(), out)) == bytes(one.encode(values())) == bytes(out)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_little_endian(name: str) -> None:
    bits = {"fp32": "0000803f", "fp16": "003c", "bf16": "803f"}  # 1.0
    assert bytes(codec(name).encode(torch.ones(1))).hex() == bits[name]


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("fp16", 65504.0, 65504.0),
        ("fp16", 70000.0, 65504.0),
        ("fp16", -1e30, -65504.0),
        ("bf16", 3.4e38, torch.finfo(torch.bfloat16).max),
        ("bf16", -3.4e38, torch.finfo(torch.bfloat16).min),
    ],
)
def test_a_value_beyond_the_range_becomes_the_largest_finite_one(
    name: str, value: float, kept: float
) -> None:
    sent = torch.tensor([1.0, value, 2.0])
    assert read(codec(name), codec(name).encode(sent), 3).tolist() == [1.0, kept, 2.0]


@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity_are_not_hidden(name: str) -> None:
    sent = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    back = read(codec(name), codec(name).encode(sent), 4)
    assert back[0].isnan()
    assert back[1:].tolist() == [math.inf, -math.inf, 1.0]


def test_overflow_is_found_in_every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "TILE", 8)
    sent = torch.ones(20)
    sent[17] = 1e9
    assert read(codec("fp16"), codec("fp16").encode(sent), 20)[17] == 65504.0


def test_a_finite_half_vector_whose_sum_is_not_is_finite() -> None:
    assert codecs.all_finite(torch.full((100,), 60000.0, dtype=torch.float16))
    assert codecs.all_finite(torch.full((4,), 3e38))
    assert not codecs.all_finite(torch.tensor([1.0, math.inf, -math.inf]))


def test_fp32_neither_copies_in_nor_out() -> None:
    sent = values(10)
    payload = codec("fp32").encode(sent)
    sent[3] = 42.0
    tile = codec("fp32").decoder(payload.toreadonly(), 10)(3, 4, torch.empty(1))
    sent[3] = 43.0
    assert tile.tolist() == [43.0]


def test_integers_beyond_float_precision_come_back() -> None:
    sent = torch.tensor([2**62 + 1, -7])
    for out in (None, memoryview(bytearray(16))):
        payload = Int64().encode(sent, out)
        tile = Int64().decoder(payload, 2)(0, 2, torch.empty(0, dtype=torch.int64))
        assert tile.tolist() == [2**62 + 1, -7]


def test_read_only_bytes_become_a_tensor_that_keeps_them_alive() -> None:
    tensor = as_tensor(memoryview(bytes(as_bytes(values(10)))), torch.float32)
    assert torch.equal(tensor, values(10))


def test_misaligned_integers_are_read_all_the_same() -> None:
    data = b"\0\0\0\0" + bytes(as_bytes(torch.tensor([5, 6])))
    assert as_tensor(memoryview(data)[4:], torch.int64).tolist() == [5, 6]


def test_an_empty_section_is_an_empty_tensor() -> None:
    for name in NAMES:
        assert len(codec(name).encode(torch.empty(0))) == 0
        assert read(codec(name), memoryview(b""), 0).numel() == 0


def test_an_unknown_codec_is_told_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="fp23") as caught:
        codec("fp23")
    assert caught.value.code == "FL-S101"
    assert "fp32" in caught.value.hint


def test_an_object_that_is_no_codec_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        codec("fractions:Fraction")
    assert caught.value.code == "FL-S102"
