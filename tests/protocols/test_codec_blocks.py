"""Codecs by blocks: how far off a value may be, and that no cut of the work changes a bit."""

import math

import pytest
import torch
from torch import Tensor

from atoll.protocols import codec_blocks
from atoll.protocols.codecs import Codec, accumulate, codec

COUNTS = (0, 1, 7, 8, 63, 64, 65, 255, 256, 257, 1000, 9001)


def values(count: int, seed: int = 3) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def back(one: Codec, sent: Tensor) -> Tensor:
    count = sent.numel()
    payload = one.encode(sent)
    assert len(payload) == one.size(count)
    return one.decoder(payload, count)(0, count, torch.empty(count)).clone()


def largest(sent: Tensor, block: int) -> Tensor:
    """The largest magnitude of each value's block."""
    padded = torch.nn.functional.pad(sent, (0, -sent.numel() % block)).view(-1, block)
    return padded.abs().amax(1).repeat_interleave(block)[: sent.numel()]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("block", [8, 64, 256, 4096])
def test_int8_is_off_by_at_most_a_254th_of_its_block(count: int, block: int) -> None:
    sent = values(count)
    error = (back(codec(f"int8:block={block}"), sent) - sent).abs()
    assert (error <= largest(sent, block) / 254 * (1 + 1e-5)).all()


def test_int8_rounds_half_to_even() -> None:
    """prowd.md 8.2: codes 64, -127, 33, 0."""
    sent = torch.tensor([0.5, -1.0, 0.26, 0.0])
    expected = torch.tensor([64.0, -127.0, 33.0, 0.0]) / 127
    assert torch.allclose(back(codec("int8"), sent), expected, atol=1e-7)


def test_int8_is_one_byte_a_value_and_a_scale_a_block() -> None:
    assert codec("int8").size(25_600) == 25_600 + 4 * 100
    assert codec("int8").size(25_601) == codec("int8").size(25_600) + 4 + 8


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-34])
def test_a_block_too_small_for_a_scale_is_zeros(size: float) -> None:
    assert (back(codec("int8"), torch.full((10,), size)) == 0).all()


@pytest.mark.parametrize("size", [1e-32, 1.0, 3e38])
def test_tiny_and_huge_blocks_keep_their_digits(size: float) -> None:
    sent = values(600) / 4
    sent.mul_(size)
    error = (back(codec("int8"), sent) - sent).abs()
    assert (error <= largest(sent, 256) / 254 * (1 + 1e-5)).all()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 300, 599])
def test_what_is_not_finite_does_not_come_back_finite(wrong: float, at: int) -> None:
    sent = values(600)
    sent[at] = wrong
    assert not back(codec("int8"), sent)[at].isfinite()


@pytest.mark.parametrize("count", COUNTS)
def test_a_tile_is_that_part_of_the_whole_wherever_it_begins(count: int) -> None:
    one, rng = codec("int8:block=64"), torch.Generator().manual_seed(count)
    payload = one.encode(values(count))
    decode, whole = one.decoder(payload, count), back(one, values(count))
    for _ in range(20):
        lo, hi = torch.randint(0, count + 1, (2,), generator=rng).sort().values.tolist()
        tile = decode(lo, hi, torch.full((hi - lo,), math.nan))
        assert torch.equal(tile, whole[lo:hi])


@pytest.mark.parametrize("spec", ["int8", "int8:block=64", "topk:0.1", "bf16"])
@pytest.mark.parametrize("tile", [1000, 4096, 1 << 16])
def test_adding_to_a_sum_has_the_same_bits_whatever_the_tile(spec: str, tile: int) -> None:
    count, one = 70_001, codec(spec)
    decode = one.decoder(one.encode(values(count)), count)

    def add(size: int) -> Tensor:
        total = values(count, seed=4)
        for lo in range(0, count, size):
            hi = min(lo + size, count)
            accumulate(decode, lo, hi, total[lo:hi], 0.3, torch.empty(hi - lo))
        return total

    assert torch.equal(add(tile), add(count))
    expected = values(count, seed=4) + 0.3 * back(one, values(count))
    assert torch.allclose(add(tile), expected, atol=1e-6)


def test_the_bytes_do_not_depend_on_how_much_is_worked_on_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, sent = codec("int8"), values(70_001)
    before = bytes(one.encode(sent))
    monkeypatch.setattr(codec_blocks, "SPAN", 1 << 10)
    assert bytes(one.encode(sent)) == before


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_planes_come_back(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, 24), dtype=torch.uint8)
    packed = codec_blocks.to_planes(codes, bits)
    assert packed.shape == (5, 24 * bits // 8)
    out = torch.empty(5, 24)
    codec_blocks.from_planes(packed, bits, out)
    assert torch.equal(out, codes.float())
