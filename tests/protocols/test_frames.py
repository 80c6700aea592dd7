"""Frames are protobuf's own bytes, both ways; garbage is refused and nothing else happens."""

import contextlib
import hashlib
import platform
import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.protocols import channel, frames, wire_pb2
from atoll.protocols.blobs import CHUNK
from atoll.protocols.errors import RemoteError

NAMES = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._\-/:+=]{0,127}\Z")
OFFSETS = st.one_of(st.integers(0, 300), st.integers(0, frames.MAX_OFFSET))
CRCS = st.integers(0, 2**32 - 1)
SHAS = st.one_of(st.just(b""), st.binary(min_size=32, max_size=32))
DATA = st.one_of(st.binary(max_size=300), st.integers(0, CHUNK).map(lambda n: b"\x7a" * n))


def split(data: bytes, offset: int = 0) -> list[bytes]:
    return list(frames.chunks(memoryview(data), "b", offset))


def refused(message: bytes) -> str:
    with pytest.raises(RemoteError) as caught:
        frames.parse(message)
    return caught.value.code


@given(st.one_of(st.just(""), NAMES), OFFSETS, CRCS, st.booleans(), SHAS, DATA)
def test_a_frame_is_what_protobuf_writes_and_is_read_back(
    blob: str, offset: int, crc: int, last: bool, sha: bytes, data: bytes
) -> None:
    frame = frames.frame(blob, offset, data, crc, last, sha)
    theirs = wire_pb2.Chunk(blob=blob, offset=offset, crc32=crc, last=last, sha256=sha, data=data)
    assert frame == theirs.SerializeToString()
    chunk = frames.parse(frame)
    assert (chunk.blob, chunk.offset, chunk.crc32) == (blob, offset, crc)
    assert (chunk.last, chunk.sha256, bytes(chunk.data)) == (last, sha, data)


@given(NAMES, OFFSETS, CRCS, st.booleans(), SHAS, st.binary(max_size=50), st.randoms())
def test_any_other_order_of_fields_is_read_as_protobuf_reads_it(
    blob: str, offset: int, crc: int, last: bool, sha: bytes, data: bytes, rng: random.Random
) -> None:
    fields = [
        wire_pb2.Chunk(blob=blob),
        wire_pb2.Chunk(offset=offset),
        wire_pb2.Chunk(crc32=crc),
        wire_pb2.Chunk(last=last),
        wire_pb2.Chunk(sha256=sha),
        wire_pb2.Chunk(data=data),
        wire_pb2.Chunk(data=data[::-1]),  # twice: the later wins
    ]
    rng.shuffle(fields)
    message = b"".join(f.SerializeToString() for f in fields) + b"\xa2\x06\x01x"  # field 100
    chunk, theirs = frames.parse(message), wire_pb2.Chunk.FromString(message)
    assert (chunk.blob, chunk.offset, chunk.crc32) == (theirs.blob, theirs.offset, theirs.crc32)
    assert (chunk.last, chunk.sha256, bytes(chunk.data)) == (
        theirs.last,
        theirs.sha256,
        theirs.data,
    )


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_read_as_protobuf_reads_it(message: bytes) -> None:
    with contextlib.suppress(RemoteError):
        frames.parse(message)
        assert_read_as_protobuf(message)


def assert_read_as_protobuf(message: bytes) -> None:
    chunk = frames.parse(message)
    theirs = wire_pb2.Chunk.FromString(message)
    assert (chunk.blob, chunk.offset, chunk.crc32) == (theirs.blob, theirs.offset, theirs.crc32)
    assert (chunk.last, chunk.sha256, bytes(chunk.data)) == (
        theirs.last,
        theirs.sha256,
        theirs.data,
    )


@given(st.binary(max_size=40), st.integers(0, 2**31), st.integers(0, 255), st.booleans())
def test_a_damaged_frame_raises_nothing_but_a_refusal(
    data: bytes, at: int, byte: int, cut: bool
) -> None:
    frame = bytearray(frames.frame("m1", CHUNK, data, zlib.crc32(data), True, bytes(32)))
    if cut:
        del frame[at % len(frame) :]
    else:
        frame[at % len(frame)] = byte
    with contextlib.suppress(RemoteError):
        frames.parse(bytes(frame)).verify()


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_the_chunks_of_a_blob_put_together_are_the_blob(size: int) -> None:
    data = random.Random(size).randbytes(size)
    parsed = [frames.parse(frame) for frame in split(data)]
    for chunk in parsed:
        chunk.verify()
    assert b"".join(chunk.data for chunk in parsed) == data
    assert [chunk.offset for chunk in parsed] == list(range(0, max(size, 1), CHUNK))
    assert [chunk.last for chunk in parsed] == [False] * (len(parsed) - 1) + [True]
    assert parsed[-1].sha256 == hashlib.sha256(data).digest()
    assert [chunk.blob for chunk in parsed] == ["b"] + [""] * (len(parsed) - 1)


