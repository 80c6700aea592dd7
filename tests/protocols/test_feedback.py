"""Error feedback: nothing is lost for good, and what was not used comes back."""

import pytest
import torch
from torch import Tensor

from atoll.protocols import feedback
from atoll.protocols.codec_topk import TopK
from atoll.protocols.codecs import Codec, codec
from atoll.protocols.codecspec import ErrorFeedback
from atoll.protocols.feedback import RESIDUAL, restore, send

PLAIN = ErrorFeedback()


def values(seed: int, count: int = 5000) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def read(one: Codec, payload: memoryview, count: int = 5000) -> Tensor:
    return one.decoder(payload, count)(0, count, torch.empty(count)).clone()


@pytest.mark.parametrize("spec", ["topk:0.01", "topk:0.02,bits=2", "int8", "bf16"])
def test_what_was_sent_and_what_is_kept_is_all_there_was(spec: str) -> None:
    """diloco.md 9.11: with decay 1 the sum of D(q) and the last residual is the sum of deltas."""
    one, state = codec(spec), dict[str, Tensor]()
    sent, learned = torch.zeros(5000, dtype=torch.float64), torch.zeros(5000, dtype=torch.float64)
    for round_ in range(20):
        learned += values(round_).double()
        packed = send(one, PLAIN, values(round_), state)
        sent += read(one, packed.payload).double()
        state = packed.state
    error = (sent + state[RESIDUAL].double() - learned).abs().max()
    assert error < 1e-4  # float32 residuals; the claim itself is exact:
    assert float(state[RESIDUAL].norm()) > 0


def test_the_residual_is_what_the_packing_lost_to_the_bit() -> None:
    one, delta = TopK(0.01), values(1)
    packed = send(one, PLAIN, delta.clone(), {})
    assert torch.equal(packed.state[RESIDUAL], delta - read(one, packed.payload))


def test_decay_forgets_a_part_of_it() -> None:
    one, rule = TopK(0.01, bits=32), ErrorFeedback(decay=0.5)
    state = {RESIDUAL: values(1)}
    expected = values(2) + 0.5 * values(1)
    packed = send(one, rule, values(2), state)
    assert torch.equal(packed.state[RESIDUAL] + read(one, packed.payload), expected)


def test_the_state_that_went_in_is_left_as_it_was() -> None:
    """A driver keeps both until it knows that the new one is on disk."""
    residual = values(1)
    send(TopK(0.01), PLAIN, values(2), {RESIDUAL: residual})
    assert torch.equal(residual, values(1))


def test_a_residual_grown_too_long_is_forgotten() -> None:
    one, rule = TopK(0.01), ErrorFeedback(reset=10)
    for size, gone in ((9.0, False), (11.0, True)):
        state = {RESIDUAL: size * values(1) / values(1).norm() * values(2).norm()}
        packed = send(one, rule, values(2), state)
        assert packed.forgotten is gone
        alone = send(one, PLAIN, values(2), {}).payload
        assert (bytes(packed.payload) == bytes(alone)) is gone


def test_without_a_reset_it_may_grow() -> None:
    state = {RESIDUAL: 1e6 * values(1)}
    assert not send(TopK(0.01), PLAIN, values(2), state).forgotten


def test_without_feedback_nothing_is_kept() -> None:
    packed = send(TopK(0.01), None, values(1), {RESIDUAL: values(2)})
    assert packed.state == {}
    assert bytes(packed.payload) == bytes(TopK(0.01).encode(values(1)))


def test_a_contribution_that_was_not_used_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "TILE", 1000)
    one, delta = TopK(0.01, bits=32), values(1)
    packed = send(one, PLAIN, delta.clone(), {})
    state = restore(one, packed.state, packed.payload)
    assert torch.equal(state[RESIDUAL], delta)


def test_nothing_comes_back_where_nothing_is_kept() -> None:
    assert restore(TopK(0.01), {}, memoryview(b"")) == {}


def test_a_delta_that_is_not_finite_shows_in_what_is_sent() -> None:
    delta = values(1)
    delta[77] = torch.nan
    assert not read(TopK(0.01), send(TopK(0.01), PLAIN, delta, {}).payload).isfinite().all()


class Counting:
    """A codec that remembers how often it packed."""

    name = "counting"

    def size(self, count: int) -> int:
        return 4 * count

    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        return codec("fp32").encode(values, out)

    def encode_from(
        self, values: Tensor, state: dict[str, Tensor], out: memoryview | None
    ) -> tuple[memoryview, dict[str, Tensor]]:
        count = state.get("times", torch.zeros(1)) + 1
        return self.encode(values * count, out), {"times": count}

    def decoder(self, payload: memoryview, count: int) -> object:
        return codec("fp32").decoder(payload, count)


def test_what_a_codec_remembers_is_kept_with_the_residual() -> None:
    state = dict[str, Tensor]()
    for times in (1, 2, 3):
        packed = send(Counting(), None, torch.ones(3), state)  # type: ignore[arg-type]
        assert read(codec("fp32"), packed.payload, 3).tolist() == [times] * 3
        state = packed.state
        assert list(state) == ["codec/times"]


def test_a_sender_packs_as_its_codec_does_and_remembers() -> None:
    one = codec("topk:0.01")
    sender = feedback.Sender(one, PLAIN, {})
    payload = sender.encode(values(1))
    assert (sender.name, sender.size(5000)) == ("topk:0.01", one.size(5000))
    assert bytes(payload) == bytes(one.encode(values(1)))
    assert torch.equal(sender.after[RESIDUAL], values(1) - read(one, payload))
    assert sender.trainable_only
    assert not sender.variable
