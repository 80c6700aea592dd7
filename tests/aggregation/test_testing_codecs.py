"""check_codec: ours pass it, and each way to be wrong that it claims to find it finds."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from atoll.aggregation import check_codec
from atoll.protocols.codecs import Codec, Decoder, Fp32, codec

OURS = (
    "fp32", "fp16", "bf16", "int8", "int8:block=8", "int4", "e3m0", "ternary", "sign", "topk:0.01",
    "topk:0.3,bits=2", "topk:0.05,bits=32", "randomk:0.1", "randomk:0.01,bits=32", "powersgd:4",
    "powersgd:2,bits=32", "int8+zstd", "topk:0.015625,bits=2+zstd", "powersgd:4+zstd",
    "randomk:0.1+ef+zstd",
)  # fmt: skip


@pytest.mark.parametrize("spec", OURS)
def test_our_codecs_pass(spec: str) -> None:
    check_codec(lambda: codec(spec), cases=6)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("spec", OURS)
def test_our_codecs_pass_two_hundred_cases(spec: str) -> None:
    check_codec(lambda: codec(spec), cases=200)


class Plain(Fp32):
    """Right; the ones below are wrong in one thing each."""

    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        return super().encode(values.clone(), out)


class Short(Plain):
    def size(self, count: int) -> int:
        return 4 * count + 1


class Grows(Plain):
    def __init__(self) -> None:
        self.times = 0

    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        self.times += 1
        return super().encode(values * self.times, out)


class ForgetsOut(Plain):
    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        return out if out is not None else super().encode(values)


class Overflows(Plain):
    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        return super().encode(values.half().float(), out)


class Doubles(Plain):
    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        return super().encode(values * 3, out)


class Hides(Plain):
    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        return super().encode(values.nan_to_num(), out)


class Overwrites(Plain):
    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        return Fp32().encode(values.mul_(0.5), out)


class FromTheStart(Plain):
    """Reads every tile from element 0."""

    def decoder(self, payload: memoryview, count: int) -> Decoder:
        whole = super().decoder(payload, count)
        return lambda lo, hi, out: whole(0, hi - lo, out)


class Crashes(Plain):
    def decoder(self, payload: memoryview, count: int) -> Decoder:
        if count and payload[-1] == 255:
            raise IndexError("what a decoder meets when it trusts its bytes")
        return super().decoder(payload, count)


class AddsTwice(Plain):
    def decoder(self, payload: memoryview, count: int) -> Decoder:
        plain = super().decoder(payload, count)

        class Twice:
            def __call__(self, lo: int, hi: int, out: Tensor) -> Tensor:
                return plain(lo, hi, out)

            def accumulate(
                self, lo: int, hi: int, total: Tensor, weight: float, spare: Tensor
            ) -> None:
                total.add_(plain(lo, hi, spare), alpha=2 * weight)

        return Twice()


class Elsewhere(Plain):
    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        return super().encode(values)


class Wide(Plain):
    def decoder(self, payload: memoryview, count: int) -> Decoder:
        plain = super().decoder(payload, count)
        return lambda lo, hi, out: plain(lo, hi, out).double()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (Elsewhere, "does not write where it is told"),
        (Wide, r"it reads as torch\.float64"),
        (Short, "size says"),
        (Grows, "other bytes"),
        (ForgetsOut, "given ones"),
        (Overflows, "not come back finite"),
        (Doubles, "loses"),
        (Hides, "is hidden"),
        (Overwrites, "changes values"),
        (FromTheStart, "not that part of the whole"),
        (Crashes, "hostile bytes raise IndexError"),
        (AddsTwice, "adds otherwise"),
    ],
)
def test_a_codec_that_is_wrong_in_one_thing_is_found(wrong: Callable[[], Codec], says: str) -> None:
    check_codec(Plain, cases=30)
    with pytest.raises(AssertionError, match=says) as found:
        check_codec(wrong, cases=30)
    assert str(found.value).startswith("seed ")


class Learns(Plain):
    """Keeps a count beside its state: a client that starts again packs other bytes."""

    def start(self, count: int) -> dict[str, Tensor]:
        return {"times": torch.zeros(1)}

    def __init__(self) -> None:
        self.times = 0

    def encode_from(
        self, values: Tensor, state: dict[str, Tensor], out: memoryview | None = None
    ) -> tuple[memoryview, dict[str, Tensor]]:
        self.times += 1
        return self.encode(values * self.times, out), state


def test_a_codec_that_remembers_outside_of_its_state_is_found() -> None:
    with pytest.raises(AssertionError, match=r"loses|other bytes"):
        check_codec(Learns, cases=30)
