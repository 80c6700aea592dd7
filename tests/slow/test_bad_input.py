"""Everything that can be asked or sent wrongly: its error, and the run going on with the others."""

import contextlib
import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from torch import Tensor

from atoll.client.client import Client
from atoll.client.options import Options, maker
from atoll.client.trainer import Task, Trained
from atoll.protocols import wire_pb2
from atoll.protocols.errors import ClientError
from atoll.server.rules import Rules
from atoll.server.uploads import Uploads
from tests.conftest import Logged

if TYPE_CHECKING:
    from tests.slow.conftest import Federation, Guest, Raw

pytestmark = pytest.mark.slow

ONE = "fedbuff:size=1,steps=3"  # every update makes a version: it is seen at once who goes on


@pytest.fixture
def running(federation: "Federation") -> Iterator["Federation"]:
    """A run with one good client, which must go on training whatever another one does."""
    local = federation.local(strategy=ONE)
    assert local.error is None, local.error
    good = federation.digits("good", slowdown=0.01)
    wait(federation, 1)
    yield federation
    wait(federation, federation.merged() + 2)
    assert good.is_alive()
    local.server.stop()
    local.ended()
    good.client.stop()
    good.ended()


def wait(federation: "Federation", version: int) -> None:
    federation.until(lambda: federation.merged() >= version, 20, f"version {version}")


# ---- the command line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "exit_code", "word"),
    [
        (["--strategy", "fedavgg"], "FL-S101", 78, "fedavgg"),
        (["--strategy", "fedavg:stepps=3"], "FL-S102", 78, "stepps"),
        (["--strategy", "nowhere:Mine"], "FL-S103", 78, "nowhere"),
        (["--data", "mnist:/no/such/place"], "FL-D101", 3, "/no/such/place"),
        (["--data", "digitz"], "FL-D103", 78, "digitz"),
        (["--listen", "0.0.0.0:0"], "FL-S105", 64, "0.0.0.0"),
        (["--listen", "nonsense"], "FL-S108", 2, "nonsense"),
        (["--init", "/no/such.safetensors"], "FL-S106", 78, "/no/such"),
    ],
)
def test_a_server_that_cannot_be_says_why_and_leaves_the_folder_as_it_was(
    federation: "Federation", options: list[str], code: str, exit_code: int, word: str
) -> None:
    server = federation.server(*options, wait=False)
    assert server.failure()[:2] == (code, exit_code)
    assert word in server.failure()[2]
    assert not (federation.state / "run.json").exists()


def test_a_port_in_use_and_a_state_directory_in_use_name_the_other(
    federation: "Federation",
) -> None:
    federation.local(strategy=ONE)
    other = federation.command(
        "other", "fl-server", "start", "--listen", federation.address, "--state", "other", "--json"
    )
    second = federation.server(wait=False)
    assert other.failure()[:2] == ("FL-S201", 73)
    assert federation.address in other.failure()[2]
    assert other.said() == ""  # no library's log lines beside the error
    assert not (federation.folder / "other").exists()
    code, exit_code, message = second.failure()
    assert (code, exit_code) == ("FL-S202", 73)
    assert f"pid {os.getpid()}" in message


def test_a_demo_whose_server_is_not_there_in_time_ends(federation: "Federation") -> None:
    demo = federation.command("demo", "fl-server", "demo", "--timeout", "0.001", "--json")
    assert demo.failure()[:2] == ("FL-S205", 5)


@pytest.mark.parametrize(
    ("options", "code", "exit_code"),
    [
        (["--data", "csv:/no/such.csv"], "FL-D101", 3),
        (["--model", "resnet19"], "FL-S101", 78),
        (["--model", "linear"], "FL-C103", 78),
    ],
)
def test_a_client_that_cannot_take_part_says_why(
    running: "Federation", options: list[str], code: str, exit_code: int
) -> None:
    assert running.client("bad", *options).failure()[:2] == (code, exit_code)


