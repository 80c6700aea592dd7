"""Partitions: disjoint, complete, the same everywhere, and shaped as their names say."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.client.data import Data, DataInfo, load_data
from atoll.client.partition import partition, shard_of
from atoll.client.partspec import KNOWN, parse
from atoll.protocols.errors import DataError

LABELS = np.arange(1200) % 10
SITES = [["a", "b", "c", "d", "e"][min(i // 200, 4)] for i in range(1200)]  # e has 400
SPECS = ["iid", "contiguous", "classes:3", "dirichlet:0.5", "quantity:0.5", "column:site"]


def refused(spec: str, labels: int = 1200, clients: int = 4) -> DataError:
    with pytest.raises(DataError) as caught:
        partition(spec, LABELS[:labels], clients, 0, SITES[:labels])
    assert caught.value.code == "FL-D104"
    assert caught.value.hint
    return caught.value


@given(st.sampled_from(SPECS), st.integers(4, 5), st.integers(0, 1000))
def test_every_example_goes_to_one_client_and_again_to_the_same(
    spec: str, clients: int, seed: int
) -> None:
    parts = partition(spec, LABELS, clients, seed, SITES)
    assert len(parts) == clients
    assert sorted(i for part in parts for i in part.tolist()) == list(range(1200))
    again = partition(spec, LABELS, clients, seed, SITES)
    assert [part.tolist() for part in parts] == [part.tolist() for part in again]


@pytest.mark.parametrize("spec", ["iid", "classes:3", "dirichlet:0.5", "quantity:0.5"])
def test_another_seed_gives_other_parts(spec: str) -> None:
    a, b = (partition(spec, LABELS, 4, seed) for seed in (0, 1))
    assert [part.tolist() for part in a] != [part.tolist() for part in b]


def test_iid_shares_are_equal_and_mixed() -> None:
    parts = partition("iid", LABELS, 7, 0)
    assert {len(part) for part in parts} == {171, 172}
    assert all(len(set(LABELS[part])) == 10 for part in parts)


def test_contiguous_shares_are_neighbours() -> None:
    parts = partition("contiguous", LABELS, 3, 5)
    assert [(part[0], part[-1]) for part in parts] == [(0, 399), (400, 799), (800, 1199)]


@given(st.integers(1, 10), st.integers(1, 12), st.integers(0, 99))
def test_each_client_holds_just_k_classes(k: int, clients: int, seed: int) -> None:
    if k * clients < 10:
        with pytest.raises(DataError):
            partition(f"classes:{k}", LABELS, clients, seed)
        return
    parts = partition(f"classes:{k}", LABELS, clients, seed)
    assert [len(set(LABELS[part].tolist())) for part in parts] == [k] * clients


def test_dirichlet_is_unequal_for_small_a_and_nearly_equal_for_large() -> None:
    def largest_share(a: float) -> float:
        """Mean over classes and seeds of the largest share of a class that one client holds."""
        found = []
        for seed in range(10):
            parts = partition(f"dirichlet:{a}", LABELS, 4, seed)
            counts = np.array([np.bincount(LABELS[part], minlength=10) for part in parts])
            assert counts.sum(1).min() >= 10
            found.append((counts.max(0) / counts.sum(0)).mean())
        return float(np.mean(found))

    assert largest_share(1000) < 0.28  # 1/4 each
    assert largest_share(0.1) > 0.75  # nearly all at one client


def test_dirichlet_shares_have_the_variance_of_the_distribution() -> None:
    """One share of Dir(a, n clients) has mean 1/n and variance (n-1) / (n^2 (n a + 1))."""
    a, n = 1.0, 4
    shares = [
        len(part) / 1200
        for seed in range(200)
        for part in partition(f"quantity:{a}", LABELS, n, seed)
    ]
    expected = (n - 1) / (n**2 * (n * a + 1))
    assert abs(np.mean(shares) - 1 / n) < 1e-9
    assert abs(np.var(shares) / expected - 1) < 0.15


def test_quantity_changes_sizes_and_not_mixtures() -> None:
    parts = partition("quantity:0.3", LABELS, 4, 3)
    sizes = sorted(len(part) for part in parts)
    assert sizes[0] >= 10
    assert sizes[-1] > 2 * sizes[0]
    largest = max(parts, key=len)
    assert np.bincount(LABELS[largest]).min() > 0.5 * len(largest) / 10


def test_whole_sites_go_to_clients_one_each_or_balanced() -> None:
    parts = partition("column:site", LABELS, 5, 0, SITES)
    assert sorted(len({SITES[i] for i in part}) for part in parts) == [1] * 5
    three = partition("column:site", LABELS, 3, 0, SITES)
    assert [sorted({SITES[i] for i in part}) for part in three] == [["e"], ["a", "c"], ["b", "d"]]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("random", "unknown partition"),
        ("iid:3", "unknown partition"),
        ("classes", "partition 'classes'"),
        ("classes:2.5", "partition 'classes:2.5'"),
        ("classes:11", "cannot share 10 classes"),
        ("classes:2", "cannot share 10 classes"),
        ("dirichlet:x", "partition 'dirichlet:x'"),
        ("dirichlet:-1", "partition 'dirichlet:-1'"),
        ("dirichlet:nan", "partition 'dirichlet:nan'"),
        ("dirichlet:inf", "partition 'dirichlet:inf'"),
    ],
)
def test_what_cannot_be_is_refused(spec: str, why: str) -> None:
    assert why in refused(spec).message


def test_every_partition_that_is_known_is_read() -> None:
    for spec in KNOWN.replace(":K", ":2").replace(":A", ":.5").split(", "):
        assert parse(spec).name == spec.partition(":")[0]


def test_too_few_examples_or_sites_are_refused() -> None:
    assert "3 examples for 4 clients" in refused("iid", labels=3).message
    assert "at least 10" in refused("dirichlet:1", labels=39).message
    assert "in each of 1000 draws" in refused("quantity:0.01", labels=40).message
    assert "5 values for 6 clients" in refused("column:site", clients=6).message
    assert "class" in refused("classes:10", labels=20).message
    with pytest.raises(DataError):
        partition("column:site", LABELS, 2, 0)


def test_text_is_split_into_neighbourhoods(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("to be or not to be " * 40)
    data = load_data(f"text:{tmp_path / 't'},context=8")
    assert np.diff(shard_of(data, "iid", (1, 3), seed=0)).tolist() == [1] * 27
    with pytest.raises(DataError) as caught:
        shard_of(data, "dirichlet:1", (0, 3), seed=0)
    assert caught.value.code == "FL-D104"


def test_a_shard_is_one_of_those_there_are() -> None:
    data = load_data("synthetic")
    assert isinstance(data, Data)
    assert data.info == DataInfo((20,), 10)
    union = np.concatenate([shard_of(data, "iid", (i, 3), seed=1) for i in range(3)])
    assert sorted(union.tolist()) == list(range(1600))
    for wrong in ((3, 3), (-1, 3)):
        with pytest.raises(DataError):
            shard_of(data, "iid", wrong, seed=1)
