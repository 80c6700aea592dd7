"""Chains of models: server and clients hold the same bits, whoever comes, goes and skips."""

import hashlib
from pathlib import Path

import pytest
import torch

from atoll.client.holding import Holding
from atoll.protocols import chains, wire_pb2
from atoll.protocols.blobs import BlobInfo
from atoll.protocols.codecs import codec
from atoll.protocols.errors import ClientError, RemoteError
from atoll.protocols.links import Allowed, Link
from atoll.protocols.manifest import Manifest, TensorSpec
from atoll.protocols.sent import Sent, sent_from_wire, sent_to_order
from atoll.server.links import Links
from atoll.server.versions import VersionStore

MANIFEST = Manifest(
    (
        TensorSpec("w", (40, 5), "float32", "trainable"),
        TensorSpec("mean", (3,), "float32", "buffers_float"),
        TensorSpec("count", (), "int64", "buffers_other"),
    )
)
HALF = Link("fp32", "fp16")


class Server:
    """Versions that wander, and the links of a life of a server."""

    def __init__(self, folder: Path, limit: int, codecs: str = "fp16") -> None:
        self.folder, self.codecs = folder, codecs
        self.store = VersionStore(folder / "versions", MANIFEST, memory_limit=limit)
        self.random = torch.Generator().manual_seed(7)
        self.newest = 0
        self.store.initial(
            {"w": torch.randn(40, 5), "mean": torch.zeros(3), "count": torch.tensor(0)}
        )
        self.restart()

    def restart(self) -> None:
        self.links = Links(Allowed.of("fp32", self.codecs), self.store, self.folder / "chains")

    def step(self) -> None:
        before = self.store.open(self.newest)
        self.newest += 1
        draft = self.store.draft(self.newest, before.number)
        moved = before.flat("trainable") + 0.01 * torch.randn(200, generator=self.random)
        draft.write("trainable", 0, moved)
        draft.write("buffers_float", 0, torch.full((3,), float(self.newest)))
        draft.write("buffers_other", 0, torch.tensor([self.newest]))
        draft.seal()
        self.links.follow(self.newest)
        self.links.keep(())
        self.store.prune(range(self.newest - 3, self.newest + 1))


class Client:
    def __init__(self, server: Server, folder: Path, link: Link = HALF) -> None:
        self.server, self.link = server, link
        self.holding = Holding(MANIFEST, folder)
        self.told: tuple[str, int] | None = None  # what the server takes it to hold
        self.down = 0
        self.wholes = 0
        server.links.agreed(folder.name, link)
        folder.mkdir(exist_ok=True)

    def fetch(self, info: BlobInfo, dest: memoryview) -> None:
        blob = self.server.links.find(info.id)
        assert hashlib.sha256(blob.view).digest() == info.sha256
        dest[:] = blob.view

    def take(self, number: int | None = None) -> bytes:
        """The model of an order, as it travels; the bytes that the client then trains from."""
        server = self.server
        number = server.newest if number is None else number
        size = server.links.size(self.link, number, self.told)
        load = server.links.load(self.link, number, server.newest, self.told)
        if self.told is not None:
            assert size == load.size
        self.down += load.size
        self.wholes += load.sent.model is not None
        wire = sent_to_order(load.sent)
        wire.version = number
        sent = sent_from_wire(wire_pb2.Order.FromString(wire.SerializeToString()))
        assert sent == load.sent
        payload = self.holding.take(sent, self.fetch, server.links.codecs[self.link.down])
        self.told = self.holding.held
        return bytes(payload.view)


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_all_on_a_codec_hold_the_same_bits_after_50_versions(tmp_path: Path, limit: int) -> None:
    """One takes every version, one every second, one whenever it likes; one begins late; the
    server is restarted once, and one client twice."""
    server = Server(tmp_path, limit)
    steady, second, odd = (Client(server, tmp_path / name) for name in "abc")
    late: Client | None = None
    drift = 0.0
    for number in range(1, 51):
        server.step()
        if number == 20:
            server.restart()
            for client, name in ((steady, "a"), (second, "b"), (odd, "c")):
                server.links.agreed(name, HALF)
                client.told = client.holding.held  # as its hello says
        if number in (10, 33):
            odd = Client(server, tmp_path / "c")  # its process was killed
        if number == 40:
            late = Client(server, tmp_path / "d")
        seen = [steady.take()]
        seen += [second.take()] if number % 2 == 0 else []
        seen += [odd.take()] if number % 7 in (0, 3) else []
        seen += [late.take()] if late is not None else []
        assert len(set(seen)) == 1, f"version {number} is not the same for all"
        plain = bytes(server.store.open(number).view)
        drift = max(drift, distance(seen[0], plain))
        assert seen[0][-20:] == plain[-20:]  # buffers are exact values
    assert 0 < drift < 1e-4  # fp16 of differences of 0.01: it does not add up over 50 versions
    assert steady.wholes == 2  # at first, and after the restart
    assert steady.down < 0.6 * 50 * len(server.store.open(50).view)
    assert late is not None
    assert late.wholes == 1


