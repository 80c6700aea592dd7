"""PowerSGD: exact where the rank is enough, better from step to step, and the same tile by tile."""

import pytest
import torch
from torch import Tensor

from atoll.protocols.codec_powersgd import PowerSGD
from atoll.protocols.codecs import codec, fitted
from atoll.protocols.errors import UsageError

SHAPES = [(30, 4, 5), (30,), (), (7, 2), (0, 3), (40, 25)]  # flat: 600, 30, 1, 14, 0, 1000
COUNT = 1645


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read(one: PowerSGD, payload: memoryview, count: int) -> Tensor:
    return one.decoder(payload, count)(0, count, torch.empty(count)).clone()


def test_a_matrix_of_the_rank_comes_back() -> None:
    one = PowerSGD(2, bits=32).fit([(30, 20)])
    sent = (randn(30, 2) @ randn(2, 20, seed=2)).reshape(-1)
    assert torch.allclose(read(one, one.encode(sent), 600), sent, atol=1e-4)
    assert one.size(600) == 4 * 2 * (30 + 20)


def test_vectors_and_small_matrices_are_sent_as_they_are() -> None:
    one, sent = PowerSGD(3, bits=32).fit(SHAPES), randn(COUNT)
    found = read(one, one.encode(sent), COUNT)
    assert torch.equal(found[600:645], sent[600:645])
    assert one.size(COUNT) == 4 * (3 * (30 + 20) + 30 + 1 + 14 + 3 * (40 + 25))


def test_what_is_remembered_brings_it_nearer_to_the_best() -> None:
    """Power iteration: the same matrix again and again ends in its best approximation."""
    one, sent = PowerSGD(2, bits=32).fit([(30, 20)]), randn(30, 20)
    u, s, v = torch.linalg.svd(sent)
    best = float((sent - u[:, :2] * s[:2] @ v[:2]).norm())
    state, lost = one.start(600), list[float]()
    for _ in range(60):
        payload, state = one.encode_from(sent.reshape(-1), state)
        lost.append(float((read(one, payload, 600) - sent.reshape(-1)).norm()))
    assert lost[0] > best * 1.02
    assert lost[-1] == pytest.approx(best, rel=1e-3)
    assert state["q"].shape == (20 * 2,)


def test_its_products_are_sums_in_one_order() -> None:
    one, sent = PowerSGD(3, bits=32).fit([(30, 20)]), randn(600)
    payload = one.encode(sent)
    numbers = torch.frombuffer(payload, dtype=torch.float32)
    p, q = numbers[:90].view(30, 3), numbers[90:].view(20, 3)
    expected = p[:, :1] * q[:, 0]
    for j in (1, 2):
        expected = expected + p[:, j : j + 1] * q[:, j]
    assert torch.equal(read(one, payload, 600), expected.reshape(-1))


def test_a_state_is_not_spoilt_by_a_delta_that_is_not_finite() -> None:
    one = PowerSGD(2).fit([(30, 20)])
    state = one.start(600)
    sent = randn(600)
    sent[3] = torch.inf
    payload, after = one.encode_from(sent, state)
    assert torch.equal(after["q"], state["q"])
    assert not read(one, payload, 600).isfinite().any()


def test_without_shapes_all_values_are_one_matrix() -> None:
    one = PowerSGD(1, bits=32)
    assert [(p.rows, p.rank, p.hi - p.lo) for p in one.parts(107)] == [(10, 1, 100), (0, 0, 7)]
    assert one.parts(0) == []


def test_shapes_of_other_tensors_are_not_taken() -> None:
    one = fitted(codec("powersgd:2"), [(30, 20)])
    assert one.size(600) == 2 * 2 * 50
    assert one.size(601) == PowerSGD(2).size(601)
    assert fitted(codec("int8"), [(30, 20)]).name == "int8"


@pytest.mark.parametrize("rank", [0, 257, 1.5, True])
def test_a_rank_is_a_small_number(rank: int) -> None:
    with pytest.raises(UsageError, match="rank"):
        PowerSGD(rank)
