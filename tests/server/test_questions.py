"""Questions: clients judge models in the middle of a merge; what is learned outlives a crash."""

import asyncio
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atoll.aggregation.fedavg import FedAvg
from atoll.protocols import messages, wire_pb2
from atoll.protocols.blobs import BlobInfo, Section
from atoll.protocols.codecs import as_bytes, as_tensor
from atoll.protocols.errors import RemoteError
from atoll.protocols.events import ClientInfo
from atoll.protocols.ids import ulid
from atoll.protocols.messages import VALIDATE, Hello, Question, Result
from atoll.server.sessions import Session
from tests.server.test_workshop import BIG, Life

RULE = "fedlaw:no_proxy=validators,mode=lambda"
DELTAS = {"a": -1.0, "b": -2.0, "c": -3.0}  # the models are 1, 2 and 3 everywhere
LOWEST = {"a": 2.5, "b": 3.0, "c": 3.5}  # where each one's loss is lowest

Say = Callable[["Town", str, Question, float, Tensor], wire_pb2.ClientMessage | None]


def honest(
    town: "Town", client: str, question: Question, loss: float, slope: Tensor
) -> wire_pb2.ClientMessage | None:
    return town.answer(question, loss, slope)


def says(**changed: Any) -> Say:
    """An answer in which something is not as it should be."""

    def say(
        town: "Town", client: str, question: Question, loss: float, slope: Tensor
    ) -> wire_pb2.ClientMessage | None:
        message = town.answer(question, loss, changed.get("slope", slope))
        message.result.examples = changed.get("examples", 10)
        if "loss" in changed:
            del message.result.metrics["loss"]
        if "inline" in changed:
            message.result.payload.inline = b""
        return message

    return say


def declines(
    town: "Town", client: str, question: Question, loss: float, slope: Tensor
) -> wire_pb2.ClientMessage | None:
    failure = wire_pb2.Failure(code="FL-D105", message="3 examples", question=question.id)
    return wire_pb2.ClientMessage(failure=failure)


def silent(
    town: "Town", client: str, question: Question, loss: float, slope: Tensor
) -> wire_pb2.ClientMessage | None:
    return None


class Town(Life):
    """A server without its port, and three clients that answer as `say` has it, at once."""

    def __init__(
        self, folder: Path, elements: int = 4, say: Mapping[str, Say] | None = None, **spec: Any
    ) -> None:
        spec = {"aggregator": RULE, "save_every": 100, "evaluate_every": 0, **spec}
        strategy = FedAvg(steps=1, rounds=9, min_clients=3)
        super().__init__(folder, elements, strategy=strategy, **spec)
        self.say = dict.fromkeys(DELTAS, honest) | dict(say or {})
        self.asked: list[tuple[str, bool]] = []  # client, with a gradient?
        self.sessions: dict[str, Session] = {}
        self._talks: list[asyncio.Task[None]] = []
        self.nodes = {name: ulid() for name in DELTAS}

    def join(self) -> None:
        """They come by themselves."""

    async def come(self, *names: str, able: bool = True) -> None:
        for name in names or tuple(DELTAS):
            can = ("fp32", VALIDATE) if able else ("fp32",)
            hello = Hello(1, "", name, self.nodes[name], ClientInfo(10, None, can))
            session = self.sessions[name] = await self.host.reception.greet(hello)
            self._talks.append(asyncio.create_task(self._talk(name, session)))

    async def _talk(self, name: str, session: Session) -> None:
        while (data := await session.next()) is not None:
            message = wire_pb2.ServerMessage.FromString(data)
            if message.WhichOneof("kind") != "question":
                continue
            question = messages.question_from_wire(message.question)
            self.asked.append((name, question.gradient))
            model = self.model(name, question)
            slope = model - LOWEST[name]
            loss = float(0.5 * slope.square().mean())
            told = self.say[name](self, name, question, loss, slope / slope.numel())
            if told is not None:
                self.host.message(session, told)

    def model(self, client: str, question: Question) -> Tensor:
        data = memoryview(question.inline)
        if not question.inline:
            data = self.host.find_blob(client, question.model.id).view
        return as_tensor(data, torch.float32)

    def answer(self, question: Question, loss: float, slope: Tensor) -> wire_pb2.ClientMessage:
        payload, inline = messages.NOTHING, b""
        if question.gradient:
            inline = bytes(as_bytes(slope))
            section = Section("trainable", "fp32", slope.numel(), len(inline))
            payload = BlobInfo("u/q", len(inline), b"", (section,))
        result = Result(
            "", 0, 0, 10, 0.0, payload, {"loss": loss}, inline=inline, question=question.id
        )
        return wire_pb2.ClientMessage(result=messages.result_to_wire(result))

    async def work(self) -> None:
        """All train their order, and a version is made."""
        wanted = self.host.run.published + 1
        await self.trained()
        await self.until(lambda: self.host.run.published == wanted)

    async def trained(self) -> None:
        for name, delta in DELTAS.items():
            await self.until(lambda name=name: self.order(name) is not None)  # type: ignore[misc]
            await self.send(str(self.order(name)), delta, name)

    async def hang_up(self) -> None:
        """The last step of a life: no merge waits for anybody."""
        self.host.workshop.merger.interrupt()
        for talk in self._talks:
            talk.cancel()

    def stats(self, version: int) -> dict[str, float]:
        for row in self.assembly.journal.rows():
            if getattr(row.event, "version", None) == version and hasattr(row.event, "stats"):
                return dict(row.event.stats)
        raise AssertionError(f"version {version} is not in the journal")

    def rows(self, kind: str) -> list[dict[str, Any]]:
        self.assembly._flush()
        rows = map(json.loads, (self.folder / "history.jsonl").read_text().splitlines())
        return [row for row in rows if row["kind"] == kind]


