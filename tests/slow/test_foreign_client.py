"""A client of another house: the generated stub, `wire.proto`'s comments, and nothing of ours.

`Foreign` is what someone would write in Go or Swift: it knows protobuf, gRPC, SHA-256 and CRC-32,
fits a linear model by hand, and takes part in a run beside one of our own clients.
"""

import contextlib
import hashlib
import math
import queue
import struct
import threading
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from atoll.protocols import wire_pb2 as wire
from atoll.protocols.wire_pb2_grpc import AtollStub
from atoll.server.rules import Rules

if TYPE_CHECKING:
    from tests.slow.conftest import Federation

pytestmark = pytest.mark.slow

Row = tuple[list[float], int]  # features, label


class Foreign(threading.Thread):
    """Softmax regression on rows of (features, label), by plain gradient descent."""

    def __init__(
        self, address: str, rows: list[Row], *, inline: bool = True, held: Sequence[Row] = ()
    ) -> None:
        super().__init__(daemon=True)
        self.rows = rows
        self.held = held  # to judge models by
        self.inline = inline  # False: send even small results as blobs
        self.stub = AtollStub(grpc.insecure_channel(address))  # type: ignore[no-untyped-call]
        self.say: queue.Queue[wire.ClientMessage | None] = queue.Queue()
        self.fates: list[int] = []
        self.trained: list[str] = []
        self.answered: list[str] = []
        self.goodbye: wire.Goodbye | None = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.converse()
        except BaseException as error:  # noqa: BLE001 - for the test to see
            self.error = error

    def converse(self) -> None:
        hello = wire.Hello(
            protocol=1, client="foreign", node="01HZX0000000000000000FRGN0",
            examples=len(self.rows), capabilities=["fp32", *(["validate"] if self.held else [])],
        )  # fmt: skip
        self.say.put(wire.ClientMessage(hello=hello))
        for message in self.stub.Control(iter(self.say.get, None)):
            match message.WhichOneof("kind"):
                case "welcome":
                    self.welcome = message.welcome
                case "order":
                    self.work(message.order)
                case "question":
                    self.answer(message.question)
                case "outcome":
                    self.fates.append(message.outcome.fate)
                    ack = wire.Ack(updates=[message.outcome.update])
                    self.say.put(wire.ClientMessage(ack=ack))
                case "goodbye":
                    self.goodbye = message.goodbye
                    return

    # ---- one order

    def work(self, order: wire.Order) -> None:
        start = self.read(order.model)
        local, loss = self.descend(list(start), order.steps)
        delta = [before - after for before, after in zip(start, local, strict=True)]
        self.trained.append(order.id)
        result = wire.Result(
            order=order.id, attempt=order.attempt, steps=order.steps, train_seconds=0.01,
            examples=order.steps * len(self.rows), metrics={"loss": loss}, final=True,
        )  # fmt: skip
        self.send(result, f"u/{order.id}", delta)

    def answer(self, question: wire.Question) -> None:
        """What the model makes of rows that it is not trained on."""
        gradient, loss = slope(self.read(question.model), self.held)
        self.answered.append(question.id)
        result = wire.Result(
            question=question.id, examples=len(self.held), metrics={"loss": loss}, final=True
        )
        if question.gradient:
            self.send(result, f"u/{question.id}", gradient)
        else:
            self.say.put(wire.ClientMessage(result=result))

    def read(self, model: wire.Blob) -> list[float]:
        packed = model.inline or self.download(model)
        (section,) = model.sections  # this model has no buffers
        assert (section.group, section.codec) == ("trainable", "fp32")
        return list(struct.unpack(f"<{section.count}f", packed))

    def send(self, result: wire.Result, name: str, values: list[float]) -> None:
        data = struct.pack(f"<{len(values)}f", *values)
        section = wire.Section(group="trainable", codec="fp32", count=len(values), length=len(data))
        result.payload.CopyFrom(wire.Blob(
            id=name, size=len(data), sections=[section], sha256=hashlib.sha256(data).digest(),
        ))  # fmt: skip
        if self.inline and len(data) <= self.welcome.inline_limit:
            result.payload.inline = data
            self.say.put(wire.ClientMessage(result=result))
            return
        with contextlib.suppress(grpc.RpcError):  # refused: the order is not wanted any more
            self.upload(result, data)

    def upload(self, result: wire.Result, data: bytes) -> None:
        metadata = (("atoll-session", self.welcome.session),)
        opened = self.stub.OpenUpload(wire.UploadOpen(result=result), metadata=metadata)
        self.stub.PutChunks(iter(self.chunks(opened.blob, data, opened.offset)), metadata=metadata)
        commit = wire.UploadCommit(result=result)
        assert self.stub.CommitUpload(commit, metadata=metadata).committed

    def chunks(self, blob: str, data: bytes, offset: int) -> list[wire.Chunk]:
        size = self.welcome.chunk_bytes
        pieces = [(at, data[at : at + size]) for at in range(offset, len(data), size)]
        return [
            wire.Chunk(
                blob=blob, offset=at, crc32=zlib.crc32(piece), last=at + len(piece) == len(data),
                data=piece,
            )
            for at, piece in pieces
        ]  # fmt: skip

    def download(self, model: wire.Blob) -> bytes:
        data = b""
        request = wire.BlobRequest(blob=model.id)
        metadata = (("atoll-session", self.welcome.session),)
        for chunk in self.stub.Download(request, metadata=metadata):
            assert zlib.crc32(chunk.data) == chunk.crc32
            data += chunk.data
        assert hashlib.sha256(data).digest() == model.sha256
        return data

    def descend(self, weights: list[float], steps: int) -> tuple[list[float], float]:
        loss = 0.0
        for _ in range(steps):
            gradient, loss = slope(weights, self.rows)
            weights = [w - 0.5 * g for w, g in zip(weights, gradient, strict=True)]
        return weights, loss


