"""FedLAW with real processes: a demo reaches its target, bad proxy data end a start at once, and
validators that lie, die or lose their server leave the run as it should be."""

import json
import math
import shutil
import struct
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from atoll.protocols import wire_pb2
from atoll.protocols.blobs import INLINE
from atoll.protocols.ids import ulid
from atoll.server.assembly import Assembly
from atoll.server.history import History
from atoll.server.rules import Rules
from atoll.server.spec import RunSpec
from atoll.server.uploads import Uploads
from tests.slow.conftest import code_of

if TYPE_CHECKING:
    from tests.slow.conftest import Federation, Raw

pytestmark = pytest.mark.slow

ASKS = "fedlaw:no_proxy=validators,mode=lambda"


def test_the_demo_reaches_its_target(federation: "Federation") -> None:
    """FedCompass merges singles too, which are not learned on; its groups are."""
    demo = federation.command(
        "demo", "fl-server", "demo", "--strategy", "fedcompass", "--aggregator", "fedlaw",
        "--out", "made", "--json",
    )  # fmt: skip
    told = demo.data(300)
    assert told["reached"]
    assert told["accuracy"] >= 0.95
    folder = demo.out.parent / "made"
    assert (folder / "shares.png").stat().st_size > 1000
    history = History.read(folder / "history.jsonl")
    assert history.taken, "nothing was learned"
    for taken in history.taken:
        assert sum(share for share, _ in taken.shares.values()) == pytest.approx(1)
        assert taken.gamma is not None
    merged = [row["stats"] for row in history.rows if row["kind"] == "merged"]
    assert all("fallback" in stats or "proxy_loss" in stats for stats in merged)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--aggregator", "fedlaw"), "FL-S104"),
        (("--aggregator", ASKS, "--local-dp", "clip=1,noise=1"), "FL-S104"),
        (("--proxy", "digits"), "FL-S104"),
        (("--aggregator", "fedlaw", "--proxy", "digits:take=5"), "FL-D107"),
        (("--aggregator", "fedlaw", "--proxy", "synthetic"), "FL-D106"),
    ],
)
def test_a_server_that_cannot_learn_does_not_start(
    federation: "Federation", options: tuple[str, ...], code: str
) -> None:
    start = federation.command(
        "start", "fl-server", "start", "--listen", "127.0.0.1:0", "--state", "state", "--json",
        *options,
    )  # fmt: skip
    assert start.error(60) == code
    assert not (start.out.parent / "state" / "run.json").exists()


# ---- validators ----------------------------------------------------------------------------------


@pytest.mark.long
def test_the_demo_reaches_its_target_by_the_word_of_its_clients(federation: "Federation") -> None:
    demo = federation.command(
        "demo", "fl-server", "demo", "--strategy", "fedcompass", "--aggregator", ASKS,
        "--out", "made", "--json",
    )  # fmt: skip
    told = demo.data(300)
    assert told["reached"]
    history = History.read(demo.out.parent / "made" / "history.jsonl")
    merged = [row["stats"] for row in history.rows if row["kind"] == "merged"]
    asked = [stats for stats in merged if "fallback" not in stats]
    assert asked, "nothing was learned"
    assert all(stats["validators"] >= 2 for stats in asked)
    assert not [row for row in history.rows if row["kind"] in ("unjudged", "not-asked")]


def merged(federation: "Federation") -> list[dict[str, float]]:
    return [row["stats"] for row in federation.history("merged")]


@pytest.mark.parametrize("model", ["mlp", "mlp:hidden=1200"])
def test_what_it_costs(federation: "Federation", model: str) -> None:
    """A merge of five steps: six models down and five gradients up for each validator, inline or,
    of a larger net, by the calls for large ones."""
    local = federation.local(
        strategy="fedavg:steps=5,rounds=2,min_clients=3", aggregator=ASKS, model=model,
        evaluate_every=0,
    )  # fmt: skip
    for guest in [federation.digits(f"c{i}", (i, 3)) for i in range(3)]:
        guest.ended(60)
    local.ended(60)
    assert [stats["validators"] for stats in merged(federation)] == [3, 3]
    assert local.server._assembly is not None
    host = local.server._assembly.host
    size = host.outgoing.model_size
    assert (size > INLINE) == (model != "mlp")
    for i in range(3):  # of two merges, and two orders
        traffic = host.outgoing.counted(f"c{i}")
        assert (traffic.down, traffic.up) == (2 * (1 + 6) * size, 2 * (1 + 5) * size)


HANGS = """
import time
from pathlib import Path
from atoll.client.specs import make_trainer

class Hanging:
    def judge(self, model, gradient, batch_statistics):
        Path("asked").touch()
        time.sleep(600)

def trainer(client, shard, seed):
    made = make_trainer("mlp", "digits", "iid", shard, seed, client=client)
    made.validator = Hanging()
    return made
"""