def test_a_client_without_a_server_gives_up_when_told_to(federation: "Federation") -> None:
    federation.address = "127.0.0.1:1"
    client = federation.client("lonely", "--patience", "0.5")
    assert client.failure()[:2] == ("FL-C101", 69)


# ---- hello -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"protocol": 2}, "FL-C102"),
        ({"schema": "0" * 64}, "FL-W104"),
        ({"run": "another"}, "FL-S107"),
        ({"capabilities": ["zip"]}, "FL-W108"),
        ({"node": "me"}, "FL-W101"),
        ({"client": "../../etc"}, "FL-W101"),
        ({"holding": ["o1; DROP TABLE"]}, "FL-W101"),
        ({"client": "good"}, "FL-C105"),
    ],
)
def test_a_hello_that_cannot_be_is_refused(
    running: "Federation", fields: dict[str, Any], code: str
) -> None:
    raw = running.raw()
    told = {"protocol": 1, "client": "bad", "node": "0" * 26, "capabilities": ["fp32"], **fields}
    raw.open(hello=wire_pb2.Hello(**told))
    assert raw.refused() == code


def test_a_stream_that_does_not_begin_with_hello_is_refused(running: "Federation") -> None:
    raw = running.raw()
    raw.open(heartbeat=wire_pb2.Heartbeat())
    assert raw.refused() == "FL-W101"


def test_a_second_client_of_one_name_is_told_to_choose_another(running: "Federation") -> None:
    make = maker(Options("good"))
    twin = running.guest(Client(running.address, make, name="good", folder=running.folder / "twin"))
    assert failed(twin).code == "FL-C105"


def failed(guest: "Guest") -> ClientError:
    guest.join(20)
    assert isinstance(guest.error, ClientError), guest.report
    return guest.error


# ---- results ---------------------------------------------------------------------------------


def result(given: Any, data: bytes, **fields: Any) -> wire_pb2.Result:
    """A result for an order, shaped as the model that came with it."""
    blob = wire_pb2.Blob(
        id=f"u/{given.id}", size=len(data), sections=given.model.sections, inline=data
    )
    told = {"order": given.id, "steps": 3, "examples": 30, "train_seconds": 0.1, "final": True}
    return wire_pb2.Result(**{**told, "payload": blob, **fields})


def zeros(order: Any) -> bytes:
    return bytes(order.model.size)


def test_an_update_of_other_tensors_is_refused_and_its_client_has_left(
    running: "Federation",
) -> None:
    raw = running.raw()
    raw.hello("bad")
    order = raw.hear("order")
    section = wire_pb2.Section(group="trainable", codec="fp32", count=4, length=16)
    blob = wire_pb2.Blob(id="u/1", size=16, sections=[section], inline=bytes(16))
    raw.say(result=result(order, b"", payload=blob))
    assert raw.refused() == "FL-W104"
    has_left(running, "FL-W104")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_with_something_that_is_no_number_never_gets_into_a_model(
    running: "Federation", value: float
) -> None:
    raw = running.raw()
    raw.hello("bad")
    order = raw.hear("order")
    raw.say(result=result(order, struct.pack("<f", value) + zeros(order)[4:]))
    assert raw.refused() == "FL-W106"
    has_left(running, "FL-W106")


def has_left(federation: "Federation", why: str) -> None:
    """The bad client, for this reason; the history is a moment behind."""

    def reasons() -> list[str]:
        return [row["reason"] for row in federation.history("leave") if row["client"] == "bad"]

    federation.until(lambda: any(why in reason for reason in reasons()), 5, f"{why} in {reasons()}")


