"""Random-k: every value as likely as any other, the same places where the draw is the same."""

import pytest
import torch
from torch import Tensor

from atoll.protocols.codec_randomk import RandomK, _mix, _mix_all
from atoll.protocols.codecs import codec
from atoll.protocols.errors import UsageError


def drawn(one: RandomK, count: int, draw: int) -> Tensor:
    return one.places(draw, 0, one.runs(count), count)


def test_one_of_each_run_is_drawn() -> None:
    places = drawn(RandomK(0.1), 1005, 7)
    assert torch.equal(places // 10, torch.arange(101))
    assert int(places[-1]) < 1005


def test_every_value_is_as_likely_as_any_other() -> None:
    one, counts = RandomK(0.1), torch.zeros(100)
    for draw in range(400):
        counts[drawn(one, 100, draw)] += 1
    assert counts.sum() == 4000
    assert (counts - 40).abs().max() < 5 * (40 * 0.9) ** 0.5


def test_it_is_unbiased() -> None:
    one, sent = RandomK(0.25, bits=32), torch.arange(1.0, 42.0)  # the last run has one value
    total, state = torch.zeros(41), {"draw": torch.tensor([0])}
    for _ in range(200):
        payload, state = one.encode_from(sent, state)
        total += one.decoder(payload, 41)(0, 41, torch.empty(41))
    assert (total / 200 / sent - 1).abs().max() < 5 * (3 / 200) ** 0.5


def test_every_update_draws_anew_and_the_same_one_alike() -> None:
    one = RandomK(0.1)
    sent = torch.randn(2, 200, generator=torch.Generator().manual_seed(1))
    first, again, second = (one.encode_from(v, {}) for v in (sent[0], sent[0].clone(), sent[1]))
    assert bytes(first[0]) == bytes(again[0])
    assert bytes(first[0][:8]) != bytes(second[0][:8])
    assert first[1] == {}


def test_a_draw_that_is_given_stands_in_the_section_and_goes_on() -> None:
    one, state = RandomK(0.1), {"draw": torch.tensor([258])}
    payload, state = one.encode_from(torch.ones(200), state)
    assert bytes(payload[:8]) == b"\2\1" + bytes(6)
    assert int(state["draw"]) == 259


def test_two_clients_with_one_draw_and_seed_send_the_same_places() -> None:
    assert torch.equal(drawn(RandomK(0.01), 5000, 3), drawn(RandomK(0.01), 5000, 3))
    assert not torch.equal(drawn(RandomK(0.01), 5000, 3), drawn(RandomK(0.01, seed=1), 5000, 3))
    assert not torch.equal(drawn(RandomK(0.01), 5000, 3), drawn(RandomK(0.01), 5000, 3 + (1 << 32)))


def test_with_feedback_a_value_stands_for_itself() -> None:
    one, sent = codec("randomk:0.1,bits=32+ef"), torch.ones(100)
    found = one.decoder(one.encode(sent), 100)(0, 100, torch.empty(100))
    assert sorted(set(found.tolist())) == [0.0, 1.0]
    assert found.sum() == 10


def test_a_value_that_was_not_drawn_and_is_not_finite_shows() -> None:
    sent = torch.ones(100)
    sent[1:] = torch.inf
    one = RandomK(0.01)
    assert not one.decoder(one.encode(sent), 100)(0, 100, torch.empty(100)).isfinite().all()


def test_the_hash_of_many_is_the_hash_of_each() -> None:
    numbers = [0, 1, 0xFFFFFFFF, 0x80000000, 12345]
    assert _mix_all(torch.tensor(numbers)).tolist() == [_mix(n) for n in numbers]


@pytest.mark.parametrize("seed", [-1, 1 << 32, True, 0.5])
def test_a_seed_has_32_bits(seed: int) -> None:
    with pytest.raises(UsageError, match="below 2\\^32"):
        RandomK(0.1, seed=seed)