def slope(weights: list[float], rows: Sequence[Row]) -> tuple[list[float], float]:
    """The mean loss and its gradient by (classes, features) weights, then (classes,) biases, flat,
    as the manifest says."""
    features, classes = len(rows[0][0]), len(weights) // (len(rows[0][0]) + 1)
    biases = classes * features
    gradient, loss = [0.0] * len(weights), 0.0
    for x, label in rows:
        scores = [
            weights[biases + c]
            + sum(map(float.__mul__, weights[c * features : (c + 1) * features], x))
            for c in range(classes)
        ]
        top = max(scores)
        powers = [math.exp(s - top) for s in scores]
        total = sum(powers)
        loss -= math.log(powers[label] / total) / len(rows)
        for c in range(classes):
            error = (powers[c] / total - (c == label)) / len(rows)
            gradient[biases + c] += error
            for f, value in enumerate(x):
                gradient[c * features + f] += error * value
    return gradient, loss


def digits(count: int) -> list[Row]:
    """Rows as another house would read them from its own files."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    pairs = zip(found.data[:count], found.target[:count], strict=True)
    return [([float(v) / 16 for v in x], int(y)) for x, y in pairs]


@pytest.mark.parametrize("inline", [True, False])
def test_a_client_written_from_the_wire_format_alone_takes_part(
    federation: "Federation", inline: bool
) -> None:
    local = federation.local(
        Rules(versions=6), strategy="fedavg:steps=3,min_clients=2", model="linear"
    )
    assert local.error is None
    foreign = Foreign(federation.address, digits(60), inline=inline)
    ours = federation.digits("ours", (1, 4))
    summary = local.ended()
    foreign.join(10)
    assert foreign.error is None, foreign.error
    assert ours.ended().used == 6
    assert foreign.goodbye is not None
    assert foreign.goodbye.done
    assert foreign.fates[:6] == [wire.Outcome.USED] * 6
    assert len(set(foreign.trained[:6])) == 6
    assert summary.metrics["accuracy"] > 0.6
    ledger = federation.ledger()
    ledger.check()
    assert sum(fate.startswith("used") for fate in ledger.fates) == 12


@pytest.mark.parametrize("inline", [True, False])
def test_a_client_written_from_the_wire_format_alone_judges_models(
    federation: "Federation", inline: bool
) -> None:
    local = federation.local(
        Rules(versions=2), strategy="fedavg:steps=3,min_clients=2", model="linear",
        aggregator="fedlaw:no_proxy=validators,mode=lambda",
    )  # fmt: skip
    rows = digits(80)
    foreign = Foreign(federation.address, rows[:60], inline=inline, held=rows[60:])
    federation.digits("ours", (1, 4)).ended()
    local.ended()
    foreign.join(10)
    assert foreign.error is None, foreign.error
    assert [row["stats"]["validators"] for row in federation.history("merged")] == [2, 2]
    assert len(set(foreign.answered)) == 2 * 6
    assert not federation.history("not-asked")


def test_the_welcome_says_all_that_a_foreign_client_must_know(federation: "Federation") -> None:
    federation.local(strategy="fedavg:min_clients=2", model="linear", lease=5.0)
    welcome = federation.raw().hello("curious")
    assert '"model": "linear"' in welcome.spec
    assert '"shape": [10, 64]' in welcome.manifest
    assert (welcome.chunk_bytes, welcome.inline_limit) == (1 << 20, 256 << 10)
    assert (welcome.lease_seconds, welcome.up_codec, welcome.down_codec) == (5.0, "fp32", "fp32")
    assert 0 < welcome.heartbeat_seconds < welcome.lease_seconds / 2