def test_a_result_of_an_unknown_order_costs_the_work_and_nothing_else(
    running: "Federation",
) -> None:
    raw = running.raw()
    raw.hello("odd")
    order = raw.hear("order")
    raw.say(result=result(order, zeros(order), order="o999999"))
    refusal = raw.hear("refusal")
    assert (refusal.code, refusal.order) == ("FL-W102", "o999999")
    raw.say(result=result(order, zeros(order)))  # its own order is as good as before
    assert raw.hear("receipt", "outcome").update == f"{order.id}.0"
    raw.say(result=result(order, zeros(order)))  # once more: it is here already
    assert raw.hear("receipt", "outcome").update == f"{order.id}.0"
    raw.say(ack=wire_pb2.Ack(updates=[f"{order.id}.0"]))
    raw.say(result=result(order, zeros(order)))  # the order is closed, and all is said about it
    assert raw.hear("refusal").code == "FL-W102"


def test_a_message_of_nonsense_ends_the_stream_of_its_client(
    running: "Federation", logged: Logged
) -> None:
    raw = running.raw()
    raw.hello("bad")
    order = raw.hear("order")
    raw.say(result=result(order, zeros(order), metrics={"loss": float("nan")}))
    assert raw.refused() == "FL-W101"
    assert "client=bad is cut off: FL-W101: malformed message: metric loss=nan" in logged.text


@pytest.mark.parametrize(
    "lie",
    [
        {"steps": 4},  # of 3
        {"steps": 0},
        {"examples": 10**18},
        {"train_seconds": -1.0},
        {"train_seconds": float("nan")},
        {"metrics": {f"m{i}": 0.0 for i in range(257)}},
    ],
    ids=str,
)
def test_what_cannot_have_happened_is_refused(
    running: "Federation", lie: Mapping[str, Any]
) -> None:
    raw = running.raw()
    raw.hello("bad")
    order = raw.hear("order")
    raw.say(result=result(order, zeros(order), **lie))
    assert raw.refused() == "FL-W101"
    assert not [row for row in running.history("update") if row["client"] == "bad"]


def test_a_million_metrics_are_no_message(running: "Federation") -> None:
    """They are cut off before anything is allocated for them."""
    raw = running.raw()
    raw.hello("bad")
    order = raw.hear("order")
    raw.say(result=result(order, zeros(order), metrics={f"m{i}": 0.0 for i in range(10**6)}))
    with contextlib.suppress(grpc.RpcError):
        for message in raw.stream:
            assert message.WhichOneof("kind") not in ("receipt", "outcome")
    assert not [row for row in running.history("update") if row["client"] == "bad"]


def test_a_training_longer_than_its_order_is_out_counts_as_long_as_that(
    running: "Federation",
) -> None:
    raw = running.raw()
    raw.hello("bad")
    order = raw.hear("order")
    raw.say(result=result(order, zeros(order), train_seconds=1e18))
    running.until(lambda: [r for r in running.history("update") if r["client"] == "bad"], 5, "it")
    (row,) = (r for r in running.history("update") if r["client"] == "bad")
    assert 0.0 <= row["train_seconds"] <= row["t"]


def test_a_client_counts_for_no_more_examples_than_the_run_lets_it(
    federation: "Federation",
) -> None:
    federation.local(strategy=ONE, most_examples=1000)
    for name, examples in (("many", 1 << 53), ("few", 7)):
        federation.raw().hello(name, examples=examples)
    federation.until(lambda: len(federation.history("join")) == 2, 10, "both")
    told = {row["client"]: row["examples"] for row in federation.history("join")}
    assert told == {"many": 1000, "few": 7}


# ---- uploads ---------------------------------------------------------------------------------


def chunk(blob: str, offset: int, data: bytes, crc: int | None = None) -> wire_pb2.Chunk:
    found = zlib.crc32(data) if crc is None else crc
    return wire_pb2.Chunk(blob=blob, offset=offset, crc32=found, data=data)


def refused(call: Any, *arguments: Any, raw: "Raw") -> str:
    with pytest.raises(grpc.RpcError) as error:
        call(*arguments, metadata=raw.metadata, timeout=10)
    found = error.value
    from_metadata = [value for key, value in found.trailing_metadata() if key == "atoll-error-bin"]
    assert from_metadata, found
    return str(wire_pb2.Refusal.FromString(from_metadata[0]).code)