def lived(folder: Path, say: Mapping[str, Say] | None = None, **spec: Any) -> Town:
    """A run of one version, and what is to be looked at."""
    town = Town(folder, say=say, **spec)
    town.live(town.come, town.work, town.hang_up)
    return town


# ---- a merge that asks ---------------------------------------------------------------------------


def test_a_merge_learns_by_what_the_clients_say(tmp_path: Path) -> None:
    town = Town(tmp_path)

    model = 16  # bytes
    traffic = [town.host.outgoing.counted(name) for name in DELTAS]

    async def ordered() -> None:  # two orders and six models
        await town.until(lambda: all(each.down == (2 + 6) * model for each in traffic))

    town.live(town.come, town.work, ordered, town.hang_up)
    for name in DELTAS:
        assert [slope for who, slope in town.asked if who == name] == [True] * 5 + [False]
    told = town.stats(1)
    shares = [told[f"lambda/{update}"] for update in ("o0.0", "o1.0", "o2.0")]
    assert sum(shares) == pytest.approx(1)
    assert shares[0] < shares[1] < shares[2]  # 3 is what their losses want, together
    assert told["validators"] == 3
    assert told["proxy_loss"] < told["proxy_loss_before"]
    moved = sum(share * -delta for share, delta in zip(shares, DELTAS.values(), strict=True))
    assert town.assembly.store.open(1).flat("trainable").tolist() == pytest.approx([moved] * 4)
    assert [each.up for each in traffic] == [(1 + 5) * model] * 3  # the update and five gradients
    assert not town.rows("unjudged")
    assert town.assembly.workshop.uploads.names() == set()
    town.die()


def test_who_does_not_offer_it_is_not_asked_and_the_sizes_are_taken(tmp_path: Path) -> None:
    town = Town(tmp_path)

    async def come() -> None:
        await town.come("a", "b", able=False)
        await town.come("c")

    town.live(come, town.work, town.work, town.hang_up)
    assert town.asked == []
    told = town.stats(1)
    assert [told[f"lambda/o{i}.0"] for i in range(3)] == pytest.approx([1 / 3] * 3)
    assert (told["gamma"], told["guard"], told["validators"]) == (1, 1, 0)
    (row,) = town.rows("unjudged")  # once, not with every merge
    assert "1 of the clients can be asked" in row["reason"]
    town.die()


# ---- who lies, declines or is silent -------------------------------------------------------------

NAN = torch.full((4,), math.nan)


@pytest.mark.parametrize(
    ("say", "code"),
    [
        (says(slope=NAN), "FL-W106"),
        (says(slope=torch.ones(5)), "FL-W104"),
        (says(examples=0), "FL-W101"),
        (says(inline=None), "FL-W104"),
        (declines, "FL-D105"),
    ],
)
def test_an_answer_that_cannot_be_used_costs_its_client_its_say_and_no_more(
    tmp_path: Path, say: Say, code: str
) -> None:
    town = Town(tmp_path, say={"b": say})
    town.live(town.come, town.work, town.work, town.hang_up)
    assert [name for name, _ in town.asked if name == "b"] == ["b"]
    assert town.stats(1)["validators"] == 2
    (row,) = town.rows("not-asked")
    assert row["client"] == "b"
    assert code in row["reason"]
    assert set(town.host.run.members) == set(DELTAS)
    town.die()