def distance(one: bytes, other: bytes) -> float:
    a, b = (torch.frombuffer(bytearray(data[:800]), dtype=torch.float32) for data in (one, other))
    return float((a - b).abs().max())


@pytest.mark.parametrize("spec", ["int8", "topk:0.05", "int4+zstd", "sign"])
@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_every_codec_makes_a_chain(tmp_path: Path, limit: int, spec: str) -> None:
    server = Server(tmp_path, limit, spec)
    steady, lazy = (Client(server, tmp_path / n, Link("", spec)) for n in "ab")
    for number in range(12):
        server.step()
        bits = {steady.take()} | ({lazy.take()} if number % 3 == 2 else set())
        assert len(bits) == 1
    assert steady.wholes == lazy.wholes == 1
    assert steady.down < 9 * len(bytes(server.store.open(12).view))


@pytest.mark.parametrize("spec", ["randomk:0.2", "randomk:0.2+zstd", "topk:0.2", "sign", "ternary"])
def test_a_chain_stays_near_the_model_however_long_it_is(tmp_path: Path, spec: str) -> None:
    """Random-k made up in each difference for what it left out of it, which the next one sends all
    the same: after 40 versions of a model of length 5 its clients held one of length 1e8."""
    server = Server(tmp_path, 1 << 20, spec)
    client = Client(server, tmp_path / "a", Link("", spec))
    for _ in range(40):
        server.step()
        seen = client.take()
    assert distance(seen, bytes(server.store.open(40).view)) < 0.3  # a version moves it by 0.01


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_what_is_kept_is_bounded(tmp_path: Path, limit: int) -> None:
    server = Server(tmp_path, limit)
    client = Client(server, tmp_path / "a")
    client.take()
    for _ in range(30):
        server.step()
    whole = len(server.store.open(server.newest).view)
    files = list((tmp_path / "chains").glob("*/*"))
    assert sum(f.stat().st_size for f in files) <= 3 * whole
    assert bool(files) == (limit == 0)
    server.links.left("a")
    assert not list((tmp_path / "chains").glob("*/*")), "the chain of nobody is given up"


def test_an_order_of_a_version_from_before_the_chain_is_sent_exactly(tmp_path: Path) -> None:
    server = Server(tmp_path, 1 << 20)
    first = Client(server, tmp_path / "a")
    for _ in range(2):
        server.step()
    first.take()
    back = Client(server, tmp_path / "b")
    assert back.take(1) == bytes(server.store.open(1).view)
    assert back.holding.held == ("fp16/1", 1)
    server.step()
    assert back.take() == first.take()
    assert back.wholes == 2


def test_a_chain_that_stood_still_too_long_begins_anew(tmp_path: Path) -> None:
    server = Server(tmp_path, 1 << 20)
    client = Client(server, tmp_path / "a")
    client.take()
    server.links.follow = lambda number: None  # type: ignore[method-assign]
    for _ in range(6):
        server.step()
    assert client.take() == bytes(server.store.open(6).view)
    assert client.holding.held == ("fp16/6", 6)


def test_every_codec_has_a_chain_of_its_own(tmp_path: Path) -> None:
    server = Server(tmp_path, 1 << 20, "fp16/bf16")
    fine, coarse = Client(server, tmp_path / "a"), Client(server, tmp_path / "b", Link("", "bf16"))
    plain = Client(server, tmp_path / "c", Link("", "fp32"))
    for client in (fine, coarse, plain):
        client.take()
    for _ in range(3):
        server.step()
        models = [client.take() for client in (fine, coarse, plain)]
    assert len(set(models)) == 3
    assert models[2] == bytes(server.store.open(3).view)
    assert distance(models[0], models[2]) < distance(models[1], models[2])