def test_a_corrupt_or_truncated_upload_is_refused_and_can_be_sent_again(
    running: "Federation",
) -> None:
    raw = running.raw()
    raw.hello("shaky")
    order = raw.hear("order")
    data = zeros(order)
    described = result(order, b"")
    described.payload.size = len(data)
    blob = described.payload.id
    opened = wire_pb2.UploadOpen(result=described)
    assert raw.stub.OpenUpload(opened, metadata=raw.metadata).offset == 0

    def put(*chunks: wire_pb2.Chunk) -> str:
        return refused(raw.stub.PutChunks, iter(chunks), raw=raw)

    assert put(chunk(blob, 0, data, crc=1)) == "FL-W105"
    assert put(chunk(blob, 0, data[:1000])) == "FL-W111"  # a piece that is no whole chunk
    assert put(chunk("u/other", 0, data)) == "FL-W107"
    described.payload.sha256 = sha256(data).digest()
    commit = wire_pb2.UploadCommit(result=described)
    assert refused(raw.stub.CommitUpload, commit, raw=raw) == "FL-W111"  # nothing is held
    raw.stub.PutChunks(iter([chunk(blob, 0, data)]), metadata=raw.metadata)
    described.payload.sha256 = sha256(b"other").digest()
    assert (
        refused(raw.stub.CommitUpload, wire_pb2.UploadCommit(result=described), raw=raw)
        == "FL-W105"
    )
    assert raw.stub.OpenUpload(opened, metadata=raw.metadata).offset == 0  # from the start
    raw.stub.PutChunks(iter([chunk(blob, 0, data)]), metadata=raw.metadata)
    described.payload.sha256 = sha256(data).digest()
    assert raw.stub.CommitUpload(commit, metadata=raw.metadata).committed
    assert raw.stub.CommitUpload(commit, metadata=raw.metadata).committed
    outcome = raw.hear("outcome")
    assert (outcome.update, outcome.fate) == (f"{order.id}.0", wire_pb2.Outcome.USED)


def test_bulk_calls_of_strangers_and_of_the_expelled_are_refused(running: "Federation") -> None:
    raw = running.raw()
    stranger = wire_pb2.BlobRequest(blob="v0/fp32")

    def download(blob: wire_pb2.BlobRequest) -> str:
        return refused(lambda *a, **k: list(raw.stub.Download(*a, **k)), blob, raw=raw)

    assert download(stranger) == "FL-W110"
    raw.hello("bad")
    order = raw.hear("order")
    assert download(wire_pb2.BlobRequest(blob="../../etc/passwd")) == "FL-W107"
    described = result(order, b"")
    described.payload.size = 5
    opened = wire_pb2.UploadOpen(result=described)
    assert refused(raw.stub.OpenUpload, opened, raw=raw) == "FL-W101"  # its sections are larger
    del described.payload.sections[:]
    described.payload.size = 0
    assert refused(raw.stub.OpenUpload, opened, raw=raw) in ("FL-W101", "FL-W104")
    opened.result.CopyFrom(described)
    assert refused(raw.stub.OpenUpload, opened, raw=raw) == "FL-W104"
    assert raw.refused() == "FL-W104"  # the stream of one who sends that ends too
    assert download(stranger) == "FL-W110"


# ---- trainers --------------------------------------------------------------------------------


