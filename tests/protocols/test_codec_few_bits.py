"""Codecs of four, two and one bits: their worked numbers, against formulas."""

import itertools

import pytest
import torch
from torch import Tensor

from atoll.protocols.codecs import Codec, codec


def back(one: Codec, sent: Tensor) -> Tensor:
    count = sent.numel()
    return one.decoder(one.encode(sent), count)(0, count, torch.empty(count)).clone()


def values(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(3))


def test_int4_of_prowd() -> None:
    """prowd.md 8.2: codes 4 (half to even), -7, 2, 0 of 7."""
    sent = torch.tensor([0.5, -1.0, 0.26, 0.0])
    expected = torch.tensor([0.571429, -1.0, 0.285714, 0.0])
    assert torch.allclose(back(codec("int4"), sent), expected, atol=1e-6)


def test_int4_is_off_by_at_most_a_fourteenth() -> None:
    sent = values(1000)
    blocks = [sent[lo : lo + 64].abs() for lo in range(0, 1000, 64)]
    largest = torch.cat([block.max().expand(len(block)) for block in blocks])
    assert ((back(codec("int4"), sent) - sent).abs() <= largest / 14 * (1 + 1e-5)).all()


@pytest.mark.parametrize("spec", ["int4", "int8", "e3m0", "ternary", "sign"])
def test_what_came_back_comes_back(spec: str) -> None:
    """prowd.md 8.3, diloco.md 9.10: idempotent."""
    once = back(codec(spec), values(5000))
    assert torch.allclose(back(codec(spec), once), once, rtol=1e-5)


def test_e3m0_has_eight_magnitudes_with_midpoints_between() -> None:
    """diloco.md 9.10: 0, 1/64, ..., 1; thresholds 1/128, 3/128, 3/64, ..., 3/4."""
    levels = [0.0, *(2.0**-n for n in range(6, -1, -1))]
    sent = torch.tensor([1.0, *levels, *(-level for level in levels)])
    assert torch.equal(back(codec("e3m0"), sent), sent)
    for low, high in itertools.pairwise(levels):
        middle = (low + high) / 2
        assert middle in (1 / 128, *(3 / 2**n for n in range(2, 8)))
        below = torch.nextafter(torch.tensor(middle), torch.tensor(0.0))
        tried = torch.stack([torch.tensor(1.0), below, torch.tensor(middle), -below])
        assert back(codec("e3m0"), tried).tolist() == [1.0, low, high, -low]


def test_e3m0_is_4_01_bits_a_value() -> None:
    assert codec("e3m0").size(4096 * 100) * 8 / (4096 * 100) == pytest.approx(4.008, abs=0.001)


def test_ternary_of_prowd() -> None:
    """prowd.md 8.2: mean .44, threshold .308, 0.5 and 1 are kept as their mean .75."""
    sent = torch.tensor([0.5, -1.0, 0.26, 0.0])
    assert torch.allclose(back(codec("ternary"), sent), torch.tensor([0.75, -0.75, 0, 0]))


def test_two_bits_of_prowds_model_are_12704_bytes_and_scales() -> None:
    """prowd.md 8.7, whose two tensors have one scale each; here each block of 512 has one."""
    weights = 50_816
    assert codec("ternary").size(weights) - 4 * -(-weights // 512) == 12_704


def test_sign_is_plus_or_minus_the_mean_magnitude() -> None:
    sent = torch.tensor([1.0, -2.0, 0.0, 5.0])
    assert back(codec("sign"), sent).tolist() == [2.0, -2.0, 2.0, 2.0]
    assert back(codec("sign"), torch.zeros(3)).tolist() == [0, 0, 0]
    assert back(codec("sign"), torch.tensor([-3.0])).tolist() == [-3.0]  # not a mean with padding


def test_sign_is_one_bit_a_value() -> None:
    assert 4 * 4096 / codec("sign").size(4096) == pytest.approx(31.75, abs=0.01)


def test_the_mean_of_huge_values_is_finite() -> None:
    for spec in ("sign", "ternary", "topk:0.5,bits=2"):
        assert back(codec(spec), torch.full((4096,), 3e38)).isfinite().all()
