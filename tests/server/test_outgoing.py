"""Over a session: an order goes out with its own model, and no NaN comes in."""

import asyncio
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atoll.aggregation.fedbuff import FedBuff
from atoll.protocols import messages, wire_pb2
from atoll.protocols.codecs import as_tensor
from atoll.protocols.errors import RemoteError
from atoll.protocols.events import ClientInfo
from atoll.protocols.ids import ulid
from atoll.protocols.messages import Hello, Order, Result
from atoll.server.sessions import Session
from tests.server.test_workshop import Life


class Line(Life):
    """A server without its port, and sessions as the service gives them."""

    def join(self) -> None:
        """They come by themselves."""

    async def hello(self, name: str, node: str) -> Session:
        return await self.host.reception.greet(
            Hello(1, "", name, node, ClientInfo(10, None, ("fp32",)))
        )

    async def ordered(self, session: Session) -> tuple[Order, list[float]]:
        """The next order, and the model that came with it."""
        async with asyncio.timeout(5):
            while (data := await session.next()) is not None:
                message = wire_pb2.ServerMessage.FromString(data)
                if message.WhichOneof("kind") == "order":
                    order = messages.order_from_wire(message.order)
                    model = as_tensor(memoryview(message.order.model.inline), torch.float32)
                    return order, model.tolist()
        raise AssertionError("the session ended without an order")

    async def answer(self, session: Session, order: Order, value: float) -> None:
        info, data = self.packed(order.id, value)
        result = Result(order.id, 0, 1, 1, 0.1, info, inline=data)
        message = wire_pb2.ClientMessage(result=messages.result_to_wire(result))
        self.host.message(session, message)


def test_an_order_brings_the_model_of_its_own_version(tmp_path: Path) -> None:
    """A slow client's old order, told again at its return, after others were told of newer ones."""
    line = Line(tmp_path, strategy=FedBuff(size=1, steps=1))
    models: dict[tuple[str, int], list[float]] = {}

    async def talk() -> None:
        node = ulid()
        slow, quick = await line.hello("slow", node), await line.hello("quick", ulid())
        first, models["slow", 0] = await line.ordered(slow)
        for version in range(3):
            order, models["quick", version] = await line.ordered(quick)
            assert order.version == version
            await line.answer(quick, order, -1.0)
        await line.until(lambda: line.host.run.published == 3)
        again, models["slow again", 0] = await line.ordered(await line.hello("slow", node))
        assert (again.id, again.version) == (first.id, 0)
        late, models["late", 3] = await line.ordered(await line.hello("late", ulid()))
        assert late.version == 3

    line.live(talk)
    for (_, version), model in models.items():
        assert model == [float(version)] * 4
    assert len(models) == 6
    line.die()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_result_that_is_no_number_is_refused_at_the_door(tmp_path: Path, bad: float) -> None:
    line = Line(tmp_path, strategy=FedBuff(size=1, steps=1))

    async def talk() -> None:
        session = await line.hello("bad", ulid())
        order, _ = await line.ordered(session)
        with pytest.raises(RemoteError) as refused:
            await line.answer(session, order, bad)
        assert refused.value.code == "FL-W106"
        await line.until(lambda: "bad" not in line.host.run.members)

    line.live(talk)
    assert line.host.run.published == 0
    assert line.assembly.workshop.uploads.names() == set()
    assert line.assembly.workshop.infos == {}
    line.die()


def test_what_was_packed_for_a_session_does_not_go_out_over_another(tmp_path: Path) -> None:
    """Its codecs may be others: a client may come back while its order is being written."""
    line = Line(tmp_path, strategy=FedBuff(size=1, steps=1))

    async def talk() -> None:
        node = ulid()
        former = await line.hello("c", node)
        order, _ = await line.ordered(former)
        held = line.host.run.open["c"]
        outgoing = line.host.outgoing
        outgoing.ready("c", held)
        (packed,) = outgoing._orders.values()
        assert packed.session is former
        session = await line.hello("c", node)  # it is told its order as one that comes back
        assert (await line.ordered(session))[0].id == order.id
        assert outgoing._orders == {}
        outgoing.ready("c", held)
        marked = replace(outgoing._orders[held.id], session=former, parts=(b"for another",))
        outgoing._orders[held.id] = marked
        outgoing.order(session, held)
        assert (await line.ordered(session))[0].id == order.id
        outgoing.ready("c", held)
        outgoing.order(None, held)  # it has left meanwhile
        assert outgoing._orders == {}

    line.live(talk)
    line.die()