def test_one_that_has_no_number_for_a_model_is_asked_in_the_next_merge(tmp_path: Path) -> None:
    town = Town(tmp_path, say={"b": says(loss=None)})
    town.live(town.come, town.work, town.work, town.hang_up)
    assert [name for name, _ in town.asked if name == "b"] == ["b", "b"]
    assert town.stats(2)["validators"] == 2
    assert not town.rows("not-asked")
    town.die()


def test_it_is_asked_again_when_it_comes_anew(tmp_path: Path) -> None:
    town = Town(tmp_path, say={"b": declines})

    async def again() -> None:
        town.say["b"], former = honest, town.sessions["b"]
        await town.come("b")
        town.host.reception.gone(former, "it has another stream")

    town.live(town.come, town.work, again, town.work, town.hang_up)
    assert (town.stats(1)["validators"], town.stats(2)["validators"]) == (2, 3)
    town.die()


def test_a_huge_slope_is_cut_to_the_middle_ones(tmp_path: Path) -> None:
    """It would turn the model towards 1e6, and all weight with it."""
    liar = says(slope=torch.full((4,), 1e6))
    town = lived(tmp_path, say={"a": liar})
    told = town.stats(1)
    assert told["validators"] == 3
    assert told["lambda/o2.0"] > 1 / 3
    town.die()


def test_who_says_it_twice_is_heard_once(tmp_path: Path) -> None:
    def twice(
        town: Town, client: str, question: Question, loss: float, slope: Tensor
    ) -> wire_pb2.ClientMessage | None:
        message = town.answer(question, loss, slope)
        town.host.message(town.sessions[client], message)
        return message

    town = lived(tmp_path, say=dict.fromkeys(DELTAS, twice))
    assert town.stats(1)["validators"] == 3
    assert not town.rows("not-asked")
    town.die()


def test_who_is_silent_is_waited_for_until_the_time_is_up(tmp_path: Path) -> None:
    town = lived(tmp_path, say={"b": silent}, aggregator=f"{RULE},deadline=0.05")
    assert [name for name, _ in town.asked if name == "b"] == ["b"]
    assert town.stats(1)["validators"] == 2
    town.die()


def test_who_hangs_up_is_not(tmp_path: Path) -> None:
    def hangs_up(
        town: Town, client: str, question: Question, loss: float, slope: Tensor
    ) -> wire_pb2.ClientMessage | None:
        town.host.reception.gone(town.sessions[client], "it was killed")
        return None

    town = lived(tmp_path, say={"b": hangs_up})
    assert town.stats(1)["validators"] == 2
    town.die()


def test_who_says_goodbye_is_gone_at_once(tmp_path: Path) -> None:
    def leaves(
        town: Town, client: str, question: Question, loss: float, slope: Tensor
    ) -> wire_pb2.ClientMessage | None:
        return wire_pb2.ClientMessage(goodbye=wire_pb2.Goodbye(reason="enough"))

    town = lived(tmp_path, say={"b": leaves})
    assert town.stats(1)["validators"] == 2
    town.die()


def test_one_that_is_back_is_asked_once_more(tmp_path: Path) -> None:
    lost: list[str] = []

    def stumbles(
        town: Town, client: str, question: Question, loss: float, slope: Tensor
    ) -> wire_pb2.ClientMessage | None:
        if lost:
            return town.answer(question, loss, slope)
        lost.append(client)
        town.host.reception.gone(town.sessions[client], "its connection broke")
        town._talks.append(asyncio.create_task(town.come(client)))
        return None

    town = lived(tmp_path, say={"b": stumbles, "c": declines})
    assert town.stats(1)["validators"] == 2
    assert [name for name, _ in town.asked if name == "b"] == ["b"] * 7
    town.die()


# ---- by the calls for large ones -----------------------------------------------------------------


