"""zstd: shorter where there is something to press, and nothing comes out that was not announced."""

import numpy as np
import pytest
import torch
import zstandard
from torch import Tensor

from atoll.protocols import tensors
from atoll.protocols.blobs import Section
from atoll.protocols.codec_int8 import Int8
from atoll.protocols.codec_randomk import RandomK
from atoll.protocols.codec_zstd import WINDOW, pressed
from atoll.protocols.codecs import Codec, Decoder, codec
from atoll.protocols.errors import RemoteError, UsageError
from atoll.protocols.manifest import Manifest, TensorSpec
from atoll.protocols.payload import check, parse

COUNT = 150_001


def sparse(count: int = COUNT) -> Tensor:
    made = torch.randn(count, generator=torch.Generator().manual_seed(1))
    made[torch.arange(count) % 7 > 0] = 0
    return made


def read(one: Codec, payload: memoryview, count: int = COUNT) -> Tensor:
    return one.decoder(payload, count)(0, count, torch.empty(count)).clone()


@pytest.mark.parametrize("spec", ["int8", "e3m0", "topk:0.01", "powersgd:2"])
def test_it_reads_as_the_codec_does_and_is_shorter(spec: str) -> None:
    plain, pressed = codec(spec), codec(f"{spec}+zstd")
    payload = pressed.encode(sparse())
    assert pressed.name == f"{plain.name}+zstd"
    assert len(payload) < plain.size(COUNT) < pressed.size(COUNT)
    assert read(pressed, payload).norm() == pytest.approx(
        float(read(plain, plain.encode(sparse())).norm()), rel=1e-3
    )


def test_pieces_are_cut_where_blocks_end() -> None:
    plain, pressed = codec("int8"), codec("int8+zstd")
    assert torch.equal(read(pressed, pressed.encode(sparse())), read(plain, plain.encode(sparse())))


def test_what_would_not_shrink_lies_there_as_it_is() -> None:
    noise = torch.randn(70_000, generator=torch.Generator().manual_seed(1))
    one = codec("sign+zstd")
    payload = one.encode(noise)
    assert (
        len(payload)
        <= one.size(70_000)
        == codec("sign").size(65_536) + codec("sign").size(70_000 - 65_536) + 4 * 2
    )
    assert torch.equal(read(one, payload, 70_000).sign(), torch.where(noise >= 0, 1.0, -1.0))


@pytest.mark.parametrize("spec", ["topk:0.1,bits=32+zstd", "powersgd:2,bits=32+zstd"])
def test_floats_are_not_pressed(spec: str) -> None:
    with pytest.raises(UsageError, match="does not quantise"):
        codec(spec)


class Reads(Int8):
    """Reads into memory of its own."""

    def decoder(self, payload: memoryview, count: int) -> Decoder:  # type: ignore[override]
        plain = super().decoder(payload, count)
        return lambda lo, hi, out: plain(lo, hi, torch.empty_like(out))


def test_a_codec_may_read_into_memory_of_its_own() -> None:
    one = pressed(Reads(), 3)
    assert torch.equal(
        read(one, one.encode(sparse())), read(codec("int8"), codec("int8").encode(sparse()))
    )


def test_what_is_around_it_goes_through() -> None:
    one = pressed(RandomK(0.1), 3)
    assert one.gives == {"lossy", "sparse"}  # type: ignore[attr-defined]
    near = one.contractive()  # type: ignore[attr-defined]
    assert set(read(near, near.encode(torch.ones(COUNT))).tolist()) == {0.0, 1.0}


def section(*frames: bytes) -> memoryview:
    lengths = np.array([len(f) for f in frames], "<u4").tobytes()
    return memoryview(lengths + b"".join(frames))


def press(data: bytes, **more: object) -> bytes:
    return zstandard.ZstdCompressor(**more).compress(data)  # type: ignore[arg-type]


SIZE = codec("int8").size(1000)
HOSTILE = {
    "a bomb": section(press(bytes(1 << 28))),
    "a bomb that lies about its size": section(
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 28))
    ),
    "one byte more": section(press(bytes(SIZE + 1))),
    "one byte less": section(press(bytes(SIZE - 1))),
    "a cut frame": section(press(bytes(range(256)) * 4)[:-5]),
    "no frame": section(b"not zstd at all"),
    "an empty frame": section(b""),
    "a window of 2 GiB": section(bytes.fromhex("28b52ffd00a8") + bytes(20)),
    "lengths that do not add up": memoryview(np.array([99], "<u4").tobytes() + bytes(10)),
    "not even lengths": memoryview(b"\1\2"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_frames_are_one_error(what: str) -> None:
    with pytest.raises(RemoteError) as caught:
        read(codec("int8+zstd"), HOSTILE[what], 1000)
    assert caught.value.code == "FL-W105"


def test_a_window_above_the_limit_is_not_opened() -> None:
    params = zstandard.ZstdCompressionParameters(window_log=20, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=params).compressobj()
    frame = stream.compress(bytes(SIZE)) + stream.flush()
    assert zstandard.get_frame_parameters(frame).window_size > WINDOW
    with pytest.raises(RemoteError, match="memory"):
        read(codec("int8+zstd"), section(frame), 1000)


def test_a_section_may_be_shorter_than_its_codec_says_and_never_longer() -> None:
    manifest = Manifest((TensorSpec("w", (COUNT,), "float32", "trainable"),))
    one = codec("int8+zstd")
    sections, view = tensors.pack(manifest, {"trainable": sparse()}, one)
    assert sections[0].length == len(view) < one.size(COUNT)
    payload = parse(manifest, sections, view, one, "update")
    assert torch.equal(payload.read("trainable"), read(one, view))
    longer = Section("trainable", one.name, COUNT, one.size(COUNT) + 1)
    with pytest.raises(RemoteError, match="expected") as caught:
        check(manifest, [longer], longer.length, one, "update")
    assert caught.value.code == "FL-W104"
