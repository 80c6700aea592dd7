"""Where a run stands, as its server tells it."""

from pathlib import Path
from typing import Any

from atoll.protocols import wire_pb2
from atoll.protocols.events import ClientInfo
from atoll.protocols.ids import ulid
from atoll.protocols.messages import Hello
from atoll.server.sessions import Session
from tests.server.test_workshop import Life


def test_steps_are_those_of_the_order_in_training(tmp_path: Path) -> None:
    """An order just sent had 99 of 94 steps done, those of the one before, and was being sent."""
    life = Life(tmp_path)
    session: Session | None = None

    def told() -> tuple[str, Any]:
        clients: Any = life.assembly.status()["clients"]
        return clients[0]["order"], clients[0]["step"]

    def beat(order: str, step: int) -> None:
        assert session is not None
        heartbeat = wire_pb2.Heartbeat(order=order, step=step)
        life.host.message(session, wire_pb2.ClientMessage(heartbeat=heartbeat))

    async def come() -> None:
        nonlocal session
        info = ClientInfo(1, None, ("fp32",))
        session = await life.host.reception.greet(Hello(1, "", "c", ulid(), info))
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

    life.join = lambda: None  # type: ignore[method-assign]
    life.live(come, 1, late)
    life.die()
