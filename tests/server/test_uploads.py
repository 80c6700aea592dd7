"""Uploads: idempotent, resumable across a restart, and a full disk that costs nobody else."""

import contextlib
import errno
import hashlib
import os
import random
import resource
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.protocols import frames
from atoll.protocols.blobs import CHUNK
from atoll.protocols.errors import RemoteError
from atoll.protocols.frames import Chunk
from atoll.server.spill import Spares, SpillFile
from atoll.server.uploads import Uploads
from tests.conftest import Logged

SIZE = 2 * CHUNK + 77


def payload(size: int = SIZE, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def chunks(data: bytes, offset: int = 0) -> list[Chunk]:
    return [frames.parse(f) for f in frames.chunks(memoryview(data), "b", offset)]


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def send(uploads: Uploads, update: str, data: bytes) -> None:
    for chunk in chunks(data, uploads.open(update, len(data))):
        if chunk.data:
            uploads.put(update, chunk)
    uploads.pause(update)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def refusal(error: pytest.ExceptionInfo[RemoteError]) -> tuple[str, float | None]:
    return error.value.code, error.value.retry_seconds


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    made = Uploads(tmp_path / "updates", min_free=0)
    made.sweep(())
    return made


@pytest.mark.parametrize("size", [0, 1, 1000, CHUNK - 1, CHUNK, CHUNK + 1, SIZE])
def test_what_was_put_is_what_is_stored(uploads: Uploads, size: int) -> None:
    data = payload(size)
    send(uploads, "o1.0", data)
    stored = uploads.commit("o1.0", sha(data))
    assert bytes(stored.view()) == data
    assert (stored.id, stored.size, stored.sha256) == ("o1.0", size, sha(data))
    assert (stored.path is None) == (size <= uploads.memory_limit)
    assert uploads.stored("o1.0") is stored


def test_every_step_may_be_repeated(uploads: Uploads) -> None:
    data = payload()
    send(uploads, "o1.0", data)
    assert uploads.open("o1.0", SIZE) == SIZE
    stored = uploads.commit("o1.0", sha(data))
    assert uploads.open("o1.0", SIZE) == SIZE
    assert uploads.commit("o1.0", sha(data)) is stored
    uploads.free("o1.0")
    uploads.free("o1.0")
    uploads.pause("o1.0")
    assert uploads.stored("o1.0") is None
    assert uploads.reserved == 0


def test_chunks_out_of_place_are_refused_and_nothing_changes(uploads: Uploads) -> None:
    data = payload()
    first, second, third = chunks(data)
    uploads.open("o1.0", SIZE)
    uploads.put("o1.0", first)
    for wrong in (first, third, chunks(data + b"x", 2 * CHUNK)[0]):
        with pytest.raises(RemoteError) as caught:
            uploads.put("o1.0", wrong)
        assert refusal(caught) == ("FL-W111", 0.0)
        assert caught.value.hint == f"go on at {CHUNK} in whole chunks"
    uploads.put("o1.0", second)
    assert uploads.put("o1.0", third) == SIZE
    assert bytes(uploads.commit("o1.0", sha(data)).view()) == data
    with pytest.raises(RemoteError, match="FL-W111"):
        uploads.put("o1.0", third)


def test_a_short_chunk_amid_the_payload_is_refused(uploads: Uploads) -> None:
    uploads.open("o1.0", SIZE)
    short = frames.parse(frames.frame("b", 0, b"abc", zlib.crc32(b"abc")))
    with pytest.raises(RemoteError, match="FL-W111"):
        uploads.put("o1.0", short)


def test_a_corrupt_chunk_is_refused_and_can_be_sent_again(uploads: Uploads) -> None:
    data = payload()
    good = chunks(data)
    bad = frames.parse(frames.frame("b", 0, payload(CHUNK, seed=9), good[0].crc32))
    uploads.open("o1.0", SIZE)
    with pytest.raises(RemoteError) as caught:
        uploads.put("o1.0", bad)
    assert refusal(caught) == ("FL-W105", 0.0)
    send(uploads, "o1.0", data)
    assert bytes(uploads.commit("o1.0", sha(data)).view()) == data


@pytest.mark.parametrize("size", [1000, SIZE])
def test_a_wrong_digest_drops_the_bytes_and_the_upload_starts_again(
    uploads: Uploads, size: int
) -> None:
    data, other = payload(size), payload(size, seed=1)
    send(uploads, "o1.0", other)
    with pytest.raises(RemoteError) as caught:
        uploads.commit("o1.0", sha(data))
    assert refusal(caught) == ("FL-W105", 0.0)
    assert uploads.open("o1.0", size) == 0
    send(uploads, "o1.0", data)
    assert bytes(uploads.commit("o1.0", sha(data)).view()) == data
    with pytest.raises(RemoteError, match="FL-W105"):  # a wrong claim later costs nothing
        uploads.commit("o1.0", sha(other))
    stored = uploads.stored("o1.0")
    assert stored is not None
    assert bytes(stored.view()) == data


def test_an_incomplete_upload_cannot_be_committed(uploads: Uploads) -> None:
    data = payload()
    uploads.open("o1.0", SIZE)
    uploads.put("o1.0", chunks(data)[0])
    with pytest.raises(RemoteError, match=f"{CHUNK} of {SIZE} bytes are held"):
        uploads.commit("o1.0", sha(data))


@pytest.mark.parametrize(
    "update", ["", "../o1.0", "o1/0", "O1", "_spare.1", "o1.part", "o\x00", "a" * 64]
)
def test_only_strict_names_become_paths(uploads: Uploads, update: str) -> None:
    with pytest.raises(RemoteError, match="FL-W101"):
        uploads.open(update, SIZE)


@given(st.text(max_size=70))
def test_no_name_leaves_the_folder(update: str) -> None:
    uploads = Uploads(Path("/nonexistent/updates"), min_free=0, free=lambda _: 1 << 40)
    with contextlib.suppress(RemoteError):
        uploads.open(update, SIZE)
        assert Path(os.path.normpath(uploads.folder / update)).parent == uploads.folder


def test_calls_for_an_upload_that_is_not_open_are_refused(uploads: Uploads) -> None:
    for call in (
        lambda: uploads.put("o9.0", chunks(b"x")[0]),
        lambda: uploads.commit("o9.0", bytes(32)),
    ):
        with pytest.raises(RemoteError) as caught:
            call()
        assert refusal(caught) == ("FL-W107", 0.0)


def test_an_update_keeps_the_size_it_was_announced_with(uploads: Uploads) -> None:
    uploads.open("o1.0", SIZE)
    with pytest.raises(RemoteError, match="announced with"):
        uploads.open("o1.0", SIZE + 1)


def test_inline_payloads_stay_in_memory(uploads: Uploads) -> None:
    stored = uploads.keep("o1.0", b"tiny")
    assert uploads.keep("o1.0", b"tiny") is stored
    assert (stored.path, bytes(stored.view())) == (None, b"tiny")
    with pytest.raises(RemoteError, match="FL-W105"):
        uploads.keep("o1.0", b"liny")
    with pytest.raises(RemoteError, match="FL-W103"):
        uploads.keep("o2.0", bytes(uploads.memory_limit + 1))
    assert not list(uploads.folder.iterdir())


# ---- restart -----------------------------------------------------------------------------------


def test_an_upload_goes_on_after_a_restart_from_its_last_whole_chunk(uploads: Uploads) -> None:
    data = payload()
    first, second, _ = chunks(data)
    uploads.open("o1.0", SIZE)
    uploads.put("o1.0", first)
    uploads.put("o1.0", second)  # and the process is killed: no pause, no close

    again = Uploads(uploads.folder, min_free=0)
    assert again.open("o1.0", SIZE) == 2 * CHUNK
    send(again, "o1.0", data)
    assert bytes(again.commit("o1.0", sha(data)).view()) == data
    uploads.pause("o1.0")


def test_half_a_chunk_left_by_a_kill_is_written_anew(uploads: Uploads) -> None:
    data = payload()
    uploads.open("o1.0", SIZE)
    uploads.put("o1.0", chunks(data)[0])
    with open(uploads.folder / "o1.0.part", "rb+") as file:  # killed amid the second write
        file.seek(CHUNK)
        file.write(b"\xff" * 1000)
    again = Uploads(uploads.folder, min_free=0)
    assert again.open("o1.0", SIZE) == CHUNK
    send(again, "o1.0", data)
    assert bytes(again.commit("o1.0", sha(data)).view()) == data
    uploads.pause("o1.0")


def test_a_commit_whose_news_was_lost_is_found_after_a_restart(uploads: Uploads) -> None:
    data = payload()
    send(uploads, "o1.0", data)
    uploads.commit("o1.0", sha(data))
    again = Uploads(uploads.folder, min_free=0)
    assert again.open("o1.0", SIZE) == SIZE
    assert bytes(again.commit("o1.0", sha(data)).view()) == data


def test_committed_updates_are_restored_and_damaged_ones_are_not(uploads: Uploads) -> None:
    for n, update in enumerate(("o1.0", "o2.0", "o3.0")):
        send(uploads, update, payload(seed=n))
        uploads.commit(update, sha(payload(seed=n)))
    with open(uploads.folder / "o2.0", "rb+") as file:
        file.write(b"rot")
    again = Uploads(uploads.folder, min_free=1 << 60)  # a full disk must not lose what is there
    assert again.sweep({"o1.0", "o2.0"}) == ["o3.0"]
    stored = again.restore("o1.0", SIZE, sha(payload(seed=0)))
    assert stored is not None
    assert bytes(stored.view()) == payload(seed=0)
    assert again.restore("o2.0", SIZE, sha(payload(seed=1))) is None
    assert again.restore("o3.0", SIZE, sha(payload(seed=2))) is None
    assert sorted(p.name for p in again.folder.iterdir()) == ["o1.0"]


@pytest.mark.parametrize("damage", ["cut", "other size", "no trailer", "magic", "size", "held"])
def test_a_part_file_that_cannot_be_trusted_starts_again(uploads: Uploads, damage: str) -> None:
    uploads.open("o1.0", SIZE)
    uploads.put("o1.0", chunks(payload())[0])
    uploads.pause("o1.0")
    part = uploads.folder / "o1.0.part"
    size = SIZE + 1 if damage == "other size" else SIZE
    if damage == "cut":
        os.truncate(part, 10)
    if damage == "no trailer":
        part.write_bytes(bytes(SIZE + 24))
    trailers = {
        "magic": (b"atoll-xx", SIZE, CHUNK),
        "size": (b"atoll-up", SIZE - 1, CHUNK),
        "held": (b"atoll-up", SIZE, CHUNK + 1),
    }
    if damage in trailers:
        with open(part, "rb+") as file:
            file.seek(SIZE)
            file.write(struct.pack("<8sQQ", *trailers[damage]))
    assert Uploads(uploads.folder, min_free=0).open("o1.0", size) == 0


# ---- spares ------------------------------------------------------------------------------------


def test_a_freed_file_is_overwritten_by_the_next_update(uploads: Uploads) -> None:
    send(uploads, "o1.0", payload(seed=1))
    stored = uploads.commit("o1.0", sha(payload(seed=1)))
    assert stored.path is not None
    inode = stored.path.stat().st_ino
    uploads.free("o1.0")
    for size in (SIZE - CHUNK, SIZE + 5):  # shorter and longer than what the file was for
        data = payload(size, seed=size)
        assert uploads.open(f"o{size}.0", size) == 0
        send(uploads, f"o{size}.0", data)
        after = uploads.commit(f"o{size}.0", sha(data))
        assert after.path is not None
        assert after.path.stat().st_ino == inode
        assert bytes(after.view()) == data
        uploads.free(f"o{size}.0")


def test_a_spare_that_was_adopted_and_not_written_says_it_holds_nothing(uploads: Uploads) -> None:
    """The old bytes and the old trailer lie in it: a killed server must not take them as new."""
    send(uploads, "o1.0", payload(seed=1))
    uploads.commit("o1.0", sha(payload(seed=1)))
    uploads.free("o1.0")
    uploads.open("o2.0", SIZE)
    assert (uploads.folder / "o2.0.part").exists()
    assert Uploads(uploads.folder, min_free=0).open("o2.0", SIZE) == 0


def test_a_file_that_someone_still_reads_is_not_overwritten(uploads: Uploads) -> None:
    old = payload(seed=1)
    send(uploads, "o1.0", old)
    view = uploads.commit("o1.0", sha(old)).view()
    uploads.free("o1.0")
    send(uploads, "o2.0", payload(seed=2))
    uploads.commit("o2.0", sha(payload(seed=2)))
    assert bytes(view) == old
    assert [p.name for p in uploads.folder.iterdir()] == ["o2.0"]


def test_spares_are_bounded_and_make_room_when_it_is_short(tmp_path: Path) -> None:
    room = [10 * SIZE]
    uploads = Uploads(tmp_path, min_free=SIZE, spare=2 * SIZE, free=lambda _: room[0])
    for n in range(3):
        send(uploads, f"o{n}.0", payload(seed=n))
        uploads.commit(f"o{n}.0", sha(payload(seed=n)))
    for n in range(3):
        uploads.free(f"o{n}.0")
    assert len(list(tmp_path.iterdir())) == 2
    room[0] = SIZE
    with pytest.raises(RemoteError, match="FL-W109"):
        uploads.open("o9.0", SIZE)
    assert not list(tmp_path.iterdir())


def test_sweeping_removes_spares_and_strangers_but_not_other_files(uploads: Uploads) -> None:
    for name in ("o1.0", "o2.0.part", "_spare.1", "README"):
        (uploads.folder / name).write_bytes(b"x")
    assert uploads.names() == {"o1.0", "o2.0"}
    assert uploads.sweep({"o1.0"}) == ["o2.0"]
    assert sorted(p.name for p in uploads.folder.iterdir()) == ["README", "o1.0"]


# ---- room --------------------------------------------------------------------------------------


def test_room_is_reserved_when_an_upload_is_opened(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, capacity=2 * SIZE, min_free=0)
    uploads.open("o1.0", SIZE)
    uploads.open("o2.0", SIZE)
    with pytest.raises(RemoteError) as caught:
        uploads.open("o3.0", 1)
    assert refusal(caught) == ("FL-W109", 5.0)
    assert uploads.open("o1.0", SIZE) == 0  # those that are in stay in
    uploads.free("o2.0")
    assert uploads.open("o3.0", SIZE) == 0


def test_uploads_that_are_still_coming_count_as_disk_in_use(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, min_free=100, free=lambda _: 2 * SIZE + 100)
    uploads.open("o1.0", SIZE)
    uploads.open("o2.0", SIZE)
    with pytest.raises(RemoteError, match="FL-W109"):
        uploads.open("o3.0", SIZE)
    assert uploads.keep("o4.0", b"small ones need no disk").size == 23


def test_a_server_without_room_says_so_once(tmp_path: Path, logged: Logged) -> None:
    """It stood still without a word: clients came again every five seconds, for ever."""
    room = [SIZE + 99]
    uploads = Uploads(tmp_path, min_free=100, free=lambda _: room[0])
    for update in ("o1.0", "o1.0", "o2.0"):
        with pytest.raises(RemoteError, match="FL-W109"):
            uploads.open(update, SIZE)
    assert logged.text == (
        f"update=o1.0 of {SIZE} bytes waits for room: {SIZE + 99} bytes are free on the disk of "
        f"{tmp_path}, 100 must stay free\n"
    )
    room[0] += 1
    assert uploads.open("o1.0", SIZE) == 0


def test_a_server_whose_disk_is_full_all_the_same_says_so_once(
    uploads: Uploads, small_disk: int, logged: Logged
) -> None:
    uploads.open("o1.0", SIZE)
    for _ in range(2):
        with pytest.raises(RemoteError, match="the disk is full"):
            uploads.put("o1.0", chunks(payload())[0])
    assert logged.text.count("waits for room") == 1


@pytest.fixture
def small_disk() -> Iterator[int]:
    """Files may not grow past a chunk and a half: the kernel refuses as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK + CHUNK // 2, hard))
    yield CHUNK + CHUNK // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_refuses_one_client_and_loses_nothing(
    uploads: Uploads, small_disk: int
) -> None:
    fits, large = payload(CHUNK + 5, seed=1), payload(seed=2)
    send(uploads, "o1.0", fits)
    uploads.open("o2.0", SIZE)
    with pytest.raises(RemoteError) as caught:
        uploads.put("o2.0", chunks(large)[0])
    assert refusal(caught) == ("FL-W109", 5.0)
    assert "full" in caught.value.message
    assert bytes(uploads.commit("o1.0", sha(fits)).view()) == fits
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    send(uploads, "o2.0", large)
    assert bytes(uploads.commit("o2.0", sha(large)).view()) == large


def test_a_failing_disk_is_told_as_one(uploads: Uploads) -> None:
    uploads.open("o1.0", SIZE)
    (uploads.folder / "o1.0.part").symlink_to("/etc/passwd")  # and no link is followed
    with pytest.raises(RemoteError, match="the disk fails"):
        uploads.put("o1.0", chunks(payload())[0])


def test_a_part_file_that_cannot_be_read_does_not_stay_half_open(uploads: Uploads) -> None:
    (uploads.folder / "o1.0.part").symlink_to("/etc/passwd")
    with pytest.raises(RemoteError, match="FL-W109"):
        uploads.open("o1.0", SIZE)
    assert not uploads.knows("o1.0")


# ---- together ----------------------------------------------------------------------------------


def test_no_descriptor_stays_open(uploads: Uploads) -> None:
    before = descriptors()
    for n in range(3):
        send(uploads, f"o{n}.0", payload(seed=n))
        view = uploads.commit(f"o{n}.0", sha(payload(seed=n))).view()
        assert view[0] == payload(seed=n)[0]
        del view
    uploads.open("o9.0", SIZE)
    uploads.put("o9.0", chunks(payload())[0])
    uploads.pause("o9.0")
    assert descriptors() == before
    uploads.put("o9.0", chunks(payload())[1])  # goes on without being opened again
    uploads.free("o9.0")
    assert descriptors() == before


def test_two_streams_of_one_upload_cannot_mix_their_bytes(uploads: Uploads) -> None:
    data = payload(4 * CHUNK)
    parts = chunks(data)
    uploads.open("o1.0", len(data))
    refused: list[str] = []

    def stream() -> None:
        for chunk in parts:
            try:
                uploads.put("o1.0", chunk)
            except RemoteError as error:
                refused.append(error.code)

    threads = [threading.Thread(target=stream) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    send(uploads, "o1.0", data)
    assert bytes(uploads.commit("o1.0", sha(data)).view()) == data
    assert set(refused) == {"FL-W111"}


def test_what_nobody_goes_on_with_can_be_named_and_freed(uploads: Uploads) -> None:
    data = payload()
    for update in ("o1.0", "o2.0", "o3.0"):
        send(uploads, update, data)
    uploads.commit("o3.0", sha(data))
    assert uploads.unfinished() == {"o1.0", "o2.0"}
    again = Uploads(uploads.folder, min_free=0)
    again.restore("o3.0", SIZE, sha(data))
    again.sweep({"o1.0", "o2.0", "o3.0"})
    assert again.open("o1.0", SIZE) == SIZE
    assert again.unfinished() == {"o1.0", "o2.0"}
    again.free("o1.0")
    again.free("o2.0")
    assert again.unfinished() == set()
    assert [path.name for path in uploads.folder.iterdir()] == ["o3.0"]


def test_a_chunk_after_the_upload_was_freed_is_refused(uploads: Uploads) -> None:
    uploads.open("o1.0", SIZE)
    uploads.put("o1.0", chunks(payload())[0])
    uploads.free("o1.0")
    with pytest.raises(RemoteError, match="FL-W107"):
        uploads.put("o1.0", chunks(payload())[1])
    assert not list(uploads.folder.iterdir())


@pytest.mark.parametrize("durable", [True, False])
def test_durable_commits_sync_the_file_and_then_its_name(
    tmp_path: Path, durable: bool, synced: list[str]
) -> None:
    uploads = Uploads(tmp_path, min_free=0, durable=durable)
    data = payload()
    send(uploads, "o1.0", data)
    assert bytes(uploads.commit("o1.0", sha(data)).view()) == data
    assert synced == ([str(tmp_path / "o1.0.part"), str(tmp_path)] if durable else [])


def test_spares_that_vanished_are_an_error_of_the_disk_not_a_crash(tmp_path: Path) -> None:
    spares = Spares(tmp_path, SIZE)
    (tmp_path / "o1.0").write_bytes(b"x")
    assert spares.give(tmp_path / "o1.0", 1)
    spare = spares.take()
    assert spare is not None
    spare.unlink()
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number says which
        SpillFile(tmp_path, "o2.0", SIZE).adopt(spare)
    assert caught.value.errno == errno.ENOENT
    assert spares.take() is None
