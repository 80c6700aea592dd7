"""A codec of a user's own, asked: what it raises or gives amiss is told as its own.

Who packs reads one line about the codec (FL-S103). Who reads bytes that it cannot read refuses them
(RemoteError FL-W105), as it refuses damaged ones, and the others' work goes on.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from atoll.protocols.codecs import Codec, Decoder
from atoll.protocols.errors import RAISED, AtollError, RemoteError, UsageError
from atoll.protocols.slots import MEND, own_code


class Own:
    """Everything but what is guarded is the codec's, what it declares too."""

    def __init__(self, codec: Codec, spec: str) -> None:
        self._codec, self._spec = codec, spec
        self.name = codec.name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self._codec, name)
        if name == "fit":
            return lambda shapes: Own(self._pack(found, shapes), self._spec)
        if name == "contractive":
            return lambda: Own(self._pack(found), self._spec)
        if name == "encode_read":
            return lambda *given: self._pack(lambda: _placed(found(*given), given[-1]))
        if name == "encode_from":
            return functools.partial(self._encode_from, found)
        return functools.partial(self._pack, found) if name == "start" else found

    def size(self, count: int) -> int:
        found: int = self._pack(self._codec.size, count)
        return found

    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        packed = self._pack(self._codec.encode, values, out)
        count = values.numel()
        if not isinstance(packed, memoryview):
            raise self._broken(f"encode() gave a {type(packed).__name__}", "return a memoryview")
        made, most = packed.nbytes, self.size(count)
        if made > most or (made < most and not getattr(self, "variable", False)):
            what = f"encode() gave {made} bytes for {count} values, size({count}) is {most}"
            raise self._broken(what, "give as many as it says, or declare variable = True")
        return _placed(packed, out)

    def _encode_from(
        self, encode: Callable[..., Any], values: Tensor, state: Any, out: memoryview | None = None
    ) -> Any:
        def placed() -> Any:
            packed, after = encode(values, state, out)
            return _placed(packed, out), after

        return self._pack(placed)

    def decoder(self, payload: memoryview, count: int) -> Decoder:
        return _Reading(self._read(self._codec.decoder, payload, count), self._read)

    def _pack(self, act: Callable[..., Any], *given: Any) -> Any:
        with own_code("codec", self._spec, "used"):
            return act(*given)

    def _read(self, act: Callable[..., Any], *given: Any) -> Any:
        try:
            return act(*given)
        except AtollError:
            raise
        except RAISED as error:
            raise RemoteError(
                "FL-W105", f"codec {self._spec!r} cannot read what it was given: {error!r}",
                "mend the codec, or ask for another; `check_codec` tries it",
            ) from error  # fmt: skip

    def _broken(self, what: str, hint: str) -> UsageError:
        return UsageError("FL-S103", f"codec {self._spec!r}: {what}", f"{hint}; {MEND}")


def _placed(packed: memoryview, out: memoryview | None) -> memoryview:
    """In `out`, where it was to be written: what travels is what lies there."""
    if out is None or packed.obj is out.obj:
        return packed
    place = out[: packed.nbytes]
    place[:] = packed.cast("B")
    return place


class _Reading:
    """A decoder of it."""

    def __init__(self, decode: Any, read: Callable[..., Any]) -> None:
        self._decode, self._read = decode, read

    def __call__(self, lo: int, hi: int, out: Tensor) -> Tensor:
        found: Tensor = self._read(self._decode, lo, hi, out)
        return found

    def __getattr__(self, name: str) -> Any:
        return functools.partial(self._read, getattr(self._decode, name))