class Bad:
    """A trainer that does one thing wrong."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.tensors: Mapping[str, Tensor] = {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if self.what == "load":
            raise RuntimeError("no memory")
        if self.what == "misfit":
            raise ValueError("weight: (3,) is not (4,)")
        self.tensors = {name: value.clone() for name, value in tensors.items()}

    def train(self, task: Task) -> Trained:
        if self.what == "train":
            raise RuntimeError("a cable is loose")
        wrong = float("nan") if self.what == "nan" else 0.0
        tensors = {name: value + wrong for name, value in self.tensors.items()}
        if self.what == "names":
            tensors.pop(sorted(tensors)[0])
        return Trained(tensors, task.steps, task.steps, {})

    def evaluate(self) -> Mapping[str, float]:
        return {}


@pytest.mark.parametrize(
    ("what", "code", "word"),
    [
        ("train", "FL-C104", "a cable is loose"),
        ("load", "FL-C104", "no memory"),
        ("misfit", "FL-C103", "does not fit"),
        ("nan", "FL-W106", ""),
        ("names", "FL-C103", "is missing"),
    ],
)
def test_a_trainer_that_fails_takes_its_client_out_of_the_run(
    running: "Federation", what: str, code: str, word: str
) -> None:
    bad = running.guest(Client(running.address, Bad(what), name="bad"))
    error = failed(bad)
    assert error.code == code
    assert error.hint
    assert word in error.message
    has_left(running, code)


# ---- a full disk -----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


def test_a_client_that_starts_on_a_full_disk_says_so(
    running: "Federation", small_disk: Path
) -> None:
    """It ended without a word, by SIGBUS."""
    fill(small_disk)
    client = running.client("bad", "--dir", str(small_disk / "mine"))
    code, exit_code, message = client.failure()
    assert (code, exit_code) == ("FL-S203", 74)
    assert "No space left" in message


def test_an_upload_for_which_there_is_no_room_waits_and_both_sides_say_so_once(
    federation: "Federation", monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    """Nobody said anything, and the run stood still."""
    looks: list[int] = []
    room = [1 << 20]

    def free(folder: Path) -> int:
        looks.append(room[0])
        return room[0]

    monkeypatch.setattr("atoll.server.room.RETRY", 0.05)
    monkeypatch.setattr("atoll.server.server.Uploads", partial(Uploads, free=free))
    local = federation.local(Rules(versions=2), strategy=ONE, model="mlp:hidden=4000")
    guest = federation.digits("big")
    federation.until(lambda: len(looks) > 6, 30, "refused three times")
    room[0] = 1 << 40
    local.ended()
    guest.ended()
    lines = [line for line in logged.text.splitlines() if " waits" in line]
    told = [line for line in lines if line.startswith("client=big update=o0.0 waits: no room: ")]
    assert len(told) == 1, lines
    assert f"{1 << 20} bytes are free" in told[0]
    assert len([line for line in lines if "waits for room" in line]) == 1
    assert len(lines) == 2


@pytest.mark.parametrize("part", ["all", "versions", "journal.sqlite", "history.jsonl", "rows"])
def test_a_full_disk_stops_the_run_and_loses_nothing(
    federation: "Federation", small_disk: Path, part: str
) -> None:
    """The whole state directory, or one part of it that lies on a disk of its own."""
    options: dict[str, Any] = {"strategy": ONE, "keep": 2, "algorithm": "scaffold:table=server"}
    if part == "all":
        federation.state = small_disk / "state"
    else:
        begun = federation.local(**options)
        begun.server.stop()
        begun.ended()
        shutil.move(federation.state / part, small_disk / part)
        (federation.state / part).symlink_to(small_disk / part)
    local = federation.local(**options)
    assert local.error is None
    guest = federation.digits("good", slowdown=0.002)
    wait(federation, 3)
    ballast = fill(small_disk)
    local.join(20)
    assert local.error is not None
    assert local.error.code == "FL-S203"
    assert "free space" in local.error.hint
    assert guest.is_alive()  # it waits for the server
    refused = federation.local(**options)
    refused.join(20)
    assert refused.error is not None, "it started on a full disk"
    assert refused.error.code == "FL-S203"
    ballast.unlink()
    before = federation.ledger().versions
    federation.local(Rules(versions=len(before) + 5), **options).ended()
    guest.ended()
    ledger = federation.ledger()
    ledger.check()
    assert ledger.versions[: len(before)] == before