def test_one_that_is_killed_in_the_middle_of_a_question_holds_nobody_up(
    federation: "Federation",
) -> None:
    (federation.folder / "hangs.py").write_text(HANGS)
    strategy = "fedavg:steps=20,rounds=3,min_clients=3"
    local = federation.local(strategy=strategy, aggregator=f"{ASKS},deadline=120", lease=3.0)
    guests = [federation.digits(f"c{i}", (i, 3)) for i in range(2)]
    doomed = federation.client("c2", "--trainer", "hangs:trainer", "--shard", "2/3")
    federation.until((federation.folder / "asked").exists, 60)
    assert federation.merged() == 0
    doomed.kill()
    summary = local.ended(60)
    for guest in guests:
        guest.ended(60)
    assert summary.versions == 3
    assert merged(federation)[0]["validators"] == 2


class Liar:
    """A client by hand that trains as told, and says of models what it likes."""

    def __init__(self, federation: "Federation", name: str) -> None:
        self.raw: Raw = federation.raw()
        self.welcome = self.raw.hello(name, capabilities=["fp32", "validate"], node=ulid())

    def result(self, **fields: Any) -> wire_pb2.Result:
        return wire_pb2.Result(final=True, examples=10, metrics={"loss": 1.0}, **fields)

    def train(self) -> int:
        """Elements of the model."""
        order = self.raw.hear("order")
        count = int(order.model.sections[0].count)
        payload = self.slope(count, 0.0)
        told = self.result(order=order.id, steps=order.steps, payload=payload)
        self.raw.say(result=told)
        return count

    @staticmethod
    def slope(count: int, value: float) -> wire_pb2.Blob:
        data = struct.pack(f"<{count}f", *[value] * count)
        section = wire_pb2.Section(group="trainable", codec="fp32", count=count, length=len(data))
        return wire_pb2.Blob(id="u/x", size=len(data), sections=[section], inline=data)


def test_liars_are_found_out_and_train_on(federation: "Federation") -> None:
    """NaN, another shape, and one of 1e20 that is cut to the middle one's length."""
    local = federation.local(
        strategy="fedavg:steps=20,rounds=1,min_clients=5", aggregator=ASKS, lease=60.0
    )
    guests = [federation.digits(f"c{i}", (i, 2)) for i in range(2)]
    nan, odd, huge = (Liar(federation, name) for name in ("nan", "odd", "huge"))
    count = max(liar.train() for liar in (nan, odd, huge))
    said = nan.raw.hear("question")
    assert said.gradient
    nan.raw.say(result=nan.result(question=said.id, payload=nan.slope(count, math.nan)))
    said = odd.raw.hear("question")
    wrong = odd.slope(count + 1, 1.0)
    wrong.inline = b""
    with pytest.raises(grpc.RpcError) as refused:
        odd.raw.stub.OpenUpload(
            wire_pb2.UploadOpen(result=odd.result(question=said.id, payload=wrong)),
            metadata=odd.raw.metadata, timeout=10,
        )  # fmt: skip
    assert code_of(refused.value) == "FL-W104"
    for _ in range(6):
        said = huge.raw.hear("question")
        payload = huge.slope(count, 1e15) if said.gradient else None
        huge.raw.say(result=huge.result(question=said.id, payload=payload))
    local.ended(60)
    for guest in guests:
        guest.ended(60)
    (stats,) = merged(federation)
    assert stats["validators"] == 3
    whose = {row["order"]: row["client"] for row in federation.history("train")}
    shares = {whose[k[7:].partition(".")[0]]: v for k, v in stats.items() if k[:7] == "lambda/"}
    assert len(shares) == 5
    assert all(shares[c] > 0.05 for c in ("c0", "c1"))
    told = {row["client"]: row["reason"] for row in federation.history("not-asked")}
    assert sorted(told) == ["nan", "odd"]
    assert "FL-W106" in told["nan"]
    assert "FL-W104" in told["odd"]


def test_a_server_killed_with_the_newest_versions_lost_makes_them_bit_by_bit(
    federation: "Federation",
) -> None:
    options = ("--strategy", "fedavg:steps=20,rounds=40,min_clients=3", "--aggregator", ASKS,
               "--lease", "60", "--lr", "0.05")  # fmt: skip
    server = federation.server(*options)
    clients = [federation.client(f"c{i}", "--shard", f"{i}/3") for i in range(3)]
    federation.until(lambda: federation.merged() >= 4, 60)
    server.kill()
    for client in clients:
        client.kill()
    versions = federation.state / "versions"
    saved = {int(path.name): path for path in versions.iterdir() if path.name.isdecimal()}
    known = federation.merged()
    lost = max(number for number in saved if number <= known)
    before = json.loads((saved[lost] / "version.json").read_text())["sha256"]
    for number, path in saved.items():
        if number >= lost:
            shutil.rmtree(path)
    spec, uploads = RunSpec.read(federation.state / "run.json"), federation.state / "updates"
    made = Assembly(spec, federation.state, Rules(), Uploads(uploads), {}, None, None)
    assert made.store.open(lost).sha256.hex() == before
    made.store.save(made.store.open(lost))  # what this look took up is kept for the next life
    made.workshop.merger.close()
    made.journal.abandon()
    made.ledger.close()
    federation.server(*options)
    clients = [federation.client(f"c{i}", "--shard", f"{i}/3") for i in range(3)]
    # The next one may have been in the middle of its merge, and asks whoever is back by then; the
    # one after it has updates of all three.
    federation.until(lambda: federation.merged() >= known + 3, 60)
    assert merged(federation)[-1]["validators"] == 3
