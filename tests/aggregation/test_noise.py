"""Noise: normal, the same for the same key and elements, and nothing in common with other keys."""

import math

import pytest
import torch
from scipy import stats

from atoll.aggregation.noise import CHUNK, add_, derived, ids, normal, one

KEY = bytes(range(32))


def test_its_mean_std_and_tails_are_a_normal_distributions() -> None:
    """Five standard errors of n draws: 1/sqrt(n) of the mean, 1/sqrt(2n) of the deviation."""
    n = 8 * CHUNK
    values = normal(KEY, 0, n).double()
    assert abs(values.mean()) < 5 / math.sqrt(n)
    assert abs(values.std() - 1) < 5 / math.sqrt(2 * n)
    assert stats.kstest(values.numpy(), "norm").pvalue > 0.001
    assert 3.9 < values.abs().max() < 6
    pairs = values[: n // 2] @ values[n // 2 :] / (n // 2)
    assert abs(pairs) < 5 / math.sqrt(n // 2)


def test_the_two_halves_of_a_block_are_not_related() -> None:
    """Box and Muller make both out of the same radius: their squares must not go together."""
    values = normal(KEY, 0, CHUNK).double().square() - 1
    both = values[: CHUNK // 2] @ values[CHUNK // 2 :] / (CHUNK // 2)
    assert abs(both) < 5 * 2 / math.sqrt(CHUNK // 2)


@pytest.mark.parametrize(
    ("lo", "hi"), [(0, 1), (5, 5), (3, 70_000), (CHUNK, 2 * CHUNK), (CHUNK - 1, CHUNK + 1)]
)
def test_any_tile_has_the_bits_of_the_whole(lo: int, hi: int) -> None:
    assert torch.equal(normal(KEY, lo, hi), normal(KEY, 0, 5 * CHUNK)[lo:hi])


def test_other_keys_give_other_noise_and_labels_other_keys() -> None:
    keys = [
        derived(KEY, "v", 1),
        derived(KEY, "v", 2),
        derived(KEY, "v/1"),
        derived(bytes(32), "v", 1),
    ]
    assert keys[0] == keys[2] != keys[1]
    assert len(keys[0]) == 32
    values = [normal(key, 0, CHUNK).double() for key in (keys[0], keys[1], keys[3])]
    for i, a in enumerate(values):
        for b in values[:i]:
            assert abs(a @ b) / CHUNK < 5 / math.sqrt(CHUNK)


def test_what_is_summed_has_a_label_of_its_own() -> None:
    a, b = ("o1.0", 0.5), ("o2.0", 0.5)
    assert len({ids([a, b]), ids([b, a]), ids([a]), ids([("o1.0", 0.25), b]), ids([])}) == 5


def test_add_gives_the_same_whatever_the_tiles() -> None:
    whole = add_(torch.ones(40 * CHUNK), KEY, 0.5)
    assert torch.equal(whole, torch.ones(40 * CHUNK).add_(normal(KEY, 0, 40 * CHUNK), alpha=0.5))
    part = add_(torch.ones(17 * CHUNK), KEY, 0.5, lo=100)
    assert torch.equal(part, whole[100 : 100 + 17 * CHUNK])
    assert one(KEY) == float(normal(KEY, 0, 1))
