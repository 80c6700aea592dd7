"""zstd around a codec: its bytes pressed in frames, each read by itself and never beyond its size.

Collet and Kucherawy 2021, RFC 8878, https://www.rfc-editor.org/rfc/rfc8878. Only after a codec that
quantises: the last digits of floats are noise. A section is the lengths of its frames (uint32),
then the frames; a frame that would not shrink lies there as it is, so a section is never longer
than the codec's own by more than its lengths.

Reading fills a buffer of the size that must come out and asks for one byte more: a frame that holds
less, or more (a bomb), is refused, and a window above WINDOW is not even opened.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Protocol, Self, cast

import numpy as np
import zstandard
from torch import Tensor

from atoll.protocols.codec_sparse import corrupt
from atoll.protocols.codecs import Codec, Decoder, fitted
from atoll.protocols.errors import UsageError

FRAME = 1 << 16  # values a frame holds, where the codec can be cut
PIECE = 1 << 18  # bytes a frame holds, where it cannot
WINDOW = 1 << 19  # bytes a decompressor may keep


class Remembering(Codec, Protocol):
    """A codec that keeps something from one encoding to the next."""

    def start(self, count: int) -> dict[str, Tensor]: ...

    def encode_from(
        self, values: Tensor, state: Mapping[str, Tensor], out: memoryview | None = None
    ) -> tuple[memoryview, dict[str, Tensor]]: ...


def pressed(inner: Codec, level: int) -> Codec:
    """`inner`, its bytes pressed. Raises UsageError FL-S102 where it does not quantise."""
    if not getattr(inner, "quantised", False):
        raise UsageError(
            "FL-S102",
            f"codec {inner.name}+zstd: {inner.name} does not quantise",
            "write it without +zstd, or with fewer bits",
        )
    whole = hasattr(inner, "fit") or hasattr(inner, "start")
    return ZstdWhole(inner, level) if whole else ZstdFrames(inner, level)


class _Zstd:
    variable = True
    quantised = True

    def __init__(self, inner: Codec, level: int) -> None:
        self.inner, self.level = inner, level
        self.name = f"{inner.name}+zstd"
        self.trainable_only = bool(getattr(inner, "trainable_only", False))
        self.gives = frozenset(getattr(inner, "gives", ()))

    def contractive(self) -> Self:
        found = getattr(self.inner, "contractive", None)
        return self if found is None else type(self)(cast("Codec", found()), self.level)

    def _write(self, frames: Iterator[memoryview], count: int, out: memoryview) -> memoryview:
        """Lengths and frames into `out`; what of it is used."""
        press = zstandard.ZstdCompressor(level=self.level, write_content_size=False)
        lengths, at = [], 4 * count
        for frame in frames:
            data = press.compress(frame)
            kept = frame if len(data) >= len(frame) else memoryview(data)
            out[at : at + len(kept)] = kept
            lengths.append(len(kept))
            at += len(kept)
        assert len(lengths) == count, "as many frames as were announced"
        out[: 4 * count] = np.array(lengths, "<u4").tobytes()
        return out[:at]


class ZstdFrames(_Zstd):
    """Around a codec that can be cut: each FRAME values are packed and pressed by themselves."""

    def size(self, count: int) -> int:
        """At most so many bytes."""
        whole, last = divmod(count, FRAME)
        most = whole * self.inner.size(FRAME) + (self.inner.size(last) if last else 0)
        return 4 * _frames(count) + most

    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        count = values.numel()
        out = memoryview(bytearray(self.size(count))) if out is None else out
        cuts = (values[lo : lo + FRAME] for lo in range(0, count, FRAME))
        return self._write((self.inner.encode(cut) for cut in cuts), _frames(count), out)

    def decoder(self, payload: memoryview, count: int) -> Decoder:
        sizes = [min(FRAME, count - lo) for lo in range(0, count, FRAME)]
        frames = _parted(payload, len(sizes))

        def decode(lo: int, hi: int, out: Tensor) -> Tensor:
            for i in range(lo // FRAME, -(-hi // FRAME)):
                raw = _expand(frames[i], self.inner.size(sizes[i]))
                start, end = max(lo - i * FRAME, 0), min(hi - i * FRAME, sizes[i])
                into = out[i * FRAME + start - lo : i * FRAME + end - lo]
                tile = self.inner.decoder(raw, sizes[i])(start, end, into)
                if tile.data_ptr() != into.data_ptr():
                    into.copy_(tile)
            return out[: hi - lo]

        return decode


class ZstdWhole(_Zstd):
    """Around a codec that needs its section whole: its bytes are pressed, and read all for a tile.

    Such sections are short (a low rank, a few of the values), and none is kept expanded: a merge
    holds one at a time in each of its threads.
    """

    def size(self, count: int) -> int:
        """At most so many bytes."""
        inner = self.inner.size(count)
        return 4 * -(-inner // PIECE) + inner

    def fit(self, shapes: list[tuple[int, ...]]) -> "ZstdWhole":
        return ZstdWhole(fitted(self.inner, shapes), self.level)

    def start(self, count: int) -> dict[str, Tensor]:
        return cast("Remembering", self.inner).start(count)

    def encode(self, values: Tensor, out: memoryview | None = None) -> memoryview:
        return self.encode_from(values, self.start(values.numel()), out)[0]

    def encode_from(
        self, values: Tensor, state: Mapping[str, Tensor], out: memoryview | None = None
    ) -> tuple[memoryview, dict[str, Tensor]]:
        out = memoryview(bytearray(self.size(values.numel()))) if out is None else out
        raw, after = cast("Remembering", self.inner).encode_from(values, state)
        pieces = (raw[at : at + PIECE] for at in range(0, len(raw), PIECE))
        return self._write(pieces, -(-len(raw) // PIECE), out), after

    def decoder(self, payload: memoryview, count: int) -> Decoder:
        size = self.inner.size(count)
        frames = _parted(payload, -(-size // PIECE))

        def decode(lo: int, hi: int, out: Tensor) -> Tensor:
            raw = bytearray(size)
            for i, frame in enumerate(frames):
                end = min((i + 1) * PIECE, size)
                raw[i * PIECE : end] = _expand(frame, end - i * PIECE)
            tile = self.inner.decoder(memoryview(raw), count)(lo, hi, out)
            return tile if tile.data_ptr() == out.data_ptr() else out[: hi - lo].copy_(tile)

        return decode


def _frames(count: int) -> int:
    return -(-count // FRAME)


def _parted(payload: memoryview, count: int) -> list[memoryview]:
    """The frames of a section. RemoteError FL-W105 where the lengths do not add up."""
    head = payload[: 4 * count]
    lengths: list[int] = np.frombuffer(head, "<u4").tolist() if len(head) == 4 * count else []
    if len(lengths) != count or 4 * count + sum(lengths) != len(payload):
        raise corrupt("the lengths of the frames do not add up to the section")
    ends = itertools.accumulate(lengths, initial=4 * count)
    return [payload[at : at + length] for at, length in zip(ends, lengths, strict=False)]


def _expand(frame: memoryview, size: int) -> memoryview:
    """Exactly `size` bytes out of a frame."""
    if len(frame) == size:
        return frame
    out, at = memoryview(bytearray(size)), 0
    try:
        press = zstandard.ZstdDecompressor(max_window_size=WINDOW)
        with press.stream_reader(frame) as reader:
            while at < size and (got := reader.readinto(out[at:])):
                at += got
            if at < size or reader.read(1):
                raise corrupt(f"a zstd frame does not hold {size} bytes")
    except zstandard.ZstdError as error:
        raise corrupt(f"a zstd frame cannot be read: {error}") from error
    return out
