"""Where a run stands, as its server tells it."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from atoll.protocols import wire_pb2
from atoll.protocols.events import ClientInfo
from atoll.protocols.ids import ulid
from atoll.protocols.messages import Hello
from tests.server.test_workshop import Life

NODE = ulid()


def greeted(life: Life) -> Callable[[], Awaitable[None]]:
    """To come as a client that hears."""

    async def come() -> None:
        info = ClientInfo(1, None, ("fp32",))
        await life.host.reception.greet(Hello(1, "", "c", NODE, info))

    life.join = lambda: None  # type: ignore[method-assign]
    return come


def test_steps_are_those_of_the_order_in_training(tmp_path: Path) -> None:
    """An order just sent had 99 of 94 steps done, those of the one before, and was being sent."""
    life = Life(tmp_path)

    def told() -> tuple[str, Any]:
        clients: Any = life.assembly.status()["clients"]
        return clients[0]["order"], clients[0]["step"]

    def beat(order: str, step: int) -> None:
        heartbeat = wire_pb2.Heartbeat(order=order, step=step)
        life.host.message(life.host.sessions.of["c"], wire_pb2.ClientMessage(heartbeat=heartbeat))

    async def first() -> None:
        await life.until(lambda: life.order() is not None)
        assert told() == (life.order(), 0)
        beat(str(life.order()), 1)
        assert told() == (life.order(), 1)

    async def late() -> None:
        assert told() == (life.order(), 0)
        beat("o0", 1)  # it was on its way
        assert told() == (life.order(), 0)
        beat(str(life.order()), 1 << 60)
        assert told() == (life.order(), 1)

    life.live(greeted(life), first, 1, late)
    life.die()


def test_bytes_are_those_of_the_run_whoever_served_it(tmp_path: Path) -> None:
    """After a restart they began at 0, and were the whole run's again when it was over."""
    life = Life(tmp_path)
    life.live(greeted(life), 3)
    life.die()
    again = Life(tmp_path)
    again.live(greeted(again), 2)
    clients: Any = again.assembly.status()["clients"]
    rows = again.assembly.history.clients["c"]
    again.die()
    assert (clients[0]["updates"], rows.bytes_up) == (5, 5 * 16)
    assert clients[0]["bytes_up"] == rows.bytes_up
    assert clients[0]["bytes_down"] >= rows.bytes_down >= 5 * 16
