"""The outbox: what a client has finished outlives its process, whole or not at all."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from atoll.client.outbox import Outbox
from atoll.client.slots import Slots
from atoll.protocols import messages, wire_pb2
from atoll.protocols.blobs import INLINE, BlobInfo, Section
from atoll.protocols.bounds import MAX_METRICS, ULID
from atoll.protocols.errors import ClientError
from atoll.protocols.messages import Result

SMALL, BIG = 64, INLINE + 4


def result(order: int, size: int = SMALL, steps: int = 5, snapshot: int = 0) -> Result:
    section = Section("trainable", "fp32", size // 4, size)
    info = BlobInfo(f"u/o{order}.0", size, b"", (section,))
    return Result(
        f"o{order}", 0, steps, 160, 1.5, info, {"loss": 0.5}, not snapshot, snapshot
    )  # fmt: skip


def keep(outbox: Outbox, made: Result) -> bytes:
    view = outbox.buffer(made.update, made.payload.size)
    view[:] = bytes(i % 251 for i in range(len(view)))
    outbox.put(made, view)
    return bytes(view)


@pytest.mark.parametrize("size", [SMALL, INLINE, BIG])
def test_a_result_survives_its_process(tmp_path: Path, size: int) -> None:
    outbox = Outbox(tmp_path)
    data = keep(outbox, result(1, size))
    outbox.close()
    again = Outbox(tmp_path)
    kept = again.get("o1.0")
    assert kept is not None
    assert (kept[0], bytes(kept[1])) == (result(1, size), data)
    assert again.waiting() == (("o1", "o1.0"),)
    again.close()


@pytest.mark.parametrize("folder", [True, False])
def test_a_settled_result_is_gone_with_its_files(tmp_path: Path, folder: bool) -> None:
    outbox = Outbox(tmp_path / "mine" if folder else None)
    for order, size in ((1, SMALL), (2, BIG)):
        keep(outbox, result(order, size))
        outbox.drop(f"o{order}.0")
        outbox.drop(f"o{order}.0")
        assert outbox.get(f"o{order}.0") is None
    assert outbox.waiting() == ()
    assert not list(tmp_path.rglob("o*"))
    outbox.close()


def test_results_come_back_oldest_first(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    for order in (11, 2, 10):
        keep(outbox, result(order))
    keep(outbox, result(10, snapshot=1))
    outbox.close()
    again = Outbox(tmp_path)
    assert [update for _, update in again.waiting()] == ["o11.0", "o2.0", "o10.0", "o10.0.s1"]
    again.close()


def test_the_data_order_counts_the_steps_of_final_results(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    assert outbox.steps == 0
    keep(outbox, result(1, steps=5))
    keep(outbox, result(2, steps=3, snapshot=1))
    keep(outbox, result(2, steps=7))
    outbox.drop("o1.0")
    outbox.close()
    again = Outbox(tmp_path)
    assert again.steps == 12
    again.close()


def test_a_client_is_the_same_node_in_its_next_life(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.enter("run")
    outbox.close()
    again = Outbox(tmp_path)
    assert again.memory == outbox.memory
    assert ULID.fullmatch(again.memory.node)
    again.close()
    elsewhere = Outbox(None)
    assert elsewhere.memory.node != outbox.memory.node


def test_another_run_starts_with_an_empty_outbox(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.enter("one")
    keep(outbox, result(1, BIG))
    outbox.enter("one")
    assert outbox.waiting()
    outbox.enter("two")
    assert (outbox.waiting(), outbox.steps, outbox.memory.run) == ((), 0, "two")
    outbox.close()
    again = Outbox(tmp_path)
    assert (again.waiting(), again.steps, again.memory) == ((), 0, outbox.memory)
    again.close()


def test_a_folder_serves_one_client_at_a_time(tmp_path: Path) -> None:
    first = Outbox(tmp_path)
    with pytest.raises(ClientError, match=str(tmp_path)) as taken:
        Outbox(tmp_path)
    assert taken.value.code == "FL-C108"
    assert f"in use by another client (pid {os.getpid()})" in taken.value.message
    assert f"kill {os.getpid()}" in taken.value.hint
    first.close()
    first.close()
    Outbox(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClientError) as refused:
        Outbox(tmp_path / "file" / "below")
    assert refused.value.code == "FL-C108"


def test_what_a_killed_process_left_half_done_is_not_listed(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    keep(outbox, result(1, BIG))
    keep(outbox, result(2, BIG))
    keep(outbox, result(3, BIG))
    outbox.buffer("o4.0", BIG)  # killed while it packed
    outbox.close()
    whole = (tmp_path / "o1.0.result").read_bytes()
    (tmp_path / "o1.0.result").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "o2.0.bin").write_bytes(b"short")
    (tmp_path / "o5.0.result").write_bytes(whole.replace(b"o1", b"\xff\xff"))
    (tmp_path / "model.bin").write_bytes(b"not ours to remove")
    again = Outbox(tmp_path)
    assert again.waiting() == (("o3", "o3.0"),)
    left = sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(("o", "m")))
    assert left == ["model.bin", "o3.0.bin", "o3.0.result"]
    again.close()


def test_a_result_without_its_bytes_is_not_listed(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    keep(outbox, result(1, BIG))
    outbox.close()
    (tmp_path / "o1.0.bin").unlink()
    again = Outbox(tmp_path)
    assert again.waiting() == ()
    again.close()


@pytest.mark.parametrize("text", ["", "[]", '{"node": "N", "colour": "red"}'])
def test_a_memory_that_cannot_be_read_makes_a_new_node(tmp_path: Path, text: str) -> None:
    (tmp_path / "client.json").write_text(text)
    outbox = Outbox(tmp_path)
    assert ULID.fullmatch(outbox.memory.node)
    outbox.close()


def test_a_disk_that_fails_is_told(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    (tmp_path / "o1.0.bin").mkdir()  # no file can be written there
    (tmp_path / "0.slot").mkdir()
    with pytest.raises(ClientError) as refused:
        outbox.buffer("o1.0", BIG)
    assert refused.value.code == "FL-S203"
    with pytest.raises(ClientError) as refused:
        keep(outbox, result(2))
    assert refused.value.code == "FL-S203"
    assert outbox.waiting() == ()
    assert outbox.steps == 0
    outbox.close()
    (tmp_path / "o1.0.bin").rmdir()
    with pytest.raises(ClientError) as refused:
        Outbox(tmp_path)
    assert refused.value.code == "FL-S203"
    (tmp_path / "0.slot").rmdir()
    Outbox(tmp_path).close()  # the folder was given back


def test_a_disk_that_is_full_at_the_start_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count of steps was mapped over a hole: to write it killed the process by SIGBUS."""

    def full(file: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ClientError, match=r"FL-S203: .* No space left") as refused:
        Outbox(tmp_path)
    assert "free space" in refused.value.hint


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("client.json", "FL-C108"),
        ("o1.0.result", "FL-C108"),
        ("o1.0.bin", "FL-C108"),
        ("steps", "FL-S203"),
    ],
)
def test_a_directory_in_place_of_a_file_is_told_by_its_name(
    tmp_path: Path, name: str, code: str
) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ClientError, match=rf"{code}: .*: {name}: Is a directory") as refused:
        Outbox(tmp_path)
    assert "another --dir" in refused.value.hint
    (tmp_path / name).rmdir()
    Outbox(tmp_path).close()  # the folder was given back


