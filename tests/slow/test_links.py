"""Codecs agreed per client, in one run: who packs how, who holds what, and who lies."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from atoll.client.client import Client
from atoll.client.data import load_data
from atoll.client.models import build
from atoll.client.options import Options, maker
from atoll.client.trainer import Task, Trained
from atoll.client.training import Job
from atoll.client.work import Workbench
from atoll.protocols import wire_pb2
from atoll.protocols.messages import Order, Result
from atoll.server.rules import Rules

if TYPE_CHECKING:
    from tests.slow.conftest import Federation

pytestmark = pytest.mark.slow


class Witness(Client):
    """A client that writes down what it held when it trained: version -> SHA-256."""

    def see(self) -> dict[int, set[str]]:
        self.held: dict[int, set[str]] = {}
        self.wholes = 0
        inner = self._training._train

        def seeing(bench: Workbench, job: Job) -> Result:
            return self._watched(inner, bench, job)

        self._training._train = seeing  # type: ignore[method-assign]
        return self.held

    def _ordered(self, order: Order) -> None:
        self.wholes += order.model is not None
        super()._ordered(order)

    def _watched(
        self, inner: Callable[[Workbench, Job], Result], bench: Workbench, job: Job
    ) -> Result:
        trainer = bench.trainer
        train = trainer.train

        def seen(task: Task) -> Trained:
            version = job.order.version
            model = bench.holding._model
            data = job.order.inline if model is None else model
            self.held.setdefault(version, set()).add(hashlib.sha256(data).hexdigest())
            return train(task)

        trainer.train = seen  # type: ignore[method-assign]
        try:
            return inner(bench, job)
        finally:
            trainer.train = train  # type: ignore[method-assign]


def witness(federation: "Federation", name: str, index: int, codec: str = "") -> Witness:
    options = Options(name, data="digits", shard=(index, 3), slowdown=0.002)
    folder = federation.folder / name
    made = Witness(federation.address, maker(options), name=name, folder=folder, codec=codec)
    made.see()
    return made


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_one_run_serves_clients_of_several_codecs(federation: "Federation", model: str) -> None:
    """Two hold the same chain, one a model as it is; each packs its own way; all are used."""
    local = federation.local(
        Rules(versions=8), strategy="fedavg:steps=5,min_clients=3", model=model,
        codec_up="bf16/fp16", codec_down="fp16",
    )  # fmt: skip
    plain = witness(federation, "plain", 0, "up=fp32,down=fp32")
    twins = [witness(federation, "a", 1), witness(federation, "b", 2, "up=fp16")]
    guests = [federation.guest(c) for c in (plain, *twins)]
    local.ended()
    assert [g.ended().used for g in guests] == [8, 8, 8]
    one, other = ({n: t.held.get(n) for n in range(8)} for t in twins)
    assert one == other
    assert all(seen is not None and len(seen) == 1 for seen in one.values())
    assert [t.wholes for t in twins] == [1, 1]
    assert plain.held[0] == one[0]  # where the chain begins
    assert all(plain.held[n] != one[n] for n in range(1, 8))
    sizes = {(row["client"], row["bytes"]) for row in federation.history("update")}
    down = {row["bytes"] for row in federation.history("started")}
    whole = max(down)
    assert {size / whole for _, size in sizes} == {1.0, 0.5}
    assert down == {whole, whole // 2}
    federation.ledger().check()


def test_a_restarted_server_and_a_killed_client_find_together(federation: "Federation") -> None:
    server = federation.server(
        "--strategy", "fedavg:steps=5,min_clients=2", "--model", "linear",
        "--codec", "up=topk:0.05+ef,down=fp16",
        "--versions", "40", "--lease", "5",
    )  # fmt: skip
    options = ("--data", "digits", "--sleep-per-step", "0.01")
    federation.client("a", *options, "--shard", "0/2")
    victim = federation.client("b", *options, "--shard", "1/2")
    federation.until(lambda: federation.merged() >= 8, 90)
    victim.kill()
    victim = federation.client("b", *options, "--shard", "1/2")
    federation.until(lambda: federation.merged() >= 20, 90)
    server.kill()
    server = federation.server("--versions", "40")
    assert server.data(120)["versions"] == 40
    federation.ledger().check()
    spec = {row["bytes"] for row in federation.history("started")}
    assert len(spec) <= 4  # whole, a difference, or two


def test_clients_judge_the_model_that_they_hold(federation: "Federation") -> None:
    """The server has no data: versions come down in chains to be judged, too."""
    local = federation.local(
        Rules(versions=60), strategy="fedavg:steps=5,min_clients=2,rounds=60", model="linear",
        data="", codec_down="int8", slots={"model": build("linear", load_data("digits").info, 0)},
    )  # fmt: skip
    guests = [federation.guest(witness(federation, name, i)) for i, name in enumerate("ab")]
    local.ended()
    reports = [guest.ended() for guest in guests]
    assert [(r.used, r.reconnections) for r in reports] == [(60, 0)] * 2
    judged = [row["version"] for row in federation.history("evaluated")]
    assert judged
    assert max(row["metrics"]["accuracy"] for row in federation.history("evaluated")) > 0.5


@pytest.mark.long
def test_a_demo_with_few_bytes_reaches_its_target(federation: "Federation") -> None:
    """1 % of each update and a byte a value down: 100 times fewer bytes up; down the model once,
    then about a quarter of it a version, however many of them a client skips."""
    demo = federation.command(
        "demo", "fl-server", "demo", "--codec", "up=topk:0.01+ef,down=int8", "--timeout", "200",
        "--out", str(federation.folder / "out"), "--json",
    )  # fmt: skip
    told = demo.data(240)
    assert told["reached"]
    whole = 4 * 4810  # bytes of the demo's model
    for client in told["clients"]:
        assert client["bytes_up"] < client["updates"] * whole / 100
        assert whole < client["bytes_down"] < whole + told["versions"] * whole * 0.3


def test_a_client_that_asks_for_what_the_run_forbids_is_told_so(federation: "Federation") -> None:
    federation.local(strategy="fedavg:min_clients=2", model="linear", codec_up="bf16")
    code, _, message = federation.client(
        "phone", "--data", "digits", "--codec", "up=fp16"
    ).failure()
    assert code == "FL-W108"
    assert "asks for up=fp16, the run allows bf16 or fp32" in message


def test_one_that_packs_otherwise_than_agreed_has_left_and_the_run_goes_on(
    federation: "Federation", tmp_path: Path
) -> None:
    local = federation.local(
        Rules(versions=6), strategy="fedavg:steps=3,min_clients=1", model="linear", lease=3.0,
        codec_up="bf16/fp16",
    )  # fmt: skip
    raw = federation.raw()
    welcome = raw.hello("liar", capabilities=["fp32", "bf16", "fp16"])
    assert (welcome.up_codec, welcome.down_codec) == ("bf16", "fp32")
    order = raw.hear("order")
    count = order.model.sections[0].count
    section = wire_pb2.Section(group="trainable", codec="fp16", count=count, length=2 * count)
    blob = wire_pb2.Blob(id="u/1", size=2 * count, sections=[section], inline=bytes(2 * count))
    raw.say(
        result=wire_pb2.Result(
            order=order.id, steps=3, examples=30, train_seconds=0.1, final=True, payload=blob
        )
    )
    assert raw.refused() == "FL-W104"
    federation.digits("honest")
    local.ended()
    left = [row for row in federation.history("leave") if row["client"] == "liar"]
    assert len(left) == 1
    assert "packed as 'fp16', expected 'bf16'" in left[0]["reason"]


def test_what_was_finished_before_may_be_packed_as_was_agreed_then(
    federation: "Federation",
) -> None:
    federation.local(strategy="fedavg:steps=3,min_clients=1", model="linear", codec_up="bf16/fp16")
    raw = federation.raw()
    raw.hello("phone", capabilities=["fp32", "bf16"], node="01HZX0000000000000000FRGN0")
    order = raw.hear("order")
    raw.close()
    again = federation.raw()
    again.hello(
        "phone", capabilities=["fp32", "fp16"], holding=[order.id],
        node="01HZX0000000000000000FRGN0",
    )  # fmt: skip
    count = order.model.sections[0].count
    section = wire_pb2.Section(group="trainable", codec="bf16", count=count, length=2 * count)
    blob = wire_pb2.Blob(id="u/1", size=2 * count, sections=[section], inline=bytes(2 * count))
    again.say(
        result=wire_pb2.Result(
            order=order.id, steps=3, examples=30, train_seconds=0.1, final=True, payload=blob
        )
    )
    outcome = again.hear("outcome")
    assert (outcome.update, outcome.fate) == (f"{order.id}.0", wire_pb2.Outcome.USED)
