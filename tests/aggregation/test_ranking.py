"""Ranking: the network sorts, and cut down to some ranks it still gets those right."""

import itertools

import pytest
import torch

from atoll.aggregation.ranking import BLOCK, comparisons, ranked


@pytest.mark.parametrize("n", range(1, 10))
def test_every_input_of_zeros_and_ones_is_sorted(n: int) -> None:
    """A network that sorts those sorts everything (Knuth's 0-1 principle)."""
    inputs = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)))
    ((_, rows),) = ranked(list(inputs.T), range(n))
    assert torch.equal(torch.stack(rows).T, inputs.sort(dim=1).values)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 16, 33, 100])
def test_some_ranks_are_those_of_the_whole_sort(n: int) -> None:
    vectors = torch.randn(n, 50, generator=torch.Generator().manual_seed(n))
    expected = vectors.sort(dim=0).values
    for ranks in (range(n), range(n // 2, n // 2 + 1), range(n // 4, n - n // 4)):
        ((_, rows),) = ranked(list(vectors), ranks)
        assert torch.equal(torch.stack(rows), expected[ranks.start : ranks.stop])


def test_fewer_ranks_cost_fewer_comparisons() -> None:
    assert len(comparisons(10, range(10))) == 31
    assert len(comparisons(10, range(10))) > len(comparisons(10, range(5, 6)))
    assert comparisons(1, range(1)) == []


def test_long_vectors_are_sorted_block_by_block_and_not_written_to() -> None:
    vectors = torch.randn(3, 2 * BLOCK + 5, generator=torch.Generator().manual_seed(0))
    before, found, starts = vectors.clone(), torch.empty_like(vectors), []
    for lo, rows in ranked(list(vectors), range(3)):
        starts.append(lo)
        found[:, lo : lo + len(rows[0])] = torch.stack(rows)
    assert torch.equal(found, vectors.sort(dim=0).values)
    assert torch.equal(vectors, before)
    assert starts == [0, BLOCK, 2 * BLOCK]