def test_a_large_model_is_fetched_and_a_large_slope_uploaded(tmp_path: Path) -> None:
    late: list[str] = []

    def uploads(
        town: Town, client: str, question: Question, loss: float, slope: Tensor
    ) -> wire_pb2.ClientMessage | None:
        assert not question.inline
        town._talks.append(asyncio.create_task(upload(town, client, question, loss, slope)))
        return None

    async def upload(
        town: Town, client: str, question: Question, loss: float, slope: Tensor
    ) -> None:
        message, host = town.answer(question, loss, slope), town.host
        if not question.gradient:
            host.message(town.sessions[client], message)
            return
        data = message.result.payload.inline
        message.result.payload.inline = b""
        message.result.payload.sha256 = hashlib.sha256(data).digest()
        result = messages.result_from_wire(message.result)
        assert host.may_upload(client, result) == question.id
        stored = town.stored(question.id, result.payload, data)
        await host.accepted(client, result, stored)
        assert not town.assembly.questions.machine.open or host.may_upload(client, result) is None
        with pytest.raises(RemoteError, match="no blob"):
            host.find_blob("nobody", question.model.id)
        late.append(client)

    town = Town(tmp_path, BIG, dict.fromkeys(DELTAS, uploads))
    town.live(town.come, town.work, town.hang_up)
    assert sorted(set(late)) == sorted(DELTAS)
    assert town.stats(1)["validators"] == 3
    town.die()


def test_half_an_answer_stays_as_long_as_its_question_is_open(tmp_path: Path) -> None:
    """A save frees the bytes of what is not awaited any more."""
    town = Town(tmp_path, BIG, dict.fromkeys(DELTAS, silent))

    async def half() -> None:
        await town.until(lambda: len(town.asked) == 3)
        uploads, name = town.assembly.workshop.uploads, town.assembly.questions._ids["c"]
        uploads.open(name, 4 * BIG)
        uploads.open("q99", 4 * BIG)
        await town.host._saver._once(0)
        assert uploads.unfinished() == {name}

    town.live(town.come, town.trained, half, town.hang_up)
    town.die()


def test_an_answer_that_nobody_waits_for_is_refused(tmp_path: Path) -> None:
    town = lived(tmp_path)
    question = Question("q2", BlobInfo("ask/1", 16, b"", ()), gradient=True)
    result = messages.result_from_wire(town.answer(question, 1.0, torch.ones(4)).result)
    with pytest.raises(RemoteError, match="q2 is closed") as refused:
        town.host.may_upload("a", result)
    assert refused.value.code == "FL-W102"
    stored = town.assembly.workshop.uploads.keep("q2", result.inline)
    asyncio.run(town.host.accepted("a", result, stored))  # it was on its way
    assert town.assembly.workshop.uploads.stored("q2") is None
    town.die()


# ---- a server that dies --------------------------------------------------------------------------


def test_a_version_made_anew_has_the_same_bits_whoever_is_there(tmp_path: Path) -> None:
    town = Town(tmp_path)
    town.live(town.come, town.work, town.work, town.hang_up)
    before = town.hashes()
    assert len(set(before.values())) == 3
    town.die()
    for number in (1, 2):
        shutil.rmtree(tmp_path / "versions" / str(number), ignore_errors=True)
    again = Town(tmp_path)
    assert again.hashes() == before
    assert again.asked == []
    again.die()


def test_and_from_a_snapshot_too(tmp_path: Path) -> None:
    town = Town(tmp_path)
    town.driver.snapshot_every = 1
    town.live(town.come, town.work, town.work, town.hang_up)
    assert town.assembly.journal.last_snapshot() is not None
    before = town.hashes()
    town.die()
    for number in (1, 2):
        shutil.rmtree(tmp_path / "versions" / str(number), ignore_errors=True)
    again = Town(tmp_path)
    assert again.hashes() == before
    again.die()


def test_a_merge_that_was_not_written_down_asks_again(tmp_path: Path) -> None:
    """Nobody is there when it is made again: the members of before are waited for."""
    town = Town(tmp_path, say=dict.fromkeys(DELTAS, silent))

    async def asked() -> None:
        await town.until(lambda: len(town.asked) == 3)

    town.live(town.come, town.trained, asked, town.hang_up)
    assert town.host.run.published == 0
    town.die()
    again = Town(tmp_path)
    again.nodes = town.nodes

    async def waits() -> None:
        await again.until(lambda: again.assembly.questions.machine.open)
        assert again.assembly.questions.machine.panel is None

    async def made() -> None:
        await again.until(lambda: again.host.run.published == 1)

    again.live(waits, again.come, made, again.hang_up)
    assert again.stats(1)["validators"] >= 2
    again.die()


def test_a_merge_that_asks_after_the_server_was_told_to_stop_is_let_go(tmp_path: Path) -> None:
    town = Town(tmp_path)

    async def stopped() -> None:
        town.host.workshop.merger.interrupt()

    async def merged() -> None:
        await town.trained()
        await town.until(lambda: not town.host._tasks)

    town.live(town.come, stopped, merged, town.hang_up)
    assert (town.host.run.published, town.driver.error) == (0, None)
    assert town.asked == []
    town.die()