def test_the_same_version_again_costs_nothing(tmp_path: Path) -> None:
    server = Server(tmp_path, 1 << 20)
    client = Client(server, tmp_path / "a")
    first, size = client.take(), client.down
    assert client.take() == first
    assert client.down == size


def test_a_difference_to_what_is_not_held_is_found_out(tmp_path: Path) -> None:
    server = Server(tmp_path, 1 << 20)
    client = Client(server, tmp_path / "a")
    client.take()
    server.step()
    client.holding = Holding(MANIFEST, None)  # it lost its memory, and the server does not know
    with pytest.raises(ClientError, match="held is none") as lost:
        client.take()
    assert lost.value.code == "FL-C109"
    client.told = client.holding.held
    client.take()
    behind = Sent(0, None, b"", "fp16/0@0", ())
    with pytest.raises(ClientError, match="difference to fp16/0@0"):
        client.holding.take(behind, client.fetch, codec("fp16"))


def test_what_has_been_added_before_is_not_added_twice(tmp_path: Path) -> None:
    """The server hears of what a client holds when it says hello, and it may have gone on since."""
    server = Server(tmp_path, 1 << 20)
    client = Client(server, tmp_path / "a")
    client.take()
    told = client.told
    server.step()
    client.take()
    server.step()
    client.told = told
    assert client.take() == server.links._chains["fp16"].view(2).tobytes()


def test_a_blob_that_is_not_kept_is_unknown(tmp_path: Path) -> None:
    server = Server(tmp_path, 1 << 20)
    Client(server, tmp_path / "a").take()
    assert server.links.find("v0/fp32").info.id == "v0/fp32"
    for blob in ("v9/fp32", "v1/fp16/0/d", "v0/zip"):
        with pytest.raises(RemoteError) as unknown:
            server.links.find(blob)
        assert unknown.value.code == "FL-W107"


@pytest.mark.parametrize(
    "order",
    [
        wire_pb2.Order(version=3, differences=[wire_pb2.Blob(id="b")]),  # to nothing
        wire_pb2.Order(version=3, base_encoding="fp16/0@1"),  # one is missing
        wire_pb2.Order(version=3, base_encoding="fp16/0@3", model=wire_pb2.Blob(id="b")),
        wire_pb2.Order(version=3, base_encoding="fp16"),  # no label
    ],
)
def test_a_model_that_cannot_be_put_together_is_malformed(order: wire_pb2.Order) -> None:
    with pytest.raises(RemoteError) as wrong:
        sent_from_wire(order)
    assert wrong.value.code == "FL-W101"


def test_what_is_held_is_said_and_read_again() -> None:
    assert chains.heard(chains.spoken("topk:0.01/3", 7)) == ("topk:0.01/3", 7)
    assert chains.heard("topk:0.01/3") is None


@pytest.mark.parametrize("limit", [0, 1 << 20])
@pytest.mark.parametrize("how", ["fetched", "looked at"])
def test_a_model_that_somebody_reads_is_never_written_over(
    tmp_path: Path, limit: int, how: str
) -> None:
    server = Server(tmp_path, limit, "int8")
    steady = Client(server, tmp_path / "a", Link("", "int8"))
    steady.take()
    server.step()
    steady.take()
    if how == "fetched":
        Client(server, tmp_path / "b", Link("", "int8")).take()  # it is new: all of x^ for it
        read = server.links.find("v1/int8/0").view
    else:
        found = server.links.view(Link("", "int8"), 1, "int8/0")
        assert found is not None
        read = found
    before = bytes(read)
    for _ in range(4):
        server.step()
        steady.take()
    assert bytes(read) == before


def test_a_model_that_nobody_has_seen_is_written_over(tmp_path: Path) -> None:
    """A chain that all follow makes no new file for its model, version after version."""
    server = Server(tmp_path, 0, "int8")
    client = Client(server, tmp_path / "a", Link("", "int8"))
    client.take()
    used = set()
    for _ in range(8):
        server.step()
        client.take()
        used |= {file.stat().st_ino for file in (tmp_path / "chains").glob("*/*.whole")}
    assert len(used) == 2
