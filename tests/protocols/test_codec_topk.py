"""Top-k: the largest of every chunk come back, ties are decided alike, lies are found."""

import math

import pytest
import torch
from torch import Tensor

from atoll.protocols import bits12
from atoll.protocols.codec_topk import CHUNK, TopK, four_bins, largest
from atoll.protocols.errors import RemoteError, UsageError
from atoll.protocols.halving import row_sums

COUNTS = (0, 1, 2, 99, 4095, 4096, 4097, 9001)


def values(count: int, seed: int = 3) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def back(one: TopK, sent: Tensor) -> Tensor:
    payload = one.encode(sent)
    assert len(payload) == one.size(sent.numel())
    return one.decoder(payload, sent.numel())(0, sent.numel(), torch.empty(sent.numel())).clone()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.25, 1.0])
def test_the_largest_of_each_chunk_come_back_and_nothing_else(count: int, fraction: float) -> None:
    sent, one = values(count), TopK(fraction, bits=32)
    expected = torch.zeros(count)
    for lo in range(0, count, CHUNK):
        chunk = sent[lo : lo + CHUNK]
        sizes = chunk.abs().tolist()
        best = sorted(range(len(chunk)), key=lambda i: -sizes[i])
        for i in best[: max(1, round(len(chunk) * fraction))]:
            expected[lo + i] = chunk[i]
    assert torch.equal(back(one, sent), expected)


def test_sixteen_bits_keep_eight_significant_ones() -> None:
    sent = values(5000)
    exact, near = back(TopK(0.1, bits=32), sent), back(TopK(0.1), sent)
    assert torch.equal(near, exact.bfloat16().float())


def test_sparse_locos_chunk_is_112_bytes_and_146_times_smaller() -> None:
    """diloco.md 9.10: 64 of 4096, 12 bits a place and 2 a value: 896 bits, 0.21875 a parameter."""
    one, chunks = TopK(64 / 4096, bits=2), 16 * 1000
    tables = 16 * 1000  # bytes: four means for 16 chunks
    assert one.size(chunks * CHUNK) - tables == 112 * chunks
    assert (one.size(chunks * CHUNK) - tables) * 8 / (chunks * CHUNK) == 0.21875
    assert round(32 / 0.21875, 1) == 146.3
    assert 4 * chunks * CHUNK / one.size(chunks * CHUNK) > 144.9


def test_one_per_cent_with_sixteen_bits_is_113_times_smaller() -> None:
    assert 4 * CHUNK / TopK(0.01).size(CHUNK) == pytest.approx(113.8, abs=0.1)


def test_two_bits_give_the_mean_of_the_bin() -> None:
    kept = values(640).view(10, 64)
    means, codes = four_bins(kept)
    centred = kept.double() - kept.double().mean()
    width = 6 * centred.pow(2).mean().sqrt() / 4
    expected = (centred / width + 2).round().clamp(0, 3)
    assert torch.equal(codes[:, :64].double(), expected)
    for code in range(4):
        own = kept.double()[expected == code]
        assert float(means[code]) == pytest.approx(float(own.mean()), rel=1e-5)


def test_two_bits_of_equal_values_are_exact() -> None:
    assert set(back(TopK(0.01, bits=2), torch.full((9000,), 3.0)).tolist()) == {0.0, 3.0}


@pytest.mark.parametrize("spec", [TopK(0.01), TopK(0.33, bits=2), TopK(0.1, bits=32)])
def test_a_tile_is_that_part_of_the_whole_wherever_it_begins(spec: TopK) -> None:
    count, rng = 140_001, torch.Generator().manual_seed(1)
    decode, whole = spec.decoder(spec.encode(values(count)), count), back(spec, values(count))
    for _ in range(12):
        lo, hi = torch.randint(0, count + 1, (2,), generator=rng).sort().values.tolist()
        assert torch.equal(decode(lo, hi, torch.full((hi - lo,), math.nan)), whole[lo:hi])


def test_of_equal_magnitudes_the_first_are_kept() -> None:
    rows = torch.tensor([[1.0, -2, 2, 2, -2, 0], [0, 0, 0, 0, 0, 0], [3, 1, 2, 0, 0, 0]])
    assert largest(rows, 3).tolist() == [[1, 2, 3], [0, 1, 2], [0, 1, 2]]
    assert largest(rows[:1], 5).tolist() == [[0, 1, 2, 3, 4]]


def test_what_is_not_finite_is_always_kept() -> None:
    rows = torch.ones(3, 8)
    rows[0, 5], rows[1, 6], rows[2, 7] = math.nan, math.inf, -math.inf
    assert largest(rows, 1).tolist() == [[5], [6], [7]]
    rows[0] = math.nan
    assert largest(rows, 2)[0].tolist() == [0, 1]
    for bits in (2, 16, 32):
        sent = values(9000)
        sent[8999] = math.nan
        assert not back(TopK(0.01, bits), sent).isfinite().all()


def test_four_thousand_and_ninety_six_places_fit_into_twelve_bits() -> None:
    for count in (1, 2, 3, 40, 41):
        places = torch.randint(0, 4096, (7, count), generator=torch.Generator().manual_seed(2))
        packed = bits12.pack(places)
        assert packed.shape == (7, bits12.size(count))
        assert torch.equal(bits12.unpack(packed, count), places)
    assert bits12.pack(torch.tensor([[0xABC, 0x123]])).tolist() == [[0xBC, 0x3A, 0x12]]


def test_row_sums_are_sums() -> None:
    for width in (1, 2, 3, 7, 64, 100):
        rows = values(5 * width).view(5, width)
        kept = rows.clone()
        assert torch.allclose(row_sums(rows), rows.sum(1), atol=1e-5)
        assert torch.equal(rows, kept)


@pytest.mark.parametrize("places", [[5, 5], [6, 5], [0, 99], [99, 4095]])
def test_places_that_no_encoder_wrote_are_found(places: list[int]) -> None:
    """Twice the same place would count once or twice, as the library likes."""
    one = TopK(0.02)
    payload = one.encode(torch.arange(99.0))
    assert one.kept(99) == 2
    payload[4:7] = bytes(bits12.pack(torch.tensor([places]))[0].tolist())
    with pytest.raises(RemoteError, match="not ascending") as caught:
        one.decoder(payload, 99)(0, 99, torch.empty(99))
    assert caught.value.code == "FL-W105"


def test_a_part_to_keep_is_a_part() -> None:
    for fraction in (0, -1, 1.01, math.nan):
        with pytest.raises(UsageError):
            TopK(fraction)


@pytest.mark.parametrize("digits", [0, 1, 6])
@pytest.mark.parametrize(("width", "kept"), [(4096, 41), (512, 5), (64, 4), (64, 5), (100, 3)])
def test_the_largest_are_the_first_of_a_stable_sort_however_they_are_looked_for(
    width: int, kept: int, digits: int
) -> None:
    """With few digits many are equal: within a heap, and beyond those that are looked through."""
    random = torch.Generator().manual_seed(width + digits)
    rows = (torch.randn(200, width, generator=random) * 10**digits).round() / 10**digits
    rows[0] = 0
    in_order = rows.abs().argsort(dim=1, descending=True, stable=True)[:, :kept]
    assert torch.equal(largest(rows, kept), in_order.sort(dim=1).values)
