"""A codec of one's own: its mistakes are told as its own, and what it cannot read is refused."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from atoll.protocols.codec_own import Own
from atoll.protocols.codecs import Bf16, Codec, codec, fits, fitted
from atoll.protocols.errors import RemoteError, UsageError
from tests.conftest import Package

VALUES = torch.arange(6.0)


class Mine(Bf16):
    """bf16, but for what a test makes wrong."""

    wrong: Any = None

    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        return self.wrong() if callable(self.wrong) else super().encode(values, out)


def mine(wrong: Any) -> Own:
    made = Mine()
    made.wrong = wrong
    return Own(made, "mine:Mine")


def fail() -> None:
    raise KeyError("oops")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (fail, "fails when it is used: KeyError: 'oops'"),  # was told as a bug of ours
        (lambda: sys.exit(2), "fails when it is used: it calls sys.exit(2)"),
        (lambda: None, ": encode() gave a NoneType"),
        (lambda: memoryview(b"abc"), ": encode() gave 3 bytes for 6 values, size(6) is 12"),
    ],
)
def test_what_encode_does_amiss_is_told(wrong: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        mine(wrong).encode(VALUES)
    assert caught.value.code == "FL-S103"
    assert said in caught.value.message
    assert caught.value.hint


class Elsewhere(Bf16):
    """Packs well, but not into the bytes that it is given."""

    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        return super().encode(values)

    def encode_from(self, values: Tensor, state: Any, out: memoryview | None) -> Any:
        return super().encode(values), {"seen": torch.ones(1)}

    def encode_read(self, read: Any, count: int, out: memoryview) -> memoryview:
        return super().encode(read(0, count, torch.empty(count)))


def test_what_travels_is_what_it_gave_also_where_it_was_to_write_elsewhere() -> None:
    """Such a codec's updates were all zeros, and merged without a word."""
    right = bytes(Bf16().encode(VALUES))
    own = Own(Elsewhere(), "mine:Elsewhere")
    packs = (
        lambda out: own.encode(VALUES, out),
        lambda out: own.encode_from(VALUES, {}, out)[0],
        lambda out: own.encode_read(lambda lo, hi, _: VALUES[lo:hi], len(VALUES), out),
    )
    for pack in packs:
        out = memoryview(bytearray(12))
        assert bytes(pack(out)) == bytes(out) == right
    assert bytes(own.encode_from(VALUES, {})[0]) == right


def test_fewer_bytes_are_right_where_it_says_that_they_vary() -> None:
    made = mine(lambda: memoryview(b"abc"))
    made._codec.variable = True  # type: ignore[attr-defined]
    assert made.encode(VALUES).tobytes() == b"abc"
    assert fits(made, 6, 3)


def test_bytes_that_it_cannot_read_are_refused() -> None:
    class Blind(Mine):
        def decoder(self, payload: memoryview, count: int) -> Any:
            def tile(lo: int, hi: int, out: Tensor) -> Tensor:
                raise IndexError(lo)

            return [][0] if payload[0] else tile

    for first in (0, 1):
        with pytest.raises(RemoteError, match="FL-W105: codec 'm:Blind' cannot read") as caught:
            Own(Blind(), "m:Blind").decoder(memoryview(bytes([first])), 1)(3, 4, VALUES)
        assert caught.value.fatal


def test_all_else_is_the_codecs_own(package: Package) -> None:
    code = "from tests.protocols.test_codec_own import Mine\nclass Fit(Mine):\n"
    code += "    name, quantised = 'fit', True\n    def fit(self, shapes):\n        return Fit()\n"
    package("theirs_atoll", code)
    made = codec("theirs_atoll:Fit")
    assert isinstance(made, Own)
    assert (made.name, made.size(6), getattr(made, "quantised", False)) == ("fit", 12, True)
    again: Codec = fitted(made, [(6,)])
    assert isinstance(again, Own)
    packed = again.encode(VALUES)
    assert torch.equal(again.decoder(packed, 6)(0, 6, torch.empty(6)), VALUES)
    assert not hasattr(made, "trainable_only")
    assert not hasattr(made, "_codecs")