def test_known_checksums_are_used_and_give_the_same_frames() -> None:
    view = memoryview(random.Random(0).randbytes(2 * CHUNK + 5))
    crcs, digest = frames.checksums(view), hashlib.sha256(view).digest()
    assert crcs == [zlib.crc32(view[at : at + CHUNK]) for at in (0, CHUNK, 2 * CHUNK)]
    assert list(frames.chunks(view, "b", crcs=crcs, digest=digest)) == split(bytes(view))
    lie = list(frames.chunks(view, "b", crcs=[1, 2, 3], digest=bytes(32)))
    assert [frames.parse(f).crc32 for f in lie] == [1, 2, 3]
    assert frames.parse(lie[-1]).sha256 == bytes(32)


@pytest.mark.parametrize("offset", [CHUNK, 2 * CHUNK, 2 * CHUNK + 5])
def test_a_resumed_stream_begins_at_its_offset_and_ends_with_the_digest_of_all(offset: int) -> None:
    data = random.Random(1).randbytes(2 * CHUNK + 5)
    parsed = [frames.parse(frame) for frame in split(data, offset)]
    assert parsed[0].offset == offset
    assert b"".join(chunk.data for chunk in parsed) == data[offset:]
    assert parsed[-1].sha256 == hashlib.sha256(data).digest()


def test_resuming_amid_a_chunk_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="resume at 7"):
        split(bytes(CHUNK), 7)


def test_a_running_digest_takes_each_byte_once_whatever_is_asked_again() -> None:
    data = random.Random(2).randbytes(3 * CHUNK + 9)
    running = frames.RunningSha(memoryview(data))
    for end in (CHUNK, 5, 2 * CHUNK, 2 * CHUNK):
        running.cover(end)
    assert running.digest() == running.digest() == hashlib.sha256(data).digest()


def test_a_changed_byte_is_found_by_its_crc() -> None:
    data = b"weights"
    chunk = frames.parse(frames.frame("b", 0, data[:-1] + b"!", zlib.crc32(data)))
    with pytest.raises(RemoteError, match="FL-W105") as caught:
        chunk.verify()
    assert caught.value.retry_seconds == 0.0


def test_what_is_too_large_is_refused_before_it_is_looked_at() -> None:
    at_limit = frames.frame("b", 0, bytes(CHUNK), 0)
    assert len(frames.parse(at_limit).data) == CHUNK
    assert refused(frames.frame("b", 0, bytes(CHUNK + 1), 0)) == "FL-W103"
    assert refused(bytes(frames.MAX_MESSAGE + 1)) == "FL-W103"


@pytest.mark.parametrize(
    "message",
    [
        b"\xff",
        b"\x7a\x05abc",  # five bytes announced, three there
        b"\x7a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # 2**64 - 1 bytes announced
        b"\x1d\x00\x00",  # half a CRC
        b"\x2a\x03abc",  # a SHA-256 of three bytes
        b"\x2a\x21" + bytes(33),
        b"\x0a\x02..",
        b"\x0a\x02\xc3\xa9",
        b"\x0a\x81\x01" + b"a" * 129,
        wire_pb2.Chunk(offset=frames.MAX_OFFSET + 1).SerializeToString(),
        wire_pb2.Chunk(offset=2**64 - 1).SerializeToString(),
    ],
)
def test_malformed_chunks_are_refused(message: bytes) -> None:
    assert refused(message) == "FL-W101"


def test_an_empty_message_is_an_empty_chunk_as_in_protobuf() -> None:
    chunk = frames.parse(b"")
    assert (chunk.blob, chunk.offset, chunk.last, bytes(chunk.data)) == ("", 0, False, b"")
    chunk.verify()


def test_the_fast_reader_takes_the_usual_order_without_copying() -> None:
    frame = frames.frame("b", CHUNK, b"abc", 1, True, bytes(32))
    assert frames.parse(frame).data.obj is frame


def test_both_sides_agree_on_the_largest_message() -> None:
    for options in (channel.CHANNEL_OPTIONS, channel.SERVER_OPTIONS):
        assert dict(options)["grpc.max_receive_message_length"] == frames.MAX_MESSAGE
        assert dict(options)["grpc.keepalive_time_ms"] == 30_000
    assert dict(channel.SERVER_OPTIONS)["grpc.so_reuseport"] == 0
    server = dict(channel.SERVER_OPTIONS)["grpc.http2.min_ping_interval_without_data_ms"]
    assert server < 30_000  # below the client's keepalive the server would hang up


def test_malloc_is_tuned_where_glibc_is() -> None:
    assert channel.tune_malloc() is (platform.libc_ver()[0] == "glibc")