@pytest.mark.parametrize("name", ["run.json", "journal.sqlite"])
def test_the_state_directory_of_a_server_is_not_taken(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ClientError, match=r"FL-C108: .*is a server's state directory") as refused:
        Outbox(tmp_path)
    assert refused.value.hint == "give another --dir"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_inline_payload_is_not_kept_twice_in_memory(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    made = replace(result(1), inline=b"")
    keep(outbox, made)
    outbox.close()
    again = Outbox(tmp_path)
    kept = again.get("o1.0")
    assert kept is not None
    assert kept[0].inline == b""
    again.close()


def test_a_slot_that_is_overwritten_holds_only_what_was_written_last(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    keep(outbox, result(1, INLINE))
    outbox.drop("o1.0")
    data = keep(outbox, result(2, SMALL))
    keep(outbox, result(3, SMALL))
    packed = outbox.packed("o2.0") or ()
    outbox.close()
    assert sorted(p.name for p in tmp_path.glob("*.slot")) == ["0.slot", "1.slot"]
    again = Outbox(tmp_path)
    assert [update for _, update in again.waiting()] == ["o2.0", "o3.0"]
    kept = again.get("o2.0")
    assert kept is not None
    assert bytes(kept[1]) == data
    assert again.packed("o2.0") == (b"".join(packed),) != (b"",)
    keep(again, result(4))
    again.drop("o2.0")
    again.close()
    last = Outbox(tmp_path)
    assert [update for _, update in last.waiting()] == ["o3.0", "o4.0"]
    last.close()


@pytest.mark.parametrize("at", [8, 12, 8192])  # its length, its CRC, a page of its payload
def test_a_slot_that_a_power_cut_left_mixed_is_free(tmp_path: Path, at: int) -> None:
    outbox = Outbox(tmp_path)
    keep(outbox, result(1, INLINE))
    keep(outbox, result(2))
    outbox.close()
    with open(tmp_path / "0.slot", "rb+") as file:
        file.seek(at)
        file.write(b"\xff" * 4)  # is the former result's
    again = Outbox(tmp_path)
    assert again.waiting() == (("o2", "o2.0"),)
    keep(again, result(3))
    assert len(list(tmp_path.glob("*.slot"))) == 2
    again.close()


def test_a_process_killed_in_the_middle_of_a_slot_leaves_it_free(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    keep(outbox, result(1))
    outbox.close()
    with open(tmp_path / "0.slot", "rb+") as file:
        file.write(bytes(8))  # its turn is written last
    again = Outbox(tmp_path)
    assert again.waiting() == ()
    again.close()


def test_a_result_too_large_for_a_slot_has_a_file(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    made = replace(result(1), metrics={f"m{i}" * 16: 0.5 for i in range(MAX_METRICS)})
    large = replace(result(2, INLINE), metrics={f"m{i}" * 2000: 0.5 for i in range(MAX_METRICS)})
    keep(outbox, made)
    keep(outbox, large)
    assert [p.name for p in tmp_path.glob("*.result")] == ["o2.0.result"]
    outbox.drop("o2.0")
    assert list(tmp_path.glob("*.result")) == []
    outbox.close()
    again = Outbox(tmp_path)
    assert again.waiting() == (("o1", "o1.0"),)
    again.close()


def test_a_slot_that_holds_no_result_is_free(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    slots.put((b"\xff", b"\xff"))
    outbox = Outbox(tmp_path)
    assert outbox.waiting() == ()
    keep(outbox, result(1))
    assert [p.name for p in tmp_path.glob("*.slot")] == ["0.slot"]
    outbox.close()


def test_slots_that_somebody_took_away_are_made_again(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    for order in (1, 2, 3):
        keep(outbox, result(order))
    outbox.close()
    (tmp_path / "1.slot").unlink()
    (tmp_path / "mine.slot").touch()
    again = Outbox(tmp_path)
    assert [update for _, update in again.waiting()] == ["o1.0", "o3.0"]
    again.close()


def test_small_results_are_packed_once_big_ones_are_not(tmp_path: Path) -> None:
    outbox = Outbox(None)
    data = keep(outbox, result(1))
    keep(outbox, result(2, BIG))
    packed = outbox.packed("o1.0")
    assert packed is not None
    whole = messages.result_from_wire(wire_pb2.Result.FromString(b"".join(packed)))
    assert whole == replace(result(1), inline=data)
    assert outbox.packed("o2.0") is None
    outbox.drop("o1.0")
    assert outbox.packed("o1.0") is None
    outbox.close()
